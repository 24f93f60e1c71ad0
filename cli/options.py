"""Command-line options made from the typed configs, so that a field is described once."""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from dpoeng.engine.config.fields import COMMANDS, bare_type
from dpoeng.engine.config.fields import unknown as unknown_field
from dpoeng.engine.config.problems import as_error
from dpoeng.engine.config.template import sections

Command = TypeVar("Command", bound=Callable[..., Any])

force_option = click.option("--force", is_flag=True, help="Replace another file; never one that is read, or of a run.")
"""For commands that write a file the user names."""


if TYPE_CHECKING:
    _PairType = click.ParamType[tuple[str, str]]
    _WordsType = click.ParamType[tuple[str, ...]]
else:
    _PairType = _WordsType = click.ParamType  # takes no type parameter before click 8.4


class _KeyValue(_PairType):
    def __init__(self, name: str, example: str, *, may_be_empty: bool = False) -> None:
        self.name, self.example, self.may_be_empty = name, example, may_be_empty

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        key, separator, text = str(value).partition("=")
        if not separator or not key or not (text or self.may_be_empty):
            self.fail(f"{value!r} is not {self.name}, e.g. {self.example}", param, ctx)
        return key, text


_KEY_VALUES = {
    "columns": _KeyValue("NAME=COLUMN", "chosen=response_a", may_be_empty=True),
    "vary": _KeyValue("FIELD=VALUE[,VALUE...]", "beta=0.05,0.1,0.3"),
}


class _Words(_WordsType):
    name = "NAME[,NAME...]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        return tuple(word.strip() for word in str(value).split(",") if word.strip())


class ConfigCommand(click.Command):
    """A command whose options are the fields of a config: grouped in `--help`, and unknown ones are explained.

    `--learning_rate` is `--learning-rate`, as users of transformers write it.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Explain an unknown option: another phase or another trainer may have it."""
        given = list(args)
        try:
            return super().parse_args(ctx, [_as_option(word) for word in args])
        except click.NoSuchOption as error:
            known = {o for p in self.params for o in (*p.opts, *p.secondary_opts)} | set(ctx.help_option_names)
            words = [w.split("=")[0] for w in given if w.startswith("--") and len(w) > 2]
            unknown = [w for w in words if w.replace("_", "-") not in known] or [error.option_name]
            cls = COMMANDS.get(self.name or "")
            problems = [unknown_field(cls, word, where=word) for word in dict.fromkeys(unknown)]
            raise as_error(problems) from error

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The options under the headings of their fields."""
        taken = {parameter.name for parameter in self.params}
        commands = [name for name, cls in COMMANDS.items() if taken & cls.model_fields.keys()]
        commands.sort(key=lambda name: name != self.name)  # a field of several stands where its own command has it
        headings: dict[str, str] = {}
        for command in commands:
            for heading, names in sections(command):
                headings.update((name, heading) for name in names if name not in headings)
        groups: dict[str, list[tuple[str, str]]] = {heading: [] for heading in headings.values()}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                groups.setdefault(headings.get(parameter.name or "", "Other"), []).append(record)
        for heading, records in groups.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)


def _as_option(word: str) -> str:
    """`--learning_rate=1e-5` -> `--learning-rate=1e-5`; what is no option is left alone."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else word


def config_options(cls: type[BaseModel], *, skip: frozenset[str] = frozenset()) -> Callable[[Command], Command]:
    """Add an option for every field of a config. It arrives as None if it is not given: file or default decide."""

    def decorate(command: Command) -> Command:
        for name, field in reversed(cls.model_fields.items()):
            if name not in skip:
                command = _option(name, field.annotation, field.default, field.description or "")(command)
        return command

    return decorate


def given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were really given on the command line."""
    values = {name: value for name, value in options.items() if value not in (None, ())}
    for name in _KEY_VALUES.keys() & values.keys():
        keys = [key for key, _ in values[name]]
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise click.UsageError(f"--{name} {twice} is given twice; all of its values belong into one")
        values[name] = dict(values[name])
    return values


def as_words(values: Mapping[str, Any]) -> list[str]:
    """Options as typed words, for another command with the same fields."""
    words: list[str] = []
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, Mapping):
            words += [word for key, text in value.items() for word in (flag, f"{key}={text}")]
        else:
            words += [flag, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return words


def _option(name: str, annotation: Any, default: Any, text: str) -> Callable[[Command], Command]:
    flag = "--" + name.replace("_", "-")
    kind = bare_type(annotation)
    if typing.get_origin(kind) is typing.Annotated:
        kind = typing.get_args(kind)[0]
    shown = _shown_default(default)
    settings: dict[str, Any] = {"default": None, "help": text + (f"  [default: {shown}]" if shown else "")}
    if kind is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", name, **settings)
    if typing.get_origin(kind) is dict:
        return click.option(flag, name, multiple=True, type=_KEY_VALUES[name], **settings)
    if typing.get_origin(kind) is tuple:
        return click.option(flag, name, type=_Words(), **settings)
    if typing.get_origin(kind) is Literal:
        return click.option(flag, name, type=click.Choice(typing.get_args(kind)), **settings)
    if kind is Path:
        return click.option(flag, name, type=click.Path(path_type=Path), **settings)
    return click.option(flag, name, type=kind if kind in (int, float) else str, **settings)


def _shown_default(default: Any) -> str:
    if default is None or default is PydanticUndefined or default in ((), {}):
        return ""
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, tuple):
        return ",".join(map(str, default))
    return str(default)
