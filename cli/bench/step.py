"""`dpoeng bench step`: what a training step asks of a GPU, counted without one."""

from __future__ import annotations

from typing import Any

import click

from dpoeng.cli.bench.output import example
from dpoeng.cli.tables import Cell, Table, json_option, say, say_json


@click.command("step", epilog=example("dpoeng bench step --model Qwen/Qwen2.5-32B --quantization 8bit"))
@click.option("--model", required=True, help="A folder with config.json, or a name that dpoeng plan knows.")
@click.option(
    "--quantization",
    default="none",
    show_default=True,
    type=click.Choice(["none", "8bit", "4bit"]),
    help="How the base is held.",
)
@click.option("--pairs", default=2, show_default=True, help="In one forward.", type=click.IntRange(1))
@click.option("--prompt", default=1024, show_default=True, help="Tokens.", type=click.IntRange(1))
@click.option("--chosen", default=1024, show_default=True, help="Tokens.", type=click.IntRange(1))
@click.option("--rejected", default=1024, show_default=True, help="Tokens.", type=click.IntRange(1))
@click.option("--lora-r", default=16, show_default=True, help="LoRA rank.", type=click.IntRange(1))
@click.option(
    "--gradient-checkpointing/--no-gradient-checkpointing", default=True, show_default=True, help="Recompute layers."
)
@json_option
def step(as_json: bool, **settings: Any) -> None:
    """Kernel launches, bytes and FLOPs of a forward and backward, by part; counted on the meta device, in seconds.

    Counts, not measurements: a base in bfloat16 or quantised, LoRA on all linear layers, FlashAttention over shared
    prompts. Bytes are of each operation's tensors, as if there were no caches; FLOPs of matrix products alone.
    """
    from dpoeng.bench.step import StepSettings, count_step

    found = count_step(StepSettings(**settings))
    if as_json:
        say_json([{"kind": "step", "settings": settings, **found.record()}])
        return
    for counts, title in (
        (found.layer, f"one of {found.layers} layers, {found.tokens} tokens: forward, recomputation, backward"),
        (found.outside, "outside the layers, less the input gradient that the first layer does not form"),
    ):
        parts = [name for name, _ in counts.launches.most_common()]
        rows: list[tuple[Cell, ...]] = [
            (name, str(launches), f"{n_bytes / 1e9:.2f} GB", f"{flop / 1e12:.3f}")
            for name, launches, n_bytes, flop in [
                *((part, counts.launches[part], counts.n_bytes[part], counts.flop[part]) for part in parts),
                ("all", counts.launches.total(), counts.n_bytes.total(), counts.flop.total()),
            ]
        ]
        say(Table(rows, ("", "launches", "bytes", "TFLOP of products"), title))
