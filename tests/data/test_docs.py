"""docs/data.md says what is true: its examples are read, its filters parsed, its reasons are all there are."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

from dpoeng.engine.data.pairs import read_pairs
from dpoeng.engine.data.rejects import REASONS
from dpoeng.engine.data.where import parse_condition

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
DATA = ROOT / "engine" / "data"
MODULES = (
    *("strict_json", "readers", "tables", "where", "messages", "prompts", "shapes"),
    *("kinds/ranked", "rendering", "proof", "chat", "encoding", "tokenization"),
)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def test_every_example_is_read_without_a_reject(tmp_path: Path) -> None:
    examples = blocks("jsonl")
    assert len(examples) == 8
    for example in examples:
        path = tmp_path / "pairs.jsonl"
        path.write_text(example, encoding="utf-8")
        found = read_pairs([path])
        assert found.rejects == []
        assert len(found.pairs) == example.count("\n")
        assert not set(found.pairs[0].extra) & {"prompt", "chosen", "rejected"}


def test_every_filter_is_in_the_language() -> None:
    (filters,) = blocks("where")
    row = json.loads(
        '{"confident": false, "margin": 0.5, "negative_type": "wrong", "meta": {"score": 3}, '
        '"score-chosen": "10.0", "score-rejected": "9.0"}'
    )
    kept = [parse_condition(line).holds(row) for line in filters.splitlines()]
    assert kept == [False, True, True, True, False, True]


def test_every_reason_is_explained_and_none_is_invented() -> None:
    section = TEXT.split("## Rejects")[1].split("## Tokens")[0]
    explained = {
        code
        for line in section.splitlines()
        if line.startswith("| `")
        for code in re.findall(r"`([a-z0-9-]+)`", line.split("|")[1])
    }
    assert set(REASONS) == explained
    assert explained == {reason for module in MODULES for reason in reasons_raised(DATA / f"{module}.py")}


def reasons_raised(module: Path) -> set[str]:
    """The texts in the first argument of every `RowFault(...)` of a module."""
    calls = [node for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    firsts = [call.args[0] for call in calls if isinstance(call.func, ast.Name) and call.func.id == "RowFault"]
    constants = [node.value for first in firsts for node in ast.walk(first) if isinstance(node, ast.Constant)]
    return {value for value in constants if isinstance(value, str)}


def test_limits_are_as_written() -> None:
    from dpoeng.engine.data import readers, strict_json

    assert f"up to {readers.MAX_DOCUMENT_BYTES >> 20} MiB" in TEXT
    assert f"above {readers.MAX_LINE_BYTES >> 20} MiB" in " ".join(TEXT.split())
    assert f"more than {strict_json.MAX_DEPTH} levels" in TEXT
