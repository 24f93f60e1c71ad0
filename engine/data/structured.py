"""Parses lists and objects that a file stores as text: JSON, Python's repr, and numpy's repr in pandas' CSV files.

The meaning of a text does not depend on the kind of file. Independent of messages and files.
"""

from __future__ import annotations

import ast
import re
from typing import Any

from dpoeng.engine.data import strict_json
from dpoeng.engine.data.strict_json import RowFault

# Skip Python's string literals as a whole, so that a brace inside a text is never taken for structure.
_LITERAL = r"""(?P<text>[rRuU]?(?:'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"))"""
_REPR = re.compile(
    _LITERAL + r"""|(?P<gap>(?<=[}\]])\s+(?=[{\[]))|(?P<open>array\()|(?P<close>(?:,\s*dtype=[\w<>.]+)?\s*\))""",
    re.DOTALL,
)
_JOINED_TEXTS = re.compile(_LITERAL + r"""\s+(?=['"])|""" + _LITERAL.replace("text", "other"), re.DOTALL)


class Base64(str):
    """Bytes of a table that are not UTF-8, in a JSON form; never a text to train on."""

    __slots__ = ()


def parse_structure(text: str) -> Any:
    """The list or object in a text, or None if it is an ordinary text.

    Raises:
        RowFault: it is JSON that RFC 8259 forbids (a duplicate key, a lone surrogate, ...).
    """
    begin = text.lstrip()[:6]
    if not begin.startswith(("[", "{", "array(")):
        return None
    try:
        value = strict_json.parse(text)
    except RowFault as fault:
        value = _parse_repr(text) if fault.reason == "bad-json" else None
    if not isinstance(value, list | dict):
        return None
    strict_json.check(value)
    return value


def _parse_repr(text: str) -> Any:
    """Parses Python's or numpy's repr; numpy writes no commas between the items of an array."""
    for candidate in (text.strip(), _REPR.sub(_as_python, text.strip())):
        if _joins_texts(candidate):
            return None  # Python would read ['a' 'b'] as one text
        try:
            return ast.literal_eval(candidate)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
    return None


def _as_python(match: re.Match[str]) -> str:
    if match["text"] is not None:
        return match["text"]
    if match["gap"] is not None:
        return ","
    return ""


def _joins_texts(text: str) -> bool:
    return any(match["text"] is not None for match in _JOINED_TEXTS.finditer(text))
