"""The tables that end a command."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from dpoeng.engine.train import TrainSummary

# metric name -> how many decimals are worth reading
_SHOWN = {
    "loss": 4,
    "rewards/accuracies": 3,
    "rewards/margins": 3,
    "rewards/chosen": 3,
    "rewards/rejected": 3,
    "logps/chosen": 1,
    "logps/rejected": 1,
}


def facts_table(facts: Sequence[tuple[str, str]]) -> Table:
    """Label and text, a line each."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in facts:
        table.add_row(label, text)
    return table


def metrics_table(summary: TrainSummary) -> Table:
    """First and last step, and the held-out pairs before and after."""
    held_out = bool(summary.eval_after)
    table = Table(title="metrics", title_justify="left", show_edge=False, pad_edge=False)
    table.add_column("")
    for heading in ("step 1", f"step {summary.steps}", *(("held out before", "held out after") if held_out else ())):
        table.add_column(heading, justify="right")
    for name, decimals in _SHOWN.items():
        cells = [summary.first.get(name), summary.last.get(name)]
        if held_out:
            cells += [summary.eval_before.get(f"eval_{name}"), summary.eval_after.get(f"eval_{name}")]
        table.add_row(name, *("" if value is None else f"{value:.{decimals}f}" for value in cells))
    return table
