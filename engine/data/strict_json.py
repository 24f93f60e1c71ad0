"""JSON exactly as in RFC 8259: refuses what Python's `json` additionally accepts.

Duplicate keys, `NaN` and `Infinity`, numbers that overflow, lone surrogates, and nesting too deep for later code are
faults of the row that contains them. Independent of files and pairs.
"""

from __future__ import annotations

import json
import math
from typing import Any

MAX_DEPTH = 64


class RowFault(Exception):  # noqa: N818 - a finding about the data, counted and listed, not a failed call
    """The reason why one row cannot be used.

    Args:
        reason: stable short code, e.g. `bad-json`; docs/data.md lists them.
        detail: the exact problem, for the reader of the rejects file.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def parse(text: str, *, is_line: bool = False) -> Any:
    """Parses a JSON text, with a `RowFault` in place of every duplicate key and every non-finite number.

    Positions in a line of a file (`is_line`) are columns: the reader knows the number of the line.

    Leaving faults in place lets a file that is one large array lose single rows: call `check` on each.

    Raises:
        RowFault: `bad-json` or `json-too-deep`, if there is no value at all.
    """
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_constant, parse_float=_float)
    except RecursionError:
        raise RowFault("json-too-deep", f"nested more than {MAX_DEPTH} levels deep") from None
    except json.JSONDecodeError as error:
        place = f"column {error.pos + 1}" if is_line else f"line {error.lineno}, column {error.colno}"
        raise RowFault("bad-json", f"{error.msg} ({place})") from None
    except ValueError as error:  # an integer with more digits than Python converts
        raise RowFault("bad-json", str(error)) from None


def check(value: Any) -> None:
    """Raises the first fault in a parsed value: one left by `parse`, a lone surrogate, or too deep nesting."""
    stack = [(value, 1)]
    while stack:
        item, depth = stack.pop()
        if isinstance(item, RowFault):
            raise item
        if isinstance(item, str):
            _check_text(item)
        elif isinstance(item, dict | list):
            if depth > MAX_DEPTH:
                raise RowFault("json-too-deep", f"nested more than {MAX_DEPTH} levels deep")
            if isinstance(item, dict):
                for key in item:
                    _check_text(key)
            stack.extend((child, depth + 1) for child in (item.values() if isinstance(item, dict) else item))


def as_row(value: Any) -> dict[str, Any] | RowFault:
    """A parsed value as a row, or the fault that prevents it."""
    try:
        check(value)
    except RowFault as fault:
        return fault
    if not isinstance(value, dict):
        return RowFault("not-an-object", f"a row must be a JSON object, this is {json_type(value)}")
    return value


def json_type(value: Any) -> str:
    """The JSON type of a value with its article, for messages."""
    if value is None:
        return "null"
    for types, name in ((bool, "a boolean"), (int | float, "a number"), (str, "a string"), (list, "an array")):
        if isinstance(value, types):
            return name
    return "an object"


def _check_text(text: str) -> None:
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code_point = ord(text[error.start])
        raise RowFault("lone-surrogate", f"U+{code_point:04X} at character {error.start} is half a character") from None


def _object(items: list[tuple[str, Any]]) -> dict[str, Any] | RowFault:
    value = dict(items)
    if len(value) == len(items):
        return value
    seen: set[str] = set()
    repeated = next(key for key, _ in items if key in seen or seen.add(key))  # type: ignore[func-returns-value]
    return RowFault("duplicate-key", f"the key {repeated!r} occurs more than once in one object")


def _constant(name: str) -> RowFault:
    return RowFault("not-finite", f"{name} is not a JSON number")


def _float(digits: str) -> float | RowFault:
    value = float(digits)
    return value if math.isfinite(value) else RowFault("not-finite", f"{digits[:40]} overflows a double")
