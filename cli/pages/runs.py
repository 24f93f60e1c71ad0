"""Several runs on one page: curves together, settings that differ, and final results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from dpoeng.cache.words import counted
from dpoeng.cli.pages.charts import Curve, line_chart
from dpoeng.cli.pages.html import Html, page, paragraph, plots, section, table
from dpoeng.cli.pages.run import CHARTS, figure, step_unit
from dpoeng.cli.tables import Table
from dpoeng.engine.runs.reading import EVAL, RunRecord

# Metrics in the table of last evaluations, if a run has them.
_LAST = ("rewards/accuracies", "rewards/margins", "loss", "logps/chosen", "logps/rejected", "kl/chosen")


def runs_page(runs: Sequence[RunRecord], window: int | None = None) -> str:
    """The page of several runs.

    Args:
        runs: two to `charts.CURVES`, in the order of their names and colours.
        window: steps of each training curve's running mean; by default a twentieth of a long curve.
    """
    names = short_names(runs)
    parts: list[str] = [paragraph(_same_pairs(runs), "dim")]
    parts += section("Held-out pairs, last evaluation", table(last_table(runs, names)))
    parts += section("Settings that differ", table(_differences(runs, names)))
    note = (
        "By optimizer step. Solid lines are training, thick ones of long runs its running mean; dots and dashes are "
        "held-out pairs. Point at a curve for its values."
    )
    parts += section("Curves", paragraph(note, "dim"), plots(_charts(runs, names, window)))
    title = f"{counted(len(runs), 'run')}: {', '.join(names)}"
    return page(title, parts)


def short_names(runs: Sequence[RunRecord]) -> list[str]:
    """The folders' names, with as much of their paths as distinguishes them."""
    paths = [run.folder.resolve().parts for run in runs]
    for depth in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-depth:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    return [str(run.folder) for run in runs]


def last_table(runs: Sequence[RunRecord], names: Sequence[str]) -> Table:
    """One row per run: steps, held-out pairs, and its last evaluation's metrics with intervals."""
    last = [run.evaluations[-1] if run.evaluations else {} for run in runs]
    metrics = [metric for metric in _LAST if any(metric in found.get("metrics", {}) for found in last)]
    rows = []
    for run, name, found in zip(runs, names, last, strict=True):
        steps = f"{run.steps():,}" + ("" if run.complete else " so far")
        cells = [name, steps, f"{found['pairs']:,}" if "pairs" in found else ""]
        for metric in metrics:
            value = figure(metric, found.get("metrics", {}).get(metric))
            bounds = " to ".join(figure(metric, bound) for bound in found.get("intervals", {}).get(metric) or ())
            cells.append(f"{value} ({bounds})" if value and bounds else value)
        rows.append(cells)
    notes = ["In brackets: 95 % intervals over held-out prompts."] if metrics else []
    return Table(rows, ("run", "steps", "held-out pairs", *metrics), "", notes)


def _same_pairs(runs: Sequence[RunRecord]) -> str:
    """Whether the runs' held-out figures are comparable."""
    if len({_held_out(run) for run in runs}) == 1:
        return "All of these runs are evaluated on the same held-out pairs."
    return "These runs are evaluated on different held-out pairs: their figures are not comparable."


def _held_out(run: RunRecord) -> str:
    """What determines a run's held-out pairs: a separate set, or a share drawn by the seed."""
    identity, config = run.record.get("identity", {}), run.record.get("config", {})
    drawn = [identity.get("pairs"), config.get("eval_share"), config.get("seed")]
    return json.dumps(identity.get("eval_pairs") or drawn)


def _differences(runs: Sequence[RunRecord], names: Sequence[str]) -> Table:
    """One row per setting that differs, one column per run."""
    settings = [_settings(run) for run in runs]
    fields = dict.fromkeys(field for run_settings in settings for field in run_settings)
    rows = []
    for field in fields:
        values = [run_settings.get(field, "") for run_settings in settings]
        if len(set(values)) > 1:
            rows.append((field, *values))
    return Table(rows, ("", *names), words=1 + len(names))


def _settings(run: RunRecord) -> dict[str, str]:
    reference: dict[str, Any] = run.record.get("reference", {})
    config = {name: value for name, value in run.record.get("config", {}).items() if name != "output_dir"}
    settings = {**config, "model": run.record.get("model"), "reference": reference.get("spec")}
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in settings.items()}


def _charts(runs: Sequence[RunRecord], names: Sequence[str], window: int | None) -> list[Html]:
    """One chart per metric, with a colour per run, over the steps of the longest run."""
    across = (0.0, float(max(1, *(run.steps() for run in runs))))
    charted = [(metric, title, unit) for title, unit, metrics in CHARTS for metric in metrics]
    known = {metric for metric, _, _ in charted}
    others = dict.fromkeys(name for run in runs for name in run.names() if name not in known)
    charts = []
    for metric, title, unit in [*charted, *((name, name, "") for name in others)]:
        label = title if title in ("loss", "gradient norm", "learning rate") or "/" not in metric else metric
        curves = [
            curve
            for colour, (run, name) in enumerate(zip(runs, names, strict=True))
            for curve in _both(run, name, metric, colour, window)
        ]
        if curves:
            charts.append(line_chart(label, curves, unit=unit, x_range=across))
    if times := [point for run in runs for point in run.step_ms()]:
        unit = step_unit(times)
        scale = 1e-3 if unit == "s" else 1.0
        curves = [
            Curve(name, [(step, scale * ms) for step, ms in run.step_ms()], colour=colour, window=window)
            for colour, (run, name) in enumerate(zip(runs, names, strict=True))
        ]
        charts.append(line_chart("time of a step", curves, unit=unit, x_range=across))
    return charts


def _both(run: RunRecord, name: str, metric: str, colour: int, window: int | None) -> list[Curve]:
    exact = metric == "learning_rate"
    curves = []
    if points := run.curve(metric):
        curves.append(Curve(name, points, exact=exact, colour=colour, window=window))
    if points := run.curve(EVAL + metric):
        curves.append(Curve(name, points, dots=True, colour=colour))
    return curves
