"""The runs of a sweep: their ranking as a table, and an HTML page that adds curves, other metrics and failures."""

from __future__ import annotations

from collections.abc import Sequence

from dpoeng.cache.words import counted, number
from dpoeng.cli.pages.charts import Curve, interval_chart, line_chart
from dpoeng.cli.pages.html import Html, cards, heading, page, paragraph, plots, pre, table, tag, text
from dpoeng.cli.pages.run import configuration
from dpoeng.cli.tables import Table, interval
from dpoeng.engine.recipes.sweeps.plan import SweepPlan
from dpoeng.engine.recipes.sweeps.ranking import RunResult, verdict
from dpoeng.engine.runs.reading import EVAL, read_run

CURVES = 6  # as many as there are colours
_OTHERS = ("rewards/accuracies", "rewards/margins", "loss", "logps/chosen", "logps/rejected", "kl/chosen")


def sweep_page(plan: SweepPlan, results: Sequence[RunResult]) -> str:
    """The page of a sweep, which may still be running."""
    done = [result for result in results if result.value is not None]
    varied = ", ".join(f"{field}: {' '.join(values)}" for field, values in plan.vary.items())
    parts: list[str] = [_cards(plan, results), paragraph(verdict(results))]
    parts += [heading("Ranking"), table(ranking_table(plan, results))]
    parts.append(
        paragraph(
            "Intervals are over held-out prompts. The difference from the best run is computed pair by pair; a run "
            "differs if its interval excludes 0. Intervals show what other held-out prompts would change, not "
            "what another seed would; and if many runs are compared with the best, one in twenty differs by chance.",
            "dim",
        )
    )
    if len(done) > 1:
        parts.append(plots(_charts(plan, done)))
        parts += [heading("Other metrics of the same evaluations"), _other_metrics(done)]
    failed = [result for result in results if result.state == "failed"]
    if failed:
        parts.append(heading("Failed"))
        parts += [
            Html(f'<div class="finding error">{tag("error")} {text(result.name)}{pre(result.error)}</div>')
            for result in failed
        ]
    common = plan.points[0].config.model_dump(mode="json", exclude={*plan.vary, "output_dir"})
    parts += [heading("Common settings"), configuration(common)]
    return page(f"Sweep {plan.root.name}", parts, f"{counted(len(results), 'run')} over {varied}")


def ranking_table(plan: SweepPlan, results: Sequence[RunResult], title: str = "") -> Table:
    """One row per run, best first: varied values, its value, its difference from the best run, and a verdict."""
    rows = []
    for place, result in enumerate(results):
        values = tuple(result.values[field] for field in plan.vary)
        if result.value is None:
            early, metrics = result.state == "ended early", result.metrics or {}
            at_rung = number(metrics[plan.rank_by]) if early and plan.rank_by in metrics else ""
            bounds = interval((result.intervals or {}).get(plan.rank_by), ".3g") if early else ""
            state = f"ended early, after step {result.step}" if early else result.state
            rows.append((*values, at_rung, bounds, "", "", state))
            continue
        word = "best" if place == 0 else "differs" if result.differs else "no difference found"
        rows.append(
            (
                *values,
                number(result.value),
                interval((result.intervals or {}).get(plan.rank_by), ".3g"),
                "" if result.difference is None else f"{result.difference:+.4g}",
                interval(result.difference_interval, "+.3g"),
                word,
            )
        )
    return Table(
        rows, (*plan.vary, plan.rank_by, "95 % interval", "from the best", "95 % interval", ""), title, words=0
    )


def _cards(plan: SweepPlan, results: Sequence[RunResult]) -> Html:
    states = [result.state for result in results]
    facts = [("complete", f"{states.count('complete')} of {len(results)}")]
    if states.count("ended early"):
        facts.append(("ended early", str(states.count("ended early"))))
    if states.count("failed"):
        facts.append(("failed", str(states.count("failed"))))
    if results and results[0].value is not None:
        facts += [
            ("best run", _spaced(results[0].name)),
            (f"its held-out {plan.rank_by} (n = {results[0].pairs:,} pairs)", number(results[0].value)),
        ]
    return cards(facts)


def _spaced(name: str) -> str:
    """A run's name with places where a line may break."""
    return name.replace(",", ", ")


def _charts(plan: SweepPlan, done: Sequence[RunResult]) -> list[Html]:
    name = plan.rank_by
    rows = [
        (result.name, result.difference, *result.difference_interval)
        for result in done
        if result.difference is not None and result.difference_interval is not None
    ]
    charts = [interval_chart(f"{name}, from {done[0].name}", rows)] if rows else []
    for field, values in plan.vary.items():
        if len(values) > 1 and all(_is_number(value) for value in values):
            charts.append(line_chart(f"{name} by {field}", _by_field(field, done), x_name=field))
    curves = [
        Curve(result.name, points, dots=True)
        for result in done[:CURVES]
        if (points := read_run(result.folder).curve(EVAL + name))
    ]
    return [*charts, line_chart(f"held-out {name} while training, the best runs", curves)]


def _by_field(field: str, done: Sequence[RunResult]) -> list[Curve]:
    """A curve for each combination of the other fields, for the best ones."""
    groups: dict[str, list[tuple[float, float]]] = {}
    for result in done:
        others = ",".join(f"{name}={value}" for name, value in result.values.items() if name != field)
        groups.setdefault(others, []).append((float(result.values[field]), result.value or 0.0))
    return [Curve(others, sorted(points), dots=True) for others, points in list(groups.items())[:CURVES]]


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def _other_metrics(done: Sequence[RunResult]) -> Html:
    names = [name for name in _OTHERS if any(name in (result.metrics or {}) for result in done)]
    rows = [
        (
            _spaced(result.name),
            str(result.step),
            *(number(metrics[name]) if name in (metrics := result.metrics or {}) else "" for name in names),
        )
        for result in done
    ]
    return table(Table(rows, ("run", "step", *names)))
