"""The steps of a run with every line of metrics sent to its trackers, and its held-out results as tables at the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dpoeng.engine.models.sources import ModelSource
from dpoeng.engine.models.tokenizer import load_chosen, recorded_tokenizer
from dpoeng.engine.runs.reading import read_held_out
from dpoeng.engine.runs.trackers import Table, open_trackers
from dpoeng.engine.training.loop import run_steps
from dpoeng.engine.training.run import Run

_LONGEST = 2_000
"""Characters of a text in a table."""


def run_steps_tracked(
    run: Run, first_step: int, identity: dict[str, Any], pause: int | None, source: ModelSource, ref: Mapping[str, Any]
) -> int:
    """`run_steps` with trackers; returns the number of steps done.

    Args:
        run: the run.
        first_step: first step to do.
        identity: see `run_identity`.
        pause: see `train`.
        source: the base, whose tokenizer decodes held-out pairs unless `ref` names another.
        ref: the view's `reference` record.
    """
    config = run.config
    trackers = open_trackers(
        config.report_to if run.group.is_first else (),
        run_name=config.run_name or config.output_dir.resolve().name,
        output_dir=config.output_dir,
        settings=config.model_dump(mode="json"),
        first_step=first_step,
        progress=run.progress,
    )
    run.log.also = trackers.log
    try:
        done = run_steps(run, first_step, identity, pause)
        if trackers.opened:
            trackers.show(done, held_out_tables(run, lambda: load_chosen(recorded_tokenizer(source, ref))))
        return done
    finally:
        trackers.finish()


def held_out_tables(run: Run, load_tokenizer: Callable[[], Any]) -> dict[str, Table]:
    """The last evaluation with its intervals, and the first `report_samples` of its pairs with their texts."""
    evaluations = run.log.read_evaluations()
    if not evaluations:
        return {}
    last = evaluations[-1]
    bounds = last["intervals"]
    figures = [
        (name, *map(_short, (value, *(bounds.get(name) or (None, None))))) for name, value in last["metrics"].items()
    ]
    heads = ("metric", f"mean of {last['pairs']} pairs", "95 % interval from", "to")
    tables: dict[str, Table] = {"held_out": (heads, figures)}
    pairs = read_held_out(run.config.output_dir)[: run.config.report_samples]
    if pairs:
        tokenizer = load_tokenizer()
        rows = []
        for pair, row in zip(pairs, run.held_out.rows, strict=False):
            texts = [
                str(tokenizer.decode(ids)) for ids in (row.ids.prompt_ids, row.ids.chosen_ids, row.ids.rejected_ids)
            ]
            shown = (texts[0][-_LONGEST:], *(text[:_LONGEST] for text in texts[1:]))
            rows.append((pair["source"], *shown, _short(pair.get("rewards/margins"))))
        tables["held_out_pairs"] = (("source", "prompt", "chosen", "rejected", "reward margin"), rows)
    return tables


def _short(value: float | None) -> float | None:
    """Four digits; trackers show every digit. W&B refuses a column of numbers and texts, so a gap stays None."""
    return None if value is None else float(f"{value:.4g}")
