"""Builds command-line options from the typed configs, so that a field is described only once.

Also decides how help shows them: the usual options, a field's values, and shell completion.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click
from click.shell_completion import CompletionItem
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from dpoeng.engine.config.fields import COMMANDS, bare_type
from dpoeng.engine.config.fields import unknown as unknown_field
from dpoeng.engine.config.problems import as_error
from dpoeng.engine.config.template import sections

Command = TypeVar("Command", bound=Callable[..., Any])

force_option = click.option("--force", is_flag=True, help="Replace another file; never an input or a run's file.")
"""For commands that write a file that the user names."""

# The fields that `--help` shows for commands with more than a page of options; `--help-all` shows all.
_USUAL_TRAIN = (
    "cache eval_view eval_share output_dir adapter_mode use_peft lora_r lora_target_modules loss_type beta "
    "learning_rate num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps report_to "
    "eval_steps load_best_model_at_end resume fsdp"
)
_USUAL = {
    "precompute-ref": "model adapter tokenizer cache name quantization dtype max_length truncation_mode columns "
    "prompt_format where batch_tokens shard",
    "train": _USUAL_TRAIN,
    "sweep": f"vary rank_by halving_factor devices {_USUAL_TRAIN}",
    "eval": "cache view eval_group_by model quantization device per_device_eval_batch_size",
    "round": "learning_rate num_train_epochs max_steps loss_type beta device",
    "check": "model adapter tokenizer max_length columns prompt_format where",
    "show": "",
}

# Placeholders for fields whose type does not show what they take.
_METAVARS = {
    **dict.fromkeys(("model", "adapter", "tokenizer", "init_adapter"), "FOLDER|HUB_ID"),
    "device": "auto|cpu|cuda|cuda:N",
    "where": "CONDITION",
    "prompt_format": "TEXT",
    "shard": "PART/COUNT",
    "gpu": "CARD[,CARD...]",
    "loss_type": "LOSS[,LOSS...]",
    "loss_weights": "NUMBER[,NUMBER...]",
    "mix": "NUMBER[,NUMBER...]",
    "mix_with": "VIEW[,VIEW...]",
    "order_by": "SCORE|column:NAME",
    "eval_group_by": "COLUMN[,COLUMN...]",
    "lora_target_modules": "MODULE[,MODULE...]",
    "lora_target_parameters": "PARAMETER[,PARAMETER...]",
    "pair_weight_column": "COLUMN",
    "metric_for_best_model": "METRIC",
    "rank_by": "METRIC",
    "devices": "DEVICE[,DEVICE...]",
}
_ON_DISK = ("model", "adapter", "tokenizer", "init_adapter")
_MOST_NAMES = 6  # more would hide the option's description


if TYPE_CHECKING:
    _PairType = click.ParamType[tuple[str, str]]
    _WordsType = click.ParamType[tuple[str, ...]]
else:
    _PairType = _WordsType = click.ParamType  # has no type parameter before click 8.4


class KeyValue(_PairType):
    """An option of the form NAME=VALUE."""

    def __init__(self, name: str, example: str, *, may_be_empty: bool = False) -> None:
        self.name, self.example, self.may_be_empty = name, example, may_be_empty

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        key, separator, text = str(value).partition("=")
        if not separator or not key or not (text or self.may_be_empty):
            self.fail(f"{value!r} is not {self.name}, e.g. {self.example}", param, ctx)
        return key, text


_KEY_VALUES = {
    "columns": KeyValue("NAME=COLUMN", "chosen=response_a", may_be_empty=True),
    "vary": KeyValue("FIELD=VALUE[,VALUE...]", "beta=0.05,0.1,0.3"),
}


class _Words(_WordsType):
    name = "NAME[,NAME...]"

    def __init__(self, names: Sequence[str] = ()) -> None:
        self.names = names

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Completes the last of several words; see click."""
        before, comma, begun = incomplete.rpartition(",")
        return [CompletionItem(f"{before}{comma}{name}") for name in self.names if name.startswith(begun)]

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        return tuple(word.strip() for word in str(value).split(",") if word.strip())


class ConfigCommand(click.Command):
    """A command whose options are the fields of a config: grouped in `--help`; unknown options are explained.

    `--learning_rate` works like `--learning-rate`, as users of transformers write it. For a command with many options
    `--help` shows the usual ones, `--help-all` all of them.
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        if self.name in _USUAL:
            self.params.append(_help_all())

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Explains an unknown option: another phase or another trainer may have it."""
        typed = list(args)
        if sum(word == "--cache" or word.startswith("--cache=") for word in args) > 1:  # click would use the last one
            beside = "; --mix-with FOLDER:VIEW also trains on pairs of another cache"
            taken = any(parameter.name == "mix_with" for parameter in self.params)
            raise click.UsageError(f"--cache is given twice{beside if taken else ''}", ctx)
        try:
            return super().parse_args(ctx, [_as_option(word) for word in args])
        except click.NoSuchOption as error:
            known = {o for p in self.params for o in (*p.opts, *p.secondary_opts)} | set(ctx.help_option_names)
            words = [w.split("=")[0] for w in typed if w.startswith("--") and len(w) > 2]
            unknown = [w for w in words if w.replace("_", "-") not in known] or [error.option_name]
            cls = COMMANDS.get(self.name or "")
            problems = [unknown_field(cls, word, where=word) for word in dict.fromkeys(unknown)]
            raise as_error(problems) from error

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Lists the options under the headings of their fields."""
        taken = {parameter.name for parameter in self.params}
        commands = [name for name, cls in COMMANDS.items() if taken & cls.model_fields.keys()]
        # put a shared field under its own command, or under the command with most fields here
        commands.sort(
            key=lambda name: (name != self.name, -len(taken & (of := COMMANDS[name].model_fields.keys())) / len(of))
        )
        headings: dict[str, str] = {}
        for command in commands:
            for heading, names in sections(command):
                headings.update((name, heading) for name in names if name not in headings)
        groups: dict[str, list[tuple[str, str]]] = {heading: [] for heading in headings.values()}
        usual = _USUAL[self.name].split() if self.name in _USUAL and not ctx.meta.get(_SHOW_ALL) else headings
        left_out = 0
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if isinstance(parameter, _Field) and parameter.name not in usual:
                left_out += 1
            elif record is not None:
                place = headings.get(parameter.name or "") if isinstance(parameter, _Field) else None
                groups.setdefault(place or "Other", []).append(record)
        for heading, records in groups.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)
        if left_out:
            formatter.write_paragraph()
            formatter.write_text(f"{left_out} more options: {ctx.command_path} --help-all")


_SHOW_ALL = "dpoeng.help_all"


def _help_all() -> click.Option:
    def show(ctx: click.Context, _: click.Parameter, value: bool) -> None:
        if value:
            ctx.meta[_SHOW_ALL] = True
            click.echo(ctx.get_help())
            ctx.exit()

    help_text = "Show every option and exit."
    return click.Option(["--help-all"], is_flag=True, is_eager=True, expose_value=False, callback=show, help=help_text)


def _as_option(word: str) -> str:
    """`--learning_rate=1e-5` -> `--learning-rate=1e-5`; leaves other words alone."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else word


def config_options(cls: type[BaseModel], *, skip: frozenset[str] = frozenset()) -> Callable[[Command], Command]:
    """Adds an option for every field of a config. Without a value it is None: file or default decide."""

    def decorate(command: Command) -> Command:
        for name, field in reversed(cls.model_fields.items()):
            if name not in skip:
                command = _option(name, field.annotation, field.default, field.description or "")(command)
        return command

    return decorate


def given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that the user gave on the command line."""
    values = {name: value for name, value in options.items() if value not in (None, ())}
    for name in _KEY_VALUES.keys() & values.keys():
        keys = [key for key, _ in values[name]]
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise click.UsageError(f"--{name} {twice} is given twice; put all values into one")
        values[name] = dict(values[name])
    return values


def as_words(values: Mapping[str, Any]) -> list[str]:
    """Options as words of a command line, for another command with the same fields."""
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


class _Field(click.Option):
    """An option that is a field of a config."""


def _option(name: str, annotation: Any, default: Any, text: str) -> Callable[[Command], Command]:
    flag = "--" + name.replace("_", "-")
    kind = bare_type(annotation)
    if typing.get_origin(kind) is typing.Annotated:
        kind = typing.get_args(kind)[0]
    default_text = _shown_default(default)
    settings: dict[str, Any] = {
        "cls": _Field,
        "default": None,
        "help": text + (f"  [default: {default_text}]" if default_text else ""),
    }
    if kind is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", name, **settings)
    settings["metavar"] = _METAVARS.get(name) or _names_metavar(annotation)
    if name in _ON_DISK:
        settings["shell_complete"] = lambda ctx, param, begun: [CompletionItem(begun, type="file")]
    if typing.get_origin(kind) is dict:
        return click.option(flag, name, multiple=True, type=_KEY_VALUES[name], **settings)
    if typing.get_origin(kind) is tuple:
        return click.option(flag, name, type=_Words(_names(annotation)), **settings)
    if typing.get_origin(kind) is Literal:
        return click.option(flag, name, type=click.Choice(typing.get_args(kind)), **settings)
    if kind is Path:
        return click.option(flag, name, type=click.Path(path_type=Path), **settings)
    return click.option(flag, name, type=kind if kind in (int, float) else str, **settings)


def _names(annotation: Any) -> list[str]:
    """The values that a type allows by name, in its order."""
    if typing.get_origin(annotation) is Literal:
        return [str(value) for value in typing.get_args(annotation)]
    if annotation is bool:
        return ["true", "false"]
    parts = typing.get_args(annotation) if not isinstance(annotation, types.UnionType) else annotation.__args__
    return [name for part in parts for name in _names(part)]


def _names_metavar(annotation: Any) -> str | None:
    """`[a|b|c]` if a type allows a few names, `[a|b][,...]` if several; None leaves it to click."""
    names = _names(annotation)
    if not names or len(names) > _MOST_NAMES:
        return None
    several = "[,...]" if typing.get_origin(bare_type(annotation)) is tuple else ""
    return f"[{'|'.join(names)}]{several}"


def _shown_default(default: Any) -> str:
    if default is None or default is PydanticUndefined or default in ((), {}):
        return ""
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, tuple):
        return ",".join(map(str, default))
    return str(default)
