"""The output folder of a run: its identity, the checkpoint to continue from, and the record of how it was made."""

from __future__ import annotations

import json
import platform
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dpoeng.cache.errors import UserError
from dpoeng.cache.files import replacing
from dpoeng.engine.config.fields import Mode
from dpoeng.engine.runs.checkpoint import Checkpoint, has_checkpoint, latest_checkpoint, remove_checkpoints
from dpoeng.engine.runs.identity import changes
from dpoeng.engine.runs.metrics import EVALUATIONS_FILE, HELD_OUT_FILE, METRICS_FILE, TIMINGS_FILE
from dpoeng.engine.runtime.folders import unwritable, write_durably
from dpoeng.engine.runtime.progress import Progress

RUN_FILE = "run.json"

ADVICE_FILE = "advice.json"

SAMPLES_FILE = "samples.jsonl"

ADAPTER_FOLDER = "adapter"

MODEL_FOLDER = "model"
"""The trained checkpoint of full fine-tuning."""


def open_output(
    root: Path,
    resume: bool | None,
    identity: dict[str, Any],
    progress: Progress,
    extends: Callable[[Checkpoint], bool] = lambda _: False,
) -> Checkpoint | None:
    """The checkpoint to continue from, or None for a fresh start.

    Args:
        root: the output folder.
        resume: True requires a checkpoint, False ignores one, None continues if there is one.
        identity: identity of this run; see `run_identity`.
        progress: receives messages about damaged checkpoints.
        extends: whether this run may continue a checkpoint of another identity: the same run, but longer.

    Raises:
        UserError: a required checkpoint is missing, or the folder has a run with another identity.
    """
    if resume is False:
        return None
    checkpoint, damaged = latest_checkpoint(root)
    for sentence in damaged:
        progress.note(sentence)
    if checkpoint is None:
        if resume:
            raise UserError(
                "no checkpoint to resume from",
                code="resume-nothing",
                where=str(root),
                expected="a checkpoint-* folder",
                remedy="leave --resume out, or name the run's folder with --output-dir",
            )
        return None
    changed = changes(checkpoint.state["identity"], identity)
    if changed and not extends(checkpoint):
        raise UserError(
            "this folder contains a run with other settings",
            code="resume-changed",
            where=str(root),
            expected="; ".join(f"{name} = {old}" for name, old, _ in changed),
            found="; ".join(f"{name} = {new}" for name, _, new in changed),
            remedy="use the same values to continue, another --output-dir for a second run, or --no-resume to start "
            "over here (this removes the old run's checkpoints)",
        )
    return checkpoint


_FILES = (METRICS_FILE, TIMINGS_FILE, EVALUATIONS_FILE, HELD_OUT_FILE, ADVICE_FILE, SAMPLES_FILE, RUN_FILE)
_FOLDERS = (ADAPTER_FOLDER, MODEL_FOLDER)


def clear_output(root: Path) -> None:
    """Removes everything that an earlier run left in its output folder; run.json, which marks it as ours, last."""
    remove_checkpoints(root)
    for name in _FOLDERS:
        shutil.rmtree(root / name, ignore_errors=True)
    for name in _FILES:
        (root / name).unlink(missing_ok=True)


def refuse_foreign(root: Path, inputs: Iterable[Path]) -> None:
    """Raises UserError if a run in this folder would replace its own inputs, or files that dpoeng did not write.

    Args:
        root: the output folder.
        inputs: folders and files that the run reads: base, SFT adapter.
    """
    replaced = [root / name for name in _FOLDERS] + [path for path in root.glob("checkpoint-*") if path.is_dir()]
    for read in inputs:
        inside = [path for path in replaced if path.exists() and read.resolve().is_relative_to(path.resolve())]
        if read.exists() and inside:
            raise UserError(
                "the run would overwrite a model that it reads",
                code="output-protected",
                where=str(read),
                expected="an output folder without the run's models",
                found=f"--output-dir {root}",
                remedy="name another folder with --output-dir",
            )
    foreign = [name for name in (*_FILES, *_FOLDERS) if (root / name).exists()]
    if foreign and not (_is_run(root / RUN_FILE) or has_checkpoint(root)):
        raise UserError(
            "the run would overwrite files in the output folder that dpoeng did not write",
            code="output-foreign",
            where=str(root),
            expected="a new folder, or the folder of a run",
            found=", ".join(foreign),
            remedy="name another folder with --output-dir, or move these files",
        )


def _is_run(path: Path) -> bool:
    """Whether run.json is ours; a damaged one counts, so that the run can be repeated."""
    try:
        return path.is_file() and json.loads(path.read_bytes()).get("command") == "dpoeng train"
    except ValueError:
        return True
    except (OSError, AttributeError):
        return False


def write_run_file(
    output_dir: Path, record: Mapping[str, Any], versions: Mapping[str, str], load: Sequence[str]
) -> None:
    """Writes run.json: everything needed to repeat the run and to load its result.

    Args:
        output_dir: the run's folder; created if missing.
        record: plain values, with `model`, `adapter_mode` and `sft_adapter`; Python and platform are added.
        versions: versions of the libraries.
        load: the result of `loading_lines`.

    Raises:
        UserError: the folder is not writable, or the disk is full.
    """
    whole = {
        **record,
        "versions": dict(versions),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "load": list(load),
    }
    _write_text(output_dir / RUN_FILE, json.dumps(whole, indent=2) + "\n")


def write_samples(output_dir: Path, samples: Iterable[Mapping[str, str]]) -> Path:
    """Writes samples.jsonl, replacing an earlier one, one JSON object per line, and returns its path.

    Args:
        output_dir: the run's folder.
        samples: `prompt`, and the answers `before` and `after` training.

    Raises:
        UserError: the folder is not writable, or the disk is full; an earlier file stays unchanged.
    """
    path = output_dir / SAMPLES_FILE
    _write_text(path, "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples))
    return path


def _write_text(path: Path, text: str) -> None:
    """Replaces a file of the output folder atomically."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            write_durably(temporary, text.encode())
    except OSError as error:
        raise unwritable(path.parent, error) from error


def write_advice(output_dir: Path, advice: Sequence[Mapping[str, Any]]) -> None:
    """Writes the remarks on the finished run as JSON; an empty list without any."""
    data = json.dumps(list(advice), indent=2) + "\n"
    write_durably(output_dir / ADVICE_FILE, data.encode())


def result_folder(output_dir: Path, mode: Mode) -> Path:
    """The folder of a complete run's result."""
    return output_dir / (MODEL_FOLDER if mode == "full" else ADAPTER_FOLDER)


def has_result(output_dir: Path) -> bool:
    """Whether a run's result exists."""
    return any((output_dir / name).is_dir() for name in (ADAPTER_FOLDER, MODEL_FOLDER))
