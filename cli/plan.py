"""`dpoeng plan`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from pydantic import ValidationError

from dpoeng.cache.words import GIB
from dpoeng.cli.options import config_options, force_option, given
from dpoeng.cli.pages.html import write_page
from dpoeng.cli.tables import Cell, Marked, Table, json_option, say, say_json
from dpoeng.engine.checks.driver import driver_note
from dpoeng.engine.config.plan import PlanConfig
from dpoeng.engine.runtime.outputs import PAGE, refuse_output

if TYPE_CHECKING:
    from dpoeng.engine.recipes.plan import CardPlan, Plan

EPILOG = """\b
Examples:
  dpoeng plan --model Qwen/Qwen2.5-32B --gpu a100-80gb
  dpoeng plan --model Qwen/Qwen2.5-32B --gpu 24gb --gpus 2 --fsdp --quantization 4bit
  dpoeng plan --model ./my-model --gpu 24gb --quantization 4bit --max-length 1024
  dpoeng plan --model llama-3.1-8b --gpu 24gb,h100-80gb --pairs 5000 --price-per-hour 2.5 --json
"""


@click.command("plan", epilog=EPILOG)
@config_options(PlanConfig)
@json_option
@click.option(
    "--html", type=click.Path(path_type=Path), help="Also write a chart of memory over a step to this HTML file."
)
@force_option
def plan(as_json: bool, html: Path | None, force: bool, **options: Any) -> None:
    """Calculate memory of both phases, hours and cost of a run, before you download or rent anything.

    Memory is simulated: the real step runs on a device without values. Time is calculated. Nothing is measured on the
    GPU that you name, and the output says so.
    """
    values = given(options)
    if "model" not in values:
        raise click.UsageError("name the model with --model")
    try:
        config = PlanConfig(**{**values, **({"whole": True} if html is not None else {})})
    except ValidationError as error:
        raise click.UsageError(str(error.errors()[0]["msg"]).removeprefix("Value error, ")) from error

    from dpoeng.engine.recipes.plan import as_json as record
    from dpoeng.engine.recipes.plan import make_plan

    inputs = [Path(config.model)]
    if html is not None:
        refuse_output(html, PAGE, inputs=inputs, force=force)
    result = make_plan(config)
    if html is not None:
        write_page(html, picture(result), inputs=inputs, force=force)
    if as_json:
        say_json(record(result))
        return
    show(result)


def show(result: Plan) -> None:
    """Prints the plan's tables, memory over a step, and the settings to use."""
    from dpoeng.engine.recipes.plan import suggested

    request = result.request
    trained = f"{request.quantization}, r={request.lora_r}" if request.use_peft else "all weights trained"
    say(
        f"{request.model}: {result.parameters / 1e9:.2f} e9 parameters, {trained}; "
        f"{'one pair' if request.responses == 2 else 'one row'} of {request.responses} x {request.max_length} tokens, "
        f"{request.prompt_length} of them a shared prompt. ",
        Marked("Calculated, not measured.", "bold"),
    )
    once, apart = result.tokens
    if request.responses > 2:
        say(
            f"a row computes {once:,} tokens, {apart / once:.1f} times fewer than the {apart:,} with a separate row "
            "for each response"
        )
    if result.trunk_layer:
        say(
            f"phase two starts at layer {result.trunk_layer} and trains the layers from there on; their input states "
            f"take {result.trunk_bytes / GIB:.1f} GiB on disk for {request.pairs:,} such pairs"
        )
    say(_cards_table(result), _parts_table(result))
    if any(card.fits and "trunk_layer" in card.way.changes for card in result.cards):
        say(
            "\nFrom a trunk only the layers above it are trained, which is another model (docs/trunk-cache.md). Its "
            f"hidden states take {result.trunk_bytes / GIB:.1f} GiB on disk for {result.request.pairs:,} such pairs."
        )
    say(f"\nmemory through a step, GiB\n{sparkline(result)}")
    if result.two_models is not None:
        say(_others_table(result, result.two_models.peak.n_bytes))
    best = next((card for card in result.cards if card.fits), None)
    if best is None:
        say("\n", Marked("It does not fit.", "error"), f" {advice(result)}")
        return
    lines = "\n".join(f"  {name}: {_yaml(value)}" for name, value in suggested(result, best).items())
    say(f"\ndpoeng.yaml for {best.gpu.name}:\n{lines}")


def _cards_table(result: Plan) -> Table:
    gpus = result.request.gpus
    rows = [
        (
            f"{gpus} x {card.gpu.name}" if gpus > 1 else card.gpu.name,
            f"{card.gpu.n_bytes / GIB:.1f}",
            *_fits(card),
            str(card.micro_batch) if card.phase2_fits else "-",
            *_hours(result, card),
        )
        for card in result.cards
    ]
    heads = ("card", "GiB", "phase one", "phase two", "pairs per forward", "hours, one + two", "cost")
    return Table(rows, heads, "does it fit?", [f"{driver_note()}; docs/requirements.md has builds for older ones."])


def _parts_table(result: Plan) -> Table:
    one, two = result.phase1[min(result.phase1)].peak, result.step
    kinds = sorted({*one.by_kind, *two.by_kind}, key=lambda kind: -two.by_kind.get(kind, 0))
    rows: list[tuple[Cell, ...]] = [
        (kind, *(f"{peak.by_kind.get(kind, 0) / GIB:.2f}" for peak in (one, two))) for kind in kinds
    ]
    totals = ("simulated peak", *(f"{peak.n_bytes / GIB:.2f}" for peak in (one, two)))
    rows.append(tuple(Marked(cell, "bold") for cell in totals))
    for name, n_bytes in result.estimates.items():
        rows.append((f"{name} (estimate)", *(2 * [f"{n_bytes / GIB:.2f}"])))
    rows.append(("with fragmentation (estimate)", *(f"{result.needed(peak) / GIB:.2f}" for peak in (one, two))))
    return Table(rows, ("", "phase one", "phase two"), "one pair per forward, GiB at the peak")


def _others_table(result: Plan, two_models: int) -> Table:
    peaks = [(option.name, option.peak_bytes) for option in result.options]
    rows = [
        (name, f"{n_bytes / GIB:.2f}", f"{(result.step.n_bytes - n_bytes) / GIB:+.2f}")
        for name, n_bytes in [*peaks, ("two models, whole logits", two_models)]
    ]
    return Table(rows, ("", "peak", "saves"), "phase two otherwise, GiB")


def advice(result: Plan) -> str:
    """The changes that would make the run fit on the largest of the cards."""
    if not result.request.compare:
        return "Other settings were not tried: leave out --no-compare to see which would fit."
    room = max(card.gpu.n_bytes for card in result.cards)
    helps = [o.name for o in result.options if result.needed(o.peak) <= room and o.peak_bytes < result.step.n_bytes]
    return ("What would fit: " + "; ".join(helps)) if helps else "No single option is enough: use a larger card."


def sparkline(result: Plan, width: int = 96) -> str:
    """Memory over the operations of a step as a line of blocks, with the maximum of each column."""
    timeline = result.phase2[1].timeline
    if not timeline:
        points = [(peak.n_bytes, name) for name, peak in result.phase2[1].stretches.items()]
        low = min(n for n, _ in points) * 0.98
        return "\n".join(
            f"  {name:<22}{'#' * max(1, round(40 * (n - low) / (result.step.n_bytes - low)))} {n / GIB:.2f}"
            for n, name in points
        )
    columns = [timeline[i * len(timeline) // width : (i + 1) * len(timeline) // width] for i in range(width)]
    tops = [(max(n for n, _ in column), column[0][1]) for column in columns if column]
    low, high = min(n for n, _ in tops), max(n for n, _ in tops)
    blocks = "▁▂▃▄▅▆▇█"
    line = "".join(blocks[min(7, int(8 * (n - low) / max(1, high - low)))] for n, _ in tops)
    phases = "".join(phase[0] for _, phase in tops)
    return f"{line}\n{phases}\nf forward, b backward, o optimizer; from {low / GIB:.2f} to {high / GIB:.2f}"


def picture(result: Plan) -> str:
    """Memory over a step as a page, with a curve for each phase."""
    from dpoeng.cli.pages.charts import Curve, line_chart
    from dpoeng.cli.pages.html import cards, page, plots

    timeline = result.phase2[1].timeline
    curves = []
    for phase in dict.fromkeys(name for _, name in timeline):
        points = [(i, n / GIB) for i, (n, name) in enumerate(timeline) if name == phase]
        width = -(-len(points) // 400)  # draws the maximum over this many operations
        tops = [max(points[i : i + width], key=lambda point: point[1]) for i in range(0, len(points), width)]
        curves.append(Curve(phase, tops, exact=True))
    return page(
        f"Plan for {result.request.model}",
        [
            cards([("peak of a step, GiB", f"{result.step.n_bytes / GIB:.2f}")]),
            plots([line_chart("memory through a step, simulated", curves, unit="GiB", x_name="operation")]),
        ],
        "Calculated, not measured.",
    )


def _fits(card: CardPlan) -> tuple[str, str]:
    fits = (card.phase1_fits, card.phase2_fits)
    one, two = (
        f"{'yes' if fit else 'no'}, {needed / GIB:.1f}{', by layer' if by_layer else ''}"
        for fit, needed, by_layer in zip(fits, card.needed_bytes, card.by_layer, strict=True)
    )
    changes = card.way.changes
    two += f", from layer {changes['trunk_layer']} on" if "trunk_layer" in changes else ""
    smaller = [str(changes["optim"])] if "optim" in changes else []
    smaller += [f"lora_r {changes['lora_r']}"] if "lora_r" in changes else []
    return one, two + (f" with {', '.join(smaller)}" if smaller else "")


def _hours(result: Plan, card: CardPlan) -> tuple[str, str]:
    one, two = card.times[0].hours, card.times[1].hours
    if one is None or two is None:
        return "?", "?"
    price = result.request.price_per_hour
    return f"{one:.2f} + {two:.2f}", f"{result.request.gpus * (one + two) * price:.2f}" if price is not None else "-"


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
