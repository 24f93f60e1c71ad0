"""Kept results: found again by their content, whatever a kill has left of the last line."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpoeng.cache.errors import UserError
from dpoeng.engine.runs.kept import Kept, content_key


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


def test_keys_are_of_the_content_alone() -> None:
    assert content_key({"a": 1, "b": 2}, "x") == content_key({"b": 2, "a": 1}, "x")
    others = [content_key(*parts) for parts in (["x"], ["x", ""], ["", "x"], [{"a": 1}, "x"], ["x\ud800"])]
    assert len(set(others)) == 5
