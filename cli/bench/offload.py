"""`dpoeng bench offload`: both phases over a model larger than the memory they use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dpoeng.cli.bench.output import Outputs, example, finish, output_options


@click.command("offload", epilog=example("dpoeng bench offload --model Qwen/Qwen2.5-14B --results bench/results"))
@click.option(
    "--model",
    default="Qwen/Qwen2.5-14B",
    show_default=True,
    help="The shape: a folder with config.json, or a name that dpoeng plan knows.",
)
@click.option("--layers", type=click.IntRange(1), help="Use only this many layers.  [default: all]")
@click.option(
    "--dtype",
    default="bfloat16",
    show_default=True,
    type=click.Choice(["float32", "bfloat16"]),
    help="Dtype of files and computation.",
)
@click.option(
    "--quantization",
    default="none",
    show_default=True,
    type=click.Choice(["none", "8bit", "4bit"]),
    help="Precision of a layer in memory.",
)
@click.option("--pairs", default=4, show_default=True, type=click.IntRange(1), help="Pairs in total, and per step.")
@click.option("--batch-size", default=2, show_default=True, type=click.IntRange(1), help="Pairs per forward.")
@click.option(
    "--tokens", default=24, show_default=True, type=click.IntRange(2), help="Tokens of a prompt, and of a response."
)
@click.option("--steps", default=2, show_default=True, type=click.IntRange(1), help="Optimizer steps.")
@click.option("--folder", type=click.Path(path_type=Path, exists=True), help="Folder for temporary files.")
@output_options
def offload(outputs: Outputs, **settings: Any) -> None:
    """Both phases layer by layer over random weights, on the CPU: memory, time, and how often weights are read.

    Qwen2.5-14B's shape makes 29 GB of files. Fewer --layers make less.
    """
    from dpoeng.bench.offload import OffloadSettings, bench_offload
    from dpoeng.cli.progress import TerminalProgress

    finish([bench_offload(OffloadSettings(**settings), TerminalProgress())], outputs)
