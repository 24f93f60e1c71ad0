"""The tables that end the commands of `dpoeng bench`, made from their records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.table import Table

from dpoeng.cache.words import counted
from dpoeng.cli.tables import facts_table as plain_facts_table
from dpoeng.cli.tables import to_rich

_PARTS = ("data", "forward", "head", "backward", "optimizer")

# label, name among the medians, name among the ratios
_COMPARED = (
    ("step, CPU-s", "step_cpu_s", "step_cpu_s"),
    ("step, wall s", "step_wall_s", "step_wall_s"),
    ("step, peak of tensors", "train_tensor_bytes", "train_tensor_bytes"),
    ("step, peak", "train_peak_bytes", "train_peak_bytes"),
    ("reference pass, CPU-s a pair", "reference_cpu_s_per_pair", "reference_cpu_s"),
    ("reference pass, pairs/s", "reference_pairs_per_s", "reference_wall_s"),
    ("reference pass, peak of tensors", "reference_tensor_bytes", "reference_tensor_bytes"),
    ("reference pass, peak", "reference_peak_bytes", "reference_peak_bytes"),
)


def facts_table(facts: Sequence[tuple[str, str]]) -> Table:
    """Label and text, a line each, as rich draws it."""
    return to_rich(plain_facts_table(facts))


def machine_table(record: dict[str, Any]) -> Table:
    """Where it was measured: no figure is worth anything without."""
    machine, versions = record["machine"], record["versions"]
    return facts_table(
        [
            ("measured on", f"{record['device_kind']}: {machine['processor'] or record['device']}"),
            (
                "cores, threads, load",
                f"{machine['cores']}, {machine['threads']}, {machine['load']} when it began",
            ),
            (
                "versions",
                f"dpoeng {versions['dpoeng']} (commit {record['commit'] or 'unknown'}), torch {versions['torch']}, "
                f"transformers {versions['transformers']}",
            ),
        ]
    )


def phases_tables(record: dict[str, Any]) -> list[Table]:
    """A column a phase and layout."""
    results = record["results"]
    table = Table(title=f"phases, {record['versions']['dtype']}", title_justify="left", show_edge=False)
    table.add_column("")
    for result in results:
        table.add_column(f"{result['phase']}\n{result['layout']}", justify="right")

    def row(label: str, *cells: str) -> None:
        table.add_row(label, *cells)

    row("pairs/s", *(f"{r['pairs_per_s']:.2f}" for r in results))
    row("unique tokens/s", *(f"{r['unique_tokens_per_s']:,.0f}" for r in results))
    row("padded-equivalent tokens/s", *(f"{r['padded_equivalent_per_s']:,.0f}" for r in results))
    row("CPU-s / 1000 unique tokens", *(f"{1e3 * _median(r['cpu_s']) / r['unique_tokens']:.2f}" for r in results))
    row("spread of repeats", *(f"± {100 * _spread(r['wall_s']):.0f} %" for r in results))
    for part in _PARTS:
        row(f"  {part}", *(_share(r["split"], part) for r in results))
    row("peak above weights", *(f"{r['peak_bytes'] / 2**20:,.0f} MiB" for r in results))
    row("useful GFLOP/s", *(f"{r['flops'] / 1e9:,.0f}" for r in results))
    row("  of this machine's matmul", *(f"{100 * r['of_gemm']:.0f} %" for r in results))
    _optional_row(table, "  of the card's data sheet", results, "of_card", lambda value: f"{100 * value:.0f} %")
    _optional_row(table, "weights read, GB/s", results, "weight_bytes_per_s", lambda value: f"{value / 1e9:,.1f}")
    _optional_row(table, "  of a large copy here", results, "of_copy", lambda value: f"{100 * value:.0f} %")
    _optional_row(table, "  of the card's memory", results, "of_card_memory", lambda value: f"{100 * value:.0f} %")
    _optional_row(table, "J a pair", results, "joules_a_pair", lambda value: f"{value:,.1f}")
    price = record.get("price_per_hour")
    if price is not None:
        row("cost of 1,000 pairs", *(f"{price / 3.6 / r['pairs_per_s']:.4g}" for r in results))
    _optional_row(
        table, "reserved by torch", results, "pool", lambda pool: f"{pool['reserved_bytes'] / 2**20:,.0f} MiB"
    )
    _optional_row(table, "  allocations tried again", results, "pool", lambda pool: f"{pool['retries']}")
    table.caption = (
        f"unique: each prompt once. padded-equivalent: the rows a padding trainer would compute. matmul: "
        f"{record['gemm_flops'] / 1e9:,.0f} GFLOP/s on this model's layers."
    )
    table.caption_justify = "left"
    return [machine_table(record), table]


def _optional_row(
    table: Table, label: str, results: list[dict[str, Any]], name: str, shown: Callable[[Any], str]
) -> None:
    """A row of what only some devices tell, and older records do not have."""
    if any(result.get(name) is not None for result in results):
        table.add_row(label, *(shown(r[name]) if r.get(name) is not None else "" for r in results))


def compare_tables(record: dict[str, Any]) -> list[Table]:
    """A column a program; ratios under the peers' figures, or none if the losses differ."""
    settings, equality, medians = record["settings"], record["equality"], record["medians"]
    columns = {"dpoeng": {**medians["dpoeng reference"], **medians["dpoeng"]}}
    columns |= {peer: medians[peer] for peer in record["ratios"]}
    table = Table(
        title=f"{settings['model']}, {settings['dtype']}, {counted(settings['batch_size'], 'pair')} a step",
        title_justify="left",
        show_edge=False,
    )
    table.add_column("")
    for name in columns:
        table.add_column(name.replace(" ", "\n", 1), justify="right")
    for label, figure, ratio in _COMPARED:
        cells = []
        for name, figures in columns.items():
            found = record["ratios"].get(name, {}) if equality["ok"] else {}
            cells.append(_cell(figures.get(figure), found.get(ratio), is_bytes=figure.endswith("bytes")))
        table.add_row(label, *cells)
    worst = max(equality["loss"].values())
    table.caption = (
        f"Losses are equal: largest relative difference {worst:.1e} (allowed {equality['tolerance']:g}). x: times what "
        f"dpoeng needs, median and range of {counted(settings['repeats'], 'repeat')}. Peaks: above the loaded weights."
        if equality["ok"]
        else f"[red]The losses differ by {worst:.1e} (allowed {equality['tolerance']:g}): no ratio is told.[/]"
    )
    table.caption_justify = "left"
    return [machine_table(record), table]


def sharing_tables(record: dict[str, Any]) -> list[Table]:
    """A row a point of each curve."""
    tables = [machine_table(record)]
    for title, name, columns in (
        ("each prompt once for both responses", "prompt_share", ("reference_speedup", "training_speedup")),
        ("each prompt once for all its pairs", "pairs_a_prompt", ("over_once_a_pair", "over_once_a_response")),
    ):
        table = Table(title=title, title_justify="left", show_edge=False)
        for heading in (name, "positions_left", *columns):
            table.add_column(heading.replace("_", " "), justify="right")
        for point in record[name]:
            table.add_row(
                f"{point[name]:g}",
                f"{100 * point['positions_left']:.0f} %",
                *(f"{point[column]:.2f}x" for column in columns),
            )
        tables.append(table)
    return tables


def cache_tables(record: dict[str, Any]) -> list[Table]:
    """A column a size; then reading and hashing."""
    sizes = record["sizes"]
    table = Table(title="cache", title_justify="left", show_edge=False)
    table.add_column("pairs")
    for size in sizes:
        table.add_column(f"{size['pairs']:,}", justify="right")
    for name in sizes[0]:
        if name != "pairs":
            label, _, unit = name.rpartition("_")
            shown = f"{label.replace('_', ' ')}, {unit}" if unit in ("us", "ms") else name.replace("_", " ")
            table.add_row(shown, *(f"{size[name]:,.3g}" for size in sizes))
    facts = {**record["read"], **record["weights"]}
    return [
        machine_table(record),
        table,
        facts_table([(name.replace("_", " "), f"{value:,.4g}") for name, value in facts.items()]),
    ]


def kernels_tables(record: dict[str, Any]) -> list[Table]:
    """A table a shape, dtype and direction; a row a way."""
    tables = [machine_table(record), *map(_way_table, record["results"])]
    return [*tables, facts_table(list(record["missing"].items()))] if record["missing"] else tables


def _way_table(result: dict[str, Any]) -> Table:
    v, h, n = result["shape"]
    table = Table(
        title=f"{result['mode']}: V {v}, H {h}, N {n}, {result['dtype']}", title_justify="left", show_edge=False
    )
    for heading in ("", "wall s", "x", "CPU-s", "x", "peak MiB", "of matmul", "log-prob error", "gradient error"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, figure in result["ways"].items():
        error = figure["grad_error"]
        table.add_row(
            name,
            f"{_median(figure['wall_s']):.3g}",
            _ratio(figure["wall_s_ratio"]),
            f"{_median(figure['cpu_s']):.3g}",
            _ratio(figure["cpu_s_ratio"]),
            f"{figure['peak_bytes'] / 2**20:,.0f}",
            f"{100 * figure['of_gemm']:.0f} %",
            f"{figure['logp_error']:.1e}",
            "" if error is None else f"{error:.1e}",
        )
    table.caption = "x: times what dpoeng needs, median and range of the rounds. Errors: to float64, worst of 64 rows."
    table.caption_justify = "left"
    return table


def aot_tables(record: dict[str, Any]) -> list[Table]:
    """What the compilers made of every kernel."""
    return [_aot_table(record["reports"])]


def _aot_table(reports: list[dict[str, Any]]) -> Table:
    table = Table(title="compiled ahead of time, nothing was run", title_justify="left", show_edge=False)
    headings = (
        "GPU", "kernel", "dtype", "registers", "stack bytes", "spills in loops", "shared KiB", "of", "occupancy",
        "matrix", "load bytes",
    )  # fmt: skip
    for heading in headings:
        table.add_column(heading)
    for report in reports:
        table.add_row(
            report["gpu"],
            " ".join(part for part in (report["kernel"], report["variant"]) if part),
            report["dtype"],
            str(report["registers"]),
            str(report["spill_bytes"]),
            str(report["loop_spills"]),
            f"{report['shared_bytes'] / 1024:.1f}",
            f"{report['shared_limit'] // 1024}",
            f"{100 * report['occupancy']:.0f} %",
            " ".join(report["matrix"]) or "–",
            str(report["load_bytes"]),
            style="red" if report["problems"] else "",
        )
    return table


def _ratio(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})"


def memory_tables(record: dict[str, Any]) -> list[Table]:
    """A row a case."""
    settings, lengths = record["settings"], record["lengths"]
    held = settings["quantization"] if settings["quantization"] != "none" else record["versions"]["dtype"]
    batch = counted(len(lengths), "pair")
    recomputed = "with" if settings["gradient_checkpointing"] else "without"
    table = Table(
        title=f"peak memory, MiB: {held}, {batch} of {sum(map(sum, lengths)):,} tokens, {recomputed} gradient "
        "checkpointing",
        title_justify="left",
        show_edge=False,
        caption="predicted: of tensors, by simulation, as dpoeng plan tells. measured: of tensors, by the allocator. "
        "process: what the system gave, libraries and freed memory included.",
        caption_justify="left",
    )
    table.add_column("")
    for heading in ("predicted", "measured", "difference", "process", "over cached"):
        table.add_column(heading, justify="right")
    cached = next(case["measured_bytes"] for case in record["results"] if case["case"] == "cached reference")
    for case in record["results"]:
        numbers = [case[name] / 2**20 for name in ("predicted_bytes", "measured_bytes", "process_bytes")]
        predicted, measured, process = (f"{number:,.1f}" for number in numbers)
        ratio = "" if case["case"] == "phase one" else f"{case['measured_bytes'] / cached:.2f}x"
        table.add_row(case["case"], predicted, measured, f"{100 * case['difference']:+.2f} %", process, ratio)
    return [machine_table(record), table]


def _cell(value: float | None, ratio: dict[str, float] | None, *, is_bytes: bool) -> str:
    if value is None:
        return "–"
    text = f"{value / 2**30:.2f} GiB" if is_bytes else f"{value:.3g}"
    if ratio is None:
        return text
    several = ratio["low"] < ratio["high"]
    return f"{text}\n{ratio['median']:.2f}x" + (f" [dim]({ratio['low']:.2f}–{ratio['high']:.2f})[/]" if several else "")


def _share(split: dict[str, dict[str, float]], part: str) -> str:
    total = sum(spent["wall_s"] for spent in split.values())
    return f"{100 * split[part]['wall_s'] / total:.0f} %" if part in split else ""


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _spread(values: list[float]) -> float:
    return (max(values) - min(values)) / 2 / _median(values)


def quality_tables(record: dict[str, Any]) -> list[Table]:
    """A row a way: as it was trained; and its adapter in float32, beside the first way's."""
    settings, results = record["settings"], record["results"]
    table = Table(
        title=f"{settings['model']}: {results[0]['pairs']} held-out pairs, {counted(results[0]['steps'], 'step')}, "
        f"{counted(settings['seeds'], 'seed')}",
        title_justify="left",
        show_edge=False,
        caption="as trained: with its own precision and reference. In float32: the adapter alone, on the float32 model "
        f"and reference, and how that differs from {results[0]['way']}, pair by pair. 95 % intervals over held-out "
        "prompts. parity: mean difference of policy and reference before training, nats a token.",
        caption_justify="left",
    )
    table.add_column("")
    headings = (
        "accuracy\nas trained", "margin\nas trained", "accuracy\nin float32", "difference", "margin\nin float32",
        "difference", "parity", "s a step",
    )  # fmt: skip
    for heading in headings:
        table.add_column(heading, justify="right")
    for number, result in enumerate(results):
        cells = [_mean(result["trained"][name], digits) for name, digits in _QUALITY]
        for name, digits in _QUALITY:
            cells.append(_mean(result["float32"][name], digits))
            cells.append(_mean(result["difference"][name], digits, signed=True) if number else "")
        parity = [value for value in result["parity"] if value is not None]
        cells.append(f"{_median(parity):.2g}" if parity else "–")
        cells.append(f"{_median(result['seconds']) / result['steps']:.2f}")
        table.add_row(result["way"], *cells)
    failed = (
        [facts_table([(f"{way} failed", why) for way, why in record["failed"].items()])] if record["failed"] else []
    )
    return [machine_table(record), table, *failed]


_QUALITY = (("rewards/accuracies", 3), ("rewards/margins", 3))


def _mean(told: dict[str, Any], digits: int, *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    text = f"{told['mean']:{sign}.{digits}f}"
    if told["interval"]:
        low, high = told["interval"]
        text += f"\n[dim]{low:{sign}.{digits}f} to {high:{sign}.{digits}f}[/]"
    return text


def scale_tables(record: dict[str, Any]) -> list[Table]:
    """A table a size that grows: a row a cost, with its exponent; and one of several processes."""
    tables = [machine_table(record)]
    by_ranks = [curve for curve in record["curves"] if "speedup" in curve]
    for over in dict.fromkeys(curve["over"] for curve in record["curves"] if curve not in by_ranks):
        curves = [curve for curve in record["curves"] if curve["over"] == over]
        for sizes in dict.fromkeys(tuple(curve["sizes"]) for curve in curves):
            table = Table(
                title=f"cost by {over}",
                title_justify="left",
                show_edge=False,
                caption="exponent: 1 is in proportion; ± its standard error. last: between the two largest sizes.",
                caption_justify="left",
            )
            table.add_column("")
            for heading in (*(f"{size:,}" for size in sizes), "exponent", "last"):
                table.add_column(heading, justify="right")
            for curve in curves:
                if tuple(curve["sizes"]) == sizes:
                    fit, in_mib = curve["exponent"], curve["unit"] == "bytes"
                    cells = [f"{cost / 2**20:,.4g}" if in_mib else f"{cost:.3g}" for cost in curve["medians"]]
                    table.add_row(
                        f"{curve['name']}, {'MiB' if in_mib else curve['unit']}"
                        + (" [dim](simulated)[/]" if curve["simulated"] else ""),
                        *cells,
                        f"{fit['value']:.2f} ± {fit['standard_error']:.2f}",
                        f"{fit['last']:.2f}",
                    )
            tables.append(table)
    return [*tables, _ranks_table(record, by_ranks)] if by_ranks else tables


def _ranks_table(record: dict[str, Any], curves: list[dict[str, Any]]) -> Table:
    sizes, shared = curves[0]["sizes"], curves[0]["sharing"]
    each = "a GPU" if record["device_kind"] == "GPU" else "one thread"
    table = Table(
        title=f"the same {curves[0]['pairs']} pairs in several processes, each with {each}",
        title_justify="left",
        show_edge=False,
        caption="speed-up: over one process; efficiency: that a process. evenly: mean over most CPU time of a process. "
        "exponent: -1 is perfect."
        + (" Marked *: fewer cores than processes, not in the fit." if shared else "")
        + f" The losses agree with those of one process to {record['loss_difference']:.1e}.",
        caption_justify="left",
    )
    table.add_column("")
    for size in sizes:
        table.add_column(f"{size}{'*' if size in shared else ''}", justify="right")
    table.add_column("exponent", justify="right")
    for curve in curves:
        fit = curve["exponent"]
        error = f" ± {fit['standard_error']:.2f}" if fit and fit["standard_error"] is not None else ""
        exponent = f"{fit['value']:.2f}{error}" if fit else "–"
        table.add_row(f"{curve['name']}, pairs/s", *(f"{speed:.2f}" for speed in curve["pairs_per_s"]), exponent)
        table.add_row("  speed-up", *(f"{times:.2f}" for times in curve["speedup"]), "")
        table.add_row("  efficiency", *(f"{100 * share:.0f} %" for share in curve["efficiency"]), "")
        table.add_row("  evenly", *(f"{100 * share:.0f} %" for share in curve["busy"]), "")
    return table


_TABLES: dict[str, Callable[[dict[str, Any]], list[Table]]] = {
    "phases": phases_tables,
    "memory": memory_tables,
    "compare": compare_tables,
    "kernels": kernels_tables,
    "kernels-aot": aot_tables,
    "sharing": sharing_tables,
    "quality": quality_tables,
    "scale": scale_tables,
    "cache": cache_tables,
}


def tables_of(record: dict[str, Any]) -> list[Table]:
    """The tables of a record of any kind."""
    return _TABLES[record["kind"]](record)
