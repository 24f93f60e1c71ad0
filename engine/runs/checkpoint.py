"""Checkpoints: one folder per step, written atomically, verified by checksum. Only safetensors and JSON.

A checkpoint contains the trained tensors, the optimizer's state and the run's progress. It has no random state: order
and dropout depend only on (seed, epoch, step), so there is none to restore.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from dpoeng.cache.errors import UserError
from dpoeng.engine.runtime.folders import write_folder

if TYPE_CHECKING:
    import torch

_PREFIX = "checkpoint-"

_STATE = "state.json"

_PARAMETERS = "parameters.safetensors"


@dataclass(frozen=True, slots=True)
class Finished:
    """A complete run's checkpoint without its tensors: steps, number of trained parameters, state."""

    step: int
    trained: int
    state: dict[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """State to resume from: tensors by name, and the state passed to `save_checkpoint`."""

    step: int
    folder: Path
    parameters: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    state: dict[str, Any]

    @property
    def trained(self) -> int:
        """Number of trained parameters."""
        return sum(tensor.numel() for tensor in self.parameters.values())

    def without_tensors(self) -> Checkpoint:
        """The checkpoint without its large tensors."""
        return replace(self, parameters={}, optimizer={})


def save_checkpoint(
    root: Path,
    step: int,
    *,
    parameters: Mapping[str, torch.Tensor],
    optimizer: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
    keep: int,
    spare: Collection[int] = (),
) -> Path:
    """Writes `root/checkpoint-<step>` durably, then removes the oldest beyond `keep`, but no step in `spare`.

    Args:
        root: the output folder of the run.
        step: optimizer steps done.
        parameters: trained tensors by name, contiguous, in host memory.
        optimizer: the optimizer's state in the same form.
        state: everything else that a run needs to continue; plain JSON.
        keep: how many checkpoints to keep, at least 1.
        spare: steps whose checkpoints always stay.

    Raises:
        UserError: the disk is full or not writable; older checkpoints are untouched.
    """
    from safetensors.torch import save

    folder = _folder(root, step)
    files = {_PARAMETERS: save(dict(parameters)), "optimizer.safetensors": save(dict(optimizer))}
    record = {
        "step": step,
        "state": dict(state),
        "files": {name: {"bytes": len(data), "xxh3_128": _digest(data)} for name, data in files.items()},
    }
    write_folder(folder, {**files, _STATE: _seal(record)})
    # Remove old checkpoints only now that the new one is on disk: a kill at any moment leaves a whole one. Also remove
    # later ones: this run did not continue from them, so they are damaged and would displace whole ones.
    spared = {_folder(root, other) for other in spare}
    folders = _folders(root)
    end = folders.index(folder) + 1
    for old in [*folders[:end][:-keep], *folders[end:]]:
        if old not in spared:
            shutil.rmtree(old)
    return folder


def read_checkpoint(root: Path, step: int) -> Checkpoint:
    """The checkpoint of a step.

    Raises:
        UserError: it does not exist, or is damaged.
    """
    folder = _folder(root, step)
    try:
        return _read(folder)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            "cannot read a required checkpoint",
            code="checkpoint-damaged",
            where=str(folder),
            expected="the model of the best evaluation",
            found=str(error),
            remedy="train again with --no-resume",
            exit_status=5,
        ) from error


def latest_checkpoint(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest undamaged checkpoint, and one sentence for each newer damaged one."""
    damaged: list[str] = []
    for folder in reversed(_folders(root)):
        try:
            return _read(folder), damaged
        except (OSError, ValueError, KeyError) as error:
            damaged.append(f"{folder} is damaged ({error}); using the checkpoint before it")
    return None, damaged


def read_finished(root: Path) -> Finished | None:
    """Reads the newest checkpoint if it is complete and undamaged; else None. Imports no torch.

    It may belong to another run: its `state` tells which.
    """
    folders = _folders(root)
    if not folders:
        return None
    trained = 0
    try:
        record = _read_record(folders[-1])
        if not record["state"]["complete"]:
            return None
        for name, expected in record["files"].items():
            data = _checked(folders[-1], name, expected)
            trained += _numbers(data) if name == _PARAMETERS else 0
        return Finished(record["step"], trained, record["state"])
    except (OSError, ValueError, KeyError):  # code that continues from an older one reports it
        return None


def remove_checkpoints(root: Path) -> None:
    """Removes all checkpoints under `root`, and leftovers of an interrupted save."""
    for folder in [*_folders(root), *root.glob(f".{_PREFIX}{'[0-9]' * 8}.tmp")]:
        shutil.rmtree(folder)


def _folder(root: Path, step: int) -> Path:
    return root / f"{_PREFIX}{step:08d}"


def _folders(root: Path) -> list[Path]:
    """Our checkpoints, oldest first; transformers' (checkpoint-500) are not ours to read or remove."""
    return sorted(path for path in root.glob(f"{_PREFIX}{'[0-9]' * 8}") if path.is_dir() and not path.is_symlink())


def has_checkpoint(root: Path) -> bool:
    """Whether one of our runs left a checkpoint here, undamaged or not."""
    return any((folder / _STATE).is_file() for folder in _folders(root))


def _digest(data: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data)


def _seal(record: Mapping[str, Any]) -> bytes:
    body = json.dumps(record, sort_keys=True, indent=1)
    return json.dumps({"record": body, "xxh3_128": _digest(body.encode())}).encode()


def _read(folder: Path) -> Checkpoint:
    from safetensors.torch import load

    record = _read_record(folder)
    tensors = {name: load(_checked(folder, name, expected)) for name, expected in record["files"].items()}
    return Checkpoint(
        step=record["step"],
        folder=folder,
        parameters=tensors[_PARAMETERS],
        optimizer=tensors["optimizer.safetensors"],
        state=record["state"],
    )


def _read_record(folder: Path) -> dict[str, Any]:
    sealed = json.loads((folder / _STATE).read_text(encoding="utf-8"))
    if _digest(sealed["record"].encode()) != sealed["xxh3_128"]:
        raise ValueError(f"{_STATE} does not match its checksum")
    record: dict[str, Any] = json.loads(sealed["record"])
    return record


def _checked(folder: Path, name: str, expected: Mapping[str, Any]) -> bytes:
    data = (folder / name).read_bytes()
    if len(data) != expected["bytes"] or _digest(data) != expected["xxh3_128"]:
        raise ValueError(f"{name} does not match its checksum")
    return data


def _numbers(safetensors: bytes) -> int:
    """The number of values in a safetensors file, from its header: 8 bytes of length, then JSON."""
    end = 8 + int.from_bytes(safetensors[:8], "little")
    header = json.loads(safetensors[8:end])
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
