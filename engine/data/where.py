"""The filter of `--where`: a small language over a row's columns. Python parses it but never runs it.

`GRAMMAR` has its rules.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from dpoeng.cache.errors import UserError
from dpoeng.engine.data.strict_json import RowFault

MAX_CHARACTERS = 1000

GRAMMAR = """\
  confident                       the column exists and is true
  not confident and margin >= 0.5
  kind in ('qa', 'chat') or topic == "law"
  meta.score != null              a field inside an object, or a column of this name
  `score-chosen` > 8              a column whose name is not a word
  and, or, not, ( ); == != < <= > >=; in, not in a list in ( ); true, false, null.
  A missing column is null. Null is false, equals only null, and every order
  comparison with it is false. Texts that read as numbers are compared as numbers.
"""
"""For help texts: examples with their meaning, and the rules."""

Row = Mapping[str, Any]
Evaluator = Callable[[Row], Any]

_CONSTANTS = {"true": True, "false": False, "null": None}
# Skips quoted texts; replaces a name in backticks with a placeholder word.
_BACKTICKS = re.compile(r"""(?P<text>'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*")|`(?P<name>[^`]+)`""")
_STAND_IN = "dpoeng_quoted_{}"

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
        columns: the columns in it, with their fields.
    """

    text: str
    columns: frozenset[str]
    evaluate: Evaluator

    def missing(self, names: Collection[str]) -> set[str]:
        """Columns that are not in `names`; `meta.score` exists if `meta` does, or a column with that whole name."""
        return {column for column in self.columns if column not in names and column.split(".")[0] not in names}

    def holds(self, row: Row) -> bool:
        """Whether to keep the row.

        Raises:
            RowFault: `filter-type`, values of different types are compared for order.
        """
        return truth(self.evaluate(row))


def parse_condition(text: str) -> Condition:
    """Parses a filter.

    Raises:
        UserError: it does not follow the grammar.
    """
    if len(text) > MAX_CHARACTERS:
        raise _not_understood(text[:60] + "...", f"more than {MAX_CHARACTERS} characters")
    try:
        quoted: dict[str, str] = {}
        tree = ast.parse(_BACKTICKS.sub(lambda match: _stand_in(match, quoted), text.strip()), mode="eval")
        columns: set[str] = set()
        evaluate = _compile(tree.body, columns, quoted)
        if not columns:
            raise ValueError("it names no column, so it has the same result for every row")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise _not_understood(text, error.msg if isinstance(error, SyntaxError) else str(error)) from None
    return Condition(text, frozenset(columns), evaluate)


def truth(value: Any) -> bool:
    """Whether a value counts as true. Texts such as "false", "no" and "0" do not, since files write booleans so."""
    if isinstance(value, str):
        return value.strip().lower() not in _FALSE_WORDS
    return bool(value)


def _not_understood(text: str, problem: str) -> UserError:
    return UserError(
        "the filter cannot be parsed",
        code="data-where",
        where=f"--where {text!r}",
        expected="columns, texts in quotes, numbers, == != < <= > >=, in (...), and, or, not, parentheses",
        found=problem,
        remedy="for example --where 'confident and margin >= 0.5'",
    )


def _stand_in(match: re.Match[str], quoted: dict[str, str]) -> str:
    if match["text"] is not None:
        return match["text"]
    word = _STAND_IN.format(len(quoted))
    quoted[word] = match["name"]
    return word


def _compile(node: ast.expr, columns: set[str], quoted: Mapping[str, str]) -> Evaluator:
    """Compiles a node to a function of the row. Only the node types named here belong to the language."""
    match node:
        case ast.Name(id=name) if name in _CONSTANTS:
            return _constant(_CONSTANTS[name])
        case ast.Name() | ast.Attribute():
            path = _path(node, quoted)
            columns.add(".".join(path))
            return lambda row: _at(row, path)
        case ast.Constant(value=value) if value is None or isinstance(value, str | int | float):
            return _constant(value)
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return _constant(-number)
        case ast.UnaryOp(op=ast.Not(), operand=inner):
            part = _compile(inner, columns, quoted)
            return lambda row: not truth(part(row))
        case ast.BoolOp(op=op, values=values):
            parts = [_compile(_not_constant(value), columns, quoted) for value in values]
            combine = all if isinstance(op, ast.And) else any
            return lambda row: combine(truth(part(row)) for part in parts)
        case ast.Tuple(elts=elements) | ast.List(elts=elements):
            members = [_compile(element, columns, quoted) for element in elements]
            return lambda row: [member(row) for member in members]
        case ast.Compare(left=left, ops=ops, comparators=comparators):
            if not any(isinstance(part, ast.Name | ast.Attribute) for part in ast.walk(node)):
                raise ValueError(f"`{ast.unparse(node)}` is the same for every row")
            sides = [_compile(side, columns, quoted) for side in (left, *comparators)]
            tests = [_comparison(op) for op in ops]
            return lambda row: all(
                test(a(row), b(row)) for test, a, b in zip(tests, sides[:-1], sides[1:], strict=True)
            )
        case ast.BinOp(op=ast.Sub()):
            raise ValueError(f"the language has no subtraction; write a column of this name as `{ast.unparse(node)}`")
    raise ValueError(f"`{ast.unparse(node)}` is not part of the language")


def _not_constant(node: ast.expr) -> ast.expr:
    """A part of `and` or `or`. A constant there is a forgotten comparison, as in `kind == 'a' or 'b'`."""
    if isinstance(node, ast.Constant | ast.Tuple | ast.List) or (isinstance(node, ast.Name) and node.id in _CONSTANTS):
        raise ValueError(f"`{ast.unparse(node)}` is the same for every row: compare it with a column, or use `in`")
    return node


def _path(node: ast.expr, quoted: Mapping[str, str]) -> tuple[str, ...]:
    """`a.b.c` -> its names."""
    match node:
        case ast.Name(id=name) if name not in _CONSTANTS:
            return (quoted.get(name, name),)
        case ast.Attribute(value=inner, attr=name):
            return (*_path(inner, quoted), quoted.get(name, name))
    raise ValueError(f"`{ast.unparse(node)}` is not part of the language")


def _at(row: Row, path: tuple[str, ...]) -> Any:
    """A column with this whole name, dots included, or else a field inside an object."""
    whole = ".".join(path)
    if whole in row or len(path) == 1:
        return row.get(whole)
    value: Any = row.get(path[0])
    for name in path[1:]:
        value = _field(value, name)
    return value


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
    # To Python True == 1, but not to the author of the data.
    if isinstance(a, bool) != isinstance(b, bool):
        return False
    if isinstance(a, str) != isinstance(b, str):
        first, second = _number(a), _number(b)
        return first is not None and first == second
    return bool(a == b)


def _contains(member: Any, container: Any) -> bool:
    if isinstance(container, list):
        return any(_equal(member, item) for item in container)
    return isinstance(container, str) and isinstance(member, str) and member in container


def _number(value: Any) -> float | None:
    """The value as a number, even if it is written as text."""
    if isinstance(value, str):
        try:
            value = float(value) if "_" not in value else None
        except ValueError:
            return None
        return value if value is not None and math.isfinite(value) else None
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _alike(a: Any, b: Any) -> tuple[Any, Any]:
    """Makes two values comparable: as numbers if both are, as texts if neither is.

    Raises:
        RowFault: `filter-type`, only one of them is a number.
    """
    first, second = _number(a), _number(b)
    if first is not None and second is not None:
        return first, second
    if isinstance(a, str) and isinstance(b, str) and first is None and second is None:
        return a, b
    raise RowFault("filter-type", f"the filter compares {a!r:.60} with {b!r:.60}, which has another type")
