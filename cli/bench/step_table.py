"""The tables of `dpoeng bench step`: work of a layer, of the rest of a step and of the optimizer."""

from __future__ import annotations

from typing import Any

from dpoeng.cli.tables import Cell, Table


def step_tables(record: dict[str, Any]) -> list[Table]:
    """A table for a layer, one for the work outside the layers, one for the optimizer; all calculated."""
    settings = record["settings"]
    by_layer = settings.get("layer_offloading", False)
    recomputed = "forward, recomputation" if settings["gradient_checkpointing"] or by_layer else "forward"
    titles = {
        "layer": f"one of {record['layers']} layers, {record['tokens']} tokens: {recomputed}, backward",
        "outside": "outside the layers, without the input gradient that the first layer does not compute",
        "optimizer": "the optimizer, fused AdamW over the LoRA of all layers",
    }
    notes = []
    if by_layer:
        moved = record["layers"] * record["layer_bus_bytes"] / 1e9
        notes = [f"Layer by layer {moved:.1f} GB cross the bus in a step of one forward: weights, and hidden states."]
    if record.get("estimated_s") is not None:
        notes += [f"Estimate, not measured: {record['estimated_s']:.3g} s a step on {record['gpu']}."]
    if record.get("measured_on") is not None:
        layer, rest = (f"{1e3 * record[name]:.3g} ms" for name in ("layer_s", "outside_s"))
        notes.append(
            f"Measured on {record['measured_on']}, without the optimizer: a layer {layer}, the rest {rest}; "
            f"{record['layers']} layers would take {record['measured_s']:.3g} s."
        )
    heads = ("", "launches", "bytes", "TFLOP")
    return [
        Table(_rows(record, place), heads, title, notes if place == "optimizer" else ())
        for place, title in titles.items()
    ]


def _rows(record: dict[str, Any], place: str) -> list[tuple[Cell, ...]]:
    launches, n_bytes, flop = (record[f"{place}_{name}"] for name in ("launches", "n_bytes", "flop"))
    parts = sorted(launches, key=lambda part: -launches[part])
    rows = [(part, launches[part], n_bytes.get(part, 0), flop.get(part, 0)) for part in parts]
    if len(rows) > 1:
        rows.append(("all", *(sum(found.values()) for found in (launches, n_bytes, flop))))
    return [(part, str(some), f"{moved / 1e9:.2f} GB", f"{done / 1e12:.3f}") for part, some, moved, done in rows]
