"""Keeps constructions out of messages, help, docstrings and documents that readers stumbled over."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(
    path for top in ("cli", "engine", "kernels", "cache", "bench", "src") for path in (ROOT / top).rglob("*.py")
)
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]

# Pattern -> what to write instead. Add one only if every hit is worth changing.
PLAIN = {
    r"\b(?:go|goes|going|gone) on (?:from|with)\b": "continue",
    r"\bof (?:its|their) own\b": "separate, or its own ...",
    r"\b(?:is|are) told (?:of|that|which)\b": "report, show",
    r"\bnats a token\b": "nats per token",
    r"\banew\b": "again, over",
    r"\blooked at\b": "checked, read",
    r"\bis said to be\b": "is",
    r"\bto be had\b": "available",
    r"\b(?:which|that) is none\b": "say what it is",
}


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Strings and comments of a module, or the lines of a document, with their line numbers."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        yield from enumerate(text.splitlines(), 1)
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def test_words_are_plain() -> None:
    patterns = {re.compile(pattern, re.IGNORECASE): advice for pattern, advice in PLAIN.items()}
    found = [
        f"{path.relative_to(ROOT)}:{line}: {match[0]!r}; write: {advice}"
        for path in [*SOURCES, *DOCUMENTS]
        for line, text in texts(path)
        for pattern, advice in patterns.items()
        if (match := pattern.search(text))
    ]
    assert not found, "\n".join(found)
