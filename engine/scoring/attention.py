"""Exact attention over packed rows whose branches share a prompt; computes only what a branch may see.

Registered with transformers under `SHARED_PROMPT`, so that every model that uses transformers' attention interface can
use it. Each group costs one causal call over `[prompt | first branch]`, which is contiguous, and one call over
`[prompt | branch]` for each further branch; in a tree one for each end, over all that comes before it. Nothing is
computed between groups, so the cost is linear in the number of pairs in a row, and a pair's numbers cannot depend on
its neighbours. `varlen` does the same in one FlashAttention call per layer, for GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F

from dpoeng.engine.config.fields import Attention
from dpoeng.engine.models.model import CausalLM, Layout, register_attention
from dpoeng.engine.models.multimodal.towers import set_attention
from dpoeng.engine.scoring.forks import Forks, fork_states, forks
from dpoeng.engine.scoring.layout import GroupSpan, IndexArray
from dpoeng.engine.scoring.varlen import Texts, texts, varlen
from dpoeng.kernels.cpu_linear import dtype_of_products

SHARED_PROMPT = "dpoeng_shared_prompt"

Keys = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of a text, each [1, Hkv, K, D]."""


@dataclass(frozen=True, slots=True, eq=False)
class AttentionPlan:
    """Attention inputs shared by all layers of a forward: spans, implementation, and masks that depend only on lengths.

    Passed through the model's keyword arguments as `dpoeng_plan`, so that a checkpointed layer gets the same plan when
    it is recomputed in the backward pass.
    """

    groups: tuple[GroupSpan, ...]
    way: Attention = "segments"
    # For a last layer that computes only some positions (`scored_end`): the plan with these.
    last: AttentionPlan | None = None
    queries: IndexArray | None = None
    # Created by the first layer, since only layers know window, dtype and device; cached for the others.
    masks: dict[tuple[int, int, int | None], torch.Tensor] = field(default_factory=dict)
    row_texts: list[Texts] = field(default_factory=list)
    row_forks: list[Forks] = field(default_factory=list)

    def texts(self, like: torch.Tensor) -> Texts:
        """The row as separate texts for FlashAttention."""
        if not self.row_texts:
            self.row_texts.append(texts(self.groups, like.device, self.queries))
        return self.row_texts[0]

    def rows_of(self, like: torch.Tensor) -> torch.Tensor:
        """The positions of `queries` [M], on the device."""
        rows = self.texts(like).query_rows
        assert rows is not None
        return rows

    def forks(self, like: torch.Tensor) -> Forks:
        """The row as prompts and branches, for layers that keep a state."""
        if not self.row_forks:
            self.row_forks.append(forks(self.groups, like.device))
        return self.row_forks[0]

    def mask(self, q_len: int, k_len: int, window: int | None, like: torch.Tensor) -> torch.Tensor:
        """Additive mask [q_len, k_len]: query i has position `k_len - q_len + i` among the keys and sees keys up to it.

        With `window` w it sees only the last w keys, including itself, as in transformers' sliding window.
        """
        key = (q_len, k_len, window)
        mask = self.masks.get(key)
        if mask is None or mask.dtype != like.dtype:
            queries = torch.arange(k_len - q_len, k_len, device=like.device)[:, None]
            keys = torch.arange(k_len, device=like.device)[None, :]
            visible = keys <= queries
            if window is not None:
                visible &= keys > queries - window
            # On a GPU rows begin at multiples of 16 entries: torch would otherwise copy the mask for every layer.
            width = k_len if like.device.type == "cpu" else -(-k_len // 16) * 16
            mask = torch.zeros(q_len, width, dtype=like.dtype, device=like.device)[:, :k_len]
            mask.masked_fill_(~visible, float("-inf"))
            self.masks[key] = mask
        return mask


def shared_prompt_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    *,
    dpoeng_plan: AttentionPlan,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer. Shapes: query [1, Hq, T, D], key and value [1, Hkv, T, D] -> [1, T, Hq, D].

    Raises:
        ValueError: the model built a mask, or attention dropout is on; neither is supported here.
    """
    if attention_mask is not None:
        raise ValueError("shared-prompt attention takes no attention mask: the plan defines what each token sees")
    if dropout:
        raise ValueError("attention dropout is not supported: it would differ between a shared and a separate prompt")
    sinks = s_aux if s_aux is not None else getattr(module, "sinks", None)
    if dpoeng_plan.way == "varlen":
        rows = dpoeng_plan.texts(query)
        window = sliding_window
        return varlen(query, key, value, rows, scaling=scaling, window=window, softcap=softcap, sinks=sinks), None
    narrow, wide = query.dtype, dtype_of_products(query)
    query, key, value = query.to(wide), key.to(wide), value.to(wide)
    # `split` instead of slices: each slice's backward fills a tensor as long as the whole row.
    sizes = [n for group in dpoeng_plan.groups for n in group.text_sizes]
    pieces: list[torch.Tensor] = []
    parts = zip(*(torch.split(states, sizes, dim=2) for states in (query, key, value)), strict=True)
    for group in dpoeng_plan.groups:
        keys: list[Keys] = []
        beginnings: dict[tuple[int, int], Keys] = {}  # each is cut off once, for all texts that continue it
        for text, (q, k, v) in zip(group.texts, islice(parts, len(group.texts)), strict=True):
            if text.after >= 0:  # the first text lies in the row in one piece, so nothing is copied for it
                place = (text.after, text.shared)
                if place not in beginnings:
                    beginnings[place] = _first(keys[text.after], text.shared)
                before = beginnings[place]
                k, v = torch.cat([before[0], k], dim=2), torch.cat([before[1], v], dim=2)
            keys.append((k, v))
            pieces.append(_attend(q, k, v, dpoeng_plan, scaling, sliding_window, softcap, sinks))
    output = torch.cat(pieces, dim=2) if len(pieces) > 1 else pieces[0]
    return output.transpose(1, 2).contiguous().to(narrow), None


def _first(keys: Keys, count: int) -> Keys:
    return keys[0][:, :, :count], keys[1][:, :, :count]


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: AttentionPlan,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Lower-right causal attention of q [1, Hq, Q, D] over k, v [1, Hkv, K, D] -> [1, Hq, Q, D]."""
    q_len, k_len = q.shape[2], k.shape[2]
    if window is not None and k_len <= window:
        window = None  # it hides nothing, and faster kernels work only without a mask
    repeats = q.shape[1] // k.shape[1]
    if softcap is None and sinks is None:
        # `is_causal` would align the queries with the first keys; with a prompt before them they belong to the last.
        causal = q_len == k_len and window is None
        if repeats > 1 and q.is_cuda and not (causal and q.dtype != torch.float32):
            # With grouped heads, CUDA has only FlashAttention (16 bits, no mask) and a kernel that stores all scores.
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
            repeats = 1
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if causal else plan.mask(q_len, k_len, window, q),
            is_causal=causal,
            scale=scaling,
            enable_gqa=repeats > 1,
        )
    # Soft-capped scores (Gemma 2) and attention sinks (gpt-oss) have no fused kernel here: use plain arithmetic.
    if repeats > 1:
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    scale = scaling if scaling is not None else q.shape[-1] ** -0.5
    scores = (q @ k.transpose(2, 3)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores + plan.mask(q_len, k_len, window, q)
    if sinks is not None:
        sink = sinks.reshape(1, -1, 1, 1).expand(1, -1, q_len, 1).to(scores.dtype)
        scores = torch.cat([scores, sink], dim=-1)
    weights = torch.softmax(scores.float(), dim=-1).to(q.dtype)  # in float32, like transformers' eager attention
    return weights[..., :k_len] @ v


def use_layout(lm: CausalLM, layout: Layout, reason: str = "") -> None:
    """Switches between shared-prompt attention and transformers' own.

    Layers that keep a state follow a row's plan in both cases; without a plan they run as in transformers.
    """
    fork_states(lm.backbone)
    register_attention(SHARED_PROMPT, shared_prompt_attention)
    lm.layout, lm.layout_reason = layout, reason
    set_attention(lm.base, SHARED_PROMPT if layout == "shared" else lm.native_attention)
