"""The report at the end of phase two, for a run just done or, from its records, a finished one. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpoeng.engine.config.fields import Mode, TrainConfig
from dpoeng.engine.runs.folder import RUN_FILE, result_folder
from dpoeng.engine.runs.metrics import MetricsLog
from dpoeng.engine.runs.reading import read_json
from dpoeng.engine.training.advice import Advice, advise
from dpoeng.engine.training.early_stopping import Best

if TYPE_CHECKING:
    from dpoeng.engine.recipes.inputs import Inputs
    from dpoeng.engine.reference.parity import ParityReport
    from dpoeng.engine.runs.checkpoint import Finished


@dataclass(slots=True)
class TrainSummary:
    """Result of phase two. Of several processes only one `reports`; the others have no results.

    `result` is the folder of the trained adapter, or in full fine-tuning (mode `full`) of the trained checkpoint.
    `loaded` says, with `fsdp`, how the processes got their shares of the base. `load` are Python lines that load the
    result.
    """

    output_dir: Path
    result: Path
    steps: int
    resumed_from: int
    train_pairs: int
    eval_pairs: int
    trainable: int
    mode: str
    parity: ParityReport | None
    layout: str
    layout_reason: str
    device: str
    processes: int = 1
    loaded: str = ""
    reports: bool = True
    first: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    eval_before: dict[str, float] = field(default_factory=dict)
    eval_after: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    peak_bytes: int | None = None
    predicted_bytes: int | None = None
    layers_read_bytes: int | None = None
    already_complete: bool = False
    planned_steps: int = 0
    best: Best = field(default_factory=Best)
    evaluation: dict[str, Any] = field(default_factory=dict)
    advice: list[Advice] = field(default_factory=list)
    load: list[str] = field(default_factory=list)


def finished_summary(
    config: TrainConfig, inputs: Inputs, mode: Mode, finished: Finished, *, processes: int = 1, reports: bool = True
) -> TrainSummary:
    """The summary of an already complete run, from its records."""
    summary = TrainSummary(
        output_dir=config.output_dir,
        result=result_folder(config.output_dir, mode),
        steps=finished.step,
        resumed_from=finished.step,
        train_pairs=len(inputs.train_rows),
        eval_pairs=len(inputs.held_out.rows),
        trainable=finished.trained,
        mode=mode,
        parity=None,
        layout="",
        layout_reason="",
        device="",
        processes=processes,
        reports=reports,
        already_complete=True,
        best=Best(**finished.state.get("best", {})),
    )
    add_results(summary, MetricsLog(config.output_dir), config)
    return summary


def add_results(summary: TrainSummary, log: MetricsLog, config: TrainConfig) -> None:
    """Adds the first and last metrics, the evaluation of the saved weights, and all remarks."""
    lines = log.read()
    steps = [line for line in lines if "loss" in line]
    evals = [line for line in lines if "eval_loss" in line]
    summary.first, summary.last = (steps[0], steps[-1]) if steps else ({}, {})
    summary.load = read_json(config.output_dir / RUN_FILE, dict).get("load") or []
    full = log.read_evaluations()
    saved = summary.best.step if config.load_best_model_at_end else None
    evals_of_saved = [line for line in evals if line["step"] == saved] or evals
    summary.eval_before, summary.eval_after = (evals[0], evals_of_saved[-1]) if evals else ({}, {})
    summary.evaluation = ([line for line in full if line["step"] == saved] or full or [{}])[-1]
    summary.advice = advise(
        steps, evals, loss_type=config.loss_type, beta=config.beta, held_out_pairs=summary.eval_pairs
    )
