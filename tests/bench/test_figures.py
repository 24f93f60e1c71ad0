"""README and docs say what the recorded results say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dpoeng.bench.figure_text import RESULTS, where
from dpoeng.bench.figures import BLOCKS, documents, rewritten


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_a_document_says_what_the_records_say(path: Path) -> None:
    """After a new record: `python -m dpoeng.bench.figures`."""
    text = path.read_text(encoding="utf-8")
    assert rewritten(text) == text
    assert text.count("<!-- figures: ") == text.count("<!-- end of figures -->")


def test_every_block_is_used() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in documents())
    for name in BLOCKS:
        assert f"<!-- figures: {name} -->" in text


def test_another_record_makes_another_text(tmp_path: Path) -> None:
    """The check can fail: a figure that differs from the record is rewritten."""
    results = shutil.copytree(RESULTS, tmp_path / "results")
    file = results / "sharing-cpu.jsonl"
    record = json.loads(file.read_text().splitlines()[-1])
    record["prompt_share"][0]["training_speedup"] = 7.77
    file.write_text(json.dumps(record) + "\n")
    text = "before\n<!-- figures: sharing -->\nold\n<!-- end of figures -->\nafter\n"
    again = rewritten(text, results)
    assert again.startswith("before\n<!-- figures: sharing -->\n")
    assert again.endswith("\n<!-- end of figures -->\nafter\n")
    assert "7.77 times" in again
    assert "old" not in again
    assert "7.77" not in rewritten(text)
    assert rewritten("no block") == "no block"
    with pytest.raises(KeyError):
        rewritten("<!-- figures: nonsense -->\n<!-- end of figures -->")


def test_different_losses_give_no_ratio(tmp_path: Path) -> None:
    results = shutil.copytree(RESULTS, tmp_path / "results")
    file = results / "compare-cpu.jsonl"
    record = json.loads(file.read_text().splitlines()[0])
    record["settings"]["batch_size"] = 77
    file.write_text(json.dumps(record) + "\n")
    assert "77 pairs" in BLOCKS["compare"](results)
    record["equality"]["ok"] = False
    file.write_text(json.dumps(record) + "\n")
    assert "77 pairs" not in BLOCKS["compare"](results)


def test_a_record_names_the_state_of_its_tree_and_machine() -> None:
    record = json.loads((RESULTS / "kernels-cpu.jsonl").read_text().splitlines()[0])
    assert record["commit"].endswith("+")
    for words in ("with uncommitted changes", f"load {record['machine']['load']:g} at the start", "triton 3.9.0"):
        assert words in where(record)
    assert "uncommitted" not in where({**record, "commit": "0123456789ab"})
