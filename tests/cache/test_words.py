"""One is one: `1 pair`, not `1 pairs`."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from dpoeng_testing import pair_rows, write_jsonl

from dpoeng.cache.words import counted, number, speed
from dpoeng.cli.main import main


def test_counted() -> None:
    assert [counted(n, "pair") for n in (0, 1, 2, 1000)] == ["0 pairs", "1 pair", "2 pairs", "1,000 pairs"]
    assert [counted(n, "process", "processes") for n in (1, 4)] == ["1 process", "4 processes"]


def test_figures_have_no_powers_of_ten_where_people_have_words() -> None:
    values = {15_040.0: "15,040", 152_504e6: "152,504,000,000", 1234.5: "1,234", 12.345: "12.35", 0.01234567: "0.01235"}
    assert {value: number(value) for value in values} == values
    assert [number(value) for value in (0.0, -0.5, 1.481e-05, 1e-05)] == ["0", "-0.5", "1.481e-5", "1e-5"]
    assert number(math.nan) == "nan"


def test_speeds_below_one_per_second_are_shown_as_seconds_each() -> None:
    assert speed(2, 100, "pairs") == "50 s/pair"
    assert speed(1234, 1, "pairs") == "1,234 pairs/s"
    assert speed(25, 10, "tokens") == "2.5 tokens/s"
    assert speed(0, 3, "pairs") == "0 pairs/s"


def test_a_count_of_one_is_singular(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (row,) = pair_rows(1)
    write_jsonl(tmp_path / "pairs.jsonl", [{**row, "margin": -1}])
    write_jsonl(tmp_path / "twice.jsonl", [row, row, {**row, "confident": False}])

    def said(*words: str) -> str:
        with pytest.raises(SystemExit):
            main(list(words))
        captured = capsys.readouterr()
        return captured.out + captured.err

    assert "1 of 1 row; 1 prompt" in (found := said("check", "pairs.jsonl", "--eval", "pairs.jsonl"))
    assert "1 kind of errors, 1 of warnings" in found
    assert re.search(r"evaluation +1 pair *\n", found)
    found = said("precompute-ref", "twice.jsonl", "--model", str(tiny_model), "--where", "confident")
    assert "1 pair repeated" in found
    assert "1 row by --where" in found
    found = said("train", "--max-steps", "1", "--eval-share", "0")
    assert "on 2 pairs, 1 step" in found
    assert "already complete (1 step)" in said("train", "--max-steps", "1", "--eval-share", "0")
    assert "1 step, complete" in said("report", "out")
