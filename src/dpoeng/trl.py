"""Gives TRL's DPOTrainer cached reference log-probs. TRL is not a dependency: install version 1.16 yourself."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TypeVar

Trainer = TypeVar("Trainer")


def with_cached_reference(
    trainer: Trainer, cache: str | PathLike[str] = "refcache", view: str | None = None, *, check_pairs: int = 4
) -> Trainer:
    """Gives TRL's DPOTrainer the reference log-probs of a cache instead of a reference model.

    >>> trainer = DPOTrainer(model, args=DPOConfig(...), train_dataset=pairs, processing_class=tokenizer)
    >>> with_cached_reference(trainer, "refcache").train()

    Each row is looked up by its token ids, after the trainer's own tokenisation and truncation. The columns
    `ref_chosen_logps` and `ref_rejected_logps` are added to its data sets, weighted if `ld_alpha` is set, and the
    reference model is freed.

    Args:
        trainer: constructed without `precompute_ref_log_probs`, not yet trained.
        cache: the folder that `dpoeng precompute-ref` wrote.
        view: a view of the cache; None if there is only one. Rows may be in any view with the same reference.
        check_pairs: number of rows that the trainer's own reference scores first, for comparison; 0 for none.

    Returns:
        The same trainer.

    Raises:
        UserError: a row is not in the cache with these tokens, the trainer's reference gives other numbers, or the
            trainer cannot use them (`sync_ref_model`, streamed data, images).
    """
    from dpoeng.engine.recipes.elsewhere.trl import use_cached_reference

    use_cached_reference(trainer, Path(cache), view, check_pairs=check_pairs)
    return trainer
