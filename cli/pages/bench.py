"""The records of `dpoeng bench` as one HTML page: plots, and the tables of the terminal."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from dpoeng.cache.words import MIB, number
from dpoeng.cli.bench.tables import tables_of
from dpoeng.cli.pages.charts import Curve, bars, line_chart
from dpoeng.cli.pages.html import Html, cards, heading, page, paragraph, plots, table

# Kinds of memory drawn in one colour, since readers cannot distinguish more.
_MEMORY_PARTS = (
    ("policy", ("weights",)),
    ("reference model", ("reference model",)),
    ("LoRA, gradients, moments", ("adapters", "gradients", "optimizer")),
    ("activations", ("saved activations", "transient")),
    ("logits", ("logits",)),
)


def bench_page(records: Sequence[dict[str, Any]]) -> str:
    """The page of some records."""
    first = records[0]
    parts: list[str] = [cards(fact for record in records for fact in _cards(record))]
    if any(record["device_kind"] == "CPU" for record in records):
        parts.append(
            paragraph(
                "Measured on a CPU: the ratios show how much work is saved. On a GPU they differ, because "
                "other parts dominate.",
                "dim",
            )
        )
    for record in records:
        parts.append(heading(record["kind"]))
        if charts := list(_CHARTS[record["kind"]](record) if record["kind"] in _CHARTS else ()):
            parts.append(plots(charts))
        parts += map(table, tables_of(record))
    commit = f"commit {first['commit']}" if first["commit"] else f"dpoeng {first['versions']['dpoeng']}"
    return page("dpoeng bench", parts, f"{first['date']}, {commit}, {first['device']}")


def _cards(record: dict[str, Any]) -> Iterable[tuple[str, str]]:
    """The most important figures of a record."""
    if record["kind"] == "phases":
        for result in record["results"]:
            if result["layout"] == record["results"][0]["layout"]:
                yield f"{result['phase']} phase, pairs/s", number(result["pairs_per_s"], 3)
    elif record["kind"] == "memory":
        by_case = {case["case"]: case for case in record["results"]}
        cached, two = by_case["cached reference"], by_case["two models"]
        yield "peak of a step, cached reference", f"{cached['measured_bytes'] / MIB:,.0f} MiB"
        yield "the same with two models", f"{two['measured_bytes'] / MIB:,.0f} MiB"
        worst = max((case["difference"] for case in record["results"]), key=abs)
        yield "largest error of the plan", f"{100 * worst:+.2f} %"


def _phases(record: dict[str, Any]) -> Iterable[Html]:
    results = {f"{r['phase']}, {r['layout']} rows": r for r in record["results"]}

    def chart(name: str, value: Callable[[dict[str, Any]], float], unit: str) -> Html:
        return bars(name, [(label, [("", value(result))]) for label, result in results.items()], unit=unit)

    yield chart("useful speed", lambda r: r["unique_tokens_per_s"], "tokens/s, each prompt counted once")
    yield bars(
        "where the time goes",
        [
            (label, [(part, 1e3 * spent["wall_s"] / result["pairs"]) for part, spent in result["split"].items()])
            for label, result in results.items()
        ],
        unit="ms a pair",
    )
    yield chart("peak memory above the weights", lambda r: r["peak_bytes"] / MIB, "MiB")
    yield chart("share of this machine's matmul speed", lambda r: 100 * r["of_gemm"], "%")


def _memory(record: dict[str, Any]) -> Iterable[Html]:
    rows: list[tuple[str, list[tuple[str, float]]]] = []
    for case in record["results"]:
        parts = [(name, sum(case["by_kind"].get(kind, 0) for kind in kinds) / MIB) for name, kinds in _MEMORY_PARTS]
        rows.append((f"{case['case']} (measured {case['measured_bytes'] / MIB:,.0f})", parts))
    yield bars("predicted peak", rows, unit="MiB")
    steps = [case for case in record["results"] if case["case"] != "phase one"]
    curves = [
        Curve(case["case"], [(ms, n_bytes / MIB) for ms, n_bytes in case["outline"]], exact=True) for case in steps
    ]
    yield line_chart("measured through one step, traced", curves, unit="MiB of tensors", x_name="ms")


def _sharing(record: dict[str, Any]) -> Iterable[Html]:
    for title, name, columns in (
        ("each prompt once for both responses", "prompt_share", ("reference_speedup", "training_speedup")),
        ("each prompt once for all its pairs", "pairs_a_prompt", ("over_once_a_pair", "over_once_a_response")),
    ):
        points = record[name]
        curves = [Curve(c.replace("_", " "), [(p[name], p[c]) for p in points]) for c in columns]
        ideal = Curve("without overheads", [(p[name], 1 / p["positions_left"]) for p in points], dots=True)
        yield line_chart(title, [*curves, ideal], unit="times as fast", x_name=name.replace("_", " "))


def _responses(record: dict[str, Any]) -> Iterable[Html]:
    points = record["responses"]
    curves = [
        Curve(way, [(p["responses"], p["tokens"]["a response"] / p["tokens"][way]) for p in points])
        for way in points[0]["speedup"]
    ]
    yield line_chart("tokens of several responses", curves, unit="times fewer tokens", x_name="responses")


def _compare(record: dict[str, Any]) -> Iterable[Html]:
    if not record["equality"]["ok"]:
        return
    medians = record["medians"]
    for name, figure, scale, unit in (
        ("a training step", "step_cpu_s", 1.0, "CPU-s"),
        ("peak of training above the weights, process", "train_peak_bytes", MIB, "MiB"),
        ("peak of training above the weights, tensors", "train_tensor_bytes", MIB, "MiB"),
    ):
        rows = [(who, [("", found[figure] / scale)]) for who, found in medians.items() if figure in found]
        if rows:
            yield bars(name, rows, unit=unit)


def _kernels(record: dict[str, Any]) -> Iterable[Html]:
    for result in record["results"]:
        title = f"{result['mode']}, {result['dtype']}, V {result['shape'][0]}"
        way_results = result["ways"].items()
        yield bars(f"{title}: time", [(n, [("", statistics.median(w["cpu_s"]))]) for n, w in way_results], unit="CPU-s")
        yield bars(
            f"{title}: peak", [(n, [("", w["peak_bytes"] / MIB)]) for n, w in way_results], unit="MiB above operands"
        )


def _cache(record: dict[str, Any]) -> Iterable[Html]:
    curves = [
        Curve(name.removesuffix("_us").replace("_", " "), [(size["pairs"], size[name]) for size in record["sizes"]])
        for name in ("commit_us", "lookup_us", "hit_us", "write_view_us")
    ]
    yield line_chart("cost of a pair", curves, unit="microseconds", x_name="pairs", logarithmic=True)


def _quality(record: dict[str, Any]) -> Iterable[Html]:
    for name, unit in (("accuracies", "share of held-out pairs"), ("margins", "beta × nats")):
        for frame, title in (("trained", "as trained"), ("float32", "in float32")):
            rows = [(r["way"], [("", r[frame][f"rewards/{name}"]["mean"])]) for r in record["results"]]
            yield bars(f"{name.replace('ies', 'y').removesuffix('s')}, {title}", rows, unit=unit)


def _scale(record: dict[str, Any]) -> Iterable[Html]:
    by_ranks = [curve for curve in record["curves"] if "speedup" in curve]
    others = [curve for curve in record["curves"] if curve not in by_ranks]
    for over, unit in dict.fromkeys((curve["over"], curve["unit"]) for curve in others):
        curves = [
            Curve(
                f"{curve['name']}{', simulated' if curve['simulated'] else ''}: {curve['exponent']['value']:.2f}",
                list(zip(curve["sizes"], curve["medians"], strict=True)),
            )
            for curve in others
            if (curve["over"], curve["unit"]) == (over, unit)
        ]
        yield line_chart(f"cost by {over}, with exponents", curves, unit=unit, x_name=over, logarithmic=True)
    if by_ranks:
        sizes = by_ranks[0]["sizes"]
        rank_curves = [Curve(curve["name"], list(zip(sizes, curve["speedup"], strict=True))) for curve in by_ranks]
        perfect = Curve("perfect", [(size, size) for size in sizes], dots=True)
        yield line_chart("speed-up by processes", [*rank_curves, perfect], unit="times as fast", x_name="processes")


_CHARTS: dict[str, Callable[[dict[str, Any]], Iterable[Html]]] = {
    "phases": _phases,
    "memory": _memory,
    "sharing": _sharing,
    "responses": _responses,
    "quality": _quality,
    "scale": _scale,
    "compare": _compare,
    "kernels": _kernels,
    "cache": _cache,
}
