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
import xxhash

from dpoeng.cache.errors import UserError
from dpoeng.cache.files import replacing
from dpoeng.cache.reader import View
from dpoeng.engine.adapters import Mode, save_policy_adapter
from dpoeng.engine.advice import Advice
from dpoeng.engine.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    place_folder,
    remove_checkpoints,
    saving_tensors,
    sync_file,
    unwritable,
    write_durably,
)
from dpoeng.engine.config import TrainConfig
from dpoeng.engine.full import save_model
from dpoeng.engine.metrics import EVALUATIONS_FILE, HELD_OUT_FILE, METRICS_FILE, TIMINGS_FILE
from dpoeng.engine.model import CausalLM, device_name, library_versions
from dpoeng.engine.progress import Progress
from dpoeng.engine.reference import ParityReport
from dpoeng.engine.sources import ModelSource

RUN_FILE = "run.json"
ADVICE_FILE = "advice.json"
SAMPLES_FILE = "samples.jsonl"
ADAPTER_FOLDER = "adapter"
MODEL_FOLDER = "model"
"""With full fine-tuning: the trained checkpoint."""

# Fields that may differ between a run and its continuation: none of them moves a weight.
_FREE_TO_CHANGE = frozenset(
    "cache output_dir resume model adapter device logging_steps eval_steps save_steps save_total_limit "
    "fsdp per_device_eval_batch_size parity_pairs parity_tolerance eval_group_by report_to run_name "
    "samples activation_offloading async_save".split()
)


def run_identity(config: TrainConfig, view: View, eval_view: View | None, mode: Mode) -> dict[str, Any]:
    """All that determines the result of a run: what a continuation must have in common with its beginning."""
    settings = {name: value for name, value in config.model_dump(mode="json").items() if name not in _FREE_TO_CHANGE}
    settings["adapter_mode"] = mode
    if config.watches_a_metric:
        settings["eval_steps"] = config.eval_steps
    identity = {
        "settings": settings,
        "reference": view.spec.digest,
        "pairs": rows_digest(view),
        "eval_pairs": rows_digest(eval_view) if eval_view is not None else None,
    }
    if config.pair_weight_column is not None:
        identity["weights"] = _column_digest(view, config.pair_weight_column)
    return identity


def rows_digest(view: View) -> str:
    """One hash over the pair keys of a view, in order."""
    digest = xxhash.xxh3_128()
    for row in range(len(view)):
        digest.update(view.key(row))
    return digest.hexdigest()


def _column_digest(view: View, column: str) -> str:
    """One hash over what a column of the user's holds, in the order of the rows."""
    digest = xxhash.xxh3_128()
    for row in range(len(view)):
        digest.update(json.dumps(view.extra(row).get(column)).encode() + b"\n")
    return digest.hexdigest()


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
    changed = _changes(checkpoint.state["identity"], identity)
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


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    flat_old = {**old["settings"], **{k: v for k, v in old.items() if k != "settings"}}
    flat_new = {**new["settings"], **{k: v for k, v in new.items() if k != "settings"}}
    return [
        (name, flat_old.get(name), flat_new.get(name))
        for name in sorted(flat_old.keys() | flat_new.keys())
        if flat_old.get(name) != flat_new.get(name)
    ]


def write_run_file(
    config: TrainConfig,
    identity: dict[str, Any],
    view: View,
    mode: Mode,
    model: str,
    adapter: str | None,
    parity: ParityReport,
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
        "parity": {
            "pairs": parity.pairs,
            "mean_diff": parity.mean_diff,
            "max_diff": parity.max_diff,
            "reward_noise": parity.reward_noise,
            "tolerance": parity.tolerance,
        },
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


def write_advice(output_dir: Path, advice: Sequence[Advice]) -> None:
    """The remarks on the finished run, an empty list if there is none."""
    data = json.dumps([remark.record() for remark in advice], indent=2) + "\n"
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
