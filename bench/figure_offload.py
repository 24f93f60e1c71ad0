"""The tables of docs/layer-offloading.md: measurements, and calculations for each card."""

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
    """CPU time layer by layer over that of the usual order."""
    record = read("offload-cost", results)[-1]
    settings = record["settings"]
    rows = [["", "CPU time by layer, over the ordinary order"]]
    rows += [[phase, f"{ranged(record['ratios'], phase)} times"] for phase in record["ratios"]]
    return (
        f"{settings['model']}, float32, {settings['count']} pairs scored, {counted(settings['steps'], 'step')} of 8 "
        f"pairs with checkpointing, {counted(settings['repeats'], 'repeat')} in turn. {where(record)}:\n\n{table(rows)}"
    )


def small_cards(results: Path) -> str:
    """Memory that each model needs on each card. Calculated."""
    record = lines_of(results / "small-cards-calculated.jsonl")[-1]
    cards = [card["name"] for card in record["results"][0]["cards"]]
    parts = []
    for phase, title in (("phase1", "Phase one"), ("phase2", "Phase two")):
        rows = [[title, *cards]]
        rows += [[_model(result), *(_cell(card, phase) for card in result["cards"])] for result in record["results"]]
        parts.append(table(rows))
    return (
        f"{_asked(record)}; **bold**: layer by layer; a: 8-bit AdamW; r: 8-bit AdamW and a smaller LoRA; t: from a "
        f"trunk; –: not at all. **Calculated**, commit {record['commit']}.\n\n" + "\n\n".join(parts)
    )


def small_cards_trunk(results: Path) -> str:
    """Memory that phase two needs from a trunk at two thirds of the depth. Calculated."""
    record = lines_of(results / "small-cards-calculated.jsonl")[-1]
    rows = [["trained layers", "on disk", *(card["name"] for card in record["results"][0]["cards"])]]
    for result in record["results"]:
        trunk = result["trunk"]
        name = f"{_model(result)}, from {trunk['layer']} on"
        rows.append([name, f"{trunk['gib']:.0f} GiB", *(_cell(card, "phase2") for card in trunk["cards"])])
    return (
        f"{_asked(record)}; on disk: the hidden states of {record['settings']['pairs']:,} such pairs; **bold**: the "
        f"layers above the trunk one at a time; a: 8-bit AdamW; r: 8-bit AdamW and a smaller LoRA; –: not at all. "
        f"**Calculated**, commit {record['commit']}.\n\n{table(rows)}"
    )


def _asked(record: Record) -> str:
    length, rank = record["settings"]["max_length"], record["settings"]["lora_r"]
    return f"GiB needed for 2 x {length} tokens, LoRA r = {rank}, context and fragmentation included"


def _model(result: Record) -> str:
    return f"{result['model'].split('/')[-1]}, {BASES[result['quantization']]}"


def _cell(card: Record, phase: str) -> str:
    if not card[f"{phase}_fits"]:
        return "–"
    needed = f"{card['needed_gib'][phase]:.1f}"
    text = f"**{needed}**" if card["layer_offloading"][phase] else needed
    changes = card.get("changes", {}) if phase == "phase2" else {}
    marks = ["t" if "trunk_layer" in changes else "", "r" if "lora_r" in changes else "a" if "optim" in changes else ""]
    return " ".join([text, *filter(None, marks)])
