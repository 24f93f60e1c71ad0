"""`dpoeng demo`: both phases on a small real model, with the commands that do each step."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from pydantic import BaseModel

from dpoeng.engine.config.fields import PrecomputeConfig, TrainConfig

if TYPE_CHECKING:
    from rich.console import Console

    from dpoeng.engine.recipes.demo import Answer, HeldOutPair

PAIRS_FILE = "demo_pairs.jsonl"
PAIRS = 100
STOP = ("\nEND",)

HELD_OUT_CAPTION = (
    "A reward is beta times what training added to log p of a response. accuracy: share of pairs whose chosen response "
    "has the higher reward; margin: by how much. Before training all rewards are 0. prefers: share of pairs with "
    "log p(chosen) > log p(rejected)."
)

EPILOG = """\b
Examples:
  dpoeng demo
  dpoeng demo --dir small-demo --pairs 40
  dpoeng demo --quantization 8bit
"""


@click.command("demo", epilog=EPILOG)
@click.option(
    "--dir", "folder", type=click.Path(path_type=Path), default=Path("demo"), show_default=True, help="Where all goes."
)
@click.option("--pairs", type=click.IntRange(10, PAIRS), default=PAIRS, show_default=True, help="How many pairs.")
@click.option("--model", help="Another SFT model.  [default: SmolLM2-135M-Instruct, fetched once]")
@click.option(
    "--quantization",
    type=click.Choice(["none", "8bit", "4bit"]),
    default="none",
    show_default=True,
    help="How the base is held in both phases.",
)
@click.option("--prepare-only", is_flag=True, help="Fetch the model, write the pairs, and stop.")
def demo(folder: Path, pairs: int, model: str | None, quantization: str, prepare_only: bool) -> None:
    """Both phases on SmolLM2-135M-Instruct and 100 preference pairs; about seven minutes on two cores.

    Each step prints the command that does the same. Run it again and it goes on from where it was.
    """
    from rich.console import Console

    from dpoeng.cli import precompute, train
    from dpoeng.cli.progress import TerminalProgress
    from dpoeng.engine.recipes.demo import obtain_model
    from dpoeng.engine.recipes.precompute import precompute_reference
    from dpoeng.engine.recipes.train import train as run_training

    console = Console(highlight=False)
    progress = TerminalProgress()

    _step(console, 1, "A model and preference pairs")
    model = model or obtain_model(folder / "model", progress)
    file = write_pairs(folder, pairs)
    console.print(
        f"model: {model}\npairs: {file}, {pairs} of them; each has a prompt, a better and a worse response",
        soft_wrap=True,
    )
    if prepare_only:
        return

    first, second = configs(folder, file, model, quantization)
    _step(console, 2, "Phase one: score the frozen model, once", command("precompute-ref", first, "pairs"))
    precompute.print_summary(precompute_reference(first, progress))

    _step(console, 3, "Phase two: train against the cached numbers", command("train", second))
    train.print_summary(run_training(second, progress))

    _step(console, 4, "What training changed")
    _show_changes(console, second)
    _step(console, 5, "Go on from here")
    console.print(next_steps(folder, first, second), markup=False, soft_wrap=True)


def write_pairs(folder: Path, count: int) -> Path:
    """The first `count` of the pairs that come with the package, as a file of the demo's own."""
    lines = resources.files("dpoeng.cli").joinpath(PAIRS_FILE).read_text(encoding="utf-8").splitlines(keepends=True)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / ("pairs.jsonl" if count == PAIRS else f"pairs-{count}.jsonl")
    file.write_text("".join(lines[:count]), encoding="utf-8")
    return file


def configs(folder: Path, file: Path, model: str, quantization: str) -> tuple[PrecomputeConfig, TrainConfig]:
    """What the two phases are asked for. Runs of another size or precision keep to folders of their own."""
    one: dict[str, Any] = {"pairs": (file,), "model": model, "cache": folder / "refcache", "dtype": "float32"}
    view, out = file.stem, file.stem.replace("pairs", "out")
    if quantization != "none":
        view, out = f"{view}-{quantization}", f"{out}-{quantization}"
        one |= {"quantization": quantization, "name": view}
    two: dict[str, Any] = {"cache": folder / "refcache", "view": view, "output_dir": folder / out}
    two |= {"eval_share": 0.2, "learning_rate": 2e-4, "num_train_epochs": 2.0}
    return PrecomputeConfig(**one), TrainConfig(**two)


def command(name: str, config: BaseModel, *arguments: str) -> str:
    """The command line that gives this config: named fields as arguments, the others that were set as options."""
    words = ["dpoeng", name]
    words += [str(value) for field in arguments for value in getattr(config, field)]
    for field in type(config).model_fields:
        if field in config.model_fields_set and field not in arguments:
            value = getattr(config, field)
            number = f"{value:g}" if isinstance(value, float) else str(value)
            words += [f"--{field.replace('_', '-')}", number]
    return shlex.join(words)


def next_steps(folder: Path, first: PrecomputeConfig, second: TrainConfig) -> str:
    """Commands to try next."""
    again = second.model_copy(update={"beta": 0.3, "output_dir": Path(f"{second.output_dir}-beta")})
    again.model_fields_set.add("beta")
    return "\n".join(
        [
            "Your own pairs and model (JSON lines with prompt, chosen and rejected):",
            "  dpoeng precompute-ref pairs.jsonl --model YOUR_SFT_MODEL",
            "  dpoeng train --cache refcache",
            "Another beta against the same cache; nothing is scored again:",
            f"  {command('train', again)}",
            "What the cache holds:",
            f"  {shlex.join(['dpoeng', 'cache', 'info', str(first.cache)])}",
            f"All of the demo lies in {folder}; remove that folder to begin anew.",
        ]
    )


def _step(console: Console, number: int, title: str, line: str | None = None) -> None:
    console.print(f"\n[bold cyan]{number}. {title}[/]")
    if line is not None:
        console.print(f"$ {line}", style="bold", markup=False, soft_wrap=True)


def _show_changes(console: Console, config: TrainConfig) -> None:
    from dpoeng.cache.reader import View
    from dpoeng.engine.recipes import demo as engine
    from dpoeng.engine.recipes.inputs import split

    view = View.open(config.cache, config.view)
    lm = engine.load_trained(config, view)
    pairs = engine.held_out(lm, view, config)
    console.print(f"On the {len(pairs)} pairs that were held out (their prompts were not trained on):")
    console.print(held_out_table(pairs, config.beta))
    rows = engine.one_of_each(view, split(view, None, config)[1], "instruction_type", 3)
    console.print("\nAnswers to three of their prompts (likeliest tokens, repetition penalty 1.1):")
    console.print(answers_table(engine.answers(lm, view, rows, max_new_tokens=48, stop=STOP)))


def held_out_table(pairs: Sequence[HeldOutPair], beta: float) -> Any:
    """Reward accuracy and margin before and after, over all pairs and by the kind of the worse response."""
    from rich.table import Table

    table = Table(show_edge=False, pad_edge=False, caption=HELD_OUT_CAPTION, caption_justify="left")
    table.add_column("\nworse response", no_wrap=True)
    table.add_column("\npairs", justify="right")
    for heading in ("accuracy", "margin", "prefers"):
        table.add_column(f"{heading}\nSFT", justify="right")
        table.add_column("\nDPO", justify="right")
    kinds = sorted({str(pair.extra.get("negative_type", "")) for pair in pairs})
    for kind in [*kinds, "all"]:
        group = [pair for pair in pairs if kind in ("all", pair.extra.get("negative_type"))]
        margins = [pair.reward_margin(beta) for pair in group]
        table.add_row(
            kind.replace("_", " "),
            str(len(group)),
            "0.00",  # before training the policy is the reference: every reward is zero
            _share(margin > 0 for margin in margins),
            "0.000",
            f"{sum(margins) / len(margins):+.3f}",
            _share(pair.reference_gap > 0 for pair in group),
            _share(pair.policy_gap > 0 for pair in group),
            end_section=kind == (kinds[-1] if kinds else ""),
        )
    return table


def answers_table(answers: Sequence[Answer]) -> Any:
    """Prompt, and both answers side by side."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_lines=True)
    for heading in ("instruction", "SFT", "DPO"):
        table.add_column(heading, ratio=1, overflow="fold")
    for answer in answers:
        table.add_row(*(escape(text) for text in (str(answer.extra.get("instruction", "")), answer.sft, answer.dpo)))
    return table


def _share(flags: Any) -> str:
    values = list(flags)
    return f"{sum(values) / len(values):.2f}"
