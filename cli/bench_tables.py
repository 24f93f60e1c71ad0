"""The tables that end `dpoeng bench phases` and `dpoeng bench compare`, made from their records."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from dpoeng.cli.summary import facts_table

_PARTS = ("data", "forward", "head", "backward", "optimizer")


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
    """A row a program; ratios beside the peers' figures, or none if the losses differ."""
    equality = record["equality"]
    table = Table(
        title=f"{record['settings']['model']}, {record['settings']['dtype']}: a step of "
        f"{record['settings']['batch_size']} pairs; (x): times what dpoeng needs",
        title_justify="left",
        show_edge=False,
    )
    table.add_column("")
    for heading in ("CPU-s a step", "wall s", "peak", "reference: CPU-s a pair", "wall", "peak"):
        table.add_column(heading, justify="right")
    medians = record["medians"]
    ours = {**medians["dpoeng reference"], **medians["dpoeng"]}
    rate = "reference_pairs_per_s"
    for name, figures in (("dpoeng", ours), *((peer, medians[peer]) for peer in record["ratios"])):
        found = record["ratios"].get(name, {}) if equality["ok"] else {}
        table.add_row(
            name,
            _cell(figures, "step_cpu_s", found),
            _cell(figures, "step_wall_s", found),
            _cell(figures, "train_peak_bytes", found),
            _cell(figures, "reference_cpu_s_per_pair", found, "reference_cpu_s"),
            f"{figures[rate]:.2f} pairs/s" + _ratio(found, "reference_wall_s") if rate in figures else "–",
            _cell(figures, "reference_peak_bytes", found),
        )
    worst = max(equality["loss"].values())
    table.caption = (
        f"Losses are equal: largest relative difference {worst:.1e} (allowed {equality['tolerance']:g}). "
        f"Peak: above the loaded weights. Medians of {record['settings']['repeats']} repeats, range in brackets."
        if equality["ok"]
        else f"[red]The losses differ by {worst:.1e} (allowed {equality['tolerance']:g}): no ratio is told.[/]"
    )
    table.caption_justify = "left"
    return [machine_table(record), table]


def _cell(figures: dict[str, float], name: str, found: dict[str, Any], ratio: str | None = None) -> str:
    if name not in figures:
        return "–"
    value = figures[name]
    text = f"{value / 2**30:.2f} GiB" if name.endswith("bytes") else f"{value:.2f}"
    return text + _ratio(found, ratio or name)


def _ratio(found: dict[str, Any], name: str) -> str:
    if name not in found:
        return ""
    ratio = found[name]
    return f"\n{ratio['median']:.2f}x [dim]({ratio['low']:.2f}–{ratio['high']:.2f})[/]"


def _share(split: dict[str, dict[str, float]], part: str) -> str:
    total = sum(spent["wall_s"] for spent in split.values())
    return f"{100 * split[part]['wall_s'] / total:.0f} %" if part in split else ""


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _spread(values: list[float]) -> float:
    return (max(values) - min(values)) / 2 / _median(values)
