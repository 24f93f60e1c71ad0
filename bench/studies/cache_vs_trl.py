"""Compares dpoeng's reference cache with TRL's `precompute_ref_log_probs`: the cost of each change.

    python -m dpoeng.bench.studies.cache_vs_trl [--peer-python PYTHON] [--record FILE]

Each case runs a program, changes one thing, and runs it again on the same cache. The study counts the pairs that the
second run scores, and compares its values with those of a run on an empty cache. Every run is a separate process. Model
and pairs are small and random, because they do not decide what is computed again.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import click
import numpy as np
import torch

PAIRS: Final = 64
ADDED: Final = 10
TOLERANCE: Final = 1e-3
"""Nats of a response. Another batch shape moves a sum by 1e-5 here; a wrong value is off by 1e-2 at least."""


@dataclass(frozen=True, slots=True)
class State:
    """All that a user could set or edit between two runs."""

    learning_rate: float = 1e-4
    seed: int = 42
    lora_r: int = 8
    max_length: int = 512
    truncation_mode: str = "keep_start"
    ld_alpha: float | None = None
    rows: int = PAIRS
    reference_alpha: int | None = None  # lora_alpha of the SFT adapter that the reference has; None: no adapter


@dataclass(frozen=True, slots=True)
class Case:
    """A change between two runs. With `flip` a bit of the cache is flipped; with `kill` the first run dies half-way."""

    name: str
    before: State
    after: State
    flip: bool = False
    kill: bool = False


BASE = State()
KEEP_END = State(truncation_mode="keep_end")
TUNED = State(reference_alpha=8)
CASES = (
    Case("nothing", BASE, BASE),
    Case("learning_rate", BASE, replace(BASE, learning_rate=2e-4)),
    Case("seed", BASE, replace(BASE, seed=43)),
    Case("rank of the trained LoRA", BASE, replace(BASE, lora_r=16)),
    Case("max_length under keep_end", KEEP_END, replace(KEEP_END, max_length=120)),
    Case("ld_alpha under keep_end", KEEP_END, replace(KEEP_END, ld_alpha=0.5)),
    Case("lora_alpha of the reference", TUNED, replace(TUNED, reference_alpha=16)),
    Case("one bit of the cached file", BASE, BASE, flip=True),
    Case(f"{ADDED} pairs appended", BASE, replace(BASE, rows=PAIRS + ADDED)),
    Case("killed at half, run again", BASE, BASE, kill=True),
)


@dataclass(slots=True)
class Outcome:
    """One run.

    Attributes:
        scored: number of pairs that the reference scored.
        values: log p_ref of chosen and rejected of each pair, as the loss uses them.
        files: where those values are stored.
        stored: the first stored number, float32.
    """

    scored: int
    values: list[tuple[float, float]]
    files: list[str] = field(default_factory=list)
    stored: float = 0.0


Program = Callable[[State, Path, Path, int | None], Outcome]
"""(state, folder with model and pairs, folder of the cache, pairs after which to die) -> result of the run."""


# --------------------------------------------------------------------------- the two programs


def run_dpoeng(state: State, inputs: Path, cache: Path, die_after: int | None) -> Outcome:
    """Phase one, with the settings of both phases in one file."""
    from dpoeng.cache.reader import View
    from dpoeng.engine.config.fields import PrecomputeConfig
    from dpoeng.engine.config.files import load_config
    from dpoeng.engine.recipes import precompute
    from dpoeng.engine.scoring import pairs as scoring_pairs

    counted = _Counter(die_after)
    real = scoring_pairs.score_pairs

    def score_pairs(lm: Any, pairs: Any) -> Any:
        counted.add(len(pairs))
        return real(lm, pairs)

    scoring_pairs.score_pairs = score_pairs
    settings = inputs / "dpoeng.yaml"
    settings.write_text(
        json.dumps(
            {
                "learning_rate": state.learning_rate,
                "seed": state.seed,
                "lora_r": state.lora_r,
                "max_length": state.max_length,
                "truncation_mode": state.truncation_mode,
                "shard_tokens": 1500,  # a real cache has many shards; this one of 64 short pairs has about ten
                "batch_tokens": 700,
            }
        )
    )
    options = {"pairs": (inputs / "pairs.jsonl",), "model": str(inputs / "model"), "cache": cache}
    if state.reference_alpha is not None:
        options["adapter"] = str(inputs / "adapter")
    precompute.precompute_reference(load_config(PrecomputeConfig, options, settings))
    view = View.open(cache)
    values = []
    for i in range(len(view)):
        pair = view[i]
        shared = min(len(pair.chosen_logps), len(pair.rejected_logps))
        values.append(
            (
                _weighted(pair.chosen_logps, shared, state.ld_alpha),
                _weighted(pair.rejected_logps, shared, state.ld_alpha),
            )
        )
    objects = [str(path) for path in sorted((cache / "objects").rglob("*.arrow"))]
    return Outcome(counted.total, values, objects, float(view[0].chosen_logps[0]))


def _weighted(logps: Any, shared: int, ld_alpha: float | None) -> float:
    """LD-DPO's sum: tokens beyond the shorter response of the pair count less, https://arxiv.org/abs/2409.06411"""
    alpha = 1.0 if ld_alpha is None else ld_alpha
    return float(logps[:shared].sum(dtype=np.float64) + alpha * logps[shared:].sum(dtype=np.float64))


def run_trl(state: State, inputs: Path, cache: Path, die_after: int | None) -> Outcome:
    """DPOTrainer up to its first step: it fills the cache when it is made."""
    from datasets import load_dataset
    from peft import LoraConfig, PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    counted = _Counter(die_after)

    class Counting(DPOTrainer):  # type: ignore[misc]
        """Counts pairs that meet the reference."""

        def compute_ref_log_probs(self, model: Any, batch: Any) -> Any:
            counted.add(len(batch["input_ids"]) // 2)  # chosen, then rejected
            return super().compute_ref_log_probs(model, batch)

    model = AutoModelForCausalLM.from_pretrained(inputs / "model")
    lora = LoraConfig(r=state.lora_r, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    if state.reference_alpha is not None:
        model, lora = PeftModel.from_pretrained(model, inputs / "adapter", is_trainable=True), None
    trainer = Counting(
        model=model,
        args=DPOConfig(
            output_dir=str(inputs / "trl"),
            precompute_ref_log_probs=True,
            max_length=state.max_length,
            truncation_mode=state.truncation_mode,
            ld_alpha=state.ld_alpha,
            learning_rate=state.learning_rate,
            seed=state.seed,
            per_device_train_batch_size=4,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=load_dataset("json", data_files=str(inputs / "pairs.jsonl"), split="train", cache_dir=str(cache)),
        processing_class=AutoTokenizer.from_pretrained(inputs / "model"),
        peft_config=lora,
    )
    rows = trainer.train_dataset
    values = list(zip(rows["ref_chosen_logps"], rows["ref_rejected_logps"], strict=True))
    files = [str(entry["filename"]) for entry in rows.cache_files]
    return Outcome(counted.total, values, files, float(values[0][0]))


PROGRAMS: Mapping[str, Program] = {"dpoeng": run_dpoeng, "trl": run_trl}


IMPORTS = {
    "dpoeng": ("dpoeng.engine.recipes.precompute", "transformers.models.llama.modeling_llama", "peft"),
    "trl": ("datasets", "peft", "transformers.models.llama.modeling_llama", "trl.trainer.dpo_trainer"),
}


class _Counter:
    def __init__(self, die_after: int | None) -> None:
        self.total = 0
        self._die_after = die_after

    def add(self, count: int) -> None:
        """Counts pairs that are about to be scored; dies like `kill -9` if requested."""
        if self._die_after is not None and self.total >= self._die_after:
            os.kill(os.getpid(), signal.SIGKILL)
        self.total += count


# --------------------------------------------------------------------------- one program through all cases


def run_cases(program: str, folder: Path) -> list[dict[str, Any]]:
    """Runs a program through all cases.

    Returns:
        a dict a case: `scored` by the second run, `wrong` of its values, `changed` (pairs whose right value is not the
        first run's, or that are new), and the right `values`.
    """
    run = PROGRAMS[program]
    for module in IMPORTS[program]:
        importlib.import_module(module)  # once here, not in every process that is forked below
    _isolated(make_inputs, folder, TUNED)
    results = []
    for number, case in enumerate(CASES):
        home = folder / f"{program}-{number}"
        home.mkdir()
        for name in ("model", "adapter"):
            shutil.copytree(folder / name, home / name, dirs_exist_ok=True)
        make_inputs(home, case.before)
        first = _isolated(run, case.before, home, home / "cache", case.before.rows // 2 if case.kill else None)
        assert (first is None) == case.kill
        if case.flip:
            assert first is not None
            flip_bit(first.files, first.stored)
        make_inputs(home, case.after)
        second = _isolated(run, case.after, home, home / "cache", None)
        fresh = _isolated(run, case.after, home, home / "fresh", None)
        assert second is not None
        assert fresh is not None
        if fresh.scored != case.after.rows:
            raise SystemExit(f"{program}: a run on an empty cache scored {fresh.scored} of {case.after.rows} pairs")
        known = first.values if first else []
        results.append(
            {
                "change": case.name,
                "pairs": case.after.rows,
                "scored": second.scored,
                "wrong": differing(second.values, fresh.values),
                "off_by": farthest(second.values, fresh.values),
                "changed": None if case.kill else differing(known, fresh.values),
                "values": fresh.values,
            }
        )
    return results


def differing(values: list[tuple[float, float]], right: list[tuple[float, float]]) -> int:
    """How many of the right pairs of numbers are not in the same place of `values`, or are off by over TOLERANCE."""
    missing = len(right) - len(values)
    pairs = zip(values, right, strict=False)
    return missing + sum(not np.allclose(mine, other, rtol=0, atol=TOLERANCE) for mine, other in pairs)


def farthest(values: list[tuple[float, float]], right: list[tuple[float, float]]) -> float:
    """The largest difference in nats."""
    return float(np.abs(np.subtract(values, right)).max())


def flip_bit(files: list[str], stored: float) -> None:
    """Flips a high bit of the mantissa of one stored number, in its file."""
    number = np.float32(stored).tobytes()
    for name in files:
        data = bytearray(Path(name).read_bytes())
        place = data.find(number)
        if place >= 0:
            data[place + 2] ^= 0x40
            Path(name).write_bytes(data)
            return
    raise SystemExit("the stored number was found in none of the cache's files")


def _isolated(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function in a separate process, or None if that was killed."""
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)

    def work(out: Connection) -> None:
        torch.set_num_threads(1)
        out.send(function(*arguments))

    process = fork.Process(target=work, args=(sender,))
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        result = None
    process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        raise SystemExit(f"{function.__name__} failed with status {process.exitcode}")
    return result


# --------------------------------------------------------------------------- model and pairs


def make_inputs(folder: Path, state: State) -> None:
    """Writes pairs.jsonl, and the first time a random model, and its SFT adapter if the state has one."""
    rows = "".join(json.dumps(_row(i)) + "\n" for i in range(state.rows))
    pairs = folder / "pairs.jsonl"
    if not pairs.exists() or pairs.read_text() != rows:
        pairs.write_text(rows)
    if not (folder / "model").exists():
        _make_model(folder)
    if state.reference_alpha is not None:
        file = folder / "adapter" / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "lora_alpha": state.reference_alpha}))


def _row(i: int) -> dict[str, str]:
    """Texts of a token a byte; some prompts with their responses are longer than 120, no response alone is."""
    words = ("tide", "bread", "river", "leaf", "sky")
    return {
        "prompt": f"Tell me of the {words[i % 5]}, point {i}.{' Be brief.' * (i % 3)}\n",
        "chosen": f"The {words[i % 5]} of {i} {'comes and goes ' * (i % 6)}",
        "rejected": f"I do not know {i}{', ask again' * (i % 4)}.",
    }


def _make_model(folder: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(["<|end|>", *letters])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            bos_token_id=None,
            eos_token_id=0,
            tie_word_embeddings=False,
        )
    )
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.12)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    tuned = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    tuned.save_pretrained(folder / "adapter")


# --------------------------------------------------------------------------- side by side


def compare(peer_python: str) -> dict[str, Any]:
    """Runs both programs through all cases. Raises UserError if TRL is missing."""
    from dpoeng.bench.compare import check_peer
    from dpoeng.bench.measuring.records import stamp

    check_peer(peer_python)
    with tempfile.TemporaryDirectory() as folder:
        ours = _program(sys.executable, "dpoeng", Path(folder))
        theirs = _program(peer_python, "trl", Path(folder))
    cases = []
    for case, mine, other in zip(CASES, ours["cases"], theirs["cases"], strict=True):
        # Both were given the same texts, so their right values are the same, or this compares nothing. Where texts are
        # cut they are not: TRL's keep_end leaves the two sides of a pair different prompts, dpoeng's one.
        apart = farthest(mine.pop("values"), other.pop("values"))
        if apart > TOLERANCE and case.after.max_length == BASE.max_length:
            raise SystemExit(f"{case.name}: the programs' own values differ by {apart:.3g} nats")
        if mine["changed"] != other["changed"]:
            raise SystemExit(f"{case.name}: the change moves {mine['changed']} and {other['changed']} pairs")
        shared = {name: mine[name] for name in ("change", "pairs", "changed")}
        kept = ("scored", "wrong", "off_by")
        cases.append(
            {**shared, "dpoeng": {name: mine[name] for name in kept}, "trl": {name: other[name] for name in kept}}
        )
    return {**stamp("cache-vs-trl", torch.device("cpu"), {}), "trl": theirs["version"], "cases": cases}


def _program(python: str, program: str, folder: Path) -> dict[str, Any]:
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [
        python,
        "-W",
        "ignore",
        "-m",
        "dpoeng.bench.studies.cache_vs_trl",
        "--program",
        program,
        "--folder",
        str(folder),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{program} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def table(record: Mapping[str, Any]) -> Any:
    """The record for a terminal."""
    from rich.table import Table

    result_table = Table(title="Change one thing, run again: pairs scored, and values that are wrong")
    result_table.add_column("what changed")
    for heading in ("values\nmoved", "TRL\nscores", "TRL\nwrong", "dpoeng\nscores", "dpoeng\nwrong"):
        result_table.add_column(heading, justify="right")
    for case in record["cases"]:
        changed = "-" if case["changed"] is None else f"{case['changed']} of {case['pairs']}"
        cells = [str(case[program][name]) for program in ("trl", "dpoeng") for name in ("scored", "wrong")]
        result_table.add_row(case["change"], changed, *cells)
    result_table.caption = f"TRL {record['trl']}, dpoeng {record['versions']['dpoeng']}"
    return result_table


@click.command()
@click.option("--peer-python", default=sys.executable, help="A Python with TRL and dpoeng.  [default: this one]")
@click.option("--record", type=click.Path(path_type=Path), help="Append the record to this file.")
@click.option("--program", type=click.Choice(list(PROGRAMS)), hidden=True)
@click.option("--folder", type=click.Path(path_type=Path), hidden=True)
def main(peer_python: str, record: Path | None, program: str | None, folder: Path | None) -> None:
    """Changes one thing at a time, and tells what dpoeng and TRL compute again or wrongly reuse."""
    if program and folder:
        told = version("trl") if program == "trl" else version("dpoeng")
        print("\n" + json.dumps({"version": told, "cases": run_cases(program, folder)}))
        return
    from dpoeng.bench.measuring.records import show

    show(lambda: compare(peer_python), table, record)


if __name__ == "__main__":
    main()
