"""(model, groups) -> the log-prob of every scored token. The one path for both phases.

Only positions that predict a scored token go through the head, and `[N, V]` logits are never built if the head is a
plain linear layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from dpoeng.engine.models.model import CausalLM, before_head
from dpoeng.engine.models.model_config import rotary_limit as rotary_limit_of
from dpoeng.engine.models.model_config import text_config
from dpoeng.engine.models.trunk.stand_ins import Reached
from dpoeng.engine.runtime.to_device import to_device
from dpoeng.engine.scoring.attention import AttentionPlan
from dpoeng.engine.scoring.layout import IndexArray, PackedRow, PromptGroup, pack, pad, queries_of, separate
from dpoeng.engine.scoring.texts import Place, places_apart, places_packed, put_states
from dpoeng.kernels.collision import log_collision
from dpoeng.kernels.head import Head
from dpoeng.kernels.token_logps import token_logps


def score_groups(lm: CausalLM, groups: Sequence[PromptGroup]) -> tuple[torch.Tensor, IndexArray]:
    """Scores groups in one forward.

    Returns:
        token log-probs [N] float32, branch after branch, and the branches' offsets [K + 1] into them.
    """
    predictors, targets, offsets = predict_groups(lm, groups)
    return head_logps(lm, predictors, targets), offsets


def predict_groups(lm: CausalLM, groups: Sequence[PromptGroup]) -> tuple[torch.Tensor, torch.Tensor, IndexArray]:
    """The forward below the head: hidden states [N, H] that predict scored tokens, these tokens [N], offsets [K + 1].

    A position that predicts the first token of two branches occurs twice.
    """
    if lm.layout == "shared":
        row = pack(groups, tree_of(lm))
        shape, plan = (1, len(row.input_ids)), AttentionPlan(row.groups, lm.attention)
        if lm.scored_end and lm.attention == "varlen":
            queries = queries_of(row)
            plan = replace(plan, last=replace(plan, queries=queries, row_texts=[]))
            row = replace(row, gather=np.searchsorted(queries, row.gather))
        hidden = _last_hidden(lm, row, shape, partial(places_packed, groups), dpoeng_plan=plan)
    else:
        if not lm.padding:
            hidden, targets, offsets = _each_alone(lm, groups)
            return _to_head(lm, hidden), targets, offsets
        row, shape, mask = pad([single for group in groups for single in separate(group)], pad_id=0)
        attention_mask = on_device(lm, mask).view(shape)
        hidden = _last_hidden(lm, row, shape, partial(places_apart, groups), attention_mask=attention_mask)
    predictors = _to_head(lm, hidden.index_select(0, on_device(lm, row.gather)))
    return predictors, on_device(lm, row.targets), row.branch_offsets


def tree_of(lm: CausalLM) -> int:
    """The shortest beginning that responses share in a forward; 0 where states of whole responses are read or kept."""
    return lm.tree if lm.entry is None and lm.watch is None else 0


def _last_hidden(
    lm: CausalLM, row: PackedRow, shape: tuple[int, int], places: Callable[[], Sequence[Place]], **inputs: Any
) -> torch.Tensor:
    """The decoder's last hidden states [B * T, H]; for a model that begins at a trunk, from its stored states."""
    if lm.entry is not None:
        if lm.by_layer is None or lm.by_layer.gates.enters:
            put_states(lm, places(), shape)
        else:  # only their shape is used
            lm.entry.states = lm.entry.states[:1, :1].expand(*shape, -1)
    if lm.watch is not None:
        lm.watch.told = places()
    try:
        hidden: torch.Tensor = lm.backbone(
            input_ids=on_device(lm, row.input_ids.reshape(shape)),  # not a view: see `runtime/to_device.on_host`
            position_ids=on_device(lm, row.position_ids).view(shape),
            use_cache=False,
            **inputs,
        ).last_hidden_state
    except Reached as end:
        hidden = end.states
    return hidden.flatten(0, 1)


def _to_head(lm: CausalLM, hidden: torch.Tensor) -> torch.Tensor:
    """Hidden states as the head expects them: ModernBERT's decoder has a dense layer before it."""
    before = before_head(lm.base)
    return hidden if before is None else before(hidden)


def _each_alone(lm: CausalLM, groups: Sequence[PromptGroup]) -> tuple[torch.Tensor, torch.Tensor, IndexArray]:
    """Like `predict_groups`, one forward per text, for models whose numbers depend on padding in the batch."""
    parts, offsets = [], [0]
    for group in groups:
        for branch in group.branches:
            single = PromptGroup(group.prompt_ids, (branch,))
            row = pack(separate(single))
            hidden = _last_hidden(lm, row, (1, len(row.input_ids)), partial(places_apart, [single]))
            parts.append((hidden.index_select(0, on_device(lm, row.gather)), on_device(lm, row.targets)))
            offsets.append(offsets[-1] + len(row.targets))
    hidden_states, targets = (torch.cat(part) for part in zip(*parts, strict=True))
    return hidden_states, targets, np.asarray(offsets, dtype=np.int64)


def head_logps(lm: CausalLM, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log p(target) from hidden states [N, H] and targets [N] -> [N] float32, by the cheapest exact method."""
    head = lm.head
    softcap, scale = head_transform(lm)
    if type(head) is nn.Linear:
        return token_logps(
            hidden.to(head.weight.dtype), head.weight, targets, bias=head.bias, softcap=softcap, scale=scale
        )
    from dpoeng.kernels.row_logps import token_logps_from_logits

    return token_logps_from_logits(_logits(lm, hidden), targets)


@torch.no_grad()
def head_log_collision(lm: CausalLM, hidden: torch.Tensor) -> torch.Tensor:
    """log sum_v p(v)^2 for hidden states [N, H] -> [N] float32, from which WPO weighs pairs."""
    head = lm.head
    if type(head) is nn.Linear:
        return log_collision(hidden.to(head.weight.dtype), Head(head.weight, head.bias, *head_transform(lm)))
    logps = torch.log_softmax(_logits(lm, hidden).float(), dim=-1)
    return torch.logsumexp(2 * logps, dim=-1)


def _logits(lm: CausalLM, hidden: torch.Tensor) -> torch.Tensor:
    softcap, scale = head_transform(lm)
    logits: torch.Tensor = lm.head(hidden) * scale
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def head_transform(lm: CausalLM) -> tuple[float | None, float]:
    """The architecture's map of its logits: (soft cap or None, factor). `choose_layout`'s probe checks it."""
    config = text_config(lm.base.config)
    softcap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
    scale = 1.0
    if getattr(config, "logits_scaling", None):  # Granite divides
        scale = 1.0 / float(config.logits_scaling)
    elif getattr(config, "logits_mup_width_multiplier", None):  # Inkling divides
        scale = 1.0 / float(config.logits_mup_width_multiplier)
    elif getattr(config, "logit_scale", None):  # Cohere multiplies
        scale = float(config.logit_scale)
    elif getattr(config, "lm_head_multiplier", None):  # Falcon-H1 multiplies
        scale = float(config.lm_head_multiplier)
    return (float(softcap) if softcap else None), scale


def position_limit(lm: CausalLM) -> int | None:
    """The longest text for which the model has positions; None if it computes them for any length.

    Learned or tabulated positions end somewhere, and a longer text would read out of bounds: an embedding of positions,
    a table of sines, or a causal mask or bias stored as a buffer.
    """
    longest = getattr(text_config(lm.base.config), "max_position_embeddings", None)
    backbone, words = lm.backbone, lm.base.get_input_embeddings()
    rows = [
        module.num_embeddings - int(getattr(module, "offset", 0))
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Embedding) and module is not words and _POSITIONS.search(name.rsplit(".", 1)[-1])
    ]
    if longest:
        buffers = [*backbone.named_buffers(), *_tensors_beside(backbone)]
        rows += [int(longest) for name, b in buffers if longest in b.shape and not name.endswith("inv_freq")]
    if getattr(getattr(lm.base.config, "attn_config", None), "alibi", False):  # MPT creates only this many biases
        rows.append(int(lm.base.config.max_seq_len))
    return min(rows, default=None)


_POSITIONS = re.compile(r"^(wpe|.*position.*|.*pos_emb.*)$")


def _tensors_beside(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Tensors that modules store as plain attributes."""
    return [(n, t) for part in module.modules() for n, t in vars(part).items() if isinstance(t, torch.Tensor)]


def rotary_limit(lm: CausalLM) -> int | None:
    """The longest text whose rotary frequencies do not depend on other texts in the batch; None: any length."""
    return rotary_limit_of(lm.base.config)


def on_device(lm: CausalLM, array: npt.NDArray[Any]) -> torch.Tensor:
    """An array as a tensor on the model's device, without waiting for the device."""
    return to_device(array, lm.device)
