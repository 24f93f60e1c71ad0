"""The tables of the `dpoeng bench` commands, made from their records."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dpoeng.cache.words import MIB, counted, gib, number
from dpoeng.cli.bench.step_table import step_tables
from dpoeng.cli.tables import Cell, Marked, Table, facts_table

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


def machine_table(record: dict[str, Any]) -> Table:
    """Machine, library versions and commit behind the figures."""
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
    """One column per phase and layout."""
    results = record["results"]
    rows = [
        ("pairs/s", *(number(r["pairs_per_s"], 3) for r in results)),
        ("unique tokens/s", *(f"{r['unique_tokens_per_s']:,.0f}" for r in results)),
        ("padded-equivalent tokens/s", *(f"{r['padded_equivalent_per_s']:,.0f}" for r in results)),
        ("CPU-s / 1000 unique tokens", *(f"{1e3 * _median(r['cpu_s']) / r['unique_tokens']:.2f}" for r in results)),
        ("spread of repeats", *(f"± {100 * _spread(r['wall_s']):.0f} %" for r in results)),
        *((f"  {part}", *(_share(r["split"], part) for r in results)) for part in _PARTS),
        ("peak above weights", *(f"{r['peak_bytes'] / MIB:,.0f} MiB" for r in results)),
        ("useful GFLOP/s", *(f"{r['flops'] / 1e9:,.0f}" for r in results)),
        ("  of this machine's matmul", *(f"{100 * r['of_gemm']:.0f} %" for r in results)),
    ]
    rows += _optional_rows(results, *_OF_SOME_DEVICES)
    price = record.get("price_per_hour")
    if price is not None:
        rows.append(("cost of 1,000 pairs", *(number(price / 3.6 / r["pairs_per_s"]) for r in results)))
    rows += _optional_rows(results, *_OF_THE_POOL)
    note = (
        f"unique: each prompt once. padded-equivalent: the rows a padding trainer would compute. matmul: "
        f"{record['gemm_flops'] / 1e9:,.0f} GFLOP/s on this model's layers."
    )
    heads = ("", *(f"{result['phase']}\n{result['layout']}" for result in results))
    return [machine_table(record), Table(rows, heads, f"phases, {record['versions']['dtype']}", [note])]


_Optional = tuple[str, str, Callable[[Any], str]]
_OF_SOME_DEVICES: tuple[_Optional, ...] = (
    ("  of the card's data sheet", "of_card", lambda value: f"{100 * value:.0f} %"),
    ("weights read, GB/s", "weight_bytes_per_s", lambda value: f"{value / 1e9:,.1f}"),
    ("  of a large copy here", "of_copy", lambda value: f"{100 * value:.0f} %"),
    ("  of the card's memory", "of_card_memory", lambda value: f"{100 * value:.0f} %"),
    ("J a pair", "joules_a_pair", lambda value: f"{value:,.1f}"),
)
_OF_THE_POOL: tuple[_Optional, ...] = (
    ("reserved by torch", "pool", lambda pool: f"{pool['reserved_bytes'] / MIB:,.0f} MiB"),
    ("  allocations tried again", "pool", lambda pool: f"{pool['retries']}"),
)


def _optional_rows(results: list[dict[str, Any]], *rows: _Optional) -> list[tuple[str, ...]]:
    """Rows of figures that only some devices give, and that older records lack."""
    return [
        (label, *(form(r[name]) if r.get(name) is not None else "" for r in results))
        for label, name, form in rows
        if any(result.get(name) is not None for result in results)
    ]


def compare_tables(record: dict[str, Any]) -> list[Table]:
    """One column per program; ratios below the peers' figures, or none if the losses differ."""
    settings, equality, medians = record["settings"], record["equality"], record["medians"]
    columns = {"dpoeng": {**medians["dpoeng reference"], **medians["dpoeng"]}}
    columns |= {peer: medians[peer] for peer in record["ratios"]}
    rows = []
    for label, name, ratio in _COMPARED:
        cells = []
        for program, figures in columns.items():
            ratios = record["ratios"].get(program, {}) if equality["ok"] else {}
            cells.append(_cell(figures.get(name), ratios.get(ratio), is_bytes=name.endswith("bytes")))
        rows.append((label, *cells))
    worst = max(equality["loss"].values())
    note: Cell = (
        f"Losses are equal: largest relative difference {worst:.1e} (allowed {equality['tolerance']:g}). x: times as "
        f"much as dpoeng, median and range of {counted(settings['repeats'], 'repeat')}. Peaks: above "
        "the loaded weights."
        if equality["ok"]
        else Marked(
            f"The losses differ by {worst:.1e} (allowed {equality['tolerance']:g}): no ratio reported.", "error"
        )
    )
    title = f"{settings['model']}, {settings['dtype']}, {counted(settings['batch_size'], 'pair')} a step"
    return [machine_table(record), Table(rows, ("", *(name.replace(" ", "\n", 1) for name in columns)), title, [note])]


def sharing_tables(record: dict[str, Any]) -> list[Table]:
    """One row per point of each curve."""
    tables = [machine_table(record)]
    for title, name, columns in (
        ("each prompt once for both responses", "prompt_share", ("reference_speedup", "training_speedup")),
        ("each prompt once for all its pairs", "pairs_a_prompt", ("over_once_a_pair", "over_once_a_response")),
    ):
        rows = [
            (
                f"{point[name]:g}",
                f"{100 * point['positions_left']:.0f} %",
                *(f"{point[column]:.2f}x" for column in columns),
            )
            for point in record[name]
        ]
        heads = [heading.replace("_", " ") for heading in (name, "positions_left", *columns)]
        tables.append(Table(rows, heads, title, words=0))
    return tables


def responses_tables(record: dict[str, Any]) -> list[Table]:
    """A row a number of responses."""
    rows = [
        (
            f"{point['responses']}",
            *(f"{tokens:,}" for tokens in point["tokens"].values()),
            *(f"{times:.2f}x" for times in point["speedup"].values()),
        )
        for point in record["responses"]
    ]
    first = record["responses"][0]
    heads = (
        "responses",
        *(f"tokens, {way}" for way in first["tokens"]),
        *(f"speed, {way}" for way in first["speedup"]),
    )
    return [machine_table(record), Table(rows, heads, "a prompt with several responses, in one forward", words=0)]


def cache_tables(record: dict[str, Any]) -> list[Table]:
    """One column per size; then reading and hashing."""
    sizes = record["sizes"]
    rows = []
    for name in sizes[0]:
        if name != "pairs":
            label, _, unit = name.rpartition("_")
            label_text = f"{label.replace('_', ' ')}, {unit}" if unit in ("us", "ms") else name.replace("_", " ")
            rows.append((label_text, *(number(size[name], 3) for size in sizes)))
    facts = {**record["read"], **record["weights"]}
    return [
        machine_table(record),
        Table(rows, ("pairs", *(f"{size['pairs']:,}" for size in sizes)), "cache"),
        facts_table([(name.replace("_", " "), number(value)) for name, value in facts.items()]),
    ]


def kernels_tables(record: dict[str, Any]) -> list[Table]:
    """One table per shape, dtype and direction; one row per way."""
    tables = [machine_table(record), *map(_way_table, record["results"])]
    return [*tables, facts_table(list(record["missing"].items()))] if record["missing"] else tables


def _way_table(result: dict[str, Any]) -> Table:
    v, h, n = result["shape"]
    rows = [
        (
            name,
            number(_median(way["wall_s"]), 3),
            _ratio(way["wall_s_ratio"]),
            number(_median(way["cpu_s"]), 3),
            _ratio(way["cpu_s_ratio"]),
            f"{way['peak_bytes'] / MIB:,.0f}",
            f"{100 * way['of_gemm']:.0f} %",
            f"{way['logp_error']:.1e}",
            "" if way["grad_error"] is None else f"{way['grad_error']:.1e}",
        )
        for name, way in result["ways"].items()
    ]
    return Table(
        rows,
        ("", "wall s", "x", "CPU-s", "x", "peak MiB", "of matmul", "log-prob error", "gradient error"),
        f"{result['mode']}: V {v}, H {h}, N {n}, {result['dtype']}",
        ["x: multiple of what dpoeng needs, median and range of the rounds. Errors: from float64, worst of 64 rows."],
    )


def aot_tables(record: dict[str, Any]) -> list[Table]:
    """One row per kernel and GPU: registers, spills, shared memory."""
    rows: list[tuple[Cell, ...]] = []
    for report in record["reports"]:
        cells = (
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
        )
        rows.append(tuple(Marked(cell, "error") for cell in cells) if report["problems"] else cells)
    heads = (
        "GPU", "kernel", "dtype", "registers", "stack bytes", "spills in loops", "shared KiB", "of", "occupancy",
        "matrix", "load bytes",
    )  # fmt: skip
    return [Table(rows, heads, "compiled ahead of time, nothing was run", words=len(heads))]


def _ratio(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})"


def memory_tables(record: dict[str, Any]) -> list[Table]:
    """One row per case."""
    settings, lengths = record["settings"], record["lengths"]
    precision = settings["quantization"] if settings["quantization"] != "none" else record["versions"]["dtype"]
    recomputed = "with" if settings["gradient_checkpointing"] else "without"
    cached = next(case["measured_bytes"] for case in record["results"] if case["case"] == "cached reference")
    rows = []
    for case in record["results"]:
        numbers = [case[name] / MIB for name in ("predicted_bytes", "measured_bytes", "process_bytes")]
        predicted, measured, process = (f"{number:,.1f}" for number in numbers)
        ratio = "" if case["case"] == "phase one" else f"{case['measured_bytes'] / cached:.2f}x"
        rows.append((case["case"], predicted, measured, f"{100 * case['difference']:+.2f} %", process, ratio))
    table = Table(
        rows,
        ("", "predicted", "measured", "difference", "process", "over cached"),
        f"peak memory, MiB: {precision}, {counted(len(lengths), 'pair')} of {sum(map(sum, lengths)):,} tokens, "
        f"{recomputed} gradient checkpointing",
        [
            "predicted: tensors, simulated as in dpoeng plan. measured: tensors, from the allocator. "
            "process: memory of the process, including libraries and freed memory."
        ],
    )
    return [machine_table(record), table]


def _cell(value: float | None, ratio: dict[str, float] | None, *, is_bytes: bool) -> str:
    if value is None:
        return "–"
    text = gib(value) if is_bytes else number(value, 3)
    if ratio is None:
        return text
    several = ratio["low"] < ratio["high"]
    return f"{text}\n{ratio['median']:.2f}x" + (f" ({ratio['low']:.2f}–{ratio['high']:.2f})" if several else "")


def _share(split: dict[str, dict[str, float]], part: str) -> str:
    total = sum(spent["wall_s"] for spent in split.values())
    return f"{100 * split[part]['wall_s'] / total:.0f} %" if part in split else ""


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _spread(values: list[float]) -> float:
    return (max(values) - min(values)) / 2 / _median(values)


def quality_tables(record: dict[str, Any]) -> list[Table]:
    """One row per way: as trained, and its adapter in float32 compared with the first way's."""
    settings, results = record["settings"], record["results"]
    rows = []
    for place, result in enumerate(results):
        cells = [_mean(result["trained"][name], digits) for name, digits in _QUALITY]
        for name, digits in _QUALITY:
            cells.append(_mean(result["float32"][name], digits))
            cells.append(_mean(result["difference"][name], digits, signed=True) if place else "")
        parity = [value for value in result["parity"] if value is not None]
        cells.append(f"{_median(parity):.2g}" if parity else "–")
        cells.append(f"{_median(result['seconds']) / result['steps']:.2f}")
        rows.append((result["way"], *cells))
    heads = (
        "", "accuracy\nas trained", "margin\nas trained", "accuracy\nin float32", "difference", "margin\nin float32",
        "difference", "parity", "s a step",
    )  # fmt: skip
    table = Table(
        rows,
        heads,
        f"{settings['model']}: {results[0]['pairs']} held-out pairs, {counted(results[0]['steps'], 'step')}, "
        f"{counted(settings['seeds'], 'seed')}",
        [
            "as trained: with its own precision and reference. In float32: the adapter alone, on the float32 model "
            f"and reference, and how that differs from {results[0]['way']}, pair by pair. 95 % intervals over held-out "
            "prompts. parity: mean difference of policy and reference before training, nats per token."
        ],
    )
    failed = [facts_table([(f"{way} failed", why) for way, why in record["failed"].items()])]
    return [machine_table(record), table, *(failed if record["failed"] else [])]


_QUALITY = (("rewards/accuracies", 3), ("rewards/margins", 3))


def _mean(figures: dict[str, Any], digits: int, *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    text = f"{figures['mean']:{sign}.{digits}f}"
    if figures["interval"]:
        low, high = figures["interval"]
        text += f"\n{low:{sign}.{digits}f} to {high:{sign}.{digits}f}"
    return text


def scale_tables(record: dict[str, Any]) -> list[Table]:
    """One table per growing size, with a row per cost and its exponent; and one table of several processes."""
    tables = [machine_table(record)]
    by_ranks = [curve for curve in record["curves"] if "speedup" in curve]
    for over in dict.fromkeys(curve["over"] for curve in record["curves"] if curve not in by_ranks):
        curves = [curve for curve in record["curves"] if curve["over"] == over]
        tables += [
            Table(
                [_scale_row(curve) for curve in curves if tuple(curve["sizes"]) == sizes],
                ("", *(f"{size:,}" for size in sizes), "exponent", "last"),
                f"cost by {over}",
                ["exponent: 1 is in proportion; ± its standard error. last: between the two largest sizes."],
            )
            for sizes in dict.fromkeys(tuple(curve["sizes"]) for curve in curves)
        ]
    return [*tables, _ranks_table(record, by_ranks)] if by_ranks else tables


def _scale_row(curve: dict[str, Any]) -> tuple[str, ...]:
    fit, in_mib = curve["exponent"], curve["unit"] == "bytes"
    return (
        f"{curve['name']}, {'MiB' if in_mib else curve['unit']}" + (" (simulated)" if curve["simulated"] else ""),
        *(number(cost / MIB) if in_mib else number(cost, 3) for cost in curve["medians"]),
        f"{fit['value']:.2f} ± {fit['standard_error']:.2f}",
        f"{fit['last']:.2f}",
    )


def _ranks_table(record: dict[str, Any], curves: list[dict[str, Any]]) -> Table:
    sizes, shared = curves[0]["sizes"], curves[0]["sharing"]
    each = "a GPU" if record["device_kind"] == "GPU" else "one thread"
    rows = []
    for curve in curves:
        fit = curve["exponent"]
        error = f" ± {fit['standard_error']:.2f}" if fit and fit["standard_error"] is not None else ""
        exponent = f"{fit['value']:.2f}{error}" if fit else "–"
        rows += [
            (f"{curve['name']}, pairs/s", *(f"{speed:.2f}" for speed in curve["pairs_per_s"]), exponent),
            ("  speed-up", *(f"{times:.2f}" for times in curve["speedup"]), ""),
            ("  efficiency", *(f"{100 * share:.0f} %" for share in curve["efficiency"]), ""),
            ("  evenly", *(f"{100 * share:.0f} %" for share in curve["busy"]), ""),
        ]
    return Table(
        rows,
        ("", *(f"{size}{'*' if size in shared else ''}" for size in sizes), "exponent"),
        f"the same {curves[0]['pairs']} pairs in several processes, each with {each}",
        [
            "speed-up: over one process; efficiency: that a process. evenly: mean over most CPU time of a process. "
            "exponent: -1 is perfect."
            + (" Marked *: fewer cores than processes, not in the fit." if shared else "")
            + f" The losses agree with those of one process to {record['loss_difference']:.1e}."
        ],
    )


def offload_tables(record: dict[str, Any]) -> list[Table]:
    """One row per phase."""
    rows = [
        (
            phase["phase"] if "steps" not in phase else f"{phase['phase']}, {counted(phase['steps'], 'step')}",
            gib(phase["anonymous_bytes"]),
            f"{phase['layer_reads']:.2f}",
            f"{phase['seconds']:,.0f}",
            f"{phase['cpu_s']:,.0f}",
        )
        for phase in record["phases"]
    ]
    heads = ("", "anonymous memory, highest", "layers read, times", "seconds", "CPU-s")
    settings = record["settings"]
    title = (
        f"{settings['model']}, random, {settings['dtype']}, {gib(record['file_bytes'])} of files; "
        f"{counted(settings['pairs'], 'pair')} a step"
    )
    return [machine_table(record), Table(rows, heads, title, ["Layers are read for a trial too, before each phase."])]


_TABLES: dict[str, Callable[[dict[str, Any]], list[Table]]] = {
    "phases": phases_tables,
    "memory": memory_tables,
    "compare": compare_tables,
    "kernels": kernels_tables,
    "kernels-aot": aot_tables,
    "sharing": sharing_tables,
    "responses": responses_tables,
    "quality": quality_tables,
    "scale": scale_tables,
    "cache": cache_tables,
    "step": step_tables,
    "offload": offload_tables,
}


def tables_of(record: dict[str, Any]) -> list[Table]:
    """The tables of a record of any kind."""
    return _TABLES[record["kind"]](record)
