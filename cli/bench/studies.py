"""`dpoeng bench quality` and `dpoeng bench scale`."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import click

from dpoeng.cli.bench.output import Outputs, example, finish, output_options

_WAYS = ("float32", "bfloat16", "8bit", "8bit, bfloat16 reference", "4bit", "4bit, bfloat16 reference")


@click.command(
    "quality",
    epilog=example(
        "dpoeng bench quality",
        "dpoeng bench quality --model sft-model --pairs pairs.jsonl --way bfloat16 --way 8bit --way 4bit --seeds 3",
    ),
)
@click.option("--model", help="A directory with safetensors or a hub id.  [default: the demo's]")
@click.option(
    "--pairs",
    multiple=True,
    type=click.Path(path_type=Path, exists=True),
    help="JSON Lines of pairs; may be given more than once.  [default: the demo's]",
)
@click.option(
    "--pairs-count",
    default=100,
    show_default=True,
    help="Use only this many of the first pairs.",
    type=click.IntRange(4),
)
@click.option(
    "--way",
    "ways",
    multiple=True,
    type=click.Choice(_WAYS),
    help="Train only this way; may be given more than once. Others are compared with the first.  [default: all]",
)
@click.option(
    "--held-out",
    default=0.3,
    show_default=True,
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Share of the prompts that are held out for evaluation.",
)
@click.option("--seeds", default=1, show_default=True, help="Trainings per way.", type=click.IntRange(1))
@click.option("--epochs", default=1.0, show_default=True, type=click.FloatRange(0, min_open=True), help="Passes.")
@click.option("--batch-size", default=4, show_default=True, help="Pairs per step.", type=click.IntRange(1))
@click.option("--learning-rate", default=2e-4, show_default=True, help="Peak learning rate.")
@click.option("--beta", default=0.1, show_default=True, help="As in dpoeng train.")
@click.option("--lora-r", default=16, show_default=True, help="LoRA rank, on all linear layers.")
@click.option("--max-length", default=256, show_default=True, help="Maximum tokens of prompt + response.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    default=Path("dpoeng-bench-quality"),
    show_default=True,
    help="Folder for caches and runs; the same command continues from there.",
)
@output_options
def quality(outputs: Outputs, **settings: Any) -> None:
    """The same training in float32, bfloat16, 8 and 4 bits, with matching and with bfloat16 references.

    Every way is trained in a separate process, one after another. Shows held-out accuracy and margin, as trained and
    with only the adapter on the float32 model, with intervals and the paired difference from the first way. This takes
    long on a CPU, especially bfloat16 on a CPU without units for it: choose a few ways with --way.
    """
    from dpoeng.bench.studies.quality import WAYS, QualitySettings, bench_quality
    from dpoeng.cli.demo import PAIRS_FILE
    from dpoeng.cli.progress import TerminalProgress
    from dpoeng.engine.recipes.demo import obtain_model

    assert tuple(WAYS) == _WAYS
    progress = TerminalProgress()
    settings["model"] = settings["model"] or obtain_model(progress)
    settings["ways"] = settings["ways"] or _WAYS
    with resources.as_file(resources.files("dpoeng.cli").joinpath(PAIRS_FILE)) as demo_pairs:
        settings["pairs"] = settings["pairs"] or (demo_pairs,)
        record = bench_quality(QualitySettings(**settings), progress)
    finish([record], outputs)


def _numbers(ctx: click.Context, param: click.Parameter, value: str) -> list[int]:
    try:
        return [int(float(word)) for word in value.split(",")]
    except (ValueError, OverflowError) as error:
        raise click.BadParameter(f"{value!r} is not a list of numbers", ctx, param) from error


def _sizes(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, ...]:
    """Sizes separated by commas: at least three, to fit a line, or none."""
    if value.strip() == "none":
        return ()
    sizes = _numbers(ctx, param, value)
    if len(set(sizes)) < 3 or sizes != sorted(set(sizes)) or sizes[0] < 4:
        raise click.BadParameter(
            f"{value!r} is neither three sizes or more of at least 4, the smallest first, nor none", ctx, param
        )
    return tuple(sizes)


def _ranks(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, ...] | None:
    """Numbers of processes separated by commas, with 1 first; `none`; or `auto` for as many as there are cores."""
    if value.strip() in ("auto", "none"):
        return None if value.strip() == "auto" else ()
    ranks = _numbers(ctx, param, value)
    if len(ranks) < 2 or ranks != sorted(set(ranks)) or ranks[0] != 1:
        raise click.BadParameter(f"{value!r} is neither 1 and more processes, like 1,2,4, nor auto or none", ctx, param)
    return tuple(ranks)


@click.command(
    "scale",
    epilog=example(
        "dpoeng bench scale --results bench/results",
        "dpoeng bench scale --pairs 1e2,1e3,1e4,1e5,1e6 --lengths none --vocabularies none --ranks none",
    ),
)
@click.option("--model", help="A directory or a hub id.  [default: an embedded random one]")
@click.option(
    "--pairs", default="1e2,1e3,1e4,1e5", show_default=True, callback=_sizes, help="Pairs in the cache, or none."
)
@click.option(
    "--lengths", default="128,256,512,1024", show_default=True, callback=_sizes, help="Tokens of a pair, or none."
)
@click.option(
    "--simulated-lengths",
    default="256,512,1024,2048,4096",
    show_default=True,
    callback=_sizes,
    help="Tokens of a pair for memory, which is simulated; or none.",
)
@click.option(
    "--vocabularies",
    default="8192,16384,32768,65536,131072",
    show_default=True,
    callback=_sizes,
    help="Sizes of the vocabulary, or none.",
)
@click.option(
    "--ranks",
    default="auto",
    show_default=True,
    callback=_ranks,
    help="Numbers of processes, e.g. 1,2,4; auto: 1, 2, 4, ... while each has a core or a GPU; or none.",
)
@click.option("--repeats", default=3, show_default=True, help="Counted repeats.", type=click.IntRange(1))
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@output_options
def scale(outputs: Outputs, **settings: Any) -> None:
    """How cost grows with the number of pairs, their length and the vocabulary, and falls with the number of processes.

    Shows curves and their exponents. The caches contain made-up numbers: this measures storage, not the model. Memory
    by length is simulated. torchrun starts the processes; each has one thread, or a GPU.
    """
    from dpoeng.bench.studies.scale import ScaleSettings, bench_scale
    from dpoeng.cli.progress import TerminalProgress

    finish([bench_scale(ScaleSettings(**settings), TerminalProgress())], outputs)
