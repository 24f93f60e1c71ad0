"""`import dpoeng` is light and shows what it offers; the example notebook runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from dpoeng_testing import pair_rows, write_jsonl

import dpoeng

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "transformers", "pyarrow", "numpy", "pydantic", "rich", "click", "xxhash"}


def test_the_import_is_light() -> None:
    """Microseconds of the import itself, the best of three: another process may hold the machine meanwhile."""
    code = "import sys, dpoeng; dir(dpoeng); dpoeng.train; print(*sys.modules)"
    taken = []
    for _ in range(3):
        command = [sys.executable, "-X", "importtime", "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert not HEAVY & set(done.stdout.split())
        (line,) = (line for line in done.stderr.splitlines() if re.search(r"\|\s*dpoeng$", line))
        taken.append(int(line.split("|")[1]))
    assert min(taken) < 150_000


def test_everything_that_is_offered_is_there() -> None:
    assert set(dpoeng.__all__) <= set(dir(dpoeng))
    for name in dpoeng.__all__:
        assert getattr(dpoeng, name).__doc__, name
    assert dpoeng.__version__ == version("dpoeng")
    with pytest.raises(AttributeError, match="trian"):
        dpoeng.trian  # type: ignore[attr-defined]  # noqa: B018
    assert (ROOT / "src" / "dpoeng" / "py.typed").is_file()


def test_python_m_runs_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "dpoeng", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith(version("dpoeng"))
    helped = subprocess.run([sys.executable, "-m", "dpoeng", "train", "-h"], capture_output=True, text=True, check=True)
    assert helped.stdout.startswith("Usage: dpoeng train [OPTIONS]")


@pytest.mark.slow  # mypy reads all of dpoeng, and torch
def test_type_checkers_know_the_arguments(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    from mypy import api

    (tmp_path / "use.py").write_text(
        "import dpoeng\n"
        "reveal_type(dpoeng.train(beta=0.2, loss_type=['sigmoid', 'sft'], on_metrics=print))\n"
        "dpoeng.train(bta=0.2)\n"
        "dpoeng.precompute_reference('p.jsonl', model='m', max_length='long')\n"
        "dpoeng.trian\n"
    )
    options = [
        "--config-file",
        str(ROOT / "pyproject.toml"),
        "--follow-imports",
        "silent",
        "--cache-dir",
        str(tmp_path),
    ]
    said, _, _ = api.run([*options, str(tmp_path / "use.py")])
    assert "TrainSummary" in said, said
    assert 'Unexpected keyword argument "bta"' in said
    assert 'Argument "max_length"' in said
    assert "trian" in said


def test_the_notebook_runs(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = json.loads((ROOT / "examples" / "notebook.ipynb").read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code), "an output holds somebody's paths"
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "pairs.jsonl", pair_rows(24))
    names: dict[str, Any] = {}
    for cell in code:
        exec("".join(cell["source"]).replace('"sft-model"', repr(str(tiny_model))), names)
    assert names["steps"] == list(range(1, 9))
    assert names["losses"][0] == pytest.approx(0.6931, abs=1e-3)
    assert len(names["margins"]) == 24
    assert names["found"].evaluation.pairs == names["trained"].eval_pairs > 0
