"""Cached rows as a torch Dataset whose tensors lie in the mapped files: nothing is copied.

Knows nothing of batches: a collate function pads or packs as its trainer likes.
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
    """Rows of a view, each a dict of tensors and numbers.

    An item holds `prompt_ids` [P], `chosen_ids` [C], `rejected_ids` [R] (int32), `chosen_logps` [C - chosen_start],
    `rejected_logps` [R - rejected_start] (float32, nats), `chosen_start`, `rejected_start` (the first scored tokens),
    `chosen_sum`, `rejected_sum` (float). A cache of imported sums has no log-probs of tokens.

    A tensor is a part of the mapped file. Writing to it changes a private copy of its page, never the file. It may be
    given to workers: each maps the files itself, from the same pages of the system.
    """

    def __init__(self, view: View, indices: range) -> None:
        self._view = view
        self._indices = indices
        self._shards: list[tuple[Shard, int]] | None = None  # each with the address where its map begins

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, i: int) -> dict[str, Any]:
        if self._shards is None:
            self._shards = [(one, _address(np.frombuffer(one.data, np.uint8))) for one in self._view.writable_shards()]
        number, place = self._view.place(self._indices[i])
        shard, start = self._shards[number]

        def tensor(values: npt.NDArray[Any]) -> Tensor:
            # Over the same memory. torch.from_numpy would warn: pyarrow's arrays are read-only.
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
        return {**self.__dict__, "_shards": None}  # a map cannot be pickled; the view opens its files again


def _address(values: npt.NDArray[Any]) -> int:
    return int(values.__array_interface__["data"][0])
