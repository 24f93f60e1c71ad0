"""The output folder of a run: what identifies the run, what it goes on from, and the record of how it was made."""

from __future__ import annotations

import json
import platform
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dpoeng.cache.errors import UserError
from dpoeng.cache.files import replacing
from dpoeng.cache.reader import View
from dpoeng.engine.config.fields import TrainConfig
from dpoeng.engine.models.adapters import Mode, save_policy_adapter
from dpoeng.engine.models.full_finetuning import save_model
from dpoeng.engine.models.model import CausalLM, device_name, library_versions
from dpoeng.engine.models.sources import ModelSource
from dpoeng.engine.runs.checkpoint import Checkpoint, latest_checkpoint, remove_checkpoints
from dpoeng.engine.runs.identity import changes
from dpoeng.engine.runs.metrics import EVALUATIONS_FILE, HELD_OUT_FILE, METRICS_FILE, TIMINGS_FILE
from dpoeng.engine.runtime.folders import place_folder, saving_tensors, sync_file, unwritable, write_durably
from dpoeng.engine.runtime.progress import Progress

RUN_FILE = "run.json"

ADVICE_FILE = "advice.json"

SAMPLES_FILE = "samples.jsonl"

ADAPTER_FOLDER = "adapter"

MODEL_FOLDER = "model"
"""With full fine-tuning: the trained checkpoint."""


def open_output(config: TrainConfig, identity: dict[str, Any], progress: Progress) -> Checkpoint | None:
    """The checkpoint to go on from, or None for a fresh start."""
    root = config.output_dir
    if config.resume is False:
        return None
    checkpoint, damaged = latest_checkpoint(root)
    for sentence in damaged:
        progress.note(sentence)
    if checkpoint is None:
        if config.resume:
            raise UserError(
                "there is no checkpoint to go on from",
                code="resume-nothing",
                where=str(root),
                expected="a checkpoint-* folder",
                remedy="leave --resume out, or name the folder of the run with --output-dir",
            )
        return None
    changed = changes(checkpoint.state["identity"], identity)
    if changed:
        raise UserError(
            "this folder holds a run of another configuration",
            code="resume-changed",
            where=str(root),
            expected="; ".join(f"{name} = {old}" for name, old, _ in changed),
            found="; ".join(f"{name} = {new}" for name, _, new in changed),
            remedy="use the same values to go on, another --output-dir for a second run, or --no-resume to start anew "
            "here (the old run's checkpoints are removed)",
        )
    return checkpoint


def clear_output(config: TrainConfig) -> None:
    """With `resume` false: removes what an earlier run left. Called when nothing can refuse the new one any more."""
    if config.resume is False:
        remove_checkpoints(config.output_dir)
        files = (METRICS_FILE, TIMINGS_FILE, EVALUATIONS_FILE, HELD_OUT_FILE, ADVICE_FILE, SAMPLES_FILE, RUN_FILE)
        for name in files:
            (config.output_dir / name).unlink(missing_ok=True)
        for name in (ADAPTER_FOLDER, MODEL_FOLDER):
            shutil.rmtree(config.output_dir / name, ignore_errors=True)


def write_run_file(
    config: TrainConfig,
    identity: dict[str, Any],
    view: View,
    mode: Mode,
    model: str,
    adapter: str | None,
    parity: Mapping[str, Any],
    lm: CausalLM,
    *,
    processes: int,
) -> None:
    """All that is needed to repeat the run, and to load its result."""
    record = {
        "command": "dpoeng train",
        "config": config.model_dump(mode="json"),
        "identity": identity,
        "reference": {**view.meta["reference"], "spec": view.spec.digest, "view": view.name},
        "files": view.meta.get("files"),
        "model": model,
        "adapter_mode": mode,
        "sft_adapter": adapter,
        "seed": config.seed,
        "parity": dict(parity),
        "layout": lm.layout,
        "layout_reason": lm.layout_reason,
        "device": device_name(lm.device),
        "processes": processes,
        "versions": library_versions(),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "load": loading_recipe(mode, model, adapter),
    }
    try:
        config.output_dir.mkdir(parents=True, exist_ok=True)
        write_durably(config.output_dir / RUN_FILE, (json.dumps(record, indent=2) + "\n").encode())
    except OSError as error:
        raise unwritable(config.output_dir, error) from error


def add_to_run_file(output_dir: Path, more: Mapping[str, Any]) -> None:
    """Adds to run.json what is known at the end of a run."""
    path = output_dir / RUN_FILE
    record = {**json.loads(path.read_text(encoding="utf-8")), **more}
    with replacing(path) as temporary:
        write_durably(temporary, (json.dumps(record, indent=2) + "\n").encode())


def loading_recipe(mode: Mode, model: str, adapter: str | None) -> list[str]:
    """Python lines that load the result with transformers and peft alone; run in the output folder."""
    if mode == "full":
        return [
            "from transformers import AutoModelForCausalLM",
            f"model = AutoModelForCausalLM.from_pretrained({MODEL_FOLDER!r})",
        ]
    lines = [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        f"model = AutoModelForCausalLM.from_pretrained({model!r})",
    ]
    if mode == "stack":
        lines += [
            f"model = PeftModel.from_pretrained(model, {adapter!r}, adapter_name='reference')",
            f"model.load_adapter({ADAPTER_FOLDER!r}, adapter_name='default')",
            "model.base_model.set_adapter(['reference', 'default'])",
        ]
    else:
        lines.append(f"model = PeftModel.from_pretrained(model, {ADAPTER_FOLDER!r})")
    return lines


def write_advice(output_dir: Path, advice: Sequence[Mapping[str, Any]]) -> None:
    """The remarks on the finished run as JSON can hold them, an empty list if there is none."""
    data = json.dumps(list(advice), indent=2) + "\n"
    write_durably(output_dir / ADVICE_FILE, data.encode())


def result_folder(output_dir: Path, mode: Mode) -> Path:
    """Where the result of a run stands when the run is complete."""
    return output_dir / (MODEL_FOLDER if mode == "full" else ADAPTER_FOLDER)


def has_result(output_dir: Path) -> bool:
    """Whether a run's result is there."""
    return any((output_dir / name).is_dir() for name in (ADAPTER_FOLDER, MODEL_FOLDER))


def write_result(
    lm: CausalLM,
    output_dir: Path,
    mode: Mode,
    source: ModelSource,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Saves what was trained, whole or not at all: the adapter, or a checkpoint with the rest as in `source`.

    `weights` are those of `full.whole_weights`.
    """

    def fill(temporary: Path) -> None:
        with saving_tensors():
            if mode == "full":
                save_model(lm, source, temporary, weights)
            else:
                save_policy_adapter(lm, temporary)
        for path in temporary.iterdir():
            sync_file(path)

    place_folder(result_folder(output_dir, mode), fill)
