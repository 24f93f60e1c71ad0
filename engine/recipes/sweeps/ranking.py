"""Ranks the runs of a sweep on the same held-out pairs, with intervals of their differences.

Runs are compared pair by pair: the difference from the best run is a number for each held-out pair, and its interval
comes from resampling prompts, the same for both runs. It is much narrower than two separate intervals, since the
difficulty of a pair is the same in both. Reads the folders of runs; needs no model.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dpoeng.cache.words import counted
from dpoeng.engine.recipes.sweeps.halving import Score
from dpoeng.engine.runs.folder import RUN_FILE, has_result
from dpoeng.engine.runs.metrics import EVALUATIONS_FILE, HELD_OUT_FILE, damaged_line, read_lines
from dpoeng.engine.runs.reading import read_held_out, read_run
from dpoeng.engine.runtime.folders import write_durably
from dpoeng.engine.runtime.outputs import Kind, writing
from dpoeng.engine.training.early_stopping import more_is_better
from dpoeng.engine.training.intervals import (
    CONFIDENCE,
    CONTROLLED,
    FEW,
    TOP,
    Floats,
    intervals,
    length_controlled_accuracy,
)

SWEEP_FILE = "sweep.json"

PER_PAIR = (
    "rewards/accuracies",
    TOP,
    CONTROLLED,
    "rewards/margins",
    "rewards/chosen",
    "rewards/rejected",
    "loss",
    "logps/chosen",
    "logps/rejected",
    "kl/chosen",
    "kl/rejected",
)
"""Held-out metrics to rank runs by."""

_NOT_OF = {"pairs": (TOP,), "ranked": (CONTROLLED,), "unpaired": (TOP, CONTROLLED, "rewards/margins")}


def rankable(rows: str) -> tuple[str, ...]:
    """The metrics with a value for each held-out row of a kind: only these can be compared row by row."""
    return tuple(name for name in PER_PAIR if name not in _NOT_OF[rows])


Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class RunResult:
    """Result of one run.

    Attributes:
        values: field -> value, of the varied fields.
        state: `stopped` is a run that is neither complete nor failed, or not begun; `ended early` one that successive
            halving did not promote.
        error: the error that ended a failed run.
        step: step of the reported evaluation, which is the saved adapter's.
        pairs: held-out pairs of that evaluation.
        metrics: held-out metric -> mean in that evaluation; `intervals` likewise, if there are any.
        value: value of the metric that ranks the runs.
        difference: of `value` from the best run's; None for the best run, as is its interval.
        differs: whether the interval of the difference excludes 0.
    """

    name: str
    values: Mapping[str, str]
    folder: Path
    state: Literal["complete", "failed", "stopped", "ended early"]
    error: str = ""
    step: int = 0
    metrics: Mapping[str, float] | None = None
    intervals: Mapping[str, Interval] | None = None
    value: float | None = None
    difference: float | None = None
    difference_interval: Interval | None = None
    differs: bool = False
    pairs: int = 0


@dataclass(frozen=True, slots=True)
class _HeldOut:
    """A run's values, pair by pair."""

    pairs: list[tuple[str, str]]
    longer: Floats
    values: dict[str, Floats]


def compare_runs(
    runs: Sequence[tuple[str, Mapping[str, str], Path]],
    rank_by: str,
    failed: Mapping[str, str],
    early: Mapping[str, int] | None = None,
) -> list[RunResult]:
    """Reads the folders of runs and ranks the complete ones.

    Args:
        runs: name, values and folder of each.
        rank_by: one of `PER_PAIR`.
        failed: name -> its error.
        early: name -> the step at which successive halving ended it.

    Returns:
        complete runs, best first, ties in their given order; then those that ended early, longest first; then the
        others.

    Raises:
        UserError: a record is damaged.
    """
    results, held_out = [], {}
    for run, values, folder in runs:
        if run in failed:
            results.append(RunResult(run, values, folder, "failed", failed[run]))
        elif not has_result(folder) or not (folder / RUN_FILE).is_file():
            results.append(_incomplete(run, values, folder, (early or {}).get(run)))
        else:
            lines, saved = _last(folder)
            step = int(saved["step"])
            held_out[run] = _pairs(lines)
            metrics, bounds = saved["metrics"], {key: (low, high) for key, (low, high) in saved["intervals"].items()}
            results.append(
                RunResult(
                    run, values, folder, "complete", "", step, metrics, bounds, metrics.get(rank_by), pairs=len(lines)
                )
            )
    sign = 1.0 if more_is_better(rank_by, None) else -1.0
    ranked = [result for result in results if result.value is not None]
    ranked.sort(key=lambda result: -sign * (result.value or 0.0))
    compared = ranked[:1] + [_against(result, ranked[0], held_out, rank_by) for result in ranked[1:]]
    others = [result for result in results if result.value is None]
    return compared + sorted(others, key=lambda result: (result.state != "ended early", -result.step))


def _last(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The held-out pairs of a complete run, and the evaluation that they come from. Raises UserError without them."""
    lines = read_held_out(folder)
    for line in reversed(read_run(folder).evaluations):
        if lines and line["step"] == lines[0]["step"]:
            return lines, line
    raise damaged_line(folder / HELD_OUT_FILE, 1, "no pairs of any evaluation of this run")


def _incomplete(run: str, values: Mapping[str, str], folder: Path, step: int | None) -> RunResult:
    """A run that has no result; `step`: of the rung where it ended, if it did."""
    line = evaluation_from(folder, step) if step is not None else None
    if line is None:
        return RunResult(run, values, folder, "stopped")
    bounds = {name: (low, high) for name, (low, high) in line["intervals"].items()}
    return RunResult(run, values, folder, "ended early", step=line["step"], metrics=line["metrics"], intervals=bounds)


def evaluation_from(folder: Path, step: int) -> dict[str, Any] | None:
    """The first evaluation of a run at a step or after it; None if there is none yet.

    Raises:
        UserError: the record is damaged.
    """
    lines = (line for line in read_lines(folder / EVALUATIONS_FILE) if line["step"] >= step)
    return min(lines, key=lambda line: int(line["step"]), default=None)


def scores_at(folder: Path, steps: Sequence[int], rank_by: str, *, ended: bool = False) -> list[Score]:
    """What a run is compared by at each rung, up to the last one with an evaluation at its step or after it.

    With `ended`, for a run that early stopping has ended, its last evaluation is that of the later rungs too.

    Raises:
        UserError: the record is damaged.
    """
    lines = sorted(read_lines(folder / EVALUATIONS_FILE), key=lambda line: int(line["step"]))
    found = []
    for step in steps:
        line = next((line for line in lines if line["step"] >= step), lines[-1] if ended and lines else None)
        if line is None:
            break
        found.append(_score(line, rank_by))
    return found


def score_at(folder: Path, step: int, rank_by: str) -> Score | None:
    """The same at one step; None before its evaluation there."""
    return next(iter(scores_at(folder, [step], rank_by)), None)


def _score(line: Mapping[str, Any], rank_by: str) -> Score:
    """The metric; of equal ones the margin in units of its interval, which does not depend on beta."""
    sign = 1.0 if more_is_better(rank_by, None) else -1.0
    margin, bounds = line["metrics"].get("rewards/margins", 0.0), line["intervals"].get("rewards/margins")
    noise = bounds[1] - bounds[0] if bounds else 0.0
    value = line["metrics"].get(rank_by)
    worst = -sys.float_info.max  # finite, since promotions are written as JSON
    return worst if value is None else sign * value, margin / noise if noise > 0 else 0.0


def _pairs(lines: Sequence[Mapping[str, Any]]) -> _HeldOut:
    """Values of each held-out row: NaN where it has none, as desirable rows have none of the others' rewards."""
    of_pairs = all(
        {"chosen_tokens", "rejected_tokens"} <= line.keys() for line in lines
    )  # other rows have no two lengths
    longer = [line["chosen_tokens"] - line["rejected_tokens"] if of_pairs else 0 for line in lines]
    names = [name for name in PER_PAIR if any(name in line for line in lines)]
    return _HeldOut(
        pairs=[(line["source"], line["prompt"]) for line in lines],
        longer=np.array(longer, dtype=np.float64),
        values={name: np.array([line.get(name, np.nan) for line in lines], dtype=np.float64) for name in names},
    )


def _against(result: RunResult, best: RunResult, held_out: Mapping[str, _HeldOut], name: str) -> RunResult:
    """The run with its difference from the best one."""
    run_values, other = held_out[result.name], held_out[best.name]
    if run_values.pairs != other.pairs:  # runs of one sweep are evaluated on the same pairs in the same order
        raise damaged_line(result.folder / HELD_OUT_FILE, 1, f"other pairs than those of {best.name}")
    source = "rewards/accuracies" if name == CONTROLLED else name
    if source not in run_values.values or source not in other.values:
        return result
    values = run_values.values[source] - other.values[source]
    known = np.flatnonzero(~np.isnan(values))
    values, longer = values[known], run_values.longer[known]
    # Control for length in the differences, as in the values.
    mean = length_controlled_accuracy(values, longer) if name == CONTROLLED else float(values.mean())
    prompts = [run_values.pairs[place][1].encode() for place in known]
    interval = intervals({source: values}, longer, prompts, seed=0, paired=True).get(name)
    differs = interval is not None and not interval[0] <= 0 <= interval[1]
    return replace(result, difference=mean, difference_interval=interval, differs=differs)


def verdict(results: Sequence[RunResult]) -> str:
    """Says in one or two sentences which runs differ from the best one on the held-out pairs."""
    ranked = [result for result in results if result.value is not None]
    early = sum(result.state == "ended early" for result in results)
    if early:
        left = [result for result in results if result.state != "ended early"]
        return f"{verdict(left)} {counted(early, 'run')} ended early, behind others at a rung."
    if not ranked:
        complete = any(result.state == "complete" for result in results)
        return "No complete run has this metric." if complete else "No run is complete."
    best, others = ranked[0], ranked[1:]
    if not others:
        return f"{best.name} is the only complete run."
    like = [result.name for result in others if not result.differs]
    noise = f"the noise of {counted(best.pairs, 'held-out pair')}"
    few = f" Fewer than {FEW} pairs are too few to decide." if best.pairs < FEW else ""
    if not like:
        return f"{best.name} is ahead of all others by more than {noise}.{few}"
    listed = "; ".join(like[:4]) + (f"; and {len(like) - 4} more" if like[4:] else "")
    if len(like) == len(others):
        return f"No difference found: no run differs from {best.name} by more than {noise}.{few}"
    return (
        f"{best.name} has the best value and differs from {len(others) - len(like)} of {len(others)} others by more "
        f"than {noise}. No difference found from {listed}.{few}"
    )


def is_sweep(path: Path) -> bool:
    """Whether `write_sweep` wrote this file. Raises ValueError if it is not JSON."""
    record = json.loads(path.read_bytes())
    return isinstance(record, dict) and {"vary", "rank_by", "verdict", "runs"} <= record.keys()


SWEEP = Kind("the sweep's record", is_sweep, forced=False)


def write_sweep(
    root: Path,
    vary: Mapping[str, Sequence[str]],
    rank_by: str,
    results: Sequence[RunResult],
    halving_factor: int | None = None,
) -> None:
    """Writes sweep.json."""
    record = {
        "vary": {name: list(values) for name, values in vary.items()},
        "rank_by": rank_by,
        **({"halving_factor": halving_factor} if halving_factor is not None else {}),
        "confidence": CONFIDENCE,
        "verdict": verdict(results),
        "runs": [{**asdict(result), "folder": result.folder.name} for result in results],
    }
    root.mkdir(parents=True, exist_ok=True)
    with writing(root / SWEEP_FILE, SWEEP) as temporary:
        write_durably(temporary, (json.dumps(record, indent=1) + "\n").encode())
