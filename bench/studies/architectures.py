"""Runs both phases for every architecture for text in transformers, as a tiny random model; writes docs/models.md.

    python -m dpoeng.bench.studies.architectures [--only llama,gpt2] [--output docs/models.md]

Each model runs in a separate process with a time limit: phase one against a plain forward in float64, a step of
training, evaluation, merge, the merged checkpoint loaded by plain transformers, and the forecast as on a GPU. No
architecture is treated by name, and refusals are those that users get.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import re
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from dpoeng.bench.studies.tiny_models import model_types, save_tiny
from dpoeng.cache.errors import UserError
from dpoeng.cache.reader import View
from dpoeng.engine.models.model_config import auto_class_of
from dpoeng.engine.runtime.outputs import Kind, writing

LIMIT_S = 120.0
"""Time limit for one architecture, in seconds."""

TOLERANCE = 1e-3
"""Largest difference in nats per token: phase one to a plain forward in float32; policy to its merged checkpoint."""

GPU_BYTES = 24 * 2**30
"""Free memory of the card in the forecast."""

STAGES = ("phase one", "training", "evaluation", "merge", "forecast")

OK = "yes"

KINDS = ("shared", "separate", "refused", "not made", "failed")


class NoForecastError(Exception):
    """The memory cannot be predicted; says why."""


@dataclass(slots=True)
class Outcome:
    """How far an architecture came.

    Attributes:
        model_type: transformers' name of it.
        prompt: `shared`, or `separate` with the reason, or why the model is refused or could not be made.
        stages: stage -> `yes`, or what stopped it.
        difference: largest difference of phase one from a plain forward, nats per token.
    """

    model_type: str
    prompt: str = ""
    stages: dict[str, str] = field(default_factory=dict)
    difference: float | None = None

    @property
    def kind(self) -> str:
        """shared, separate, refused, not made or failed."""
        # A forecast that says why it cannot be made is advice that is missing, and no failure; a merge that is refused
        # with its reason leaves the adapter as it is.
        told = ("forecast", "merge") if self.stages.get("merge", "").startswith("refused") else ("forecast",)
        if self.stages and all(self.stages.get(stage) == OK for stage in STAGES if stage not in told):
            return self.prompt.split(":")[0]
        return self.prompt.split(":")[0] if self.prompt.split(":")[0] in ("refused", "not made") else "failed"


def try_architecture(model_type: str, work: Path, outcome: Outcome, save: Callable[[str, Path], Path]) -> None:
    """Takes the tiny model of a type through every stage, as far as it comes, and notes this in `outcome`.

    Args:
        model_type: transformers' name.
        work: an empty folder.
        outcome: filled in.
        save: makes the model and saves it in a folder.
    """
    try:
        model = save(model_type, work / "model")
    except Exception as error:
        outcome.prompt = f"not made: {_short(error)}"
        return
    pairs = _write_pairs(work / "pairs.jsonl")
    stages: dict[str, Callable[[], None]] = {
        "phase one": lambda: _phase_one(model, pairs, work, outcome),
        "training": lambda: _training(work),
        "evaluation": lambda: _evaluation(work),
        "merge": lambda: _merge(model, work),
        "forecast": lambda: _forecast(model, work),
    }
    for stage, run in stages.items():
        try:
            run()
            outcome.stages[stage] = OK
        except NoForecastError as error:
            outcome.stages[stage] = str(error)
        except UserError as error:
            found = f" ({error.found})" if error.found else ""
            outcome.stages[stage] = f"refused: {error.message}{found}".replace(str(model), "the checkpoint")
            if stage == "phase one":
                outcome.prompt = outcome.stages[stage]
                return
            if stage == "training":
                return
        except Exception as error:
            outcome.stages[stage] = f"{_short(error)} at {_place(error)}"
            if stage in ("phase one", "training"):
                outcome.prompt = outcome.prompt or f"failed: {_short(error)}"
                return


def _write_pairs(path: Path) -> Path:
    rows = [
        {
            "prompt": f"Tell me about the tides, point {i // 2}.",
            "chosen": f" The moon pulls on the sea, {i} times.",
            "rejected": " I do not know" + " at all" * (i % 3),
        }
        for i in range(4)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _phase_one(model: Path, pairs: Path, work: Path, outcome: Outcome) -> None:
    from dpoeng.engine.config.fields import PrecomputeConfig
    from dpoeng.engine.recipes.precompute import precompute_reference

    settings = {"pairs": [pairs], "model": str(model), "cache": work / "cache", "device": "cpu", "dtype": "float32"}
    summary = precompute_reference(PrecomputeConfig.model_validate(settings))
    outcome.prompt = "shared" if summary.layout == "shared" else f"separate: {summary.layout_reason}"
    outcome.difference = _largest_difference(model, View.open(work / "cache", summary.view))
    if not outcome.difference <= TOLERANCE:
        raise ArithmeticError(f"{outcome.difference:.3g} nats from a plain forward")


@torch.no_grad()
def _largest_difference(model: Path, view: View) -> float:
    """Of cached values from transformers' own forward of each text by itself, log-softmax in float64."""
    plain = auto_class_of(model).from_pretrained(model, dtype=torch.float32).eval()
    largest = 0.0
    for row in range(len(view)):
        pair = view[row]
        chosen, rejected = (pair.ids.chosen_ids, pair.chosen_logps), (pair.ids.rejected_ids, pair.rejected_logps)
        for response, cached in (chosen, rejected):
            ids = torch.tensor([[*pair.ids.prompt_ids.tolist(), *response.tolist()]])
            first = len(pair.ids.prompt_ids)
            logits = plain(input_ids=ids, use_cache=False).logits[0, first - 1 : -1].double()
            logps = torch.log_softmax(logits, -1).gather(1, ids[0, first:, None]).squeeze(1)
            largest = max(largest, float((logps - torch.tensor(cached.copy())).abs().max()))
    return largest


def _training(work: Path) -> None:
    from dpoeng.engine.config.fields import TrainConfig
    from dpoeng.engine.recipes.train import train

    settings = {
        "cache": work / "cache",
        "output_dir": work / "run",
        "device": "cpu",
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": True,
        "eval_share": 0.0,
        "learning_rate": 1e-2,
    }
    train(TrainConfig.model_validate(settings))


def _evaluation(work: Path) -> None:
    from dpoeng.engine.config.fields import TrainConfig
    from dpoeng.engine.recipes.evaluate import evaluate_trained, find_trained

    evaluate_trained(
        find_trained(work / "run"), TrainConfig.model_validate({"cache": work / "cache", "device": "cpu"}), "all"
    )


@torch.no_grad()
def _merge(model: Path, work: Path) -> None:
    """Merges, loads the result with plain transformers, and compares it with base and adapter in plain peft.

    If they differ, dpoeng's own policy tells which of them is wrong.
    """
    from peft import PeftModel

    from dpoeng.engine.recipes.merge import merge_run

    merge_run(work / "run", work / "merged")
    merged = auto_class_of(model).from_pretrained(work / "merged", dtype=torch.float32).eval()
    base = auto_class_of(model).from_pretrained(model, dtype=torch.float32)
    policy = PeftModel.from_pretrained(base, str(work / "run" / "adapter")).eval()
    ids = torch.arange(2, 42)[None]
    with policy.disable_adapter():
        untrained = policy(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
    one, other = (net(input_ids=ids, use_cache=False).logits.double().log_softmax(-1) for net in (merged, policy))
    if torch.equal(other, untrained):
        raise ArithmeticError("training has moved nothing")
    difference = float((one - other).abs().max())
    if not difference <= TOLERANCE:
        own = float((one - _own_policy(model, work)(input_ids=ids, use_cache=False).logits.log_softmax(-1)).abs().max())
        right = f"; the merged checkpoint is {own:.3g} nats from dpoeng's own policy"
        raise ArithmeticError(f"merged and adapter in plain peft differ by {difference:.3g} nats{right}")


def _own_policy(model: Path, work: Path) -> Any:
    """Base and trained adapter as dpoeng loads them."""
    from dpoeng.engine.models.adapters import load_trained_adapter
    from dpoeng.engine.models.loading import load_model
    from dpoeng.engine.models.model import set_mode
    from dpoeng.engine.models.sources import find_adapter, find_model

    device = torch.device("cpu")
    lm = load_model(find_model(str(model)), quantization="none", dtype="float32", device=device, tokenizer=False)
    lm = load_trained_adapter(lm, "new", find_adapter(str(work / "run" / "adapter")), None)
    set_mode(lm, training=False)
    return lm.model


def _forecast(model: Path, work: Path) -> None:
    """Make the memory forecast of `precompute-ref` and `train`, as on a card with `GPU_BYTES` free."""
    from dpoeng.engine.config.fields import PrecomputeConfig, TrainConfig
    from dpoeng.engine.memory import fit
    from dpoeng.engine.models.sources import find_model

    view = View.open(work / "cache")
    pairs = [view[row].ids for row in range(len(view))]
    source, cuda = find_model(str(model)), torch.device("cuda")
    notes: list[str] = []
    with _free_memory(GPU_BYTES):
        config = PrecomputeConfig.model_validate({"model": str(model), "dtype": "bfloat16", "batch_tokens": 1024})
        fit.check_forward(config, source, pairs, cuda, note=notes.append)
        train_config = TrainConfig.model_validate({"gradient_checkpointing": True})
        fit.check_step(train_config, source, pairs, cuda, quantization="none", dtype="bfloat16", note=notes.append)
    if notes:
        raise NoForecastError(notes[0].split("; the run continues")[0])


@contextlib.contextmanager
def _free_memory(n_bytes: int) -> Iterator[None]:
    """Stands in for a recent card: the memory that it has free, and its units for bfloat16."""
    from dpoeng.engine.memory import fit
    from dpoeng.engine.models import loading

    available, multiplies = fit.available_bytes, loading.gpu_multiplies_bf16
    fit.available_bytes, loading.gpu_multiplies_bf16 = lambda device: n_bytes, lambda device: True
    try:
        yield
    finally:
        fit.available_bytes, loading.gpu_multiplies_bf16 = available, multiplies


def _short(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160] if text else ''}"


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own_frames = [frame for frame in frames if "/dpoeng/" in frame.filename or "/engine/" in frame.filename]
    return " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed([*own_frames[-2:], frames[-1]]))


# --------------------------------------------------------------------------- a process each


def study(types: Sequence[str], *, limit_s: float = LIMIT_S, tell: Callable[[Outcome], None]) -> list[Outcome]:
    """The outcome of each type, each in a forked process that is ended after `limit_s` seconds.

    `tell` is called with each as it comes.
    """
    context = multiprocessing.get_context("fork")
    outcomes = []
    for model_type in types:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(model_type, sender))
        process.start()
        sender.close()
        outcome = Outcome(model_type, f"failed: no answer in {limit_s:g} s")
        if receiver.poll(limit_s):
            with contextlib.suppress(EOFError):
                outcome = receiver.recv()
        process.kill()
        process.join()
        outcomes.append(outcome)
        tell(outcome)
    return outcomes


def _child(model_type: str, sender: Any) -> None:
    sender.send(outcome_of(model_type))
    sender.close()


def outcome_of(model_type: str) -> Outcome:
    """One architecture, in this process."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    outcome = Outcome(model_type)
    with (
        tempfile.TemporaryDirectory() as folder,
        Path(os.devnull).open("w") as nothing,
        contextlib.redirect_stderr(nothing),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        try_architecture(model_type, Path(folder), outcome, save_tiny)
    return outcome


# --------------------------------------------------------------------------- the page


def _is_study(path: Path) -> bool:
    return "python -m dpoeng.bench.studies.architectures" in path.read_text(encoding="utf-8")


_PLACE = re.compile(r" at \S+\.py:\d+( < \S+\.py:\d+)*$")
"""Where an error was raised: for the log, not for the page."""
_MOVED = re.compile(r"separate: sharing the prompt moves the model's numbers by ([\d.e+-]+) nats")


def page(outcomes: Sequence[Outcome]) -> str:
    """docs/models.md."""
    import peft
    import transformers

    counts = Counter(outcome.kind for outcome in outcomes)
    lines = [
        "# Models",
        "",
        "Every causal architecture that transformers registers, and every one for images and text, as a tiny random "
        "model, taken through phase one (against a plain forward in float64), training, evaluation, merge (against "
        "plain peft) and the memory forecast. Towers for images and sound are not loaded. "
        "`python -m dpoeng.bench.studies.architectures --output docs/models.md` generates this page.",
        "",
        f"Versions: torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}, "
        f"peft {peft.__version__}.",
        "",
        "| outcome | architectures |",
        "|---|---|",
        *(
            f"| {kind} | {counts[kind]} |"
            for kind in ("shared", "separate", "refused", "not made", "failed")
            if counts[kind]
        ),
        "",
        "**shared**: a prompt runs once for both responses; recurrent and convolution layers hand their state on from "
        "the prompt to each response. **separate**: each response runs with its own copy of the prompt; the numbers "
        "are the same. **refused**: dpoeng stops with a message. **not made**: not tried, because this study found no "
        "small config for it. **failed**: a stage failed.",
        "",
    ]
    ordered = sorted(outcomes, key=lambda one: one.model_type)
    right = [one for one in ordered if one.stages.get("forecast") == OK and set(one.stages.values()) == {OK}]
    shared = [one.model_type for one in right if one.prompt == "shared"]
    moved = {one.model_type: match[1] for one in right if (match := _MOVED.match(one.prompt))}
    if shared:
        lines += [f"Shared, and all stages pass: {', '.join(shared)}.", ""]
    if moved:
        lines += [
            "Separate, and all stages pass. Sharing the prompt would move the model's numbers by so many nats per "
            "token: " + ", ".join(f"{name} {nats}" for name, nats in moved.items()) + ".",
            "",
        ]  # fmt: skip
    lines += ["| model type | prompt | training, evaluation, merge, forecast |", "|---|---|---|"]
    for outcome in (one for one in ordered if one.model_type not in {*shared, *moved}):
        failed = {stage: _PLACE.sub("", text) for stage, text in outcome.stages.items() if text != OK}
        stopped = [f"{stage}: {text}" for stage, text in failed.items() if not outcome.prompt.startswith("refused")]
        rest = "; ".join(stopped) if stopped else (OK if outcome.stages.get("forecast") == OK else "-")
        cells = (outcome.model_type, outcome.prompt, rest)
        lines.append("| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _read_outcomes(path: Path | None) -> dict[str, Outcome]:
    if path is None or not path.is_file():
        return {}
    outcomes = [Outcome(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    return {outcome.model_type: outcome for outcome in outcomes}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--only", help="model types, separated by commas; default: all")
    parser.add_argument("--output", type=Path, help="the page to write; default: standard output")
    parser.add_argument("--outcomes", type=Path, help="JSON Lines of outcomes: recorded ones are skipped")
    parser.add_argument("--limit-s", type=float, default=LIMIT_S, help="seconds for each")
    arguments_given = parser.parse_args(arguments)

    torch.set_num_threads(1)
    outcome_of("llama")  # loads every library once, before processes are forked

    def tell(outcome: Outcome) -> None:
        print(outcome.model_type, outcome.kind, outcome.prompt[:60], outcome.stages, file=sys.stderr, flush=True)
        if arguments_given.outcomes:
            with arguments_given.outcomes.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(outcome)) + "\n")

    types = arguments_given.only.split(",") if arguments_given.only else model_types()
    earlier = _read_outcomes(arguments_given.outcomes)
    fresh = study([one for one in types if one not in earlier], limit_s=arguments_given.limit_s, tell=tell)
    outcomes = earlier | {outcome.model_type: outcome for outcome in fresh}
    text = page([outcomes[one] for one in types])
    if arguments_given.output:
        with writing(arguments_given.output, Kind("the page", _is_study, forced=False)) as temporary:
            temporary.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
