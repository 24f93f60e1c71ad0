"""`dpoeng bench kernels`."""

from __future__ import annotations

import functools
from typing import Any

import click

from dpoeng.cli.bench.output import Outputs, example, finish, output_options
from dpoeng.cli.tables import say, say_json


@click.command(
    "kernels",
    epilog=example("dpoeng bench kernels --shape 151936,896,1024", "dpoeng bench kernels --aot --gpu sm_90"),
)
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    metavar="V,H,N",
    help="Vocabulary, hidden size, tokens.  [default: 49152,576,512]",
)
@click.option(
    "--dtype", "dtypes", multiple=True, type=click.Choice(["float32", "bfloat16", "float16"]),
    help="May be given more than once.  [default: float32, bfloat16]",
)  # fmt: skip
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--repeats", default=3, show_default=True, help="Counted rounds.", type=click.IntRange(1))
@click.option(
    "--against", multiple=True, type=click.Choice(["naive", "TRL", "Liger", "F.linear_cross_entropy"]),
    help="Compare only with this; may be given more than once.  [default: all that are installed]",
)  # fmt: skip
@click.option(
    "--aot", is_flag=True, help="Compile for every GPU instead: registers, spills, shared memory. No GPU needed."
)
@click.option("--gpu", "gpus", multiple=True, help="With --aot: only this one, e.g. sm_90 or gfx942.")
@click.option("--tune", is_flag=True, help="Time the scoring kernel's tiles on this GPU and save the best.")
@output_options
def kernels(
    shapes: tuple[str, ...], dtypes: tuple[str, ...], device: str, repeats: int, against: tuple[str, ...],
    aot: bool, gpus: tuple[str, ...],
    tune: bool, outputs: Outputs,
) -> None:  # fmt: skip
    """The fused head compared with full logits, TRL's and Liger's heads and F.linear_cross_entropy.

    Training (forward + backward) and scoring: time, peak memory above the operands, error against float64, and the
    share of this machine's own matmul rate.
    """
    import torch

    from dpoeng.bench import kernels as bench
    from dpoeng.bench.measuring.records import stamp

    chosen = [_shape(text) for text in shapes] or list(bench.DEFAULT_SHAPES)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if aot:
        record = stamp("kernels-aot", torch.device("cpu"), {"gpus": list(gpus)})
        record |= {"reports": bench.aot(_known(gpus))}
    elif tune:
        if not torch.cuda.is_available():
            raise click.UsageError("--tune needs a GPU, and torch sees none")
        tuned = [bench.tune(chosen[0], dtype) for dtype in dtypes or ("bfloat16",)]
        say_json(tuned) if outputs.as_json else say("\n".join(map(str, tuned)))
        return
    else:
        picked = dtypes or ("float32", "bfloat16")
        record = bench.run(
            chosen, picked, device=device, repeats=repeats, against=against, say=functools.partial(say, err=True)
        )
    finish([record], outputs)


def _shape(text: str) -> Any:
    from dpoeng.bench.kernels import Shape

    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise click.BadParameter(f"{text!r} is not V,H,N, as in 49152,576,2048", param_hint="--shape")
    return Shape(*(int(part) for part in parts))


def _known(gpus: tuple[str, ...]) -> tuple[str, ...]:
    from dpoeng.kernels.tiles import GPUS

    for gpu in gpus:
        if gpu not in GPUS:
            raise click.BadParameter(f"{gpu!r} is not one of {', '.join(GPUS)}", param_hint="--gpu")
    return gpus
