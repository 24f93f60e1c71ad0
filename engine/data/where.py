"""The filter of `--where`: a small language over a row's columns, read by Python's parser, but never run as Python.

    confident                       the column is there and true
    not confident and margin >= 0.5
    negative_type in ('wrong', 'evasive') or instruction_type == "qa"
    meta.score != null              a field inside an object

A missing column is null. Null is false, equals only null, and every order comparison with it is false.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dpoeng.cache.errors import UserError
from dpoeng.engine.data.strict_json import RowFault

MAX_CHARACTERS = 1000

Row = Mapping[str, Any]
Evaluator = Callable[[Row], Any]

_CONSTANTS = {"true": True, "false": False, "null": None}
_FALSE_WORDS = frozenset({"", "0", "false", "no", "none", "null", "nan"})
_ORDER: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


@dataclass(frozen=True, slots=True)
class Condition:
    """A parsed filter.

    Attributes:
        text: as the user wrote it.
        columns: the top-level columns that it names.
    """

    text: str
    columns: frozenset[str]
    evaluate: Evaluator

    def holds(self, row: Row) -> bool:
        """Whether the row is kept.

        Raises:
            RowFault: `filter-type`, where values of different types are put in order.
        """
        return truth(self.evaluate(row))


def parse_condition(text: str) -> Condition:
    """Parse a filter.

    Raises:
        UserError: it is not in the language.
    """
    if len(text) > MAX_CHARACTERS:
        raise _not_understood(text[:60] + "...", f"more than {MAX_CHARACTERS} characters")
    try:
        tree = ast.parse(text.strip(), mode="eval")
        columns: set[str] = set()
        evaluate = _compile(tree.body, columns)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise _not_understood(text, error.msg if isinstance(error, SyntaxError) else str(error)) from None
    return Condition(text, frozenset(columns), evaluate)


def truth(value: Any) -> bool:
    """Whether a value counts as true; texts such as "false", "no" and "0" do not, since files write booleans so."""
    if isinstance(value, str):
        return value.strip().lower() not in _FALSE_WORDS
    return bool(value)


def _not_understood(text: str, problem: str) -> UserError:
    return UserError(
        "the filter is not understood",
        code="data-where",
        where=f"--where {text!r}",
        expected="columns, texts in quotes, numbers, == != < <= > >=, in (...), and, or, not, parentheses",
        found=problem,
        remedy="for example --where 'confident and margin >= 0.5'",
    )


def _compile(node: ast.expr, columns: set[str]) -> Evaluator:
    """One node as a function of the row. Only the kinds of node that are named here are in the language."""
    match node:
        case ast.Name(id=name) if name in _CONSTANTS:
            return _constant(_CONSTANTS[name])
        case ast.Name(id=name):
            columns.add(name)
            return lambda row: row.get(name)
        case ast.Attribute(value=inner, attr=name):
            owner = _compile(inner, columns)
            return lambda row: _field(owner(row), name)
        case ast.Constant(value=value) if value is None or isinstance(value, str | int | float):
            return _constant(value)
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return _constant(-number)
        case ast.UnaryOp(op=ast.Not(), operand=inner):
            part = _compile(inner, columns)
            return lambda row: not truth(part(row))
        case ast.BoolOp(op=op, values=values):
            parts = [_compile(value, columns) for value in values]
            combine = all if isinstance(op, ast.And) else any
            return lambda row: combine(truth(part(row)) for part in parts)
        case ast.Tuple(elts=elements) | ast.List(elts=elements):
            members = [_compile(element, columns) for element in elements]
            return lambda row: [member(row) for member in members]
        case ast.Compare(left=left, ops=ops, comparators=comparators):
            sides = [_compile(side, columns) for side in (left, *comparators)]
            tests = [_comparison(op) for op in ops]
            return lambda row: all(
                test(a(row), b(row)) for test, a, b in zip(tests, sides[:-1], sides[1:], strict=True)
            )
    raise ValueError(f"`{ast.unparse(node)}` is not part of the language")


def _constant(value: Any) -> Evaluator:
    return lambda row: value


def _field(owner: Any, name: str) -> Any:
    return owner.get(name) if isinstance(owner, dict) else None


def _comparison(op: ast.cmpop) -> Callable[[Any, Any], bool]:
    match op:
        case ast.Eq() | ast.Is():
            return _equal
        case ast.NotEq() | ast.IsNot():
            return lambda a, b: not _equal(a, b)
        case ast.In():
            return _contains
        case ast.NotIn():
            return lambda a, b: not _contains(a, b)
    order = _ORDER[type(op)]
    return lambda a, b: a is not None and b is not None and order(*_alike(a, b))


def _equal(a: Any, b: Any) -> bool:
    # Python holds True == 1; the data's author does not.
    return isinstance(a, bool) == isinstance(b, bool) and bool(a == b)


def _contains(member: Any, container: Any) -> bool:
    if isinstance(container, list):
        return any(_equal(member, item) for item in container)
    return isinstance(container, str) and isinstance(member, str) and member in container


def _alike(a: Any, b: Any) -> tuple[Any, Any]:
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (a, b))
    if numbers or (isinstance(a, str) and isinstance(b, str)):
        return a, b
    raise RowFault("filter-type", f"the filter puts {a!r:.60} and {b!r:.60} in order, which are of different types")
