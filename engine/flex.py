"""The attention of `engine/attention` as one FlexAttention call a layer: for GPUs, where it is compiled to one kernel.

The block mask says which tiles of queries and keys have anything to do with each other. It is worked out from the
spans on the CPU, without a `[T, T]` mask ever being built; tiles in which everything is visible are named as such, so
that the rule is evaluated on the edges only. (Dong et al. 2024, FlexAttention, https://arxiv.org/abs/2412.05496)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dpoeng.engine.layout import GroupSpan, IndexArray

BLOCK = 128

BoolArray = npt.NDArray[np.bool]


@dataclass(frozen=True, slots=True, eq=False)
class Segments:
    """What each position of a row of T belongs to: [T] group, [T] branch (-1: the prompt), [T] position in its text."""

    group: IndexArray
    branch: IndexArray
    position: IndexArray


@dataclass(slots=True)
class BlockCount:
    """Tiles of `BLOCK` x `BLOCK` scores: those that are computed, and all that a full square would have.

    Added up over the layers of all forwards. How many heads and layers there are does not move the share.
    """

    computed: int = 0
    total: int = 0

    def add(self, other: BlockCount) -> None:
        """Adds those of another layer."""
        self.computed += other.computed
        self.total += other.total

    def record(self) -> dict[str, float]:
        """For run.json."""
        return {"size": BLOCK, "computed": self.computed, "total": self.total, "share": self.computed / self.total}

    def __str__(self) -> str:
        return f"{100 * self.computed / self.total:.3g} % of {BLOCK} x {BLOCK} blocks computed"


@dataclass(frozen=True, slots=True, eq=False)
class RowMask:
    """FlexAttention's BlockMask of a row, and how many of its tiles are computed."""

    mask: Any
    blocks: BlockCount


def segments(groups: Sequence[GroupSpan]) -> Segments:
    """Spans of a row -> what each position belongs to."""
    total = max(end for span in groups for _, end in (*span.branches, (0, span.prompt_end)))
    group, branch, position = (np.zeros(total, np.int64) for _ in range(3))
    for number, span in enumerate(groups):
        prompt = span.prompt_end - span.prompt_begin
        for i, (begin, end) in enumerate([(span.prompt_begin, span.prompt_end), *span.branches]):
            group[begin:end] = number
            branch[begin:end] = i - 1
            position[begin:end] = np.arange(end - begin) + (prompt if i else 0)
    return Segments(group, branch, position)


def visible(
    rows: Segments, window: int | None
) -> Callable[[IndexArray, IndexArray], np.ndarray[Any, np.dtype[np.bool]]]:
    """The rule as a function of (query, key) indices: same text, key not later, within the window."""

    def rule(q: IndexArray, k: IndexArray) -> BoolArray:
        own = (rows.branch[k] == -1) | (rows.branch[k] == rows.branch[q])
        seen: BoolArray = (rows.group[k] == rows.group[q]) & own & (k <= q)
        if window is not None:
            seen &= rows.position[q] - rows.position[k] < window
        return seen

    return rule


def block_lists(rows: Segments, window: int | None, block: int = BLOCK) -> tuple[list[list[int]], list[list[int]]]:
    """For each tile of queries: the tiles of keys that are visible in part, and those that are visible as a whole.

    Only tiles of the same group are looked at, so the work is linear in the number of groups.
    """
    total = len(rows.group)
    rule = visible(rows, window)
    starts = np.searchsorted(rows.group, rows.group[::block])  # where the first group of each tile begins
    partial: list[list[int]] = []
    full: list[list[int]] = []
    for tile, first in enumerate(starts):
        q = np.arange(tile * block, min((tile + 1) * block, total))
        partial.append([])
        full.append([])
        for other in range(int(first) // block, tile + 1):
            k = np.arange(other * block, min((other + 1) * block, total))
            seen = rule(q[:, None], k[None, :])
            if seen.all() and len(q) == len(k) == block:
                full[-1].append(other)
            elif seen.any():
                partial[-1].append(other)
    return partial, full


def block_mask(groups: Sequence[GroupSpan], window: int | None, device: torch.device) -> RowMask:
    """The mask of a row."""
    from torch.nn.attention.flex_attention import BlockMask

    rows = segments(groups)
    partial, full = block_lists(rows, window)
    group, branch, position = (torch.from_numpy(a).to(device) for a in (rows.group, rows.branch, rows.position))
    reach = torch.tensor(window or 0, device=device)  # a number would become a symbol that is not lowered everywhere

    def mask_mod(b: Any, h: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        del b, h
        seen = (group[k] == group[q]) & ((branch[k] == -1) | (branch[k] == branch[q])) & (k <= q)
        if window is not None:
            seen = seen & (position[q] - position[k] < reach)
        return seen

    total = len(rows.group)
    mask = BlockMask.from_kv_blocks(
        *_lists(partial, device),
        *_lists(full, device),
        BLOCK_SIZE=BLOCK,
        mask_mod=mask_mod,
        seq_lengths=(total, total),
    )
    return RowMask(mask, BlockCount(sum(map(len, (*partial, *full))), len(partial) ** 2))


def _lists(blocks: list[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(how many tiles of each row count [1, 1, R], their numbers first [1, 1, R, R]), as BlockMask wants them."""
    count = len(blocks)
    numbers = np.zeros((count, count), np.int32)
    for tile, named in enumerate(blocks):
        rest = sorted(set(range(count)) - set(named))
        numbers[tile] = [*named, *rest]
    lengths = np.array([len(named) for named in blocks], np.int32)
    return torch.from_numpy(lengths).to(device)[None, None], torch.from_numpy(numbers).to(device)[None, None]


def flex(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Any,
    *,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of a packed row. Shapes: query [1, Hq, T, D], key and value [1, Hkv, T, D] -> [1, Hq, T, D].

    A sink is a score without a value (gpt-oss): the output shrinks by the share of the sum that it takes.
    """

    from torch.nn.attention.flex_attention import AuxRequest

    found = _attention(query.is_cuda)(
        query,
        key,
        value,
        score_mod=_capped(softcap, query.device) if softcap is not None else None,
        block_mask=mask,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=AuxRequest(lse=True) if sinks is not None else None,
    )
    if sinks is None:
        return torch.as_tensor(found)
    output, more = found
    share = torch.sigmoid(more.lse - sinks.reshape(1, -1, 1).to(more.lse.dtype))
    return torch.as_tensor(output * share.unsqueeze(-1).to(output.dtype))


@functools.cache  # one function a cap: another one would be compiled anew
def _capped(softcap: float, device: torch.device) -> Callable[..., torch.Tensor]:
    cap = torch.tensor(softcap, device=device)  # a float would be a dynamic shape's symbol, which inductor cannot lower

    def capped(score: torch.Tensor, b: Any, h: Any, q: Any, k: Any) -> torch.Tensor:
        del b, h, q, k
        return torch.tanh(score / cap) * cap

    return capped


@functools.cache
def _attention(compiled: bool) -> Any:
    """FlexAttention: compiled on a GPU; on a CPU as plain operations, which is slow and serves tests."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if compiled else flex_attention
