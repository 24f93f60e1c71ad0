"""`dpoeng export`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from dpoeng.cache.words import counted
from dpoeng.cli.evaluate import run_config
from dpoeng.cli.options import config_options, force_option, given
from dpoeng.cli.tables import Marked, facts_table, json_option, say, say_json
from dpoeng.engine.config.fields import TrainConfig

if TYPE_CHECKING:
    from dpoeng.engine.recipes.elsewhere.export import ExportSummary

EPILOG = """\b
Examples:
  dpoeng export out --to gguf --into model.gguf --dtype q8_0
  dpoeng export out --to gguf-adapter --into adapter.gguf
  dpoeng export out --to vllm --into vllm-adapter
  dpoeng export out --to merged --into merged --dtype bfloat16
"""

_FIELDS = frozenset("cache view model device".split())


@click.command("export", epilog=EPILOG)
@click.argument("output_dir", type=click.Path(path_type=Path))
@click.option(
    "--to",
    "target",
    required=True,
    type=click.Choice(["merged", "gguf", "gguf-adapter", "vllm"]),
    help="A merged checkpoint; a GGUF model or adapter for llama.cpp; an adapter for vLLM.",
)
@click.option("--into", required=True, type=click.Path(path_type=Path), help="A new folder; for GGUF a file.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16", "q8_0"]),
    default="auto",
    show_default=True,
    help="Dtype of the weights; auto is the base's, q8_0 only with gguf.",
)
@click.option(
    "--check-pairs",
    type=click.IntRange(0),
    default=4,
    show_default=True,
    help="Pairs of the cache on which the result is compared with the trained policy; 0 for none.",
)
@force_option
@json_option
@config_options(TrainConfig, skip=frozenset(TrainConfig.model_fields) - _FIELDS)
def export(
    output_dir: Path,
    target: Literal["merged", "gguf", "gguf-adapter", "vllm"],
    into: Path,
    dtype: str,
    check_pairs: int,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Write the result of a finished run for another program, load it again, and compare it with the trained policy.

    The comparison scores pairs of the run's cache with the policy over its full-precision base, which must fit into
    memory. A result that differs by more than rounding is deleted. `--to merged` is `dpoeng merge` with this check.
    """
    from dpoeng.cli.progress import TerminalProgress, importing

    with importing():
        from dpoeng.engine.recipes.elsewhere.export import export as write
        from dpoeng.engine.recipes.evaluate import find_trained

    config = run_config(find_trained(output_dir), given(options))
    summary = write(
        output_dir,
        target,
        into,
        config,
        dtype=dtype,
        check_pairs=check_pairs,
        force=force,
        progress=TerminalProgress(),
    )
    if as_json:
        say_json(summary)
        return
    facts = [("written", str(summary.path)), ("base", summary.base), ("dtype", summary.dtype)]
    if summary.rank is not None:
        facts.append(("rank", str(summary.rank)))
    if summary.check is not None:
        check = summary.check
        difference = f"{check.mean_diff:.2g} nats per token from the trained policy, on {counted(check.pairs, 'pair')}"
        facts.append(("difference", f"{difference} (allowed: {check.tolerance:g})"))
    say(facts_table(facts))
    if summary.check is None:
        say(Marked("Not compared", "warning"), " with the trained policy, because of --check-pairs 0.")
    say(f"\n{_how_to_load(summary)}")


def _how_to_load(summary: ExportSummary) -> str:
    path, base = str(summary.path), summary.base
    if summary.target == "vllm":
        words = ["vllm", "serve", base, "--enable-lora", "--max-lora-rank", str(summary.max_lora_rank)]
        return shlex.join([*words, "--lora-modules", f"dpo={path}"])
    if summary.target == "merged":
        return f"AutoModelForCausalLM.from_pretrained({path!r}) loads it."
    if summary.target == "gguf-adapter":
        return shlex.join(["llama-cli", "-m", "BASE.gguf", "--lora", path]) + "   # BASE.gguf: the base as GGUF"
    return shlex.join(["llama-cli", "-m", path])
