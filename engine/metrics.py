"""What a run reports: the field's names, one JSON object a line, and nothing in it that differs between two runs.

Timings are kept in a file of their own, so that the log of a resumed run equals the undisturbed one's byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dpoeng.engine.losses import PreferenceLoss

METRICS_FILE = "metrics.jsonl"
TIMINGS_FILE = "timings.jsonl"


def preference_metrics(parts: Sequence[PreferenceLoss], prefix: str = "") -> dict[str, float]:
    """Means over the pairs of several forwards, under the names that TRL gave them."""
    losses = torch.cat([part.losses.detach() for part in parts])
    chosen = torch.cat([part.chosen_rewards for part in parts])
    rejected = torch.cat([part.rejected_rewards for part in parts])
    values = {
        "loss": losses,
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).double(),
        "logps/chosen": torch.cat([part.chosen_logps for part in parts]),
        "logps/rejected": torch.cat([part.rejected_logps for part in parts]),
    }
    return {prefix + name: float(value.mean()) for name, value in values.items()}


class MetricsLog:
    """Appends to metrics.jsonl and timings.jsonl, and cuts both back to a step when a run goes on from there."""

    def __init__(self, folder: Path) -> None:
        self._metrics = folder / METRICS_FILE
        self._timings = folder / TIMINGS_FILE

    def rewind(self, step: int) -> None:
        """Drops every line of a later step, and a last line that a kill cut short."""
        for path in (self._metrics, self._timings):
            if path.is_file():
                kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= step]
                path.write_text("".join(kept), encoding="utf-8")

    def write(self, step: int, epoch: float, metrics: dict[str, float]) -> None:
        """One line of results."""
        _append(self._metrics, {"step": step, "epoch": round(epoch, 4), **metrics})

    def write_timing(self, step: int, timing: dict[str, float]) -> None:
        """One line of how long it took."""
        _append(self._timings, {"step": step, **timing})

    def read(self) -> list[dict[str, Any]]:
        """Every line of metrics.jsonl."""
        return [json.loads(line) for line in _whole_lines(self._metrics)] if self._metrics.is_file() else []


def _append(path: Path, record: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def _whole_lines(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").split("\n")
    return [line + "\n" for line in lines[:-1]]
