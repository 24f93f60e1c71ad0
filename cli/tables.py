"""What ends a command: tables, and what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from dpoeng.engine.data.tokenization import TokenizedData

if TYPE_CHECKING:
    from dpoeng.engine.recipes.sweep import SweepPlan
    from dpoeng.engine.recipes.sweep_ranking import RunResult
    from dpoeng.engine.recipes.train import TrainSummary
    from dpoeng.engine.training.advice import Advice

# metric name -> how many decimals are worth reading
_SHOWN = {
    "loss": 4,
    "rewards/accuracies": 3,
    "rewards/margins": 3,
    "rewards/chosen": 3,
    "rewards/rejected": 3,
    "rewards/accuracies_length_controlled": 3,
    "rewards/margins_length_correlation": 2,
    "logps/chosen": 1,
    "logps/rejected": 1,
    "kl/chosen": 4,
    "kl/rejected": 4,
}

_OF_STEPS = [name for name in _SHOWN if not name.startswith("kl/") and "length" not in name]


def facts_table(facts: Sequence[tuple[str, str]]) -> Table:
    """Label and text, a line each."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in facts:
        table.add_row(label, text)
    return table


def command_line(*words: object) -> str:
    """A command of dpoeng that a shell takes as it stands, in bold."""
    return f"[bold]{escape(shlex.join(['dpoeng', *map(str, words)]))}[/]"


def metrics_table(summary: TrainSummary) -> Table:
    """First and last step, and the held-out pairs before and after."""
    held_out = bool(summary.eval_after)
    table = Table(title="metrics", title_justify="left", show_edge=False, pad_edge=False)
    table.add_column("")
    for heading in ("step 1", f"step {summary.steps}", *(("held out before", "held out after") if held_out else ())):
        table.add_column(heading, justify="right")
    for name in _OF_STEPS:
        decimals = _SHOWN[name]
        cells = [summary.first.get(name), summary.last.get(name)]
        if held_out:
            cells += [summary.eval_before.get(f"eval_{name}"), summary.eval_after.get(f"eval_{name}")]
        table.add_row(name, *("" if value is None else f"{value:.{decimals}f}" for value in cells))
    return table


def evaluation_table(evaluation: Mapping[str, Any]) -> Table:
    """Every metric of an evaluation with its interval."""
    table = Table(
        title="held out",
        title_justify="left",
        show_edge=False,
        pad_edge=False,
        caption="length_controlled: the mean of the accuracies where chosen is longer and where it is shorter. kl: per "
        "token, of the given responses.",
        caption_justify="left",
    )
    table.add_column("")
    table.add_column("mean", justify="right")
    table.add_column(f"{100 * evaluation['confidence']:.0f} % interval", justify="right")
    for name, decimals in _SHOWN.items():
        if name in evaluation["metrics"]:
            table.add_row(name, f"{evaluation['metrics'][name]:.{decimals}f}", _interval(evaluation, name, decimals))
    return table


def group_tables(evaluation: Mapping[str, Any]) -> list[Table]:
    """Accuracy and margin by the values of each column."""
    tables = []
    for column, groups in evaluation["groups"].items():
        table = Table(title=f"by {column}", title_justify="left", show_edge=False, pad_edge=False)
        table.add_column("")
        for heading in ("pairs", "accuracy", "interval", "margin", "interval"):
            table.add_column(heading, justify="right")
        for label, group in groups.items():
            cells = []
            for name in ("rewards/accuracies", "rewards/margins"):
                decimals = _SHOWN[name]
                cells += [f"{group['metrics'][name]:.{decimals}f}", _interval(group, name, decimals)]
            table.add_row(label, f"{group['pairs']:,}", *cells)
        tables.append(table)
    return tables


def advice_text(advice: Sequence[Advice]) -> str:
    """Remarks, a paragraph each; empty if there is none."""
    return "".join(f"\n[yellow]{remark.code}[/]: {remark.seen}\n  try: {remark.remedy}\n" for remark in advice)


def _interval(part: Mapping[str, Any], name: str, decimals: int) -> str:
    low, high = part["intervals"].get(name, (None, None))
    return "" if low is None else f"{low:.{decimals}f} to {high:.{decimals}f}"


_NOTES = {
    "truncated": "truncated",
    "merged": "with other prompt tokens before a response than alone",
    "unshared": "with last prompt tokens that differ between the sides",
    "duplicates": "duplicate",
    "contradictions": "the other way round in an earlier pair",
    "separate": "responses tokenised apart from their prompt (the tokenizer gives no offsets)",
}


def length_table(data: TokenizedData) -> Table:
    """Tokens of prompt, responses and pair, with a caption that counts whatever was not as usual."""
    table = Table(title="tokens", title_justify="left", show_edge=False, pad_edge=False, caption_justify="left")
    table.add_column("")
    for heading in ("pairs", "mean", "p50", "p95", "max"):
        table.add_column(heading, justify="right")
    for part, lengths in data.counts.lengths.items():
        numbers = (lengths.p50, lengths.p95, lengths.max)
        table.add_row(part, f"{lengths.count:,}", f"{lengths.mean:,.1f}", *(f"{number:,}" for number in numbers))
    notes = [f"{getattr(data.counts, name):,} {text}" for name, text in _NOTES.items() if getattr(data.counts, name)]
    if data.rejects:
        notes.append(f"{len(data.rejects):,} left out")
    table.caption = ", ".join(notes) or None
    return table


def result_rows(plan: SweepPlan, results: Sequence[RunResult]) -> list[tuple[str, ...]]:
    """Of each run: what is varied, its value, its difference from the best run, and a word on it."""
    rows = []
    for place, result in enumerate(results):
        values = tuple(result.values[field] for field in plan.vary)
        if result.value is None:
            rows.append((*values, "", "", "", "", result.state))
            continue
        word = "best" if place == 0 else "differs" if result.differs else "not told apart"
        rows.append(
            (
                *values,
                f"{result.value:.4g}",
                _bounds((result.intervals or {}).get(plan.rank_by)),
                "" if result.difference is None else f"{result.difference:+.4g}",
                _bounds(result.difference_interval, sign=True),
                word,
            )
        )
    return rows


def _bounds(bounds: tuple[float, float] | None, *, sign: bool = False) -> str:
    form = "{:+.3g} to {:+.3g}" if sign else "{:.3g} to {:.3g}"
    return form.format(*bounds) if bounds else ""
