"""`dpoeng bench step`: counts a training step's work for a GPU, without one."""

from __future__ import annotations

from typing import Any

import click

from dpoeng.cli.bench.output import Outputs, example, finish, output_options


@click.command("step", epilog=example("dpoeng bench step --model Qwen/Qwen2.5-32B --quantization 8bit"))
@click.option("--model", required=True, help="A folder with config.json, or a name that dpoeng plan knows.")
@click.option(
    "--quantization",
    default="none",
    show_default=True,
    type=click.Choice(["none", "8bit", "4bit"]),
    help="Precision of the base's weights.",
)
@click.option("--batch-size", default=2, show_default=True, help="Pairs in one forward.", type=click.IntRange(1))
@click.option("--prompt", default=1024, show_default=True, help="Tokens.", type=click.IntRange(1))
@click.option("--chosen", default=1024, show_default=True, help="Tokens.", type=click.IntRange(1))
@click.option("--rejected", default=1024, show_default=True, help="Tokens.", type=click.IntRange(1))
@click.option("--lora-r", default=16, show_default=True, help="LoRA rank.", type=click.IntRange(1))
@click.option(
    "--gradient-checkpointing/--no-gradient-checkpointing", default=True, show_default=True, help="Recompute layers."
)
@click.option("--layer-offloading", is_flag=True, help="Layer by layer: each is loaded twice, and recomputed.")
@click.option("--trunk-layer", type=click.FloatRange(0, min_open=True), help="From a trunk at this layer, or share.")
@click.option("--gpu", help="Estimate the time of a step on this card, by name as in dpoeng plan: a100-80gb.")
@click.option(
    "--measure-on",
    metavar="DEVICE",
    help="Also time the step of this model with 2 and with 4 layers there, with random weights: cuda.",
)
@output_options
def step(outputs: Outputs, gpu: str | None, measure_on: str | None, **settings: Any) -> None:
    """Kernel launches, bytes and FLOPs of a training step, by part; counted on the meta device, in seconds.

    Counts, not measurements, for a base in bfloat16 or quantised, LoRA on all linear layers, and FlashAttention over
    shared prompts. Bytes are those of each operation's tensors, as if there were no caches; FLOPs are those of matrix
    products. The time is estimated from them: 75 % of the card's FLOPs, 80 % of its bandwidth, 6 microseconds a launch;
    with --layer-offloading also the bus, at 25 GB/s. With --measure-on the times of a GPU stand beside the counts.
    """
    if measure_on and (settings["layer_offloading"] or settings["trunk_layer"]):
        raise click.UsageError("--measure-on times a step without --layer-offloading and --trunk-layer")
    import torch

    from dpoeng.bench.measuring.records import stamp
    from dpoeng.bench.step import StepSettings, count_step
    from dpoeng.engine.memory.cards import find_gpu

    card = find_gpu(gpu) if gpu else None
    counts = count_step(StepSettings(**settings))
    record = {**stamp("step", torch.device("cpu"), settings), "calculated": True, **counts.record()}
    if card is not None:
        record |= {"gpu": card.name, "estimated_s": counts.seconds(card)}
    if measure_on is not None:
        from dpoeng.bench.step_time import measure_step
        from dpoeng.engine.models.loading import pick_device

        record |= measure_step(StepSettings(**settings), counts.layers, pick_device(measure_on))
    finish([record], outputs)
