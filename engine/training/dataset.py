"""Cached rows as a torch Dataset with zero-copy tensors on the mapped files.

Does no batching: use a collate function that pads or packs as your trainer needs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dpoeng.cache.reader import View
from dpoeng.cache.shard import Shard

_DTYPES = {"int32": torch.int32, "float32": torch.float32}


class CachedPairs(Dataset[dict[str, Any]]):
    """Rows of a view, each as a dict of tensors and numbers.

    An item has `prompt_ids` [P], `chosen_ids` [C], `rejected_ids` [R] (int32), `chosen_logps` [C - chosen_start],
    `rejected_logps` [R - rejected_start] (float32, nats), `chosen_start`, `rejected_start` (the first scored tokens),
    `chosen_sum`, `rejected_sum` (float). A cache of imported sums has no per-token log-probs.

    A tensor is a part of the mapped file. Writing to it changes a private copy of its page, never the file. It can be
    passed to workers: each maps the files itself, and the system shares the pages.
    """

    def __init__(self, view: View, indices: range) -> None:
        self._view = view
        self._indices = indices
        self._shards: list[tuple[Shard, int]] | None = None  # each with the start address of its map

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, i: int) -> dict[str, Any]:
        if self._shards is None:
            self._shards = [(one, _address(np.frombuffer(one.data, np.uint8))) for one in self._view.writable_shards()]
        number, place = self._view.place(self._indices[i])
        shard, start = self._shards[number]

        def tensor(values: npt.NDArray[Any]) -> Tensor:
            # Share the memory. torch.from_numpy would warn, because pyarrow's arrays are read-only.
            if not len(values):
                return torch.empty(0, dtype=_DTYPES[values.dtype.name])
            offset = _address(values) - start
            return torch.frombuffer(shard.data, dtype=_DTYPES[values.dtype.name], count=len(values), offset=offset)

        row, ids = shard[place], shard[place].ids
        item: dict[str, Any] = {
            "prompt_ids": tensor(ids.prompt_ids),
            "chosen_ids": tensor(ids.chosen_ids),
            "rejected_ids": tensor(ids.rejected_ids),
            "chosen_start": ids.chosen_start,
            "rejected_start": ids.rejected_start,
            "chosen_sum": row.chosen_sum,
            "rejected_sum": row.rejected_sum,
        }
        if not self._view.spec.holds_sums:
            item["chosen_logps"] = tensor(row.chosen_logps)
            item["rejected_logps"] = tensor(row.rejected_logps)
        return item

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": None}  # a map cannot be pickled; the view reopens its files


def _address(values: npt.NDArray[Any]) -> int:
    return int(values.__array_interface__["data"][0])
