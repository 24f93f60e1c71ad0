"""dpoeng.yaml, options and Python arguments to a typed config; every mistake of a file is reported at once.

A file may hold the fields of both phases; each command takes its own. Precedence: option, then file, then default.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from dpoeng.cache.errors import UserError
from dpoeng.engine.config import PrecomputeConfig, SweepConfig, TrainConfig
from dpoeng.engine.foreign_names import COMMANDS, known_fields, meaning, releases, remedy

DEFAULT_FILE = Path("dpoeng.yaml")

Config = TypeVar("Config", bound=PrecomputeConfig | TrainConfig | SweepConfig)


@dataclass(frozen=True, slots=True)
class Entry:
    """A value in a file, and the line where it stands."""

    value: Any
    line: int


@dataclass(frozen=True, slots=True)
class Setting:
    """One field of one command: its value, and where that comes from (`default`, `dpoeng.yaml:3`, `--beta`)."""

    command: str
    name: str
    value: Any
    origin: str


@dataclass(frozen=True, slots=True)
class Problem:
    """One wrong field."""

    code: str
    where: str
    message: str
    expected: str | None
    found: str
    remedy: str


def load_config(cls: type[Config], overrides: Mapping[str, Any], file: Path | None = None) -> Config:
    """Builds a config from a file and what was given on the command line.

    Args:
        cls: PrecomputeConfig, TrainConfig or SweepConfig.
        overrides: fields that were given explicitly; they win over the file.
        file: a YAML file; None reads ./dpoeng.yaml if it is there.

    Raises:
        UserError: the file cannot be read, a name is unknown, or values are wrong; it lists all of them.
    """
    path = file if file is not None else (DEFAULT_FILE if DEFAULT_FILE.is_file() else None)
    entries = load_yaml(path) if path is not None else {}
    fields = known_fields()
    problems = [unknown_field(n, where=f"{path}:{entry.line}") for n, entry in entries.items() if n not in fields]
    config: Config | None = None
    for each in (cls, *(other for other in COMMANDS.values() if other is not cls)):
        values = {name: entry.value for name, entry in entries.items() if name in each.model_fields}
        if each is cls:
            problems += [unknown_field(n, where=option(n), command=cls) for n in overrides if n not in cls.model_fields]
            values.update((name, value) for name, value in overrides.items() if name in cls.model_fields)
        try:
            made = each(**values)
            if isinstance(made, cls):
                config = made
        except ValidationError as error:
            for problem in value_problems(error, overrides if each is cls else {}, entries, path):
                # Contradictions between fields are those of the command that is run: its options may resolve them.
                if problem.where not in {p.where for p in problems} and (each is cls or problem.where != _TOGETHER):
                    problems.append(problem)
    if problems:
        lines = {f"{path}:{entry.line}": entry.line for entry in entries.values()}
        raise as_error(sorted(problems, key=lambda p: lines.get(p.where, 0)))
    assert config is not None
    return config


def resolve(overrides: Mapping[str, Any], file: Path | None = None) -> list[Setting]:
    """Every field of both phases with its value and origin.

    Raises:
        UserError: as `load_config`.
    """
    path = file if file is not None else (DEFAULT_FILE if DEFAULT_FILE.is_file() else None)
    entries = load_yaml(path) if path is not None else {}
    settings = []
    for command, cls in COMMANDS.items():
        own = {name: value for name, value in overrides.items() if name in cls.model_fields}
        config = load_config(cls, own, file)
        for name in cls.model_fields:
            line = f"{path}:{entries[name].line}" if name in entries else "default"
            settings.append(Setting(command, name, getattr(config, name), option(name) if name in own else line))
    return settings


def config_schema() -> dict[str, Any]:
    """The JSON Schema of dpoeng.yaml: pydantic's of both phases, in one object."""
    properties: dict[str, Any] = {}
    for command, cls in COMMANDS.items():
        for name, shape in cls.model_json_schema()["properties"].items():
            text = f"{command}: {shape.pop('description', '')}"
            shape.pop("title", None)
            if shape.get("type") == "array":  # words with commas are a list too
                shape = {"anyOf": [{k: v for k, v in shape.items() if k != "default"}, {"type": "string"}]}
            if name in properties:
                properties[name]["description"] += "\n" + text
            else:
                properties[name] = {**shape, "description": text}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "dpoeng.yaml",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }


def option(name: str) -> str:
    """`lora_r` -> `--lora-r`."""
    return f"--{name.replace('_', '-')}"


# --------------------------------------------------------------------------- the file


class _Loader(yaml.SafeLoader):
    """YAML 1.2's idea of a number: 5e-6 is one, and a date is text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":int", ":float"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?[0-9]+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"),
    list("-+.0123456789"),
)
# PyYAML's own constructor reads 010 as eight.
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))


def load_yaml(path: Path, text: str | None = None) -> dict[str, Entry]:
    """The mapping in a YAML file, with line numbers. A key without a value is left out: it means the default.

    Raises:
        UserError: no such file, no YAML, no mapping, or a key that stands twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig") if text is None else text
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            entries: dict[str, Entry] = {}
            if node is not None and not isinstance(node, yaml.MappingNode):
                raise _unreadable(path, "a list" if isinstance(node, yaml.SequenceNode) else "one value", mapping=False)
            for key, value in node.value if node is not None else ():
                name, line = str(loader.construct_object(key, deep=True)), key.start_mark.line + 1
                if name in entries:
                    raise UserError(
                        f"{name} stands twice in the configuration file",
                        code="config-twice",
                        where=f"{path}:{line}",
                        expected="each field once",
                        found=f"{name} in lines {entries[name].line} and {line}",
                        remedy="take one of the two out",
                    )
                entries[name] = Entry(loader.construct_object(value, deep=True), line)
        finally:
            loader.dispose()
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError, RecursionError, TypeError) as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None)
        reason = f"{problem}, column {mark.column + 1}" if mark is not None and problem else str(error)
        raise _unreadable(path, reason, line=mark.line + 1 if mark is not None else None) from error
    return {name: entry for name, entry in entries.items() if entry.value is not None}


def _unreadable(path: Path, found: str, *, line: int | None = None, mapping: bool = True) -> UserError:
    return UserError(
        "the configuration file cannot be read" if mapping else "the configuration file is not a set of fields",
        code="config-unreadable",
        where=f"{path}:{line}" if line else str(path),
        expected="YAML: one `field: value` a line",
        found=found,
        remedy="mend the file, or name another with --config; `dpoeng init` writes one with comments",
    )


# --------------------------------------------------------------------------- what is wrong

_TOGETHER = "the combination of fields"


def unknown_field(name: str, *, where: str, command: type[Any] | None = None) -> Problem:
    """The problem of a name that is no field: one of the other phase, of another trainer, or misspelt."""
    plain = name.strip("-").replace("-", "_")
    fields = known_fields()
    commands = fields.get(plain, [])
    if commands:
        own = next((c for c, cls in COMMANDS.items() if cls is command), "this command")
        return Problem(
            "config-unknown",
            where,
            f"{plain} is a field of {' and '.join(commands)}, not of {own}",
            f"{plain} with dpoeng {commands[0]}",
            name,
            f"give it to dpoeng {commands[0]}, or write it into dpoeng.yaml, which serves both phases",
        )
    known = next((m for m in (meaning(plain), meaning(plain, "peft"), meaning(plain, "bitsandbytes")) if m), None)
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
    pool = [n for n, takers in fields.items() if command is None or any(COMMANDS[t] is command for t in takers)]
    near = difflib.get_close_matches(plain, pool, n=3, cutoff=0.6) or difflib.get_close_matches(plain, fields, n=3)
    return Problem(
        "config-unknown",
        where,
        f"there is no field {plain}",
        ("perhaps " + ", ".join(f"{n} ({' and '.join(fields[n])})" for n in near))
        if near
        else "a field that `dpoeng config show` lists",
        name,
        f"write {option(near[0]) if where.startswith('--') else near[0]}, or take it out"
        if near
        else "correct the name, or take it out",
    )


def value_problems(
    error: ValidationError, overrides: Mapping[str, Any], entries: Mapping[str, Entry], path: Path | None
) -> list[Problem]:
    """One problem a field; of a union's alternatives the first speaks for all."""
    problems: dict[str, Problem] = {}
    for detail in error.errors(include_url=False):
        name = str(detail["loc"][0]) if detail["loc"] else ""
        if name in problems:
            continue
        if not name:
            where = _TOGETHER
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
    """What was probably meant: another unit, another spelling."""
    number = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
    if name == "learning_rate" and number is not None and number >= 1:
        return f"rates are small numbers: was {number:g}e-6 meant?"
    if name in _SHARES and number is not None and number > 1:
        return f"it is a share, not per cent: {number / 100:g} for {number:g} %" if number <= 100 else "give a share"
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
    return "correct the value; --help tells what each field means" if name else "change one of them"


def as_error(problems: list[Problem]) -> UserError:
    """One exception for one or many problems."""
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
        remedy="correct each of them; `dpoeng config show` prints all fields",
    )
