"""The tables of docs/layer-offloading.md: what was measured, and what each card can do by calculation."""

from __future__ import annotations

from pathlib import Path

from dpoeng.bench.figure_text import BASES, Record, lines_of, ranged, read, table, where
from dpoeng.cache.words import GIB, counted


def offload(results: Path) -> str:
    """The latest record of `dpoeng bench offload`."""
    record = read("offload", results)[-1]
    settings = record["settings"]
    rows = [["", "anonymous memory, highest", "layers read", "CPU-s", "seconds"]]
    for phase in record["phases"]:
        steps = f", {counted(phase['steps'], 'step')}" if "steps" in phase else ""
        rows.append(
            [
                phase["phase"] + steps,
                f"**{phase['anonymous_bytes'] / GIB:.2f} GiB**",
                f"{phase['layer_reads']:.2f} times",
                f"{phase['cpu_s']:.0f}",
                f"{phase['seconds']:.0f}",
            ]
        )
    return (
        f"{settings['model']}'s shape, random, {settings['dtype']}: {record['file_bytes'] / GIB:.1f} GiB of files on a "
        f"machine with {record['machine']['memory_bytes'] / GIB:.1f} GiB of memory; {settings['pairs']} pairs. "
        f"{where(record)}:\n\n{table(rows)}"
    )


def offload_cost(results: Path) -> str:
    """CPU time by layer over that of the ordinary order."""
    record = read("offload-cost", results)[-1]
    settings = record["settings"]
    rows = [["", "CPU time by layer, over the ordinary order"]]
    rows += [[phase, f"{ranged(record['ratios'], phase)} times"] for phase in record["ratios"]]
    return (
        f"{settings['model']}, float32, {settings['count']} pairs scored, {counted(settings['steps'], 'step')} of 8 "
        f"pairs with checkpointing, {counted(settings['repeats'], 'repeat')} in turn. {where(record)}:\n\n{table(rows)}"
    )


def small_cards(results: Path) -> str:
    """What each model needs on each card. Calculated."""
    record = lines_of(results / "small-cards-calculated.jsonl")[-1]
    cards = [card["name"] for card in record["results"][0]["cards"]]
    asked = record["settings"]
    parts = []
    for phase, title in (("phase1", "Phase one"), ("phase2", "Phase two")):
        rows = [[title, *cards]]
        for result in record["results"]:
            name = f"{result['model'].split('/')[-1]}, {BASES[result['quantization']]}"
            rows.append([name, *(_cell(card, phase) for card in result["cards"])])
        parts.append(table(rows))
    return (
        f"GiB needed for 2 x {asked['max_length']} tokens, LoRA r = {asked['lora_r']}, context and fragmentation "
        f"included; **bold**: layer by layer; –: not at all. **Calculated**, commit {record['commit']}.\n\n"
        + "\n\n".join(parts)
    )


def _cell(card: Record, phase: str) -> str:
    if not card[f"{phase}_fits"]:
        return "–"
    needed = f"{card['needed_gib'][phase]:.1f}"
    return f"**{needed}**" if card["layer_offloading"][phase] else needed
