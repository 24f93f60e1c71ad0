"""`dpoeng bench`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from dpoeng.cli.lazy import LazyGroup

Command = TypeVar("Command", bound=Callable[..., Any])

COMMANDS = {
    "phases": ("dpoeng.cli.bench:phases", "Both phases: speed, where the time goes, memory."),
    "compare": ("dpoeng.cli.bench:compare", "dpoeng against TRL on the same tokens, with equal losses."),
    "kernels": ("dpoeng.cli.bench_kernels:kernels", "The fused head against its alternatives."),
    "sharing": ("dpoeng.cli.bench:sharing", "What running each prompt once brings: two curves."),
    "cache": ("dpoeng.cli.bench:cache", "The cache: open, read, verify, look up."),
}

EPILOG = """\b
Examples:
  dpoeng bench
  dpoeng bench phases --model sft-model --pairs pairs.jsonl --dtype bfloat16
  dpoeng bench compare --model sft-model --pairs pairs.jsonl --peer-python peer/bin/python --results bench/results
"""


def _example(line: str) -> str:
    return f"\b\nExample:\n  {line}"


def _record_options(command: Command) -> Command:
    path = click.Path(path_type=Path)
    command = click.option("--results", type=path, help="Append the record to DIR/<what>-<cpu or gpu>.jsonl.")(command)
    return click.option("--json", "json_file", type=path, help="Append the record, a line of JSON, to this file.")(
        command
    )


def _model_options(*, required: bool) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for option in (
            click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."),
            click.option("--max-length", default=512, show_default=True, help="Most tokens of prompt + response."),
            click.option("--lora-r", default=16, show_default=True, help="LoRA rank, on all linear layers."),
            click.option("--repeats", default=3, show_default=True, help="Counted repeats.", type=click.IntRange(1)),
            click.option("--batch-size", default=4, show_default=True, help="Pairs in a step.", type=click.IntRange(1)),
            click.option(
                "--pairs",
                multiple=True,
                required=required,
                type=click.Path(path_type=Path, exists=True),
                help="A file of pairs; may be given more than once.",
            ),
            click.option("--model", required=required, help="A directory with safetensors or a hub id."),
        ):
            command = option(command)
        return command

    return decorate


@click.group(cls=LazyGroup, table=COMMANDS, invoke_without_command=True, epilog=EPILOG)
@_record_options
@click.pass_context
def bench(ctx: click.Context, json_file: Path | None, results: Path | None) -> None:
    """Measure throughput and memory on this machine.

    Without a command: `phases` on an embedded random model of SmolLM2's shape, cut to six layers, and on pairs with
    the lengths of real ones. Ends within three minutes on two cores.
    """
    if ctx.invoked_subcommand is None:
        _run_phases({}, json_file, results)


@click.command("phases", epilog=_example("dpoeng bench phases --model sft-model --pairs pairs.jsonl"))
@_model_options(required=False)
@click.option("--steps", default=4, show_default=True, help="Steps of phase two in a repeat.", type=click.IntRange(1))
@click.option(
    "--quantization",
    default="none",
    show_default=True,
    type=click.Choice(["none", "8bit", "4bit"]),
    help="How the base is held.",
)
@click.option(
    "--dtype",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    help="Compute dtype; auto is the checkpoint's own.",
)
@_record_options
def phases(json_file: Path | None, results: Path | None, **settings: Any) -> None:
    """Both phases, with the prompt shared and with separate rows: pairs and tokens a second, time split, peak memory.

    Without --model: an embedded random one. Without --pairs: random tokens with the lengths of real pairs.
    """
    _run_phases(settings, json_file, results)


@click.command(
    "compare",
    epilog=_example("dpoeng bench compare --model sft-model --pairs pairs.jsonl --peer-python peer/bin/python"),
)
@_model_options(required=True)
@click.option("--steps", default=6, show_default=True, help="Steps; the first is not counted.", type=click.IntRange(2))
@click.option("--pairs-count", default=64, show_default=True, help="Pairs that the reference pass scores.")
@click.option(
    "--dtype",
    default="float32",
    show_default=True,
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Of the frozen weights, in both programs.",
)
@click.option("--peer-python", type=click.Path(path_type=Path), help="A Python with TRL.  [default: this one]")
@click.option("--work", type=click.Path(path_type=Path), help="Keep finished runs here, so that a stop costs one run.")
@_record_options
def compare(json_file: Path | None, results: Path | None, **settings: Any) -> None:
    """dpoeng against TRL, each in processes of their own, in turn: time, memory, and whether the losses are equal.

    TRL gets the same model, token ids, LoRA, order and batches, and the reference in three ways: precomputed, by
    switching the adapter off, and as a second model.
    """
    from dpoeng.bench.compare import CompareSettings, bench_compare
    from dpoeng.cli.bench_tables import compare_tables
    from dpoeng.cli.progress import TerminalProgress

    _finish(bench_compare(CompareSettings(**settings), TerminalProgress()), compare_tables, json_file, results)


@click.command("sharing", epilog=_example("dpoeng bench sharing --results bench/results"))
@click.option("--model", help="A directory or a hub id.  [default: an embedded random one]")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--tokens", default=384, show_default=True, help="Of a pair, both responses.", type=click.IntRange(8))
@click.option("--pairs", default=8, show_default=True, help="In a step and in a pass.", type=click.IntRange(1))
@click.option("--repeats", default=3, show_default=True, help="Counted repeats.", type=click.IntRange(1))
@_record_options
def sharing(json_file: Path | None, results: Path | None, **settings: Any) -> None:
    """Speed with each prompt run once, against repeating it: by the prompt's share of the tokens, by pairs a prompt."""
    from dpoeng.bench.sharing import SharingSettings, bench_sharing
    from dpoeng.cli.bench_tables import sharing_tables
    from dpoeng.cli.progress import TerminalProgress

    _finish(bench_sharing(SharingSettings(**settings), TerminalProgress()), sharing_tables, json_file, results)


@click.command("cache", epilog=_example("dpoeng bench cache --json cache.jsonl"))
@click.option("--pairs", default=100_000, show_default=True, help="Pairs of the largest cache.", type=click.IntRange(1))
@click.option("--weight-bytes", default=500_000_000, show_default=True, help="Size of the made-up checkpoint.")
@click.option("--folder", type=click.Path(path_type=Path, exists=True), help="Where to write; removed again.")
@_record_options
def cache(json_file: Path | None, results: Path | None, **settings: Any) -> None:
    """The cache alone, on made-up pairs: write, look up, open, read; and hashing the weights of a model."""
    import torch
    from rich.console import Console

    from dpoeng.bench.cache import run
    from dpoeng.bench.records import stamp
    from dpoeng.cli.bench_tables import cache_tables

    told = {**settings, "folder": None}
    record = stamp("cache", torch.device("cpu"), told)
    record |= run(**settings, say=Console(stderr=True).print)
    _finish(record, cache_tables, json_file, results)


def _run_phases(settings: dict[str, Any], json_file: Path | None, results: Path | None) -> None:
    from dpoeng.bench.phases import PhaseSettings, bench_phases
    from dpoeng.cli.bench_tables import phases_tables
    from dpoeng.cli.progress import TerminalProgress

    _finish(bench_phases(PhaseSettings(**settings), TerminalProgress()), phases_tables, json_file, results)


def _finish(
    record: dict[str, Any],
    tables: Callable[[dict[str, Any]], list[Any]],
    json_file: Path | None,
    results: Path | None,
) -> None:
    """Prints the tables, keeps the record."""
    from rich.console import Console

    from dpoeng.bench.records import append

    console = Console()
    for table in tables(record):
        console.print(table, highlight=False)
    targets = [json_file] if json_file else []
    if results:
        targets.append(results / f"{record['kind']}-{record['device_kind'].lower()}.jsonl")
    for target in targets:
        append(record, target)
        console.print(f"Record appended to {target}", highlight=False, soft_wrap=True)
