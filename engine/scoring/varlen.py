"""The attention of `attention` as one FlashAttention call per layer over texts of different lengths: for GPUs.

A row with its spans is a sequence of texts: `[prompt | first branch]`, then `[prompt | branch]` for each further
branch, of which only the branch is needed. The queries are adjacent in the row already; the keys of a prompt (in a
tree: of all that comes before) are gathered again for each further branch. The kernel aligns the causal mask at the
lower right, so a branch's queries see their whole prompt. Nothing is computed between texts, and nothing is compiled
for a row's shape.
(Dao 2023, FlashAttention-2, https://arxiv.org/abs/2307.08691; `torch.nn.attention.varlen`)
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

from dpoeng.engine.runtime.to_device import to_device
from dpoeng.engine.scoring.layout import GroupSpan, IndexArray, queries_within

MOST_OF_A_HEAD = 256
"""The widest head of FlashAttention 2."""


@dataclass(frozen=True, slots=True, eq=False)
class Texts:
    """A row as S texts.

    Attributes:
        query_offsets: [S + 1] int32, start of each text's queries in the row.
        key_offsets: [S + 1] int32, start of each text's keys.
        key_rows: [K], the positions of the row that are keys, text after text; None if these are all, in order.
        longest_query: length of the longest text's queries.
        longest_key: length of the longest text's keys.
        query_rows: [M], the positions of the row that are queries; None for all.
    """

    query_offsets: torch.Tensor
    key_offsets: torch.Tensor
    key_rows: torch.Tensor | None
    longest_query: int
    longest_key: int
    query_rows: torch.Tensor | None = None


def texts(groups: Sequence[GroupSpan], device: torch.device, needed: IndexArray | None = None) -> Texts:
    """The texts of a row's spans; with `needed` [M], only these positions are queries."""
    keys = [rows for group in groups for rows in _key_rows(group)]
    queries = [size for group in groups for size in group.text_sizes]
    if needed is not None:
        # The mask is aligned at the last query, so drop keys after it, and texts without queries.
        of_texts = [queries_within(needed, begin, end) for group in groups for begin, end in group.text_ranges]
        keys = [rows[rows <= own[-1]] for rows, own in zip(keys, of_texts, strict=True) if len(own)]
        queries = [len(own) for own in of_texts if len(own)]
    lengths = [len(rows) for rows in keys]

    def offsets(counts: Sequence[int]) -> torch.Tensor:
        return to_device(np.cumsum([0, *counts], dtype=np.int32), device)

    again = needed is not None or lengths != queries
    return Texts(
        offsets(queries),
        offsets(lengths),
        to_device(np.concatenate(keys), device) if again else None,
        max(queries),
        max(lengths),
        None if needed is None else to_device(needed, device),
    )


def _key_rows(group: GroupSpan) -> list[IndexArray]:
    """The positions of each text's keys."""
    rows: list[IndexArray] = []
    for text in group.texts:
        own = np.arange(text.begin, text.end)
        rows.append(own if text.after < 0 else np.concatenate([rows[text.after][: text.shared], own]))
    return rows


def varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: Texts,
    *,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of a packed row. Shapes: query [1, Hq, T, D], key and value [1, Hkv, T, D] -> [1, T, Hq, D].

    If only some rows are needed, the others are 0.

    Raises:
        ValueError: soft-capped scores, attention sinks, or heads of a size that this kernel does not have.
    """
    if softcap is not None or sinks is not None:
        raise ValueError("FlashAttention's kernel has neither soft-capped scores nor attention sinks")
    size = query.shape[-1]
    # Checked here too, so that a step simulated without a GPU takes the same attention.
    if size > MOST_OF_A_HEAD or size % 8 or value.shape[-1] != size:
        raise ValueError(f"FlashAttention's kernel does not have heads of {size} and {value.shape[-1]}")
    from torch.nn.attention.varlen import varlen_attn

    if rows.query_rows is not None:
        query = query.index_select(2, rows.query_rows)
    # `squeeze` instead of indexing, whose backward would fill and copy a tensor.
    q, k, v = (states.squeeze(0).transpose(0, 1) for states in (query, key, value))
    if rows.key_rows is not None:
        k, v = k.index_select(0, rows.key_rows), v.index_select(0, rows.key_rows)
    grouped: dict[str, Any] = {"enable_gqa": query.shape[1] != key.shape[1]} if _names_groups() else {}
    # A window of transformers counts the token itself; FlashAttention counts only its neighbours.
    output = varlen_attn(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        rows.query_offsets,
        rows.key_offsets,
        rows.longest_query,
        rows.longest_key,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        **grouped,
    )
    attended = torch.as_tensor(output)[None]
    if rows.query_rows is None:
        return attended
    return attended.new_zeros(1, value.shape[2], *attended.shape[2:]).index_copy(1, rows.query_rows, attended)


@cache  # every layer of every forward asks
def _names_groups() -> bool:
    """Whether torch's function has an argument for grouped heads. torch 2.11's accepts fewer key heads without one."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters
