"""Combines dpoeng.yaml, options and Python arguments to a typed config; reports all mistakes of a file at once.

A file may contain the fields of both phases; each command reads its own. Precedence: option, then file, then default.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from dpoeng.cache.errors import UserError
from dpoeng.engine.config.fields import COMMANDS, PrecomputeConfig, SweepConfig, TrainConfig, known_fields, unknown
from dpoeng.engine.config.problems import TOGETHER, Entry, as_error, option, unknown_field, value_problems

DEFAULT_FILE = Path("dpoeng.yaml")

Config = TypeVar("Config", bound=PrecomputeConfig | TrainConfig | SweepConfig)
Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Setting:
    """One field of one command: its value, and its origin (`default`, `dpoeng.yaml:3`, `--beta`)."""

    command: str
    name: str
    value: Any
    origin: str


def load_config(cls: type[Config], overrides: Mapping[str, Any], file: Path | None = None) -> Config:
    """Builds a config from a file and the command line's options.

    Args:
        cls: PrecomputeConfig, TrainConfig or SweepConfig.
        overrides: fields that were set explicitly; they take precedence over the file.
        file: a YAML file; None reads ./dpoeng.yaml if it exists.

    Raises:
        UserError: the file cannot be read, a name is unknown, or values are wrong; it lists all of them.
    """
    path = file if file is not None else (DEFAULT_FILE if DEFAULT_FILE.is_file() else None)
    entries = load_yaml(path) if path is not None else {}
    fields = known_fields()
    problems = [
        unknown_field(n, where=f"{path}:{entry.line}", fields=fields) for n, entry in entries.items() if n not in fields
    ]
    config: Config | None = None
    for each in (cls, *(other for other in COMMANDS.values() if other is not cls)):
        values = {name: entry.value for name, entry in entries.items() if name in each.model_fields}
        if each is cls:
            problems += [unknown(cls, n, where=option(n)) for n in overrides if n not in cls.model_fields]
            values.update((name, value) for name, value in overrides.items() if name in cls.model_fields)
        try:
            made = each(**values)
            if isinstance(made, cls):
                config = made
        except ValidationError as error:
            for problem in value_problems(error, overrides if each is cls else {}, entries, path):
                # Report contradictions between fields only for the command that runs: its options may resolve them.
                if problem.where not in {p.where for p in problems} and (each is cls or problem.where != TOGETHER):
                    problems.append(problem)
    if problems:
        lines = {f"{path}:{entry.line}": entry.line for entry in entries.values()}
        raise as_error(sorted(problems, key=lambda p: lines.get(p.where, 0)))
    assert config is not None
    return config


def config_of(cls: type[Model], values: Mapping[str, Any]) -> Model:
    """Builds a config from Python arguments only; reads no file.

    Args:
        cls: one of the configs, PlanConfig too.
        values: fields by name; a path is accepted where text is expected.

    Raises:
        UserError: a name is unknown, or values are wrong; it lists all of them.
    """
    plain = {name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in values.items()}
    try:
        return cls(**plain)
    except ValidationError as error:
        raise as_error(value_problems(error, plain, {}, None)) from error


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
    """The JSON Schema of dpoeng.yaml: pydantic's schemas of both phases in one object."""
    properties: dict[str, Any] = {}
    for command, cls in COMMANDS.items():
        for name, shape in cls.model_json_schema()["properties"].items():
            text = f"{command}: {shape.pop('description', '')}"
            shape.pop("title", None)
            if shape.get("type") == "array":  # also accepts words with commas
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


# --------------------------------------------------------------------------- the file


_MAX_BYTES = 1 << 20


def _text(path: Path) -> str:
    """The text of a configuration file.

    Raises:
        ValueError: it is a pipe or a device, which may never end, or too large for a configuration.
    """
    if path.exists() and not path.is_file() and not path.is_dir():  # for a folder the system's own error is clearer
        raise ValueError("not a regular file; write a pipe's output to a file first")
    with path.open("rb") as file:
        content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise ValueError(f"larger than {_MAX_BYTES >> 20} MiB, the limit for a configuration")
    return content.decode("utf-8-sig")


class _Loader(yaml.SafeLoader):
    """YAML 1.2 numbers: 5e-6 is a number and a date is text. No aliases, because nested ones expand without limit."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuses aliases; otherwise PyYAML's own."""
        if self.check_event(yaml.AliasEvent):
            mark = self.current_event.start_mark
            raise yaml.MarkedYAMLError(
                problem="aliases (*name) are not supported: write the value out", problem_mark=mark
            )
        return super().compose_node(parent, index)


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
# PyYAML's own constructor would read 010 as eight.
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))


def load_yaml(path: Path, text: str | None = None) -> dict[str, Entry]:
    """The mapping in a YAML file, with line numbers. Keys without a value are left out, so they get the default.

    Raises:
        UserError: no such file, not YAML, not a mapping, or a repeated key.
    """
    try:
        text = _text(path) if text is None else text
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
                        f"{name} appears twice in the configuration file",
                        code="config-twice",
                        where=f"{path}:{line}",
                        expected="each field once",
                        found=f"{name} in lines {entries[name].line} and {line}",
                        remedy="remove one of the two",
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
        "cannot read the configuration file" if mapping else "the configuration file is not a set of fields",
        code="config-unreadable",
        where=f"{path}:{line}" if line else str(path),
        expected="YAML: one `field: value` a line",
        found=found,
        remedy="fix the file, or name another with --config; `dpoeng init` writes a commented one",
    )
