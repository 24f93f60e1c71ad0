"""The filter language: what it keeps, what it refuses, and that it runs nothing."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpoeng.cache.errors import UserError
from dpoeng.engine.data.pairs import read_pairs
from dpoeng.engine.data.strict_json import RowFault
from dpoeng.engine.data.where import parse_condition

ROW: dict[str, Any] = {
    "confident": True,
    "margin": 0.5,
    "negative_type": "wrong",
    "empty": "",
    "no": "false",
    "zero": 0,
    "null": "shadowed",
    "meta": {"score": 3, "tags": ["a", "b"]},
}

KEPT = [
    "confident",
    "not no",
    "not zero",
    "not empty",
    "not absent",
    "margin >= 0.5",
    "0 < margin <= 0.5 < 1",
    "margin > -1",
    "confident == true",
    "confident != false",
    "not (confident == 1)",  # a boolean is no number
    "absent == null",
    "absent is null",
    "margin is not null",
    "not (absent > 0 or absent <= 0)",
    "negative_type == 'wrong'",
    'negative_type in ("evasive", "wrong")',
    "negative_type not in ['evasive']",
    "'ron' in negative_type",
    "meta.score == 3",
    "'a' in meta.tags",
    "not meta.absent.deeper",
    "confident and not no or absent",
    " confident\n",
]


@pytest.mark.parametrize("text", KEPT)
def test_condition_holds_and_its_negation_does_not(text: str) -> None:
    assert parse_condition(text).holds(ROW)
    assert not parse_condition(f"not ({text.strip()})").holds(ROW)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "margin.__class__()",
        "[x for x in (1, 2)]",
        "lambda: 1",
        "margin + 1 > 1",
        "meta['score'] == 3",
        "f'{margin}'",
        "confident if margin else no",
        "(a := 1)",
        "{1: 2}",
        "b'x' == margin",
        "1j == margin",
        "~zero",
        "*a",
        "margin >",
        "margin = 1",
        "confident; no",
        "'unclosed",
        "(" * 300 + "a" + ")" * 300,
        "not " * 240 + "a",
        "x" * 1001,
        "a\0b",
    ],
)
def test_what_is_not_in_the_language_is_refused(text: str) -> None:
    if text.startswith("not "):  # deep but allowed: it must merely not crash
        assert parse_condition(text).holds({"a": 1})
        return
    with pytest.raises(UserError) as caught:
        parse_condition(text)
    assert caught.value.code == "data-where"
    assert caught.value.found


def test_values_of_different_types_are_not_put_in_order() -> None:
    for row in ({"margin": "high"}, {"margin": True}, {"margin": [1]}):
        with pytest.raises(RowFault) as caught:
            parse_condition("margin >= 0.5").holds(row)
        assert caught.value.reason == "filter-type"


@given(st.text(max_size=60))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    try:
        condition = parse_condition(text)
    except UserError:
        return
    with suppress(RowFault):
        assert condition.holds({}) in (True, False)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_filter_is_applied_before_anything_else_is_asked_of_a_row(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"instruction": f"i{i}", "chosen": "a", "rejected": "b", "confident": i < 3} for i in range(6)
    ]
    rows.append({"instruction": "x", "chosen": "", "rejected": "b", "confident": False})
    found = read_pairs([write(tmp_path / "a.jsonl", rows)], where="confident")
    assert [pair.prompt for pair in found.pairs] == ["i0", "i1", "i2"]
    assert (found.filtered, found.rejects) == (4, [])


def test_a_filter_by_an_unknown_column_names_the_nearest(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"instruction": "i", "chosen": "a", "rejected": "b", "confident": True}])
    with pytest.raises(UserError, match="did you mean 'confident'") as caught:
        read_pairs([path], where="not confidnt")
    assert caught.value.code == "data-columns"


def test_a_filter_that_keeps_nothing_says_so(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"instruction": "i", "chosen": "a", "rejected": "b", "margin": 1}])
    with pytest.raises(UserError, match="1 row left out by the filter"):
        read_pairs([path], where="margin > 1")
    with pytest.raises(UserError, match="filter-type"):
        read_pairs([path], where="margin > 'x'")
