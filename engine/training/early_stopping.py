"""The best evaluation so far, and when to stop waiting for a better one. Part of every checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from dpoeng.cache.errors import UserError


@dataclass(frozen=True, slots=True)
class Best:
    """Best evaluation after step 0.

    Attributes:
        step: step of the best one, or None before the first.
        value: its value of the metric.
        earlier: the previous best step; its checkpoint is kept too, in case the newest is damaged.
        waited: evaluations since the best one.
    """

    step: int | None = None
    value: float | None = None
    earlier: int | None = None
    waited: int = 0

    def record(self) -> dict[str, Any]:
        """The state as JSON values."""
        return asdict(self)

    @property
    def kept(self) -> frozenset[int]:
        """Steps whose checkpoints must stay."""
        return frozenset(step for step in (self.step, self.earlier) if step is not None)


def watched(metrics: Mapping[str, float], name: str | None) -> float:
    """The metric to watch, by its name with or without `eval_`; the loss if no name is given.

    Raises:
        UserError: there is no such metric.
    """
    key = "eval_" + (name or "loss").removeprefix("eval_")
    if key not in metrics:
        raise UserError(
            f"unknown metric {name}",
            code="config-value",
            where="--metric-for-best-model",
            expected=", ".join(known.removeprefix("eval_") for known in metrics),
            found=str(name),
            remedy="name one of these",
        )
    return metrics[key]


def more_is_better(name: str | None, configured: bool | None) -> bool:
    """Whether a larger metric is better: as configured, else True except for a loss or a KL."""
    if configured is not None:
        return configured
    return not any(part in (name or "loss") for part in ("loss", "kl/"))


def updated(best: Best, step: int, value: float, *, greater: bool, threshold: float) -> Best:
    """The state after an evaluation. As in transformers' EarlyStoppingCallback, `threshold` must be exceeded."""
    gain = 0.0 if best.value is None else (value - best.value if greater else best.value - value)
    if best.value is None or gain > threshold:
        return Best(step=step, value=value, earlier=best.step, waited=0)
    return replace(best, waited=best.waited + 1)
