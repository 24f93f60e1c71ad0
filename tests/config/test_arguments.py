"""Messages name fields in Python and options on the command line; keyword arguments are typed as their fields are."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel

from dpoeng.cache.errors import CacheError, UserError
from dpoeng.cli import check, compare, evaluate
from dpoeng.cli.rounds import round as round_command
from dpoeng.cli.runs import export as export_command
from dpoeng.engine.config import settings
from dpoeng.engine.config.arguments import as_arguments
from dpoeng.engine.config.fields import LOSS_FIELDS, PrecomputeConfig, TrainConfig
from dpoeng.engine.config.plan import PlanConfig


@pytest.mark.parametrize(
    ("typed", "named"),
    [
        ("--eval-view", "eval_view"),
        ("--beta 0.1", "beta=0.1"),
        ("--beta=0.1 and --view=held", 'beta=0.1 and view="held"'),
        ("leave --eval-share out", "leave `eval_share` out"),
        ("--learning-rate 5e-6, or less", "learning_rate=5e-6, or less"),
        ("add --quantization none --dtype bfloat16: the", 'add quantization="none" dtype="bfloat16": the'),
        ("--quantization 8bit or 4bit", 'quantization="8bit" or 4bit'),
        ("--layout auto or separate", 'layout="auto" or separate'),
        ("train again with --no-resume", "train again with resume=False"),
        ("--fsdp --no-use-peft", "fsdp=True use_peft=False"),
        ("add --model DIR (and --adapter DIR)", "add model=DIR (and adapter=DIR)"),
        ("choose one, e.g. --view second", 'choose one, e.g. view="second"'),
        ("and leave --device out", "and leave `device` out"),
        ("use --device cpu, or", 'use device="cpu", or'),
        ("where:    --shard 5/4", 'where:    shard="5/4"'),
        ("for example --where 'confident and margin >= 0.5'", "for example where='confident and margin >= 0.5'"),
        ("leave rows out with --where, e.g.", "leave rows out with `where`, e.g."),
        ("--columns chosen=NAME names the column", 'columns={"chosen": "NAME"} names the column'),
        ("add --pairs all to evaluate", 'add pairs="all" to evaluate'),
        ("(leave out --model, --dtype)", "(leave out `model`, `dtype`)"),
        ("--max-length\nremedy: shorter", "max_length\nremedy: shorter"),
        # A command, another program's option and what was found stay as they are.
        ("run `dpoeng check P --model M`; raise --max-length", "run `dpoeng check P --model M`; raise `max_length`"),
        ("e.g. dpoeng precompute-ref p.jsonl --model sft", "e.g. dpoeng precompute-ref p.jsonl --model sft"),
        ("pip install --no-deps x, or --quantization none", 'pip install --no-deps x, or quantization="none"'),
        ("torchrun --nproc-per-node N dpoeng train --fsdp", "torchrun --nproc-per-node N dpoeng train --fsdp"),
        ("(--nproc-per-node), and leave --device out", "(--nproc-per-node), and leave `device` out"),
        ("overwrite it with --force", "overwrite it with --force"),
        ("found: 'text with --beta 0.1'", "found: 'text with --beta 0.1'"),
        ("the prompt's column with --columns prompt=X", 'the prompt\'s column with columns={"prompt": "X"}'),
        ("runs/--beta/x", "runs/--beta/x"),
    ],
)
def test_options_become_arguments(typed: str, named: str) -> None:
    assert as_arguments(typed) == named


@pytest.mark.parametrize("kind", [UserError, CacheError])
def test_an_error_has_both_forms(kind: type[UserError]) -> None:
    error = kind("no such view", code="a-b", where="--view", found="--beta 0.1", remedy="leave --view out")
    assert error.text().splitlines()[1:] == [
        "  where:    --view",
        "  found:    --beta 0.1",
        "  remedy:   leave --view out",
    ]
    assert str(error).splitlines()[1:] == ["  where:    view", "  found:    beta=0.1", "  remedy:   leave `view` out"]


def accepted(annotation: Any) -> Any:
    """What Python may give for a field: a path as text, one name for a list."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Path:
        return str | PathLike[str]
    if origin is tuple:
        return Sequence[parts[0]] if parts[0] is float else parts[0] | Sequence[parts[0]]
    if origin is dict:
        return Mapping[str, str]
    if origin in (typing.Union, types.UnionType):
        return typing.Union[tuple(map(accepted, parts))]  # noqa: UP007 - of a tuple
    return annotation


TRAIN, PRECOMPUTE = set(TrainConfig.model_fields), set(PrecomputeConfig.model_fields)


@pytest.mark.parametrize(
    ("taken", "config", "names"),
    [
        (settings.PrecomputeSettings, PrecomputeConfig, PRECOMPUTE - {"pairs", "model", "adapter", "cache"}),
        (settings.CheckSettings, PrecomputeConfig, set(check._USED) - {"model"}),
        (settings.LossFields, TrainConfig, set(LOSS_FIELDS)),
        (settings.TrainSettings, TrainConfig, TRAIN - {"cache", "output_dir"}),
        (settings.EvaluateSettings, TrainConfig, set(evaluate._FIELDS)),
        (settings.CompareSettings, TrainConfig, set(compare._FIELDS)),
        (settings.ExportSettings, TrainConfig, set(export_command._FIELDS)),
        (settings.RoundFields, TrainConfig, set(round_command.FIELDS)),
        (settings.PlanSettings, PlanConfig, set(PlanConfig.model_fields) - {"model"}),
    ],
)
def test_keyword_arguments_are_the_fields(taken: Any, config: type[BaseModel], names: set[str]) -> None:
    """A new field needs a line in engine/config/settings.py."""
    hints = typing.get_type_hints(taken)
    assert set(hints) == names
    for name in names:
        expected = accepted(config.model_fields[name].annotation)
        if name in ("model", "adapter", "tokenizer", "init_adapter"):
            expected |= PathLike[str]
        if name == "loss_type":  # a name, or a function of the user's
            expected = settings.LossName | Sequence[settings.LossName]
        assert hints[name] == expected, f"{taken.__name__}.{name}: {expected}"


def test_literals_stay_literals() -> None:
    assert typing.get_type_hints(settings.TrainSettings)["adapter_mode"] == Literal["auto", "new", "stack", "continue"]
