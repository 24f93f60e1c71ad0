"""`bench/studies/cache_vs_trl`: what it counts, by hand; and (with TRL) the whole, against what the document says."""

from __future__ import annotations

import io
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

from dpoeng.bench.studies import cache_vs_trl as bench


def test_wrong_values_are_counted() -> None:
    right = [(-1.0, -2.0), (-3.0, -4.0), (-5.0, -6.0)]
    assert bench.differing(right, right) == 0
    assert bench.differing([(-1.0, -2.0001), (-3.0, -4.01), (-5.0, -6.0)], right) == 1
    assert bench.differing([(float("nan"), -2.0), *right[1:]], right) == 1
    assert bench.differing(right[:1], right) == 2
    assert bench.farthest([(-1.0, -2.5), *right[1:]], right) == 0.5


def test_the_flipped_bit_is_that_of_a_number(tmp_path: Path) -> None:
    other, file = tmp_path / "other", tmp_path / "values"
    other.write_bytes(b"nothing")
    file.write_bytes(b"head" + struct.pack("<3f", -1.5, -2.25, -3.0) + b"tail")
    bench.flip_bit([str(other), str(file)], -2.25)
    after = struct.unpack("<3f", file.read_bytes()[4:-4])
    assert (after[0], after[2]) == (-1.5, -3.0)
    assert np.isfinite(after[1])
    assert abs(after[1] + 2.25) > 0.1
    with pytest.raises(SystemExit):
        bench.flip_bit([str(other)], -2.25)


def test_some_pairs_are_cut_and_none_is_rejected() -> None:
    """Otherwise the change of max_length changes nothing, or dpoeng leaves pairs out."""
    rows = [bench._row(i) for i in range(bench.PAIRS + bench.ADDED)]
    longest = [len(row["prompt"]) + max(len(row["chosen"]), len(row["rejected"])) + 1 for row in rows]
    assert 5 < sum(length > 120 for length in longest[: bench.PAIRS]) < bench.PAIRS - 5
    assert max(len(row[side]) + 1 for row in rows for side in ("chosen", "rejected")) < 120
    assert len({tuple(row.values()) for row in rows}) == len(rows)


def test_a_missing_peer_is_an_error_that_says_so(tmp_path: Path) -> None:
    done = CliRunner().invoke(bench.main, ["--peer-python", str(tmp_path / "nowhere")])
    assert done.exit_code == 1
    assert "TRL is not installed" in done.output


def case(change: str, changed: int | None, trl: tuple[int, int], dpoeng: tuple[int, int]) -> dict[str, Any]:
    return {
        "change": change,
        "pairs": 64,
        "changed": changed,
        "trl": {"scored": trl[0], "wrong": trl[1]},
        "dpoeng": {"scored": dpoeng[0], "wrong": dpoeng[1]},
    }


def test_the_table_has_every_figure() -> None:
    record = {
        "trl": "9.9",
        "versions": {"dpoeng": "8.8"},
        "cases": [case("seed", 0, (61, 0), (0, 0)), case("killed", None, (64, 3), (37, 5))],
    }
    shown = io.StringIO()
    Console(width=160, file=shown).print(bench.table(record))
    rows = [line.replace("│", " ").split() for line in shown.getvalue().splitlines()]
    assert ["seed", "0", "of", "64", "61", "0", "0", "0"] in rows
    assert ["killed", "-", "64", "3", "37", "5"] in rows


@pytest.mark.peers
@pytest.mark.timeout(600)
def test_what_the_document_says_is_what_happens() -> None:
    found = {case["change"]: case for case in bench.compare(sys.executable)["cases"]}
    text = (Path(__file__).parents[2] / "docs" / "cache-vs-trl.md").read_text(encoding="utf-8")
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")]
    told = {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in rows}
    for change, case in found.items():
        figures = [str(case[program][name]) for program in ("trl", "dpoeng") for name in ("scored", "wrong")]
        assert told[change][1:5] == figures, change
