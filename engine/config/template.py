"""Writes a dpoeng.yaml with comments: every field, or only those with a value."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dpoeng.cache.errors import UserError
from dpoeng.engine.config.fields import COMMANDS, SECTIONS
from dpoeng.engine.runtime.outputs import Kind, writing

WIDTH = 100


@dataclass(frozen=True, slots=True)
class Line:
    """A value for the file, and the comments above it."""

    value: Any
    comments: tuple[str, ...] = ()


def config_text(values: Mapping[str, Line], *, header: Sequence[str] = (), every_field: bool) -> str:
    """The text of a configuration file.

    Args:
        values: fields with a value.
        header: comment lines at the top; an empty string separates them.
        every_field: also write the other fields, as comments with description and default.
    """
    lines = [line for text in header for line in _comment(text)]
    written: set[str] = set()
    for command, cls in COMMANDS.items():
        title = f"phase {'one' if command == 'precompute-ref' else 'two'}, dpoeng {command}"
        for heading, names in sections(command):
            block: list[str] = []
            for name in names:
                if name in written:
                    continue  # write a field of both phases once, under phase one
                if name in values:
                    described = [cls.model_fields[name].description or ""] if every_field else []
                    block += [c for text in (*described, *values[name].comments) for c in _comment(text)]
                    block.append(yaml_line(name, values[name].value))
                elif every_field:
                    default = cls.model_fields[name].default
                    block += _comment(cls.model_fields[name].description or "")
                    block.append("# " + (f"{name}:" if default is None else yaml_line(name, default)))
                else:
                    continue
                written.add(name)
                if every_field:
                    block.append("")
            if block:
                lines += ["", f"# ---- {heading} ({title})", *([""] if every_field else []), *block]
    return "\n".join(lines).strip("\n") + "\n"


def sections(command: str) -> list[tuple[str, list[str]]]:
    """The fields of a command, under their headings."""
    found: list[tuple[str, list[str]]] = []
    for name in COMMANDS[command].model_fields:
        if name in SECTIONS[command]:
            found.append((SECTIONS[command][name], []))
        found[-1][1].append(name)
    return found


def yaml_line(name: str, value: Any) -> str:
    """`name: value`, as YAML reads it back."""
    text = yaml.safe_dump(plain(value), allow_unicode=True, width=10**6, default_flow_style=True)
    return f"{name}: {text.removesuffix(chr(10)).removesuffix('...').rstrip()}"


def plain(value: Any) -> Any:
    """Paths as text and tuples as lists, since YAML and JSON have neither."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    return value


def write_config(path: Path, text: str, *, inputs: Iterable[Path] = (), force: bool) -> None:
    """Writes the file atomically; replaces another only with `force`, and never one of `inputs`.

    Raises:
        UserError: the file exists, is an input, or cannot be written.
    """
    if path.exists() and not force:
        raise UserError(
            f"{path} already exists",
            code="config-exists",
            where=str(path),
            expected="a name that is free",
            found="a file" if path.is_file() else "a folder",
            remedy="name another with --output, or overwrite it with --force",
        )
    with writing(path, _CONFIG, inputs=inputs, force=force) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _unwritable(path: Path, name: str, found: str) -> UserError:
    return UserError(
        f"{name} cannot be written",
        code="config-unwritable",
        where=str(path),
        found=found,
        remedy="name a file in an existing, writable folder with --output",
    )


_CONFIG = Kind("the configuration file", unwritable=_unwritable)


def _comment(text: str) -> Iterable[str]:
    indent = "  " if text.startswith("- ") else ""
    return [f"# {line}" for line in textwrap.wrap(text, WIDTH, subsequent_indent=indent)] if text else ["#"]
