"""Explains wrong fields: unknown names, values out of range, and one error for all of them.

Takes the field lists as arguments, so it does not depend on a config.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dpoeng.cache.errors import UserError
from dpoeng.engine.config.other_trainers import meaning, releases, remedy


@dataclass(frozen=True, slots=True)
class Entry:
    """A value in a file, and its line."""

    value: Any
    line: int


@dataclass(frozen=True, slots=True)
class Problem:
    """One wrong field."""

    code: str
    where: str
    message: str
    expected: str | None
    found: str
    remedy: str


def option(name: str) -> str:
    """`lora_r` -> `--lora-r`."""
    return f"--{name.replace('_', '-')}"


# Former fields and values of dpoeng: what to do now. An old dpoeng.yaml gets a clear message.
_REMOVED_FIELDS = {
    "samples": "remove it, and run `dpoeng compare OUT` after training: the report shows its answers",
    "async_save": "remove it: checkpoints are small and are written between two steps",
}
_REMOVED_VALUES = {("attention", "flex"): "FlexAttention was removed: leave it out, auto chooses the fastest exact one"}

# --------------------------------------------------------------------------- what is wrong

TOGETHER = "the combination of fields"


def unknown_field(name: str, *, where: str, fields: Mapping[str, Sequence[str]], command: str | None = None) -> Problem:
    """Explains a name that is not a field here: it belongs to another command or trainer, or is misspelt.

    Args:
        name: the name as the user wrote it.
        where: place in a file, or the option.
        fields: every field of dpoeng and the commands that have it.
        command: the command it was given to; None for a file, which serves all.
    """
    plain = name.strip("-").replace("-", "_")
    commands = fields.get(plain, ())
    if plain in _REMOVED_FIELDS:
        message = f"{plain} is no longer a field of dpoeng"
        return Problem("config-unknown", where, message, "nothing", name, _REMOVED_FIELDS[plain])
    if commands:
        this_command = command or "this command"
        return Problem(
            "config-unknown",
            where,
            f"{plain} is a field of {' and '.join(commands)}, not of {this_command}",
            f"{plain} with dpoeng {commands[0]}",
            name,
            f"pass it to dpoeng {commands[0]}, or write it into dpoeng.yaml, which serves both phases",
        )
    sources = ("trl", "peft", "bitsandbytes")
    known = next((m for source in sources if (m := meaning(plain, source, fields=fields))), None)
    if known is not None:
        taken = releases(plain)
        renamed = f"; renamed {known.renamed[0]} in {known.renamed[1]}" if known.renamed else ""
        return Problem(
            "config-foreign",
            where,
            f"{plain} is not a field of dpoeng",
            known.field or known.instead or f"nothing: {known.needless}",
            f"{plain}, a name of {taken or 'peft or bitsandbytes'}{renamed}",
            remedy(plain, known),
        )
    pool = [n for n, takers in fields.items() if command is None or command in takers]
    near = difflib.get_close_matches(plain, pool, n=3, cutoff=0.6) or difflib.get_close_matches(plain, fields, n=3)
    return Problem(
        "config-unknown",
        where,
        f"unknown field {plain}",
        ("perhaps " + ", ".join(f"{n} ({' and '.join(fields[n])})" for n in near))
        if near
        else "a field that `dpoeng config show` lists",
        name,
        f"write {option(near[0]) if where.startswith('--') else near[0]}, or remove it"
        if near
        else "correct the name, or remove it",
    )


def value_problems(
    error: ValidationError, overrides: Mapping[str, Any], entries: Mapping[str, Entry], path: Path | None
) -> list[Problem]:
    """One problem per field; of a union's alternatives only the first is reported."""
    problems: dict[str, Problem] = {}
    for detail in error.errors(include_url=False):
        name = str(detail["loc"][0]) if detail["loc"] else ""
        if name in problems:
            continue
        if not name:
            where = TOGETHER
        elif name in overrides:
            where = option(name)
        else:
            where = f"{path}:{entries[name].line}" if name in entries else name
        rule = _rule(detail["type"], detail.get("ctx", {}), str(detail["msg"]))
        value = overrides[name] if name in overrides else entries[name].value if name in entries else detail["input"]
        problems[name] = Problem(
            "config-value",
            where,
            f"{name}: {rule}" if name else rule,
            rule.removeprefix("must be ") if name else None,
            _shown(value) if name else ", ".join(sorted(overrides)) or str(path),
            _hint(name, value, str(detail.get("ctx", {}).get("expected", ""))),
        )
    return list(problems.values())


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:100] + "..."


def _rule(kind: str, context: Mapping[str, Any], message: str) -> str:
    """pydantic's error type in plain words."""
    comparisons = {
        "greater_than": f"must be greater than {context.get('gt')}",
        "greater_than_equal": f"must be at least {context.get('ge')}",
        "less_than": f"must be less than {context.get('lt')}",
        "less_than_equal": f"must be at most {context.get('le')}",
        "literal_error": f"must be one of {context.get('expected')}",
        "finite_number": "must be a finite number",
        "tuple_type": "must be a list, or words with commas between them",
        "dict_type": "must be a set of NAME: COLUMN",
        "path_type": "must be a path",
        "string_type": "must be text",
    }
    kinds = {"float": "must be a number", "int": "must be a whole number", "bool": "must be true or false"}
    if "_" in kind and kind.split("_")[0] in kinds:
        return kinds[kind.split("_")[0]]
    return comparisons.get(kind) or message.removeprefix("Value error, ")


_SHARES = {"warmup_ratio", "eval_share", "max_reject_share", "lora_dropout"}

_STEPS = {"warmup_steps", "eval_steps", "save_steps", "logging_steps"}


def _hint(name: str, value: Any, allowed: str) -> str:
    """Guesses the intended value: another unit, another spelling."""
    if gone := _REMOVED_VALUES.get((name, str(value))):
        return gone
    number = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
    if name == "learning_rate" and number is not None and number >= 1:
        return f"rates are small numbers: was {number:g}e-6 meant?"
    if name in _SHARES and number is not None and number > 1:
        return f"a share, not a percentage: {number / 100:g} for {number:g} %" if number <= 100 else "give a share"
    if name in _STEPS and number is not None and 0 < number < 1:
        return "give a number of steps" + (f", or warmup_ratio: {number:g}" if name == "warmup_steps" else "")
    choices = re.findall(r"'([^']+)'", allowed)
    if isinstance(value, bool) and choices:
        return "in YAML a bare yes, no, on or off is true or false; write one of the words" + (
            ", here none" if "none" in choices and not value else ""
        )
    near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
    if near:
        return f"was {near[0]} meant?"
    return "correct the value; --help explains each field" if name else "change one of them"


def as_error(problems: list[Problem]) -> UserError:
    """Combines one or many problems in one exception."""
    first = problems[0]
    if len(problems) == 1:
        message, where, expected, found, mend = first.message, first.where, first.expected, first.found, first.remedy
        if first.code == "config-unknown":
            return UserError(message, code="config-unknown", where=where, expected=expected, found=found, remedy=mend)
        if first.code == "config-foreign":
            return UserError(message, code="config-foreign", where=where, expected=expected, found=found, remedy=mend)
        return UserError(message, code="config-value", where=where, expected=expected, found=found, remedy=mend)
    width = max(len(problem.where) for problem in problems)
    lines = [f"{p.where:<{width}}  {p.message}; {p.remedy}" for p in problems]
    return UserError(
        f"{len(problems)} fields are wrong",
        code="config-several",
        found=("\n" + " " * 12).join(lines),
        remedy="correct each; `dpoeng config show` prints all fields",
    )
