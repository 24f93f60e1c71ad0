"""The inputs of phase two from the cache: views, rows, held-out split, weights, schedule, with their checks.

The only module that opens a cache for training, evaluation and sweeps. Needs no model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import xxhash

from dpoeng.cache.errors import UserError
from dpoeng.cache.exchange.responses import row_key
from dpoeng.cache.reader import View
from dpoeng.cache.records import ROW_KINDS, damaged
from dpoeng.cache.schema import pair_key
from dpoeng.cache.selection.mixed import AnyView
from dpoeng.cache.words import counted
from dpoeng.engine.config.fields import TrainConfig
from dpoeng.engine.losses.names import LOSS_FACTS, fitting_rows, rows_of
from dpoeng.engine.recipes.phase_two.mixing import arrangement_of, with_others
from dpoeng.engine.training.order import Schedule, hold_out, plan_schedule
from dpoeng.engine.training.rows import HeldOut, Rows, WeightArray


@dataclass(frozen=True, slots=True)
class Split:
    """Opened views, and their rows on both sides of the held-out split.

    Attributes:
        view: the training view, or several joined.
        eval_view: the evaluation view if one is named; otherwise rows of `view` are held out.
        train: rows to train on.
        held_out: rows to evaluate on.
        overlap: a sentence about pairs or prompts on both sides; empty without any.
    """

    view: AnyView
    eval_view: View | None
    train: Rows
    held_out: Rows
    overlap: str = ""


@dataclass(frozen=True, slots=True)
class Inputs:
    """Everything that a run reads from the cache.

    Attributes:
        split: opened views and their rows.
        train_weights: the user's weight of each training row, or None.
        held_out: held-out rows, ready for the evaluation.
        schedule: the rows of each optimizer step.
    """

    split: Split
    train_weights: WeightArray | None
    held_out: HeldOut
    schedule: Schedule

    @property
    def view(self) -> AnyView:
        """The training view."""
        return self.split.view

    @property
    def train_rows(self) -> Rows:
        """Rows to train on."""
        return self.split.train

    @property
    def reference(self) -> dict[str, Any]:
        """How the reference was loaded in phase one."""
        reference = self.view.meta.get("reference")
        if not isinstance(reference, dict):
            raise damaged(f"view {self.view.name}: meta.reference", "an object", repr(reference)[:200])
        return reference

    @property
    def pairs_seen(self) -> int:
        """Training pairs over the whole run, counted each time they are used."""
        return self.schedule.total_steps * min(self.schedule.batch, len(self.train_rows))


def open_views(config: TrainConfig, open_view: Callable[..., View] = View.open) -> tuple[AnyView, View | None]:
    """Opens the training view and, if named, the evaluation view.

    Args:
        config: reads `cache`, `view`, `mix_with` and `eval_view`.
        open_view: `View.open`, or a function that caches opened views.

    Raises:
        CacheError: no such view, or a damaged one.
        UserError: the loss does not fit these rows.
    """
    first_view = open_view(config.cache, config.view, beside=config.eval_view, rows=ROW_KINDS)
    view = with_others(config, first_view, open_view)
    eval_view = open_view(config.cache, config.eval_view, rows=ROW_KINDS) if config.eval_view else None
    for opened in (view, *([eval_view] if eval_view else [])):
        _check_loss(config, opened)
    return view, eval_view


def _check_loss(config: TrainConfig, view: AnyView) -> None:
    if view.rows != "ranked" and config.pairs_in_row != "all":
        raise UserError(
            "pairs_in_row has no effect on these rows",
            code="config-value",
            where=f"--pairs-in-row {config.pairs_in_row}, view {view.name}",
            expected="a view of ranked rows",
            found=f"{view.rows} rows",
            remedy="leave it out",
        )
    wanted = rows_of(config.loss_type)
    if view.rows not in fitting_rows(wanted):
        fitting = [name for name, known in LOSS_FACTS.items() if view.rows in fitting_rows(known.rows)]
        raise UserError(
            "this loss does not fit the rows of this view",
            code="loss-rows",
            where=f"--loss-type {','.join(config.loss_type)}, view {view.name}",
            expected=f"a view of {wanted} rows",
            found=f"{view.rows} rows",
            remedy=f"use one of {', '.join(fitting)}, or name another view; docs/losses.md lists the rows of each loss",
        )


def open_split(config: TrainConfig, open_view: Callable[..., View] = View.open) -> Split:
    """Opens the views and splits their rows; depends on `cache`, `view`, `eval_view`, `eval_share` and `seed`.

    Raises:
        UserError: a view cannot be used, or every evaluation pair is also a training pair.
    """
    view, eval_view = open_views(config, open_view)
    train, held_out = split(view, eval_view, config)
    overlap = check_apart(view, eval_view) if eval_view is not None else ""
    return Split(view, eval_view, Rows(view, train), Rows(eval_view or view, held_out), overlap)


def open_inputs(config: TrainConfig, open_split: Callable[[TrainConfig], Split] = open_split) -> Inputs:
    """Reads everything that a run needs from the cache.

    Args:
        config: config of the run.
        open_split: a sweep passes a function that opens each view and makes each split only once.

    Raises:
        UserError: the cache does not contain what the configuration needs.
    """
    opened = open_split(config)
    refuse_sums_for_tokens(config.ld_alpha, opened.view)
    column, held_out = config.pair_weight_column, opened.held_out
    return Inputs(
        split=opened,
        train_weights=opened.train.weights(column),
        held_out=HeldOut(
            rows=held_out,
            weights=held_out.weights(column),
            prompts=held_out.prompts(),
            labels=held_out.labels(config.eval_group_by) if held_out else {},
            source_of=held_out.source,
        ),
        schedule=plan_schedule(
            len(opened.train),
            batch=config.per_device_train_batch_size * config.gradient_accumulation_steps,
            epochs=config.num_train_epochs,
            max_steps=config.max_steps,
            seed=config.seed,
            arrangement=arrangement_of(config, opened.view, opened.train.indices),
        ),
    )


def refuse_sums_for_tokens(ld_alpha: float | None, view: AnyView) -> None:
    """Raises UserError if the loss weighs single tokens but the cache has only sums."""
    if view.spec.holds_sums and ld_alpha is not None:
        raise UserError(
            "this loss weighs single tokens, but these reference log-probs are sums over whole responses",
            code="cache-sums-only",
            where="--ld-alpha",
            expected="a cache that `dpoeng precompute-ref` wrote",
            found=f"view {view.name}, imported from {view.meta['imported']['name']}",
            remedy="leave --ld-alpha out, or run precompute-ref on the pairs",
        )


def split(view: AnyView, eval_view: View | None, config: TrainConfig) -> tuple[list[int], list[int]]:
    """Places of rows to train on and of rows to evaluate on; with `eval_view`, all rows of each view."""
    if eval_view is not None:
        if eval_view.spec.digest != view.spec.digest:
            raise UserError(
                "training and evaluation pairs have different references",
                code="eval-reference",
                where="--eval-view",
                expected=f"the reference of {view.name}: {view.spec.digest}",
                found=f"{eval_view.name}: {eval_view.spec.digest}",
                remedy="run precompute-ref for both files with the same model options",
            )
        return list(view.row_starts()), list(eval_view.row_starts())
    starts = view.row_starts()
    prompts = (view.prompt_ids(place).tobytes() for place in starts)
    train, held_out = hold_out(prompts, config.eval_share, config.seed)
    return [starts[row] for row in train], [starts[row] for row in held_out]


def check_held_out(config: TrainConfig, count: int) -> None:
    """Raises if an option needs held-out pairs and there are none.

    Raises:
        UserError: early stopping or the best model was requested.
    """
    wants = [
        option
        for option, wanted in (
            ("--load-best-model-at-end", config.load_best_model_at_end),
            ("--early-stopping-patience", config.early_stopping_patience is not None),
        )
        if wanted
    ]
    if wants and not count:
        raise UserError(
            "no pairs are held out",
            code="eval-empty",
            where=", ".join(wants),
            expected="pairs that are not trained on",
            found=f"--eval-share {config.eval_share:g} of the prompts is none",
            remedy="raise --eval-share, name other pairs with --eval-view, or leave these options out",
        )


def _prompt_digest(view: AnyView, place: int) -> bytes:
    return xxhash.xxh3_128_digest(view.prompt_ids(place).tobytes())


def check_apart(view: AnyView, eval_view: View) -> str:
    """Describes pairs and prompts that are in both training and evaluation; empty without any.

    As in `dpoeng check --eval`, swapped pairs count as equal, and so does a ranked row with its responses in any order;
    texts are compared by their token ids.

    Raises:
        UserError: every evaluation pair is also a training pair.
    """
    trained = {row_key(view, place).texts for place in view.row_starts()}
    prompts = {_prompt_digest(view, place) for place in view.row_starts()}
    rows = eval_view.row_starts()
    pairs = also = 0
    for place in rows:
        swapped = view.rows == "pairs" and pair_key(eval_view[place].ids.swapped()) in trained
        if swapped or row_key(eval_view, place).texts in trained:
            pairs += 1
        elif _prompt_digest(eval_view, place) in prompts:
            also += 1
    if pairs == len(rows):
        raise UserError(
            "every evaluation pair is also a training pair",
            code="eval-trained-on",
            where=f"--eval-view {eval_view.name}",
            expected=f"pairs that are not in the training view {view.name}",
            found=f"{pairs} of {len(rows)} are in both",
            remedy="use --eval-share 0.1 instead of --eval-view to hold out a tenth of the prompts; or run "
            "precompute-ref on other pairs and name their view",
        )
    shared = [counted(pairs, "pair")] if pairs else []
    shared += [f"{also} more by prompt alone" if pairs else f"{counted(also, 'pair')} by prompt alone"] if also else []
    if not shared:
        return ""
    return (
        f"{' and '.join(shared)} of {counted(len(rows), 'evaluation pair')} in {eval_view.name} are also "
        f"trained on (in {view.name}), so their figures show memorisation; --eval-share 0.1 instead of --eval-view "
        "splits by prompt"
    )
