"""Command-line options made from the typed configs, so that a field is described once."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import click
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

Command = TypeVar("Command", bound=Callable[..., Any])


class _KeyValue(click.ParamType[tuple[str, str]]):
    name = "NAME=COLUMN"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        key, separator, text = str(value).partition("=")
        if not separator or not key or not text:
            self.fail(f"{value!r} is not NAME=COLUMN, e.g. chosen=response_a", param, ctx)
        return key, text


class _Words(click.ParamType[tuple[str, ...]]):
    name = "NAME[,NAME...]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        return tuple(word.strip() for word in str(value).split(",") if word.strip())


def config_options(cls: type[BaseModel], *, skip: frozenset[str] = frozenset()) -> Callable[[Command], Command]:
    """Adds an option for every field of a config; one that is not given arrives as None: file or default decide."""

    def decorate(command: Command) -> Command:
        for name, field in reversed(cls.model_fields.items()):
            if name not in skip:
                command = _option(name, field.annotation, field.default, field.description or "")(command)
        return command

    return decorate


def given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were really given on the command line."""
    values = {name: value for name, value in options.items() if value not in (None, ())}
    if "columns" in values:
        values["columns"] = dict(values["columns"])
    return values


def _option(name: str, annotation: Any, default: Any, text: str) -> Callable[[Command], Command]:
    flag = "--" + name.replace("_", "-")
    kind = _bare(annotation)
    shown = _shown_default(default)
    settings: dict[str, Any] = {"default": None, "help": text + (f"  [default: {shown}]" if shown else "")}
    if kind is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", name, **settings)
    if typing.get_origin(kind) is dict:
        return click.option(flag, name, multiple=True, type=_KeyValue(), **settings)
    if typing.get_origin(kind) is tuple:
        return click.option(flag, name, type=_Words(), **settings)
    if typing.get_origin(kind) is Literal:
        return click.option(flag, name, type=click.Choice(typing.get_args(kind)), **settings)
    if kind is Path:
        return click.option(flag, name, type=click.Path(path_type=Path), **settings)
    return click.option(flag, name, type=kind if kind in (int, float) else str, **settings)


def _bare(annotation: Any) -> Any:
    """`X | None` -> X; a union of a flag and names is text."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        kinds = [kind for kind in typing.get_args(annotation) if kind is not type(None)]
        return kinds[0] if len(kinds) == 1 else str
    return annotation


def _shown_default(default: Any) -> str:
    if default is None or default is PydanticUndefined or default in ((), {}):
        return ""
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, tuple):
        return ",".join(map(str, default))
    return str(default)
