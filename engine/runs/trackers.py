"""Experiment trackers beside metrics.jsonl: TensorBoard, Weights & Biases, MLflow, Trackio, through accelerate.

A tracker never decides about a run: one that is missing is refused before anything is loaded, one that fails later is
left out with a note. Where each writes is its own affair (its environment variables); TensorBoard's files go into the
output folder. Names are those of transformers' callbacks, so that curves lie over those of TRL's runs.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpoeng.cache.errors import UserError
from dpoeng.engine.runtime.progress import QUIET, Progress

PROJECT = "dpoeng"
"""What wandb and Trackio call a project, and MLflow an experiment; their own environment variables win."""


_STEP = "train/global_step"
"""What transformers logs beside each line to W&B and Trackio, and draws their curves over."""


def check_trackers(names: Sequence[str]) -> None:
    """Whether the packages are there.

    Raises:
        UserError: one is not.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"the tracker {name} is not installed",
                code="tracker-missing",
                where="report_to",
                expected=f"the package {name}",
                remedy=f"pip install {name}, or remove it from report_to: metrics.jsonl is always written",
                exit_status=5,
            )


@dataclass(slots=True)
class Trackers:
    """The trackers of one run."""

    opened: dict[str, Any] = field(default_factory=dict)
    progress: Progress = QUIET

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl; what is no finite number is left to that file."""
        numbers = {name: value for name, value in metrics.items() if _is_number(value)}
        for name, tracker in list(self.opened.items()):
            try:
                tracker.log(names_in(name, numbers, step), step=step)
            except Exception as error:
                self._give_up(name, error)

    def finish(self) -> None:
        """Closes all of them; what they hold is on disk or sent."""
        for name, tracker in list(self.opened.items()):
            try:
                tracker.finish()
            except Exception as error:
                self._give_up(name, error)
        self.opened.clear()

    def _give_up(self, name: str, error: Exception) -> None:
        del self.opened[name]
        self.progress.note(f"{name} failed and is switched off ({type(error).__name__}: {error}); the run continues")


def names_in(tracker: str, numbers: Mapping[str, float], step: int) -> dict[str, float]:
    """The numbers under the names that transformers' callback for this tracker gives them.

    `eval_loss` is `eval/loss` and `loss` is `train/loss`; MLflow alone gets them as they are. See `rewrite_logs` in
    https://github.com/huggingface/transformers/blob/main/src/transformers/integrations/integration_utils.py
    """
    if tracker == "mlflow":
        return dict(numbers)
    grouped = {
        f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}": value
        for name, value in numbers.items()
    }
    return {**grouped, _STEP: step} if tracker in ("wandb", "trackio") else grouped


def open_trackers(
    names: Sequence[str],
    *,
    run_name: str,
    output_dir: Path,
    settings: Mapping[str, Any],
    first_step: int = 0,
    progress: Progress = QUIET,
) -> Trackers:
    """Starts trackers.

    Args:
        names: of `tensorboard`, `wandb`, `mlflow`, `trackio`.
        run_name: what they call the run.
        output_dir: TensorBoard writes into its folder `runs`.
        settings: the configuration, shown beside the curves.
        first_step: where a run goes on; TensorBoard then hides what an earlier one logged behind it.
        progress: told if one fails later.

    Raises:
        UserError: one cannot start.
    """
    trackers = Trackers(progress=progress)
    for name in names:
        try:
            tracker = _tracker(name, run_name, output_dir, first_step)
            tracker.start()
            if name == "wandb":  # as transformers draws its curves
                tracker.tracker.define_metric(_STEP)
                tracker.tracker.define_metric("*", step_metric=_STEP, step_sync=True)
            tracker.store_init_configuration(_flat(settings))
        except Exception as error:
            trackers.finish()
            raise UserError(
                f"the tracker {name} cannot start",
                code="tracker-failed",
                where="report_to",
                found=f"{type(error).__name__}: {error}"[:500],
                remedy="see its documents (wandb needs a login, or WANDB_MODE=offline), or remove it from report_to",
                exit_status=5,
            ) from error
        trackers.opened[name] = tracker
    return trackers


def _tracker(name: str, run_name: str, output_dir: Path, first_step: int) -> Any:
    from accelerate import PartialState, tracking

    PartialState()  # their methods run on the first process alone, and ask it which that is
    match name:
        case "tensorboard":
            purge = {"purge_step": first_step + 1} if first_step else {}
            return tracking.TensorBoardTracker(run_name, logging_dir=str(output_dir / "runs"), **purge)
        case "wandb":
            return tracking.WandBTracker(PROJECT, name=run_name, dir=str(output_dir))
        case "mlflow":
            return tracking.MLflowTracker(PROJECT, run_name=run_name)
        case _:
            return tracking.TrackioTracker(PROJECT, name=run_name)


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Values that every tracker takes: what is no plain value becomes text; None is left out."""
    plain = {name: value for name, value in settings.items() if value is not None}
    return {k: v if isinstance(v, bool | int | float | str) else json.dumps(v, default=str) for k, v in plain.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
