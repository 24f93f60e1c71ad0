"""`dpoeng bench`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from dpoeng.cli.bench.output import Outputs, example, finish, output_options, refuse_outputs
from dpoeng.cli.main import LazyGroup
from dpoeng.cli.tables import say

COMMANDS = {
    "phases": ("dpoeng.cli.bench.commands:phases", "Both phases: speed, where the time goes, memory."),
    "memory": (
        "dpoeng.cli.bench.commands:memory",
        "Measured memory against the plan's; the cost of a reference in the step.",
    ),
    "compare": ("dpoeng.cli.bench.commands:compare", "dpoeng against TRL on the same tokens, with equal losses."),
    "kernels": ("dpoeng.cli.bench.kernels:kernels", "The fused head against its alternatives."),
    "sharing": ("dpoeng.cli.bench.commands:sharing", "The gain from computing each prompt once: two curves."),
    "checks": ("dpoeng.cli.bench.checks:checks", "A few ratios with wide limits: slower, larger, leaking?"),
    "offload": ("dpoeng.cli.bench.offload:offload", "Both phases over a model larger than the memory they use."),
    "step": ("dpoeng.cli.bench.step:step", "A step's launches, bytes and FLOPs on a GPU, counted without one."),
    "quality": ("dpoeng.cli.bench.studies:quality", "The same training in each precision: accuracy and margin."),
    "scale": ("dpoeng.cli.bench.studies:scale", "How cost grows, with the exponent fitted."),
    "cache": ("dpoeng.cli.bench.commands:cache", "The cache: open, read, verify, look up."),
}

EPILOG = """\b
Examples:
  dpoeng bench
  dpoeng bench phases --model sft-model --pairs pairs.jsonl --dtype bfloat16
  dpoeng bench compare --model sft-model --pairs pairs.jsonl --peer-python peer/bin/python --results bench/results
"""


def model_options(
    *, required: bool = False, batch_size: int = 4, repeats: bool = True
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The options that choose model, pairs and sizes."""
    path = click.Path(path_type=Path, exists=True)
    options = [
        click.option("--model", required=required, help="A directory with safetensors or a hub id."),
        click.option(
            "--pairs", multiple=True, required=required, type=path, help="A file of pairs; may be given more than once."
        ),
        click.option(
            "--batch-size", default=batch_size, show_default=True, help="Pairs per step.", type=click.IntRange(1)
        ),
        click.option("--lora-r", default=16, show_default=True, help="LoRA rank, on all linear layers."),
        click.option("--max-length", default=512, show_default=True, help="Maximum tokens of prompt + response."),
        click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."),
    ]
    if repeats:
        counted = click.option(
            "--repeats", default=3, show_default=True, help="Counted repeats.", type=click.IntRange(1)
        )
        options.insert(3, counted)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def precision_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options for the precision of weights and computation."""
    command = click.option(
        "--dtype",
        default="auto",
        show_default=True,
        type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
        help="Compute dtype; auto is the checkpoint's own.",
    )(command)
    return click.option(
        "--quantization",
        default="none",
        show_default=True,
        type=click.Choice(["none", "8bit", "4bit"]),
        help="Precision of the base's weights.",
    )(command)


@click.group(cls=LazyGroup, table=COMMANDS, invoke_without_command=True, epilog=EPILOG)
@output_options
@click.pass_context
def bench(ctx: click.Context, outputs: Outputs) -> None:
    """Measure throughput and memory on this machine.

    Without a command, runs `phases` and `memory` on an embedded random model with SmolLM2's shape, cut to six layers,
    and on pairs with the lengths of real ones. Takes about five CPU minutes; writes tables, the records to
    dpoeng-bench.jsonl and a page to dpoeng-bench.html.
    """
    if ctx.invoked_subcommand is not None:
        if any(outputs):
            raise click.UsageError(
                f"--json, --record, --results and --html go after the command: {ctx.invoked_subcommand}"
            )
        return
    record_file, page_file = outputs.record or Path("dpoeng-bench.jsonl"), outputs.html or Path("dpoeng-bench.html")
    outputs = outputs._replace(record=record_file, html=page_file)
    refuse_outputs(outputs)

    from dpoeng.bench.memory import MemorySettings, bench_memory
    from dpoeng.bench.phases import PhaseSettings, bench_phases
    from dpoeng.cli.progress import TerminalProgress

    progress = TerminalProgress()
    finish([bench_phases(PhaseSettings(), progress), bench_memory(MemorySettings(batch_size=1), progress)], outputs)


@click.command("phases", epilog=example("dpoeng bench phases --model sft-model --pairs pairs.jsonl"))
@model_options()
@click.option("--steps", default=4, show_default=True, help="Steps of phase two per repeat.", type=click.IntRange(1))
@precision_options
@click.option(
    "--trace",
    type=click.Path(path_type=Path, dir_okay=False),
    help="After the counted rounds, profile one more of each phase with torch.profiler and write FILE-reference and "
    "FILE-training, for ui.perfetto.dev.",
)
@click.option("--price-per-hour", type=click.FloatRange(0), help="Price of the machine; adds the cost of 1,000 pairs.")
@click.option("--layers", default=6, show_default=True, help="Layers of the embedded model.", type=click.IntRange(1))
@click.option(
    "--width",
    default=576,
    show_default=True,
    help="Hidden size of the embedded model, a multiple of 64.",
    type=click.IntRange(64),
)
@output_options
def phases(outputs: Outputs, trace: Path | None, price_per_hour: float | None, **settings: Any) -> None:
    """Both phases, with shared prompts and with separate rows: pairs and tokens per second, time split, peak memory.

    Without --model: an embedded random one. Without --pairs: random tokens with the lengths of real pairs.
    """
    from dpoeng.bench.phases import PhaseSettings, bench_phases
    from dpoeng.cli.progress import TerminalProgress

    usual = PhaseSettings()
    if settings["model"] and (settings["layers"], settings["width"]) != (usual.layers, usual.width):
        raise click.UsageError("--layers and --width shape the embedded model: leave them out, or --model")
    if settings["width"] % 64:
        raise click.UsageError(f"--width {settings['width']} is not a multiple of 64, the size of a head")
    record = bench_phases(PhaseSettings(**settings), TerminalProgress(), trace)
    finish([{**record, "price_per_hour": price_per_hour}], outputs)


@click.command(
    "memory",
    epilog=example(
        "dpoeng bench memory", "dpoeng bench memory --model sft-model --pairs pairs.jsonl --quantization 8bit"
    ),
)
@model_options(batch_size=2, repeats=False)
@precision_options
@click.option(
    "--gradient-checkpointing/--no-gradient-checkpointing",
    default=True,
    show_default=True,
    help="Recompute layers in the backward pass.",
)
@output_options
def memory(outputs: Outputs, **settings: Any) -> None:
    """Peak memory compared with `dpoeng plan`: phase one, and a step of phase two with each kind of reference.

    The kinds are: cached; the policy with its adapter switched off; a second model; and a second model in plain
    PyTorch, with whole logits and one row per response. The batch is the longest of 64 pairs.
    with whole logits and a row a response. The longest of 64 pairs are the batch.
    """
    from dpoeng.bench.memory import MemorySettings, bench_memory
    from dpoeng.cli.progress import TerminalProgress

    finish([bench_memory(MemorySettings(**settings), TerminalProgress())], outputs)


_PEERS = ("trl precomputed", "trl adapter off", "trl second model")


@click.command(
    "compare",
    epilog=example("dpoeng bench compare --model sft-model --pairs pairs.jsonl --peer-python peer/bin/python"),
)
@model_options(required=True)
@click.option("--steps", default=6, show_default=True, help="Steps; the first is not counted.", type=click.IntRange(2))
@click.option("--pairs-count", default=64, show_default=True, help="Pairs that the reference pass scores.")
@click.option(
    "--max-prompt-length",
    type=click.IntRange(1),
    help="Maximum tokens of a prompt, which keeps its end.  [default: no limit]",
)
@click.option(
    "--dtype",
    default="float32",
    show_default=True,
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Precision of the frozen weights, in both programs.",
)
@click.option(
    "--peer",
    "peers",
    multiple=True,
    type=click.Choice(_PEERS),
    help="A configuration of TRL; may be given more than once.  [default: all]",
)
@click.option("--peer-python", type=click.Path(path_type=Path), help="A Python with TRL.  [default: this one]")
@click.option(
    "--work", type=click.Path(path_type=Path), help="Folder for finished runs, so that a stop loses only one run."
)
@output_options
def compare(outputs: Outputs, **settings: Any) -> None:
    """Compare dpoeng with TRL, in alternating separate processes: time, memory, and whether the losses are equal.

    TRL gets the same model, token ids, LoRA, order and batches, and the reference in three ways: precomputed, by
    switching the adapter off, and as a second model.
    """
    from dpoeng.bench.compare import PEERS, CompareSettings, bench_compare
    from dpoeng.cli.progress import TerminalProgress

    assert PEERS == _PEERS
    settings["peers"] = settings["peers"] or _PEERS
    finish([bench_compare(CompareSettings(**settings), TerminalProgress())], outputs)


@click.command("sharing", epilog=example("dpoeng bench sharing --results bench/results"))
@click.option("--model", help="A directory or a hub id.  [default: an embedded random one]")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option(
    "--tokens", default=384, show_default=True, help="Tokens of a pair, with both responses.", type=click.IntRange(8)
)
@click.option("--pairs", default=8, show_default=True, help="Pairs per step and per pass.", type=click.IntRange(1))
@click.option("--repeats", default=3, show_default=True, help="Counted repeats.", type=click.IntRange(1))
@click.option("--responses", is_flag=True, help="Instead: 2 to 8 responses of 256 tokens to a prompt of 1,024.")
@output_options
def sharing(outputs: Outputs, responses: bool, **settings: Any) -> None:
    """Speed with each prompt computed once, against repeating it: by the prompt's share of tokens and by pairs."""
    from dpoeng.bench.studies.sharing import ResponsesSettings, SharingSettings, bench_responses, bench_sharing
    from dpoeng.cli.progress import TerminalProgress

    if responses:
        chosen = {name: value for name, value in settings.items() if name not in ("tokens", "pairs")}
        finish([bench_responses(ResponsesSettings(**chosen), TerminalProgress())], outputs)
        return
    finish([bench_sharing(SharingSettings(**settings), TerminalProgress())], outputs)


@click.command("cache", epilog=example("dpoeng bench cache --record cache.jsonl"))
@click.option("--pairs", default=100_000, show_default=True, help="Pairs of the largest cache.", type=click.IntRange(1))
@click.option("--weight-bytes", default=500_000_000, show_default=True, help="Size of the made-up checkpoint.")
@click.option("--folder", type=click.Path(path_type=Path, exists=True), help="Folder for temporary files.")
@output_options
def cache(outputs: Outputs, **settings: Any) -> None:
    """The cache alone, on made-up pairs: write, look up, open, read; and hashing the weights of a model."""
    import torch

    from dpoeng.bench.cache import run
    from dpoeng.bench.measuring.records import stamp

    described = {**settings, "folder": None}
    record = stamp("cache", torch.device("cpu"), described)
    record |= run(**settings, say=functools.partial(say, err=True))
    finish([record], outputs)
