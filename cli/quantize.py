"""`dpoeng quantize`."""

from __future__ import annotations

from pathlib import Path

import click

from dpoeng.cache.words import gib
from dpoeng.cli.tables import command_line, facts_table, json_option, say, say_json

EPILOG = """\b
Examples:
  dpoeng quantize Qwen/Qwen2.5-32B --into qwen-8bit
  dpoeng quantize sft-model --into sft-4bit --quantization 4bit
"""


@click.command("quantize", epilog=EPILOG)
@click.argument("model")
@click.option("--into", required=True, type=click.Path(path_type=Path), help="A new folder for the checkpoint.")
@click.option(
    "--quantization",
    type=click.Choice(["8bit", "4bit"]),
    default="8bit",
    show_default=True,
    help="bitsandbytes' precision.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Dtype of the unquantised parts: head, embedding, norms.",
)
@json_option
@click.option("--device", default="auto", show_default=True, help="Device that quantises: auto, cpu, cuda or cuda:N.")
def quantize(model: str, into: Path, quantization: str, dtype: str, device: str, as_json: bool) -> None:
    """Write a model in 8 or 4 bits, so that every later run reads half or a quarter of the bytes.

    Both phases accept the folder as --model and need no --quantization. `dpoeng merge` still needs the original.
    """
    from dpoeng.cli.progress import TerminalProgress
    from dpoeng.engine.models.loading import pick_device
    from dpoeng.engine.models.sources import find_model
    from dpoeng.engine.recipes.quantize import quantize as write_quantized

    summary = write_quantized(
        find_model(model),
        into,
        quantization="8bit" if quantization == "8bit" else "4bit",
        dtype=dtype,
        device=pick_device(device),
        progress=TerminalProgress(),
    )
    if as_json:
        say_json(summary)
        return
    say(
        facts_table(
            [
                ("checkpoint", str(summary.folder)),
                ("weights", f"{gib(summary.before)} before, {gib(summary.after)} now"),
            ]
        )
    )
    say("\nNext: ", command_line("precompute-ref", "pairs.jsonl", "--model", summary.folder))
