"""`dpoeng init`."""

from __future__ import annotations

from pathlib import Path

import click

from dpoeng.cli.tables import json_option, say, say_json

EPILOG = """\b
Examples:
  dpoeng init
  dpoeng init pairs.jsonl --model Qwen/Qwen2.5-32B --adapter my-sft-lora --gpu a100-80gb
  dpoeng init pairs.jsonl --model sft-model --output runs/first.yaml
"""


@click.command("init", epilog=EPILOG)
@click.argument("pairs", nargs=-1, type=click.Path(path_type=Path))
@click.option("--model", help="The SFT base: a directory, a .gguf file or a hub id.")
@click.option("--adapter", help="SFT LoRA adapter on the base.")
@click.option("--gpu", help="The card, by name or by memory: a100-80gb, 24gb.  [default: this machine's]")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("dpoeng.yaml"),
    show_default=True,
    help="The file to write.",
)
@click.option("--force", is_flag=True, help="Overwrite the output.")
@json_option
def init(
    pairs: tuple[Path, ...],
    model: str | None,
    adapter: str | None,
    gpu: str | None,
    output: Path,
    force: bool,
    as_json: bool,
) -> None:
    """Write a dpoeng.yaml with every field explained, set for your model, PAIRS and GPU.

    Simulates what fits on the card, as `dpoeng plan` does; needs only config.json and reads no weights.
    """
    from dpoeng.cli.progress import TerminalProgress
    from dpoeng.engine.checks.driver import driver_note
    from dpoeng.engine.config.template import config_text, write_config
    from dpoeng.engine.recipes.init import suggest

    header = [
        "Configuration of dpoeng, for both phases. A field that is commented out shows its default.",
        "Options override this file; `dpoeng config show` prints each value and its source.",
    ]
    lines = suggest(pairs, model, adapter, gpu=gpu, progress=TerminalProgress())
    text = config_text(lines, header=header, every_field=True)
    write_config(output, text, inputs=[*pairs, *(Path(name) for name in (model, adapter) if name)], force=force)
    if as_json:
        say_json({"output": output, "fields": lines})
        return
    say(f"{output} written:")
    for name, line in lines.items():
        value = ", ".join(map(str, line.value)) if isinstance(line.value, list) else line.value
        say(f"  {name}: {value}" + (f"  ({' '.join(line.comments)})" if line.comments else ""))
    say(f"\nOn a GPU: {driver_note()}; `dpoeng doctor` checks it.")
    missing = [name for name in ("model", "pairs") if name not in lines]
    say("\nNext:" + (f" set {' and '.join(missing)} in {output}, then" if missing else ""))
    config = "" if str(output) == "dpoeng.yaml" else f" --config {output}"
    say(f"  dpoeng precompute-ref{config}\n  dpoeng train{config}")
