"""(model, groups) -> the log-probability of every scored token. One path for both phases.

Only the positions that predict a scored token meet the head, and `[N, V]` logits are never built where the head is a
plain linear layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from dpoeng.cache.errors import UserError
from dpoeng.cache.schema import IdArray
from dpoeng.engine.attention import AttentionPlan
from dpoeng.engine.config import Attention
from dpoeng.engine.flex import BlockCount
from dpoeng.engine.layout import Branch, IndexArray, PackedRow, PromptGroup, pack, pad, separate
from dpoeng.engine.model import CausalLM, use_layout
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
        dpoeng_plan=AttentionPlan(row.groups, lm.attention, blocks=lm.blocks),
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


# --------------------------------------------------------------------------- the probe

# Mean |difference| per token, nats, that a probe may show. Random tokens are the hardest case (log-probs near -15),
# and a wrong mask or a missed logit scale is wrong by whole nats.
_PROBE_TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.25, torch.float16: 0.05}


@torch.no_grad()
def choose_layout(lm: CausalLM, wanted: str = "auto", attention: Attention = "auto") -> None:
    """Decides by trying: the shared-prompt layout if it gives the model's own numbers, else separate rows.

    A dozen tokens are scored in the shared layout, and by the model's own forward with full logits. So an architecture
    that looks at more than positions and masks (recurrence, its own attention, logits changed after the head) is
    noticed whether or not dpoeng knows its name.

    Raises:
        UserError: `wanted` cannot be had, or not even separate rows give the model's own numbers.
    """
    generator = np.random.default_rng(0)

    def draw(count: int) -> IdArray:
        return generator.integers(0, lm.vocab_size, count, dtype=np.int32)

    groups = [
        PromptGroup(draw(5), (Branch(draw(3)), Branch(draw(4), start=1))),
        PromptGroup(draw(3), (Branch(draw(2)), Branch(draw(3)))),
    ]
    use_layout(lm, "separate")
    expected = torch.cat([_own_logps(lm, single) for group in groups for single in separate(group)])
    tolerance = _PROBE_TOLERANCE[lm.dtype] * (2.0 if lm.quantization != "none" else 1.0)

    def difference() -> float:
        return float((score_groups(lm, groups)[0] - expected).abs().mean())

    separate_error = difference()
    if not bool(expected.isfinite().all()):
        raise UserError(
            "the model gives values that are no log-probabilities",
            code="reference-not-finite",
            where="a probe of 17 tokens",
            expected="finite numbers",
            found="NaN or infinity",
            remedy="if the dtype is float16, use --dtype bfloat16 or float32; else the weights are damaged",
            exit_status=5,
        )
    if not separate_error <= tolerance:
        raise UserError(
            f"dpoeng does not compute this architecture's log-probs correctly ({type(lm.base).__name__})",
            code="model-unsupported",
            where="a probe of 17 tokens against the model's own forward",
            expected=f"mean difference per token <= {tolerance:g} nats",
            found=f"{separate_error:.4g} nats",
            remedy="please report the architecture; it changes its logits in a way that dpoeng does not know",
        )
    if wanted == "separate":
        use_layout(lm, "separate", "asked for")
        return
    reason, without = "", ""
    for way in ways_to_attend(attention, lm.device.type, lm.dtype):
        use_layout(lm, "shared", f"each prompt run once for both responses; attention: {way}{without}")
        lm.attention = way
        try:
            error_of_way = difference()
            reason = f"sharing the prompt moves the model's numbers by {error_of_way:.3g} nats a token"
        except (ValueError, TypeError, RuntimeError, NotImplementedError, ImportError) as error:
            error_of_way = float("inf")
            reason = f"its attention cannot be replaced ({type(error).__name__}: {str(error).splitlines()[0]})"
        if error_of_way <= tolerance:
            lm.blocks = BlockCount()  # the probe's row is no row of the run
            return
        without = f" ({way}: {reason})"
    if attention in ("flex", "varlen"):
        raise UserError(
            f"this model's numbers do not come out of {attention} attention here",
            code="attention-unsupported",
            where=f"--attention {attention}",
            found=reason,
            remedy="leave --attention out: segments work wherever a prompt can be shared",
            exit_status=5,
        )
    if wanted == "shared":
        raise UserError(
            f"{type(lm.base).__name__} cannot share a prompt between branches",
            code="layout-unsupported",
            where="--layout shared",
            found=reason,
            remedy="use --layout auto or separate",
        )
    use_layout(lm, "separate", reason)


def ways_to_attend(wanted: Attention, device_type: str, dtype: torch.dtype) -> tuple[Attention, ...]:
    """The ways to try, the best first. FlashAttention's kernel is for GPUs, and for 16 bits."""
    if wanted != "auto":
        return (wanted,)
    return ("varlen", "segments") if device_type == "cuda" and dtype != torch.float32 else ("segments",)


def _own_logps(lm: CausalLM, single: PromptGroup) -> torch.Tensor:
    """The model's own forward, full logits, float64 log-softmax."""
    (branch,) = single.branches
    ids = on_device(lm, branch.ids.astype(np.int64))
    logits = lm.base(input_ids=ids[None], use_cache=False).logits[0, branch.start - 1 : -1]
    logps = torch.log_softmax(logits.double(), dim=-1).gather(1, ids[branch.start :, None]).squeeze(1)
    return logps.float()
