"""Prepares rounds from a run: checks it, reads its pairs and prompts again, and copies its cache."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import xxhash

from dpoeng.cache.errors import UserError
from dpoeng.cache.exchange.merging import merge
from dpoeng.cache.selection.mixed import AnyView
from dpoeng.cache.store import Store
from dpoeng.cache.words import counted
from dpoeng.engine.config.fields import Mode, TrainConfig
from dpoeng.engine.models.sources import find_model
from dpoeng.engine.models.tokenizer import load_chosen, recorded_tokenizer
from dpoeng.engine.recipes.evaluate import Trained
from dpoeng.engine.recipes.inputs import open_views, split
from dpoeng.engine.recipes.rounds.answers import Sampling, policy_identity
from dpoeng.engine.recipes.rounds.judges import Judge, shown_prompt
from dpoeng.engine.recipes.rounds.prompts import RoundPrompt, as_row, distinct_prompts, read_prompt_file
from dpoeng.engine.recipes.rounds.record import STATE, write_lines
from dpoeng.engine.recipes.rounds.source_pairs import source_pairs
from dpoeng.engine.runs.identity import FREE_TO_CHANGE, rows_digest
from dpoeng.engine.runs.trackers import check_trackers
from dpoeng.engine.runtime.endpoint import Endpoint
from dpoeng.engine.runtime.host import group_size
from dpoeng.engine.runtime.progress import Progress


@dataclass(frozen=True, slots=True)
class RoundSettings:
    """Settings of the rounds.

    Attributes:
        reference: each round's reference: `first`, the starting run's; `last`, the policy that was sampled.
        rounds: total number of rounds, finished ones included.
        train_on: `all` trains on the run's pairs and those of every round; `new` on this round's pairs only.
        prompts: a file of prompts; None takes those of the run's training pairs.
        count: prompts per round; None for all.
        keep_cut: also use answers that `max_new_tokens` cut off.
        sampling: settings for the answers.
        server: the server that samples; None samples in this process.
    """

    reference: Literal["first", "last"]
    rounds: int = 1
    train_on: Literal["all", "new"] = "all"
    prompts: Path | None = None
    count: int | None = None
    keep_cut: bool = False
    sampling: Sampling = field(default_factory=lambda: Sampling(count=4, temperature=1.0))
    server: Endpoint | None = None


@dataclass(frozen=True, slots=True)
class Start:
    """The starting run, its prompts, and its pairs as files in the rounds' folder."""

    view: AnyView
    config: TrainConfig
    mode: Mode
    prompts: Sequence[RoundPrompt]
    train_file: Path
    held_out_file: Path | None
    keys: frozenset[bytes]


def check_start(trained: Trained, config: TrainConfig, settings: RoundSettings) -> None:
    """Raises UserError if rounds cannot start from this run, before any work is done."""
    check_trackers(config.report_to)
    why = ""
    if group_size(os.environ) > 1:
        why = "rounds run in one process: start them without torchrun"
    elif trained.run is None or trained.mode is None:
        why = "this is not the folder of a run: rounds need its cache and settings"
    elif settings.reference == "first" and trained.mode == "full":
        why = "full fine-tuning always starts from its reference's weights: use --reference last"
    elif settings.reference == "last" and trained.mode == "stack":
        why = "the last policy has two adapters, and a reference can have only one: use --reference first"
    elif settings.server is not None and trained.mode == "stack":
        why = "a server loads one adapter, and this policy has two: remove --server"
    elif config.pair_weight_column is not None or config.order_by.startswith("column:"):
        why = "new pairs do not have the column that --pair-weight-column or --order-by names"
    elif settings.sampling.count < 2 or settings.sampling.temperature <= 0:
        why = "a pair needs two different answers: --samples of 2 or more, --temperature above 0"
    if why:
        raise UserError(
            "cannot start rounds from this run",
            code="round-start",
            where=str(trained.folder.parent),
            found=why,
            remedy="change the run or the option named above",
        )


def begin(trained: Trained, config: TrainConfig, settings: RoundSettings, folder: Path, progress: Progress) -> Start:
    """Reads the run's pairs and the prompts as texts, and copies the run's cache on the first call.

    Raises:
        UserError: the rows are not pairs, or cannot be read again.
    """
    view, eval_view = open_views(config)
    if view.rows != "pairs":
        raise UserError(
            "rounds create pairs, but this run was trained on other rows",
            code="round-start",
            where=f"view {view.name}",
            expected="a view of pairs",
            found=f"{view.rows} rows",
            remedy="start from a run on pairs; precompute-ref --ranked-pairs best makes pairs of ranked rows",
        )
    rows, held_out = split(view, eval_view, config)
    pairs = source_pairs(view, rows)
    held_out_file = folder / "held-out.jsonl" if held_out else None
    if not (folder / STATE).is_file():
        write_lines(folder / "first.jsonl", [as_row(pair) for pair in pairs])
        if held_out_file is not None:
            write_lines(held_out_file, [as_row(pair) for pair in source_pairs(eval_view or view, held_out)])
        progress.note(f"copying {config.cache} to the rounds' own cache")
        merge(Store.open(folder / "cache", create=True), Store.open(config.cache))
    reference = view.meta["reference"]
    source = find_model(config.model or reference["model"], revision=reference.get("revision"))
    tokenizer = load_chosen(recorded_tokenizer(source, reference))
    asked = pairs
    if settings.prompts is not None:
        asked = read_prompt_file(settings.prompts, pairs[0], view.meta.get("prompt_format"))
    prompts, unusable = distinct_prompts(asked, tokenizer, view.meta["tokens"]["max_length"])
    if not prompts:
        raise UserError(
            "no prompt is usable",
            code="round-prompts",
            where=str(settings.prompts or view.name),
            expected="prompts shorter than --max-length, so that an answer fits",
            found=unusable[0][1] if unusable else "none",
            remedy="give other prompts with --prompts",
            exit_status=3,
        )
    if unusable:
        lines = [{"prompt": shown_prompt(pair.prompt), "why": why} for pair, why in unusable]
        write_lines(folder / "unusable_prompts.jsonl", lines)
        progress.note(f"{counted(len(unusable), 'prompt')} skipped; unusable_prompts.jsonl gives the reasons")
    assert trained.mode is not None
    return Start(
        view=view,
        config=config,
        mode=trained.mode,
        prompts=prompts,
        train_file=folder / "first.jsonl",
        held_out_file=held_out_file,
        keys=frozenset(view.key(row) for row in rows),
    )


def rounds_identity(trained: Trained, start: Start, judge: Judge, settings: RoundSettings) -> dict[str, Any]:
    """The settings that all rounds in one folder share; their number may grow."""
    config, defaults = start.config, TrainConfig.model_validate({}).model_dump(mode="json")
    training = {
        name: value
        for name, value in config.model_dump(mode="json").items()
        if name not in FREE_TO_CHANGE and value != defaults[name]
    }
    prompts = xxhash.xxh3_128_hexdigest(b"".join(b"%d:%b" % (len(one.ids), one.ids.tobytes()) for one in start.prompts))
    return {
        "policy": policy_identity(trained, config, start.view.spec.digest),
        "pairs": rows_digest(start.view),
        "prompts": prompts,
        "count": settings.count,
        "reference": settings.reference,
        "train_on": settings.train_on,
        "keep_cut": settings.keep_cut,
        "sampling": settings.sampling.identity(),
        "server": settings.server is not None,
        "judge": dict(judge.identity),
        "training": training,
    }
