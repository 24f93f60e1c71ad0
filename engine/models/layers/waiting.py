"""Stores hidden states until their next layer: in host memory, or in a mapped scratch file."""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dpoeng.cache.errors import UserError
from dpoeng.cache.words import GIB
from dpoeng.engine.runtime.host import available_memory


@dataclass(slots=True)
class Slot:
    """The storage of one tensor. `held` is None if only its shape is known (on the meta device)."""

    held: torch.Tensor | None
    shape: torch.Size
    dtype: torch.dtype


class Waiting:
    """Stores tensors off the device between two uses.

    Args:
        device: their device.
        folder: folder of the scratch file; None for host memory. The file is unnamed and ends with the process.
        keeps_meta: whether tensors without values are kept too: on a CPU, device and host share their memory.
    """

    def __init__(self, device: torch.device, folder: Path | None = None, *, keeps_meta: bool = False) -> None:
        self.device = device
        self.keeps_meta = keeps_meta
        self.n_bytes = 0
        self._file = _Scratch(folder) if folder is not None else None

    def put(self, tensor: torch.Tensor, slot: Slot | None = None) -> Slot:
        """Stores a tensor, in place of the one in `slot` if it has the same size."""
        tensor = tensor.detach()
        if tensor.is_meta:
            return Slot(tensor if self.keeps_meta else None, tensor.shape, tensor.dtype)
        again = slot is not None and slot.held is not None
        if again and (slot.shape, slot.dtype) != (tensor.shape, tensor.dtype):  # type: ignore[union-attr]
            self.drop([slot])  # type: ignore[list-item]
            again = False
        if not again:
            self.n_bytes += tensor.nbytes
            slot = Slot(self._room_for(tensor), tensor.shape, tensor.dtype)
        assert slot is not None
        if self._file is None and not tensor.is_cuda:
            slot.held = tensor  # nothing to copy
        else:
            assert slot.held is not None
            slot.held.copy_(tensor, non_blocking=tensor.is_cuda)  # read back in the same stream
        return slot

    def get(self, slot: Slot) -> torch.Tensor:
        """The tensor on the device; a copy unless it was stored there."""
        if slot.held is None:
            return torch.empty(slot.shape, dtype=slot.dtype, device="meta")
        return slot.held.to(self.device, non_blocking=True)

    def drop(self, slots: Sequence[Slot]) -> None:
        """Releases tensors."""
        for slot in slots:
            if slot.held is not None:
                self.n_bytes -= slot.held.nbytes
                if self._file is not None:
                    self._file.give_back(slot.held)
            slot.held = None

    def _room_for(self, tensor: torch.Tensor) -> torch.Tensor | None:
        if self._file is not None:
            return self._file.room(tensor.shape, tensor.dtype)
        return torch.empty_like(tensor, device="cpu", pin_memory=True) if tensor.is_cuda else None


class _Scratch:
    """Tensors in one mapped file. Released space is reused for tensors with the same number of bytes."""

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                self._file = os.dup(file.fileno())
        except OSError as error:
            raise _unusable(folder, error) from error
        weakref.finalize(self, os.close, self._file)
        self._folder, self._end = folder, 0
        self._free: dict[int, list[Any]] = {}

    def room(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor in the file.

        Raises:
            UserError: the disk is full.
        """
        size = max(1, shape.numel() * dtype.itemsize)
        free = self._free.get(size)
        mapped = free.pop() if free else self._map(size)
        return torch.frombuffer(mapped, dtype=dtype, count=shape.numel()).view(shape)

    def _map(self, size: int) -> Any:
        whole = -(-size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        try:
            # Allocate now: if the disk is full when a mapped page is written, the process dies without a message.
            os.posix_fallocate(self._file, self._end, whole)
            mapped = mmap.mmap(self._file, size, offset=self._end)
        except OSError as error:
            raise _unusable(self._folder, error) from error
        self._end += whole
        return mapped

    def give_back(self, tensor: torch.Tensor) -> None:
        """Marks the tensor's space as reusable."""
        flat = tensor.reshape(-1)
        self._free.setdefault(max(1, tensor.nbytes), []).append(flat.view(torch.uint8).numpy())


def room_to_wait(folder: Path | None, gib: float | None) -> int:
    """Maximum bytes to store: as set, or half of what is free, in host memory or on the folder's disk.

    Raises:
        UserError: the folder cannot be created, or its disk has less space than was set.
    """
    if folder is None:
        free = available_memory()
    else:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(folder).free
        except OSError as error:
            raise _unusable(folder, error) from error
    if gib is None:
        return (free if free is not None else 8 * GIB) // 2
    wanted = int(gib * GIB)
    if free is not None and wanted > free:
        raise UserError(
            "there is not enough room for hidden states",
            code="offload-room",
            where=f"--offload-gib {gib:g}",
            expected=f"{gib:g} GiB",
            found=f"{free / GIB:.1f} GiB free " + (f"in {folder}" if folder is not None else "in host memory"),
            remedy="lower --offload-gib, or name a folder on a disk with more room with --offload-folder",
            exit_status=5,
        )
    return wanted


def _unusable(folder: Path, error: OSError) -> UserError:
    return UserError(
        "hidden states cannot be stored in this folder",
        code="offload-room",
        where=f"--offload-folder {folder}",
        found=error.strerror or str(error),
        remedy="name a folder on a local disk with room, or lower --offload-gib",
        exit_status=5,
    )
