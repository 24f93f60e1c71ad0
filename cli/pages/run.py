"""A run: tables of its metrics, and an HTML page that adds curves, configuration, hashes and samples."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dpoeng.cache.words import counted, number
from dpoeng.cli.pages.charts import Curve, line_chart
from dpoeng.cli.pages.html import Html, cards, details, heading, page, paragraph, plots, pre, section, table, tag, text
from dpoeng.cli.rounds.judgement import judgement_table
from dpoeng.cli.tables import Table, accuracy_line, facts_table, interval
from dpoeng.engine.config.fields import TrainConfig
from dpoeng.engine.runs.reading import EVAL, JUDGED_FILE, Points, RunRecord

# Charts, the most important first: (title, unit, metrics). Every other metric gets its own chart.
CHARTS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("loss", "nats", ("loss",)),
    ("reward accuracy", "share of pairs", ("rewards/accuracies",)),
    ("best response first", "share of rows", ("rewards/top_accuracies",)),
    ("reward margin", "beta × nats", ("rewards/margins",)),
    ("rewards", "beta × nats", ("rewards/chosen", "rewards/rejected", "rewards/threshold")),
    ("log-probs", "nats a response", ("logps/chosen", "logps/rejected")),
    ("KL to the reference", "an estimate", ("kl/chosen", "kl/rejected")),
    ("gradient norm", "before clipping", ("grad_norm",)),
    ("learning rate", "", ("learning_rate",)),
    ("reward accuracy, length-controlled", "share of pairs", ("rewards/accuracies_length_controlled",)),
    ("reward margin and length", "correlation", ("rewards/margins_length_correlation",)),
)
_PARITY = {
    "mean_diff": "mean difference, nats per token",
    "max_diff": "largest difference, nats per token",
    "reward_noise": "noise of rewards, beta × nats",
    "tolerance": "largest allowed mean difference, nats per token",
    "noise": "these pairs alone and packed, nats per token",
}
_CHARTED = {name for _, _, names in CHARTS for name in names}

# metric -> the format that shows its meaningful digits
_FORMATS = {
    "loss": ".4f",
    "rewards/accuracies": ".3f",
    "rewards/top_accuracies": ".3f",
    "rewards/margins": ".3f",
    "rewards/chosen": ".3f",
    "rewards/rejected": ".3f",
    "rewards/accuracies_length_controlled": ".3f",
    "rewards/margins_length_correlation": ".2f",
    "logps/chosen": ".1f",
    "logps/rejected": ".1f",
    "kl/chosen": ".4f",
    "kl/rejected": ".4f",
    "rewards/threshold": ".3f",
}
_JUDGED_AT_MOST = 20
_OF_STEPS = [name for name in _FORMATS if not name.startswith("kl/") and "length" not in name]

Metrics = Mapping[str, float]


def report_page(run: RunRecord, window: int | None = None) -> str:
    """The page of a run.

    Args:
        run: the run, complete or not.
        window: steps of each curve's running mean; by default a twentieth of a long curve.
    """
    reference = run.record.get("reference", {})
    state = "complete" if run.complete else f"not complete: {counted(run.steps(), 'step')} so far"
    subtitle = f"{run.record.get('model', '')} on view {reference.get('view', '?')}, {state}"
    parts: list[str] = [cards(_cards(run))]
    warnings = run.warnings()
    if warnings:
        parts.append(heading("Warnings"))
        for seen, remedy in warnings:
            inner = f"{tag('warning')} {text(seen)}" + (paragraph(f"Remedy: {remedy}", "dim") if remedy else "")
            parts.append(Html(f'<div class="finding warning">{inner}</div>'))
    if charts := _charts(run, window):
        parts += [heading("Curves"), _note(run), plots(charts)]
    parts += section("First and last", _summary(run))
    evaluations = [line for line in run.metrics if any(name.startswith(EVAL) for name in line)]
    parts += section("Evaluations", _evaluations(evaluations))
    if run.evaluations:
        last = run.evaluations[-1]
        parts += section("The last evaluation", *map(table, (evaluation_table(last), *group_tables(last))))
    parts += section("Answers before and after, judged", *_judgement(run))
    parts += section("Samples", *map(_sample, run.samples))
    parts += [heading("Configuration"), configuration(run.record.get("config", {})), *_identity(run)]
    return page(f"Run {run.folder.name or run.folder}", parts, subtitle)


def _cards(run: RunRecord) -> list[tuple[str, str]]:
    facts = [("steps", f"{run.steps():,}")]
    for label, name, form in (
        ("held-out accuracy", f"{EVAL}rewards/accuracies", "{:.1%}"),
        ("held-out margin", f"{EVAL}rewards/margins", "{:.3f}"),
        ("held-out loss", f"{EVAL}loss", "{:.4f}"),
    ):
        points = run.curve(name)
        if points:
            first = f", at first {form.format(points[0][1])}" if len(points) > 1 else ""
            facts.append((f"{label}{first}{_pairs_behind(run)}", form.format(points[-1][1])))
    if not run.curve(f"{EVAL}loss"):
        for label, name in (("loss", "loss"), ("accuracy", "rewards/accuracies"), ("margin", "rewards/margins")):
            if points := run.curve(name):
                facts.append((label, number(points[-1][1])))
    if times := run.step_ms():
        facts.append(("median step", _duration(_median(times))))
        facts.append(("all steps", _duration(sum(ms for _, ms in times))))
    return facts


def _pairs_behind(run: RunRecord) -> str:
    """The number of pairs behind a held-out figure, in words."""
    pairs = run.evaluations[-1].get("pairs") if run.evaluations else None
    return f" (n = {pairs:,} pairs)" if pairs else ""


def _duration(ms: float) -> str:
    seconds = ms / 1000
    if seconds < 1:
        return f"{ms:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _note(run: RunRecord) -> Html:
    smooth = " Thin lines are single steps, thick ones their running mean." if len(run.metrics) > 60 else ""
    return paragraph(
        f"By optimizer step; dots and dashes are held-out pairs.{smooth} Point at a curve for its values.", "dim"
    )


def _charts(run: RunRecord, window: int | None) -> list[Html]:
    """The known charts that have values, then one for each other metric, then the time per step."""
    charts = []
    across = (0.0, float(max(run.steps(), 1)))
    for title, unit, names in CHARTS:
        if len(names) == 1:
            curves = _curves(run, names[0], window)
        else:
            curves = [
                Curve(f"{name.rsplit('/', 1)[-1]}{suffix}", points, dots=bool(suffix), colour=colour, window=window)
                for colour, name in enumerate(names)
                for prefix, suffix in (("", ""), (EVAL, ", held out"))
                if (points := run.curve(prefix + name))
            ]
        if curves:
            charts.append(line_chart(title, curves, unit=unit, x_range=across))
    others = ((name, _curves(run, name, window)) for name in run.names() if name not in _CHARTED)
    charts += [line_chart(name, curves, x_range=across) for name, curves in others if curves]
    if times := run.step_ms():
        charts.append(line_chart("time of a step", [_in_seconds(times, window)], unit=step_unit(times), x_range=across))
    return charts


def step_unit(times: Points) -> str:
    """Seconds if a step takes at least one, else milliseconds."""
    return "s" if _median(times) >= 1000 else "ms"


def _in_seconds(times: Points, window: int | None) -> Curve:
    scale = 1e-3 if step_unit(times) == "s" else 1.0
    return Curve("step", [(step, scale * ms) for step, ms in times], window=window)


def _median(times: Points) -> float:
    ordered = sorted(ms for _, ms in times)
    return ordered[len(ordered) // 2]


def _curves(run: RunRecord, name: str, window: int | None) -> list[Curve]:
    """A metric in training and on held-out pairs."""
    curves = []
    if points := run.curve(name):
        curves.append(Curve("training", points, exact=name == "learning_rate", window=window))
    if points := run.curve(EVAL + name):
        curves.append(Curve("held out", points, dots=True, colour=1))
    return curves


def _summary(run: RunRecord) -> Html:
    """Every metric at the first and the last step and evaluation."""
    points = [
        {name: curve[place][1] for name in run.names() if (curve := run.curve(prefix + name))}
        for prefix in ("", EVAL)
        for place in (0, -1)
    ]
    return table(metrics_table(("first step", "last step", "held out, first", "held out, last"), points, run.names()))


def metrics_table(heads: Sequence[str], columns: Sequence[Metrics], names: Iterable[str] = _OF_STEPS) -> Table:
    """Metrics by name, with a column for each of `columns`; rows and columns without values are left out."""
    nonempty = [(head, column) for head, column in zip(heads, columns, strict=True) if column]
    rows = [(name, *(figure(name, column.get(name)) for _, column in nonempty)) for name in names]
    return Table([row for row in rows if any(row[1:])], ("", *(head for head, _ in nonempty)))


def figure(name: str, value: float | None) -> str:
    """A metric with its meaningful digits; what rounds to zero has no sign."""
    return "" if value is None else f"{value:z{_FORMATS[name]}}" if name in _FORMATS else number(value)


def _evaluations(lines: list[dict[str, Any]]) -> Html:
    """One row per evaluation; values that are not numbers (intervals, categories) are only in metrics.jsonl."""
    names = [
        name for name in dict.fromkeys(key for line in lines for key in line if key.startswith(EVAL))
        if all(isinstance(line.get(name, 0), int | float) for line in lines)
    ]  # fmt: skip
    head = ("step", *(name.removeprefix(EVAL) for name in names))
    rows = [(str(line["step"]), *(number(line[name]) if name in line else "" for name in names)) for line in lines]
    return table(Table(rows, head))


def evaluation_table(record: Mapping[str, Any]) -> Table:
    """The metrics of an evaluation with their intervals."""
    metrics, intervals = record["metrics"], record.get("intervals", {})
    names = [*(name for name in _FORMATS if name in metrics), *(name for name in intervals if name not in _FORMATS)]
    rows = [(name, figure(name, metrics[name]), _bounds(intervals, name)) for name in names]
    explained = "length_controlled: the mean of two accuracies, for chosen longer and for chosen shorter. "
    shown = any(name.endswith("length_controlled") for name in names)
    return Table(
        rows,
        ("", "mean", f"{100 * record.get('confidence', 0.95):.0f} % interval"),
        f"held out: {record.get('pairs', '?')} pairs",
        [
            *([f"{line}. "] if (line := accuracy_line(record)) else []),
            explained * shown + "kl: per token, on the given responses.",
        ],
    )


def group_tables(record: Mapping[str, Any]) -> list[Table]:
    """Metrics with intervals for each value of the grouping columns."""
    tables = []
    for column, groups in record.get("groups", {}).items():
        names = [
            name
            for name in dict.fromkeys(name for group in groups.values() for name in group["metrics"])
            if name in ("rewards/accuracies", "rewards/margins")
        ]
        rows = [
            (
                value,
                f"{group['pairs']:,}",
                *(
                    text
                    for name in names
                    for text in (figure(name, group["metrics"].get(name)), _bounds(group["intervals"], name))
                ),
            )
            for value, group in groups.items()
        ]
        heads = (text for name in names for text in (name.removeprefix("rewards/"), "interval"))
        if rows:
            tables.append(Table(rows, ("", "pairs", *heads), f"by {column}"))
    return tables


def _bounds(intervals: Mapping[str, Sequence[float]], name: str) -> str:
    return interval(intervals.get(name), _FORMATS.get(name, ".4g"))


def _judgement(run: RunRecord) -> list[Html]:
    """The figures of `dpoeng judge`, and the first of its answers."""
    if not run.judgement:
        return []
    old = "The run was trained further since: these are answers of an earlier policy. Run dpoeng judge again."
    count = len(run.judged)
    more = (
        f"The first {_JUDGED_AT_MOST} of {count:,} prompts; judge/{JUDGED_FILE} has all."
        if count > _JUDGED_AT_MOST
        else ""
    )
    return [
        *([paragraph(old, "bad")] if run.judged_before else []),
        table(judgement_table(run.judgement)),
        *map(_judged, run.judged[:_JUDGED_AT_MOST]),
        *([paragraph(more, "dim")] if more else []),
    ]


def _judged(line: Mapping[str, Any]) -> Html:
    verdict = {"after": "better after", "before": "better before"}.get(line["better"], line["better"])
    shown = {"prompt": line["prompt"], "before training": line["before"], "after training": line["after"]}
    if line.get("why"):
        shown["instead of a verdict"] = line["why"]
    return details(f"{verdict}: {str(line['prompt']).strip()[:120]}", _texts(shown))


def _texts(texts: Mapping[str, Any]) -> Html:
    """Texts with their names."""
    return Html(
        "".join(
            f"<h3>{text(str(name))}</h3>{pre(value if isinstance(value, str) else json.dumps(value))}"
            for name, value in texts.items()
        )
    )


def _sample(sample: dict[str, Any]) -> Html:
    title = str(sample.get("prompt", ""))[:120] or "sample"
    return details(title, _texts(sample))


def configuration(config: Mapping[str, Any]) -> Html:
    """The fields that were set, and in a collapsed part those at their defaults."""
    default = {
        name: json.dumps(value) for name, value in TrainConfig.model_validate({}).model_dump(mode="json").items()
    }
    rows = {name: json.dumps(value) for name, value in config.items()}
    changed = {name: value for name, value in rows.items() if value != default.get(name)}
    at_default = [(name, value) for name, value in rows.items() if name not in changed]
    unchanged = paragraph("All fields have their defaults.", "dim")
    set_table = table(facts_table(list(changed.items()))) if changed else unchanged
    return Html(
        set_table
        + (
            details(f"{counted(len(at_default), 'field')} at their default", table(facts_table(at_default)))
            if at_default
            else ""
        )
    )


def _identity(run: RunRecord) -> list[str]:
    record, reference = run.record, run.record.get("reference", {})
    facts = [("reference", reference.get("spec")), ("SFT adapter", record.get("sft_adapter"))]
    facts += [(name, reference.get(name)) for name in ("model", "revision", "quantization", "dtype", "layout")]
    identity = record.get("identity", {})
    facts += [("pairs", identity.get("pairs")), ("evaluation pairs", identity.get("eval_pairs"))]
    facts += [(f"file {name}", digest) for name, digest in (record.get("files") or {}).items()]
    parity = record.get("parity") or {}
    parts = section("Reference and data", table(facts_table([(name, str(value)) for name, value in facts if value])))
    rows = [(_PARITY.get(name, name), number(value)) for name, value in parity.items()]
    parts += section("Policy against cache, before the first step", table(Table(rows)))
    versions = dict(record.get("versions") or {})
    versions |= {name: record[name] for name in ("python", "platform", "device") if name in record}
    parts += section("Versions", table(facts_table([(name, str(value)) for name, value in versions.items()])))
    if record.get("load"):
        parts += [heading("Load the adapter"), pre("\n".join(record["load"]))]
    return parts
