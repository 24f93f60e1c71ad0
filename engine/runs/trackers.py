"""Experiment trackers besides metrics.jsonl: TensorBoard, Weights & Biases, MLflow, Trackio, through accelerate.

A tracker never affects a run: a missing one is refused before anything is loaded, and one that fails later is switched
off with a note. Its environment variables decide where it writes; TensorBoard's files go into the output folder. Names
are those of transformers' callbacks, so that curves can be compared with those of TRL's runs.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib import import_module
from pathlib import Path
from typing import Any

from dpoeng.cache.errors import UserError
from dpoeng.engine.runtime.progress import QUIET, Progress

PROJECT = "dpoeng"
"""Name of the project (wandb, Trackio) or experiment (MLflow); their environment variables take precedence."""


Table = tuple[Sequence[str], Sequence[Sequence[str | float | None]]]
"""Headings, and rows of texts and numbers; None leaves a cell empty."""

_STEP = "train/global_step"
"""Value that transformers logs with each line to W&B and Trackio, as the x axis of their curves."""


def check_trackers(names: Sequence[str]) -> None:
    """Checks that the trackers' packages are installed.

    Raises:
        UserError: one is missing.
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
        """Logs one line of metrics.jsonl; values that are not finite numbers stay in that file only."""
        numbers = {name: value for name, value in metrics.items() if _is_number(value)}
        for name, tracker in list(self.opened.items()):
            try:
                tracker.log(names_in(name, numbers, step), step=step)
            except Exception as error:
                self._give_up(name, error)

    def show(self, step: int, tables: Mapping[str, Table]) -> None:
        """Logs tables by name, as text in TensorBoard and as a file in MLflow, which have none."""
        for name, tracker in list(self.opened.items()):
            try:
                for title, (columns, rows) in tables.items():
                    _show(name, tracker, step, title, columns, rows)
            except Exception as error:
                self._give_up(name, error)

    def finish(self) -> None:
        """Closes all trackers, so that their data is on disk or sent."""
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
    """The numbers under the names that transformers' callback for this tracker uses.

    `eval_loss` becomes `eval/loss` and `loss` becomes `train/loss`; only MLflow keeps names unchanged. See
    `rewrite_logs` in
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
        run_name: name of the run in the trackers.
        output_dir: TensorBoard writes to its folder `runs`.
        settings: the configuration, shown with the curves.
        first_step: first step of a continued run; TensorBoard then hides later lines of an earlier run.
        progress: receives a note if a tracker fails later.

    Raises:
        UserError: one cannot start.
    """
    trackers = Trackers(progress=progress)
    for name in names:
        try:
            tracker = _tracker(name, run_name, output_dir, first_step)
            tracker.start()
            flat = _flat(settings)
            if name == "wandb":  # the x axis that transformers uses
                tracker.tracker.define_metric(_STEP)
                tracker.tracker.define_metric("*", step_metric=_STEP, step_sync=True)
            if name == "trackio":  # accelerate's method stores an argument of W&B's among the settings
                tracker.tracker.config.update(flat)
            else:
                tracker.store_init_configuration(flat)
            if name == "tensorboard":  # its page of hyperparameters has a column per setting
                tracker.tracker.add_text(
                    "configuration", _markdown(("setting", "value"), [(k, str(v)) for k, v in flat.items()]), first_step
                )
        except Exception as error:
            trackers.finish()
            raise UserError(
                f"the tracker {name} cannot start",
                code="tracker-failed",
                where="report_to",
                found=f"{type(error).__name__}: {error}"[:500],
                remedy="read its documentation (wandb needs a login or WANDB_MODE=offline), or drop it from report_to",
                exit_status=5,
            ) from error
        trackers.opened[name] = tracker
    return trackers


def _tracker(name: str, run_name: str, output_dir: Path, first_step: int) -> Any:
    from accelerate import PartialState, tracking

    PartialState()  # their methods run only in the first process, which this object identifies
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


def _show(
    name: str, tracker: Any, step: int, title: str, columns: Sequence[str], rows: Sequence[Sequence[str | float | None]]
) -> None:
    match name:
        case "tensorboard":
            tracker.tracker.add_text(title, _markdown(columns, rows), step)
        case "wandb":
            tracker.log_table(title, columns=list(columns), data=[list(row) for row in rows], step=step)
        case "mlflow":
            run = tracker.tracker.info.run_id
            import_module("mlflow").MlflowClient().log_text(run, _markdown(columns, rows), f"{title}.md")
        case _:
            cells = [dict(zip(columns, row, strict=True)) for row in rows]
            tracker.tracker.log({title: import_module("trackio").Table(data=cells)}, step=step)


# Characters that Markdown reads as emphasis, links, code, headings or the border of a cell.
_MARKUP = re.compile(r"([\\`*_{}\[\]#|!~])")


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown whose texts stay as they are."""

    def cell(value: Any) -> str:
        text = "" if value is None else str(value)
        return _MARKUP.sub(r"\\\1", escape(text, quote=False)).replace("\r", "").replace("\n", "<br>")

    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(
        f"| {' | '.join(str(text) if at == 1 else cell(text) for text in line)} |" for at, line in enumerate(lines)
    )


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Values that every tracker accepts: other types become text; None is left out."""
    plain = {name: value for name, value in settings.items() if value is not None}
    return {k: v if isinstance(v, bool | int | float | str) else json.dumps(v, default=str) for k, v in plain.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
