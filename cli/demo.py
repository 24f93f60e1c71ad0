"""`dpoeng demo`: both phases on a small real model, with the commands for each step."""

from __future__ import annotations

import shlex
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from pydantic import BaseModel

from dpoeng.cli.tables import Marked, say
from dpoeng.engine.config.fields import PrecomputeConfig, TrainConfig
from dpoeng.engine.runtime.outputs import Kind, writing

if TYPE_CHECKING:
    from dpoeng.engine.runtime.progress import Progress

PAIRS_FILE = "demo_pairs.jsonl"
PAIRS = 100
DEFAULT_PAIRS = 80
GENERATION: dict[str, Any] = {"count": 3, "max_new_tokens": 48, "repetition_penalty": 1.1, "stop": "END"}
"""Options of `dpoeng compare`. Responses end with a line END; the penalty keeps small models from repeating."""

EPILOG = """\b
Examples:
  dpoeng demo
  dpoeng demo --dir large-demo --pairs 100
  dpoeng demo --quantization 8bit
"""


@click.command("demo", epilog=EPILOG)
@click.option(
    "--dir",
    "folder",
    type=click.Path(path_type=Path),
    default=Path("demo"),
    show_default=True,
    help="Folder for the demo's files.",
)
@click.option(
    "--pairs", type=click.IntRange(10, PAIRS), default=DEFAULT_PAIRS, show_default=True, help="Number of pairs."
)
@click.option("--model", help="Another SFT model.  [default: SmolLM2-135M-Instruct, downloaded once]")
@click.option(
    "--quantization",
    type=click.Choice(["none", "8bit", "4bit"]),
    default="none",
    show_default=True,
    help="Precision of the base in both phases.",
)
@click.option("--prepare-only", is_flag=True, help="Download the model, write the pairs, and stop.")
def demo(folder: Path, pairs: int, model: str | None, quantization: str, prepare_only: bool) -> None:
    """Run both phases on SmolLM2-135M-Instruct and 80 preference pairs; a few minutes on two cores.

    Each step prints the command that does the same. Run it again and it continues where it stopped.
    """
    from dpoeng.cli import precompute, train
    from dpoeng.cli.progress import TerminalProgress
    from dpoeng.engine.recipes.demo import obtain_model
    from dpoeng.engine.recipes.precompute import precompute_reference
    from dpoeng.engine.recipes.train import train as run_training

    progress = TerminalProgress()

    _step(1, "A model and preference pairs")
    model = model or obtain_model(progress)
    file = write_pairs(folder, pairs)
    say(f"model: {model}\npairs: {file}, {pairs} of them; each has a prompt, a better and a worse response")
    if prepare_only:
        return

    first, second = configs(folder, file, model, quantization)
    _step(2, "Phase one: score the frozen model, once", command("precompute-ref", first, "pairs"))
    precompute.print_summary(precompute_reference(first, progress))

    _step(3, "Phase two: train against the cached log-probs", command("train", second))
    train.print_summary(run_training(second, progress))

    _show_changes(second, progress)
    _step(6, "Next steps")
    say(next_steps(folder, first, second, model))


def write_pairs(folder: Path, count: int) -> Path:
    """Writes the first `count` of the package's pairs to the demo's folder."""
    whole = resources.files("dpoeng.cli").joinpath(PAIRS_FILE).read_text(encoding="utf-8")
    lines = whole.splitlines(keepends=True)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / ("pairs.jsonl" if count == DEFAULT_PAIRS else f"pairs-{count}.jsonl")
    kind = Kind("the demo's pairs", lambda path: whole.startswith(path.read_text(encoding="utf-8")), forced=False)
    with writing(file, kind) as temporary:
        temporary.write_text("".join(lines[:count]), encoding="utf-8")
    return file


def configs(folder: Path, file: Path, model: str, quantization: str) -> tuple[PrecomputeConfig, TrainConfig]:
    """The configs of both phases. Runs of another size or precision get separate folders."""
    one: dict[str, Any] = {"pairs": (file,), "model": model, "cache": folder / "refcache", "dtype": "float32"}
    view, out = file.stem, file.stem.replace("pairs", "out")
    if quantization != "none":
        view, out = f"{view}-{quantization}", f"{out}-{quantization}"
        one |= {"quantization": quantization, "name": view}
    two: dict[str, Any] = {"cache": folder / "refcache", "view": view, "output_dir": folder / out}
    # Few steps at a high learning rate: enough for an effect on held-out pairs, in about a minute on two cores.
    two |= {"eval_share": 0.35, "learning_rate": 1e-3, "num_train_epochs": 1.0, "parity_pairs": 8}
    return PrecomputeConfig(**one), TrainConfig(**two)


def command(name: str, config: BaseModel, *arguments: str) -> str:
    """The command line for this config: named fields as arguments, other fields that were set as options."""
    set_fields = {
        field: getattr(config, field) for field in type(config).model_fields if field in config.model_fields_set
    }
    positional = [value for field in arguments for value in set_fields.pop(field)]
    return words(name, set_fields, *positional)


def words(name: str, options: dict[str, Any], *arguments: object) -> str:
    """A dpoeng command line, quoted for a shell."""
    line = ["dpoeng", name, *map(str, arguments)]
    for option, value in options.items():
        line += [f"--{option.replace('_', '-')}", f"{value:g}" if isinstance(value, float) else str(value)]
    return shlex.join(line)


def next_steps(folder: Path, first: PrecomputeConfig, second: TrainConfig, model: str) -> str:
    """Commands to try next, and what to remove at the end."""
    again = second.model_copy(update={"beta": 0.3, "output_dir": Path(f"{second.output_dir}-beta")})
    again.model_fields_set.add("beta")
    return "\n".join(
        [
            "Your own pairs and model (JSON lines with prompt, chosen and rejected):",
            "  dpoeng precompute-ref pairs.jsonl --model YOUR_SFT_MODEL",
            "  dpoeng train --cache refcache",
            "Another beta on the same cache, without scoring again:",
            f"  {command('train', again)}",
            "What is in the cache:",
            f"  {shlex.join(['dpoeng', 'cache', 'info', str(first.cache)])}",
            f"The demo's files are in {folder}; remove that folder to start over. The model is {model}.",
        ]
    )


def _step(number: int, title: str, line: str | None = None) -> None:
    say("\n", Marked(f"{number}. {title}", "bold cyan"))
    if line is not None:
        say(Marked(f"$ {line}", "bold"))


def _show_changes(config: TrainConfig, progress: Progress) -> None:
    """Evaluates the saved adapter and compares answers, as `dpoeng eval` and `dpoeng compare` do."""
    from dpoeng.cli import compare, evaluate
    from dpoeng.engine.recipes.compare import compare_prompts, keep_samples
    from dpoeng.engine.recipes.evaluate import evaluate_trained, find_trained

    trained = find_trained(config.output_dir)
    _step(4, "The saved adapter on held-out pairs", words("eval", {"adapter": config.output_dir}))
    evaluate.print_evaluation(evaluate_trained(trained, config, "held-out", progress))

    _step(5, "Answers before and after", words("compare", GENERATION, config.output_dir))
    answers = compare_prompts(trained, config, (), **{**GENERATION, "stop": (GENERATION["stop"],)})
    say(compare.generations_table(answers))
    keep_samples(trained, answers, progress)
