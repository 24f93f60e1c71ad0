"""`dpoeng merge`."""

from __future__ import annotations

from pathlib import Path

import click

from dpoeng.cache.words import counted
from dpoeng.cli.tables import facts_table, json_option, say, say_json

EPILOG = """\b
Examples:
  dpoeng merge out --into merged
  dpoeng merge out --into merged --dtype bfloat16 --model /models/Qwen2.5-32B
"""


@click.command("merge", epilog=EPILOG)
@click.argument("output_dir", type=click.Path(path_type=Path))
@click.option("--into", required=True, type=click.Path(path_type=Path), help="A new folder for the checkpoint.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Dtype of the merged weights; auto keeps the base's.",
)
@json_option
@click.option("--model", help="The base, if it has moved since the run.")
def merge(output_dir: Path, into: Path, dtype: str, model: str | None, as_json: bool) -> None:
    """Merge the adapters of a finished run into the full-precision base: a checkpoint that needs no peft.

    The base is read from its own files, even if training used 8 or 4 bits: merging into quantised weights would round
    the update away. Needs host memory for one file of the checkpoint.
    """
    from dpoeng.cli.progress import TerminalProgress
    from dpoeng.engine.recipes.merge import merge_run

    summary = merge_run(output_dir, into, dtype=dtype, model=model, progress=TerminalProgress())
    if as_json:
        say_json(summary)
        return
    say(
        facts_table(
            [
                ("base", summary.base),
                ("adapters", ", ".join(summary.adapters)),
                ("merged", f"{summary.merged} of {counted(summary.tensors, 'tensor')}, sums in float32"),
            ]
        )
    )
    say(f"\nAutoModelForCausalLM.from_pretrained({str(summary.folder)!r}) loads it.")
