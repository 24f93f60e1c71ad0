"""Kept results: found again by their content, whatever a kill has left of the last line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from dpoeng.cache.errors import UserError
from dpoeng.engine.recipes.rounds.answers import are_answers
from dpoeng.engine.recipes.rounds.judges import is_reply
from dpoeng.engine.runs.kept import Kept, content_key
from dpoeng.engine.runs.metrics import append_line


def test_stored_values_are_read_again_and_torn_lines_are_not(tmp_path: Path) -> None:
    file = tmp_path / "new" / "kept.jsonl"
    kept = Kept(file)
    assert kept.get("a") is None
    kept.put("a", {"reply": "é\n"})
    kept.put("b", 2)
    whole = file.read_bytes()
    for cut in range(len(whole) + 1):
        file.write_bytes(whole[:cut])
        again = Kept(file)
        assert (again.get("a") is not None) == (cut >= whole.index(b"\n") + 1)
        again.put("b", 2)
        again.put("a", {"reply": "é\n"})
        assert (Kept(file).get("a"), Kept(file).get("b")) == ({"reply": "é\n"}, 2)


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "kept.jsonl").write_text('{"key": "a", "value": 1}\nnonsense\n{"key": "b", "value": 2}\n')
    with pytest.raises(UserError, match=r"kept.jsonl:2"):
        Kept(tmp_path / "kept.jsonl")


def test_a_value_of_another_kind_is_named(tmp_path: Path) -> None:
    (tmp_path / "kept.jsonl").write_text('{"key": "a", "value": "x"}\n{"key": "b", "value": 2}\n')
    with pytest.raises(UserError, match=r"kept.jsonl:2"):
        Kept(tmp_path / "kept.jsonl", lambda value: isinstance(value, str))


def test_nothing_is_written_through_a_link_or_into_a_pipe(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text('{"key": "a", "value": 1}\n{"key"')
    (tmp_path / "kept.jsonl").symlink_to("outside")
    os.mkfifo(tmp_path / "pipe")
    for act in (
        lambda: Kept(tmp_path / "kept.jsonl"),
        lambda: append_line(tmp_path / "kept.jsonl", {}),
        lambda: Kept(tmp_path / "pipe").put("b", 2),
    ):
        with pytest.raises((UserError, OSError)) as caught:
            act()
        assert getattr(caught.value, "code", "") in ("output-unwritable", "")
    assert (tmp_path / "outside").read_text() == '{"key": "a", "value": 1}\n{"key"'


@pytest.mark.parametrize(
    ("value", "fits"),
    [
        ({"reply": "A", "from": "x"}, True),
        ({"score": 0.5}, True),
        ({"score": True}, False),
        ({"score": 10**400}, False),
        ({"score": float("nan")}, False),
        ({"score": [1]}, False),
        ({"reply": None}, False),
        ("reply", False),
        (None, False),
    ],
)
def test_replies_of_judges(value: Any, fits: bool) -> None:
    assert is_reply(value) == fits


@pytest.mark.parametrize(
    ("value", "fits"),
    [
        ([{"text": "a", "ended": True, "tokens": 1}], True),
        ([{"text": "a", "ended": True}], False),
        ([{"text": "a", "ended": 1, "tokens": 1}], False),
        ([{"text": 5, "ended": True, "tokens": 1}], False),
        ([{"text": "a", "ended": True, "tokens": "1"}], False),
        ([], False),
        (["a"], False),
        (7, False),
    ],
)
def test_answers_of_policies(value: Any, fits: bool) -> None:
    assert are_answers(value, "tokens") == fits
    assert are_answers([{"text": "a", "ended": False}])


def test_keys_are_of_the_content_alone() -> None:
    assert content_key({"a": 1, "b": 2}, "x") == content_key({"b": 2, "a": 1}, "x")
    others = [content_key(*parts) for parts in (["x"], ["x", ""], ["", "x"], [{"a": 1}, "x"], ["x\ud800"])]
    assert len(set(others)) == 5
