"""The tables that end the commands of `dpoeng bench`, made from their records."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from dpoeng.cli.summary import facts_table

_PARTS = ("data", "forward", "head", "backward", "optimizer")

# label, name among the medians, name among the ratios
_COMPARED = (
    ("step, CPU-s", "step_cpu_s", "step_cpu_s"),
    ("step, wall s", "step_wall_s", "step_wall_s"),
    ("step, peak", "train_peak_bytes", "train_peak_bytes"),
    ("reference pass, CPU-s a pair", "reference_cpu_s_per_pair", "reference_cpu_s"),
    ("reference pass, pairs/s", "reference_pairs_per_s", "reference_wall_s"),
    ("reference pass, peak", "reference_peak_bytes", "reference_peak_bytes"),
)


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
    table.caption = (
        f"unique: each prompt once. padded-equivalent: the rows a padding trainer would compute. matmul: "
        f"{record['gemm_flops'] / 1e9:,.0f} GFLOP/s on this model's layers."
    )
    table.caption_justify = "left"
    return [machine_table(record), table]


def compare_tables(record: dict[str, Any]) -> list[Table]:
    """A column a program; ratios under the peers' figures, or none if the losses differ."""
    settings, equality, medians = record["settings"], record["equality"], record["medians"]
    columns = {"dpoeng": {**medians["dpoeng reference"], **medians["dpoeng"]}}
    columns |= {peer: medians[peer] for peer in record["ratios"]}
    table = Table(
        title=f"{settings['model']}, {settings['dtype']}, {settings['batch_size']} pairs a step",
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
        f"dpoeng needs, median and range of {settings['repeats']} repeats. Peaks: above the loaded weights."
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


def _cell(value: float | None, ratio: dict[str, float] | None, *, is_bytes: bool) -> str:
    if value is None:
        return "–"
    text = f"{value / 2**30:.2f} GiB" if is_bytes else f"{value:.3g}"
    if ratio is None:
        return text
    return f"{text}\n{ratio['median']:.2f}x [dim]({ratio['low']:.2f}–{ratio['high']:.2f})[/]"


def _share(split: dict[str, dict[str, float]], part: str) -> str:
    total = sum(spent["wall_s"] for spent in split.values())
    return f"{100 * split[part]['wall_s'] / total:.0f} %" if part in split else ""


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _spread(values: list[float]) -> float:
    return (max(values) - min(values)) / 2 / _median(values)
