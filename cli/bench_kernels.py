"""`dpoeng bench kernels`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.command(
    "kernels",
    epilog="\b\nExamples:\n  dpoeng bench kernels --shape 151936,896,1024\n  dpoeng bench kernels --aot --gpu sm_90",
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
    help="Only with this; may be given more than once.  [default: all that are installed]",
)  # fmt: skip
@click.option(
    "--aot", is_flag=True, help="Compile for every GPU instead: registers, spills, shared memory. No GPU needed."
)
@click.option("--gpu", "gpus", multiple=True, help="With --aot: only this one, e.g. sm_90 or gfx942.")
@click.option("--tune", is_flag=True, help="Time the scoring kernel's tiles on this GPU and remember the best.")
@click.option("--results", type=click.Path(path_type=Path), help="Append the record to DIR/kernels-<cpu or gpu>.jsonl.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Append the record to this file.")
def kernels(
    shapes: tuple[str, ...], dtypes: tuple[str, ...], device: str, repeats: int, against: tuple[str, ...],
    aot: bool, gpus: tuple[str, ...],
    tune: bool, results: Path | None, json_file: Path | None,
) -> None:  # fmt: skip
    """The fused head against full logits, TRL's and Liger's heads and F.linear_cross_entropy.

    Training (forward + backward) and scoring: time, peak memory above the operands, error to float64, and the share of
    this machine's own matmul rate.
    """
    import torch
    from rich.console import Console

    from dpoeng.bench import kernels as bench
    from dpoeng.bench.records import append, stamp
    from dpoeng.cli.bench_tables import machine_table

    console = Console()
    chosen = [_shape(text) for text in shapes] or list(bench.DEFAULT_SHAPES)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if aot:
        record = stamp("kernels-aot", torch.device("cpu"), {"gpus": list(gpus)})
        record |= {"reports": bench.aot(_known(gpus))}
        console.print(_aot_table(record["reports"]), highlight=False)
    elif tune:
        if not torch.cuda.is_available():
            raise click.UsageError("--tune needs a GPU, and torch sees none")
        for dtype in dtypes or ("bfloat16",):
            console.print(bench.tune(chosen[0], dtype), highlight=False)
        return
    else:
        picked = dtypes or ("float32", "bfloat16")
        say = Console(stderr=True).print
        record = bench.run(chosen, picked, device=device, repeats=repeats, against=against, say=say)
        console.print(machine_table(record), highlight=False)
        for result in record["results"]:
            console.print(_way_table(result), highlight=False)
        for name, reason in record["missing"].items():
            console.print(f"{name}: {reason}", highlight=False, markup=False, soft_wrap=True)
    folder = results / f"{record['kind']}-{record['device_kind'].lower()}.jsonl" if results else None
    for target in (json_file, folder):
        if target is not None:
            append(record, target)
            console.print(f"Record appended to {target}", highlight=False, soft_wrap=True)


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


def _way_table(result: dict[str, Any]) -> Any:
    from rich.table import Table

    v, h, n = result["shape"]
    table = Table(
        title=f"{result['mode']}: V {v}, H {h}, N {n}, {result['dtype']}", title_justify="left", show_edge=False
    )
    for heading in ("", "wall s", "x", "CPU-s", "x", "peak MiB", "of matmul", "log-prob error", "gradient error"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, figure in result["ways"].items():
        error = figure["grad_error"]
        table.add_row(
            name,
            f"{_median(figure['wall_s']):.3g}",
            _ratio(figure["wall_s_ratio"]),
            f"{_median(figure['cpu_s']):.3g}",
            _ratio(figure["cpu_s_ratio"]),
            f"{figure['peak_bytes'] / 2**20:,.0f}",
            f"{100 * figure['of_gemm']:.0f} %",
            f"{figure['logp_error']:.1e}",
            "" if error is None else f"{error:.1e}",
        )
    table.caption = "x: times what dpoeng needs, median and range of the rounds. Errors: to float64, worst of 64 rows."
    table.caption_justify = "left"
    return table


def _aot_table(reports: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(title="compiled ahead of time, nothing was run", title_justify="left", show_edge=False)
    headings = (
        "GPU", "kernel", "dtype", "registers", "stack bytes", "spills in loops", "shared KiB", "of", "occupancy",
        "matrix", "load bytes",
    )  # fmt: skip
    for heading in headings:
        table.add_column(heading)
    for report in reports:
        table.add_row(
            report["gpu"],
            " ".join(part for part in (report["kernel"], report["variant"]) if part),
            report["dtype"],
            str(report["registers"]),
            str(report["spill_bytes"]),
            str(report["loop_spills"]),
            f"{report['shared_bytes'] / 1024:.1f}",
            f"{report['shared_limit'] // 1024}",
            f"{100 * report['occupancy']:.0f} %",
            " ".join(report["matrix"]) or "–",
            str(report["load_bytes"]),
            style="red" if report["problems"] else "",
        )
    return table


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _ratio(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})"
