"""Gives TRL's DPOTrainer the cache's log-probs instead of a reference model.

TRL 1.16 uses only reference log-probs that it computed itself: it ignores such a column in the user's data set, or
computes it again and then raises. So the columns go into the trainer's own tokenised data sets, and the trainer's flag
says that they are precomputed. This module uses only the trainer's attributes and does not import TRL.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpoeng.cache.errors import UserError
from dpoeng.cache.reader import View
from dpoeng.cache.schema import PairIds, ScoredPair
from dpoeng.engine.recipes.elsewhere.lookup import Lookup, Side, pair_of, sums_of
from dpoeng.engine.reference.parity import spread, tolerated

COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
_REMEDY = (
    "score these rows with the trainer's own model, tokenizer and length: `dpoeng precompute-ref PAIRS --max-length` "
    "as DPOConfig's max_length; --no-append-eos if the texts have their own end token"
)


def use_cached_reference(trainer: Any, cache: Path, view: str | None, *, check_pairs: int = 4) -> None:
    """Gives a DPOTrainer that has not been trained the reference log-probs of a cache.

    Args:
        trainer: TRL's DPOTrainer; its constructor tokenised the data sets.
        cache: the folder of the cache.
        view: the view whose reference to use, if the cache has several.
        check_pairs: number of rows that the trainer scores itself first, for comparison; 0 for none.

    Raises:
        UserError: the trainer is not suitable, the cache lacks a row, or the references differ.
    """
    _refuse_unfit(trainer)
    lookup = Lookup(View.open(cache, view))
    alpha = getattr(trainer.args, "ld_alpha", None)
    if alpha is not None and lookup.view.spec.holds_sums:
        raise _unfit(
            "ld_alpha needs token log-probs", "a cache with token log-probs", "a cache that was imported as sums"
        )
    found = {name: _found(trainer, rows, name, lookup) for name, rows in _data_sets(trainer).items()}
    if check_pairs:
        _check_model(trainer, found["train_dataset"], lookup.view, check_pairs, alpha)
    given = {name: _with_columns(rows, found[name], alpha) for name, rows in _data_sets(trainer).items()}
    trainer.train_dataset = given.pop("train_dataset")
    if isinstance(trainer.eval_dataset, dict):
        trainer.eval_dataset = {name: given[f"eval_dataset[{name!r}]"] for name in trainer.eval_dataset}
    elif given:
        trainer.eval_dataset = given["eval_dataset"]
    trainer.precompute_ref_logps = True
    trainer.ref_model = None


def _refuse_unfit(trainer: Any) -> None:
    lacking = [
        name for name in ("precompute_ref_logps", "train_dataset", "data_collator") if not hasattr(trainer, name)
    ]
    if lacking:
        kind = type(trainer).__name__
        raise _unfit("this is not a DPOTrainer", "a DPOTrainer of TRL 1, constructed", f"{kind}, without {lacking[0]}")
    if trainer.precompute_ref_logps:
        raise _unfit(
            "the trainer already computed its reference", "precompute_ref_log_probs=False", "True, or a second call"
        )
    if getattr(trainer.args, "sync_ref_model", False):
        raise _unfit("sync_ref_model changes the reference during training", "a fixed reference", "sync_ref_model")
    for name, rows in _data_sets(trainer).items():
        columns = getattr(rows, "column_names", None) or []
        if not hasattr(rows, "add_column") or not hasattr(rows, "__len__") or not set(_IDS) <= set(columns):
            raise _unfit(f"{name} has no rows of token ids", "a datasets.Dataset of text", type(rows).__name__)
        if set(COLUMNS) & set(columns):
            raise _unfit(f"{name} already has reference columns", "a data set without them", ", ".join(COLUMNS))


def _unfit(message: str, expected: str, found: str) -> UserError:
    return UserError(
        message,
        code="reference-trainer",
        where="with_cached_reference",
        expected=expected,
        found=found,
        remedy="call it once, after DPOTrainer(model, args=DPOConfig(...), train_dataset=pairs, ...) before train()",
    )


def _data_sets(trainer: Any) -> dict[str, Any]:
    """The data sets by their names in messages."""
    evals = trainer.eval_dataset
    named = {f"eval_dataset[{name!r}]": rows for name, rows in evals.items()} if isinstance(evals, dict) else {}
    alone = {} if isinstance(evals, dict) or evals is None else {"eval_dataset": evals}
    return {"train_dataset": trainer.train_dataset, **alone, **named}


def _found(trainer: Any, rows: Any, name: str, lookup: Lookup) -> list[ScoredPair]:
    pairs = [_pair(trainer, row) for row in rows.select_columns(list(_IDS))]
    return lookup.find(pairs, where=name, remedy=_REMEDY)


def _pair(trainer: Any, row: Any) -> PairIds | None:
    """The tokens of a row as in the loss: the trainer's collator truncates."""
    batch = trainer.data_collator([row])
    ids, held, scored = (batch[name].numpy() for name in ("input_ids", "attention_mask", "completion_mask"))
    chosen, rejected = (Side(ids[i][held[i] == 1], scored[i][held[i] == 1] == 1) for i in (0, 1))
    return pair_of(chosen, rejected)


def _with_columns(rows: Any, found: Sequence[ScoredPair], alpha: float | None) -> Any:
    sums = [sums_of(pair, alpha) for pair in found]
    for column, values in zip(COLUMNS, zip(*sums, strict=True), strict=True):
        rows = rows.add_column(column, list(values))
    return rows


def _check_model(trainer: Any, found: Sequence[ScoredPair], view: View, count: int, alpha: float | None) -> None:
    """Lets the trainer compute some of the values. Raises UserError if they differ from the cache's."""
    if getattr(trainer, "is_deepspeed_enabled", False) or getattr(trainer, "is_fsdp_enabled", False):
        logging.getLogger("dpoeng").warning(
            "with_cached_reference checked the tokens, but not the model, because it is sharded over processes"
        )
        return
    differences = []
    for i in spread(range(len(found)), count):
        batch = trainer.data_collator([trainer.train_dataset[i]])
        inputs = {name: value.to(trainer.accelerator.device) for name, value in batch.items()}
        takes_model = "model" in inspect.signature(trainer.compute_ref_log_probs).parameters  # since TRL 1.9
        model = [trainer.ref_model or trainer.model] if takes_model else []
        live = [float(side[0]) for side in trainer.compute_ref_log_probs(*model, inputs)]
        sizes = len(found[i].chosen_logps), len(found[i].rejected_logps)
        differences += [abs(a - b) / n for a, b, n in zip(live, sums_of(found[i], alpha), sizes, strict=True)]
    reference = view.meta["reference"]
    bits = next((bits for bits in ("8bit", "4bit") if getattr(trainer.model, f"is_loaded_in_{bits}", False)), "none")
    dtype = str(trainer.model.dtype).removeprefix("torch.")
    mean = float(np.mean(differences))
    allowed = tolerated(bits, dtype, reference["quantization"], reference["dtype"])
    if not mean <= allowed:
        raise UserError(
            "the trainer's reference differs from the cache's",
            code="reference-mismatch",
            where=f"view {view.name}, {reference['model']}"
            + (f" + {reference['adapter']}" if reference["adapter"] else ""),
            expected=f"a mean difference of at most {allowed:g} nats per token",
            found=f"{mean:.3g} nats per token over {min(count, len(found))} pairs",
            remedy="give the trainer the model and adapter that phase one scored, or score with the trainer's; "
            "check_pairs=0 if you want another reference",
            exit_status=3,
        )
