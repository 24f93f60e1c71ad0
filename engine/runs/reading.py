"""Reads a run's output folder: run.json, metrics.jsonl, timings.jsonl and samples.

Also reads a run that is still going. Independent of how it is displayed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpoeng.cache.errors import UserError
from dpoeng.engine.runs.folder import ADAPTER_FOLDER, ADVICE_FILE, MODEL_FOLDER, RUN_FILE, SAMPLES_FILE, has_result
from dpoeng.engine.runs.metrics import EVALUATIONS_FILE, HELD_OUT_FILE, METRICS_FILE, TIMINGS_FILE, read_lines

EVAL = "eval_"

JUDGE_FOLDER = "judge"
JUDGEMENT_FILE = "judgement.json"
JUDGED_FILE = "judged.jsonl"
"""Where `dpoeng judge` writes in the folder of a run: its figures, and a line per prompt."""

Points = list[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A run as stored on disk.

    Attributes:
        folder: as the user named it.
        record: run.json.
        metrics: the lines of metrics.jsonl, each with `step` and `epoch`; evaluations' names begin with `eval_`.
        timings: the lines of timings.jsonl.
        samples: the lines of samples.jsonl, each with texts by name; empty without the file.
        complete: whether the result exists: the trained adapter, or the checkpoint.
        advice: the remarks of advice.json.
        evaluations: the lines of evaluations.jsonl, with intervals and groups.
        judgement: the figures of `dpoeng judge`; empty if it has not judged this run.
        judged: its prompts, each with both answers and the better one.
        judged_before: whether the result was written after that, so that another policy was judged.
    """

    folder: Path
    record: dict[str, Any]
    metrics: list[dict[str, Any]]
    timings: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    complete: bool = False
    advice: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    judgement: dict[str, Any] = field(default_factory=dict)
    judged: list[dict[str, Any]] = field(default_factory=list)
    judged_before: bool = False

    def names(self) -> list[str]:
        """Every numeric metric, without `eval_`, in the order of first occurrence."""
        seen: dict[str, None] = {}
        for line in self.metrics:
            for name, value in line.items():
                if name not in ("step", "epoch") and isinstance(value, int | float):
                    seen.setdefault(name.removeprefix(EVAL))
        return list(seen)

    def curve(self, name: str) -> Points:
        """(step, value) of a metric; values that are not numbers become nan."""
        return _points(self.metrics, name)

    def step_ms(self) -> Points:
        """(step, milliseconds)."""
        return _points(self.timings, "step_ms")

    def steps(self) -> int:
        """Steps done so far."""
        return max((int(line["step"]) for line in self.metrics), default=0)

    def steps_timed(self) -> int:
        """Steps done so far, including those that are not logged."""
        return max([self.steps(), *(int(step) for step, _ in self.step_ms())])

    @property
    def total_steps(self) -> int | None:
        """Total steps of the run; None in older records."""
        total = self.record.get("total_steps")
        return total if isinstance(total, int) else None

    def recent_step_s(self, count: int = 20) -> float | None:
        """Mean seconds of the last steps; None before the first."""
        recent = [ms for _, ms in self.step_ms()[-count:]]
        return sum(recent) / len(recent) / 1e3 if recent else None

    def peak_bytes(self) -> int | None:
        """Peak memory of the GPU, or else of the process; None if no step recorded it."""
        peaks = [line["peak_bytes"] for line in self.timings if isinstance(line.get("peak_bytes"), int)]
        return max(peaks, default=None)

    def warnings(self) -> list[tuple[str, str]]:
        """Remarks on the curves: (observation, advice)."""
        return [(str(remark.get("seen", remark)), str(remark.get("remedy", ""))) for remark in self.advice]


def read_run(folder: Path) -> RunRecord:
    """Reads an output folder of `dpoeng train`.

    Raises:
        UserError: it is not one, or a file in it is damaged.
    """
    path = folder / RUN_FILE
    if not path.is_file():
        raise UserError(
            "no run in this folder",
            code="run-not-found",
            where=str(folder),
            expected=f"{RUN_FILE}, which dpoeng train writes at its start",
            found="no such folder" if not folder.is_dir() else "a folder without it",
            remedy="name the --output-dir of a run",
        )
    judgement = folder / JUDGE_FOLDER / JUDGEMENT_FILE
    judged = judgement.is_file()
    return RunRecord(
        folder=folder,
        record=read_json(path, dict),
        metrics=read_lines(folder / METRICS_FILE),
        timings=read_lines(folder / TIMINGS_FILE),
        samples=read_lines(folder / SAMPLES_FILE),
        complete=has_result(folder),
        advice=read_json(folder / ADVICE_FILE, list) if (folder / ADVICE_FILE).is_file() else [],
        evaluations=read_lines(folder / EVALUATIONS_FILE),
        judgement=read_json(judgement, dict) if judged else {},
        judged=read_lines(judgement.with_name(JUDGED_FILE)) if judged else [],
        judged_before=judged and _written_later(folder, judgement),
    )


def _written_later(folder: Path, file: Path) -> bool:
    """Whether the run's result is newer than a file."""
    results = [folder / name for name in (ADAPTER_FOLDER, MODEL_FOLDER) if (folder / name).is_dir()]
    return any(result.stat().st_mtime > file.stat().st_mtime for result in results)


def read_held_out(folder: Path) -> list[dict[str, Any]]:
    """A run's held-out pairs, with the values of its saved adapter; empty without any.

    Raises:
        UserError: the file is damaged.
    """
    return read_lines(folder / HELD_OUT_FILE)


def read_json(path: Path, kind: type, needed: Iterable[str] = ()) -> Any:
    """Reads a JSON record of a run and checks its type.

    Raises:
        UserError: it is damaged, or run.json lacks a `needed` field or has one of another type than written.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, kind):
            raise ValueError(f"not a JSON {'object' if kind is dict else 'array'}")
        if isinstance(content, dict):
            _check_fields(content, needed)
    except (ValueError, OSError, RecursionError) as error:
        raise _damaged(path, str(error)) from error
    return content


_FIELDS = {
    **dict.fromkeys(("config", "reference", "identity", "parity", "versions", "files"), dict),
    **dict.fromkeys(("model", "adapter_mode", "sft_adapter"), str),
    "load": list,
}


def _check_fields(record: Mapping[str, Any], needed: Iterable[str]) -> None:
    for name in needed:
        if record.get(name) is None:
            raise ValueError(f"no field {name!r}")
    for name, kind in _FIELDS.items():
        value = record.get(name)
        if value is None and (name in ("parity", "sft_adapter", "files", "versions", "load") or name not in record):
            continue
        if not isinstance(value, kind):
            raise ValueError(f"{name!r} is a {type(value).__name__}, not a {kind.__name__}")


def _points(lines: Iterable[dict[str, Any]], name: str) -> Points:
    pairs = ((line.get("step"), line.get(name)) for line in lines)
    return [
        (float(step), math.nan if value is None else float(value))
        for step, value in pairs
        if isinstance(step, int | float) and isinstance(value, int | float)
    ]


_REMEDIES = {
    RUN_FILE: "train again in another folder (--output-dir), or in this one with --no-resume",
    JUDGEMENT_FILE: f"remove {JUDGEMENT_FILE}, and run dpoeng judge again: it asks only what is missing",
    ADVICE_FILE: f"remove {ADVICE_FILE}: it contains remarks on the run, and nothing depends on it",
}


def _damaged(path: Path, problem: str) -> UserError:
    return UserError(
        "a file of the run is damaged",
        code="run-damaged",
        where=str(path),
        found=problem,
        remedy=_REMEDIES[path.name],
        exit_status=3,
    )
