"""(model, groups) -> the log-probability of every scored token. One path for both phases.

Only the positions that predict a scored token meet the head, and `[N, V]` logits are never built where the head is a
plain linear layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy.typing as npt
import torch
from torch import nn

from dpoeng.engine.models.model import CausalLM
from dpoeng.engine.scoring.attention import AttentionPlan
from dpoeng.engine.scoring.layout import IndexArray, PackedRow, PromptGroup, pack, pad, separate
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
    """The forward below the head: hidden states [N, H] that predict the scored tokens, these [N], and offsets [K + 1].

    A position that predicts the first token of two branches is there twice.
    """
    if lm.layout == "shared":
        row = pack(groups)
        hidden = _run_packed(lm, row)
    else:
        row, shape, mask = pad([single for group in groups for single in separate(group)], pad_id=0)
        hidden = lm.backbone(
            input_ids=on_device(lm, row.input_ids).view(shape),
            attention_mask=on_device(lm, mask).view(shape),
            position_ids=on_device(lm, row.position_ids).view(shape),
            use_cache=False,
        ).last_hidden_state.flatten(0, 1)
    return hidden.index_select(0, on_device(lm, row.gather)), on_device(lm, row.targets), row.branch_offsets


def _run_packed(lm: CausalLM, row: PackedRow) -> torch.Tensor:
    output = lm.backbone(
        input_ids=on_device(lm, row.input_ids)[None],
        position_ids=on_device(lm, row.position_ids)[None],
        use_cache=False,
        dpoeng_plan=AttentionPlan(row.groups, lm.attention),
    )
    hidden: torch.Tensor = output.last_hidden_state[0]
    return hidden


def head_logps(lm: CausalLM, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log p(target) from hidden states [N, H] and targets [N] -> [N] float32, by the cheapest way that is exact."""
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
    """log sum_v p(v)^2 at each of some hidden states [N, H] -> [N] float32: what WPO weighs pairs by."""
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
    """What the architecture does to its logits: (soft cap or None, factor). Checked by `choose_layout`'s probe."""
    config = lm.base.config
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = 1.0
    if getattr(config, "logits_scaling", None):  # Granite divides
        scale = 1.0 / float(config.logits_scaling)
    elif getattr(config, "logit_scale", None):  # Cohere multiplies
        scale = float(config.logit_scale)
    return (float(softcap) if softcap else None), scale


def rotary_limit(lm: CausalLM) -> int | None:
    """The length up to which a text's rotary frequencies are its own; None where there is no limit.

    LongRoPE and dynamic NTK choose them by the largest position of a forward (`dynamic_rope_update` of transformers),
    so that a longer text would change the numbers of all others in it.
    """
    config = lm.base.config
    held = getattr(config, "rope_parameters", None) or {}
    kinds = [held] if "rope_type" in held else [kind for kind in held.values() if isinstance(kind, dict)]
    limits = [int(kind["original_max_position_embeddings"]) for kind in kinds if kind.get("rope_type") == "longrope"]
    limits += [int(config.max_position_embeddings) for kind in kinds if "dynamic" in str(kind.get("rope_type"))]
    return min(limits, default=None)


def on_device(lm: CausalLM, array: npt.NDArray[Any]) -> torch.Tensor:
    """An array as a tensor where the model is, without waiting for the device."""
    return torch.from_numpy(array).to(lm.device, non_blocking=True)
