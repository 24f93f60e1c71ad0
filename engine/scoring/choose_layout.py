"""Shared or separate prompts, and which attention: decided by trying them on a few tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dpoeng.cache.errors import UserError
from dpoeng.cache.schema import IdArray
from dpoeng.engine.config.fields import Attention
from dpoeng.engine.models.model import CausalLM
from dpoeng.engine.scoring.attention import use_layout
from dpoeng.engine.scoring.forward import on_device, score_groups
from dpoeng.engine.scoring.layout import Branch, PromptGroup, separate

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
    use_layout(lm, "separate")
    probe = _Probe.of(lm)
    _check_separate_rows(lm, probe)
    if wanted == "separate":
        use_layout(lm, "separate", "asked for")
        return
    refusal = _share_prompts(lm, attention, probe)
    if refusal is None:
        return
    if attention == "varlen":
        raise UserError(
            "this model's numbers do not come out of varlen attention here",
            code="attention-unsupported",
            where="--attention varlen",
            found=refusal,
            remedy="leave --attention out: segments work wherever a prompt can be shared",
            exit_status=5,
        )
    if wanted == "shared":
        raise UserError(
            f"{type(lm.base).__name__} cannot share a prompt between branches",
            code="layout-unsupported",
            where="--layout shared",
            found=refusal,
            remedy="use --layout auto or separate",
        )
    use_layout(lm, "separate", refusal)


@dataclass(frozen=True, slots=True)
class _Probe:
    """A few random tokens, and the model's own log-probs of their responses.

    Attributes:
        groups: two prompts of two responses each. The second response starts at its second token, so that a token
            that is seen and not scored is tried too.
        expected: [tokens] nats, from full logits.
        tolerance: mean |difference| a token, nats.
    """

    groups: list[PromptGroup]
    expected: torch.Tensor
    tolerance: float

    @classmethod
    def of(cls, lm: CausalLM) -> _Probe:
        generator = np.random.default_rng(0)

        def draw(count: int) -> IdArray:
            return generator.integers(0, lm.vocab_size, count, dtype=np.int32)

        groups = [
            PromptGroup(draw(5), (Branch(draw(3)), Branch(draw(4), start=1))),
            PromptGroup(draw(3), (Branch(draw(2)), Branch(draw(3)))),
        ]
        expected = torch.cat([_own_logps(lm, single) for group in groups for single in separate(group)])
        # Products in 8 bits may round activations too: noise, which is small beside a wrong mask.
        return cls(groups, expected, _PROBE_TOLERANCE[lm.dtype] * (2.0 if lm.quantization != "none" else 1.0))

    def difference(self, lm: CausalLM) -> float:
        """Mean |difference| a token in the layout that the model has now, nats."""
        return float((score_groups(lm, self.groups)[0] - self.expected).abs().mean())


def _check_separate_rows(lm: CausalLM, probe: _Probe) -> None:
    """Raises UserError where the model's own numbers are not finite, or separate rows do not give them."""
    if not bool(probe.expected.isfinite().all()):
        raise UserError(
            "the model gives values that are no log-probabilities",
            code="reference-not-finite",
            where="a probe of 17 tokens",
            expected="finite numbers",
            found="NaN or infinity",
            remedy="if the dtype is float16, use --dtype bfloat16 or float32; else the weights are damaged",
            exit_status=5,
        )
    difference = probe.difference(lm)
    if not difference <= probe.tolerance:  # NaN too
        raise UserError(
            f"dpoeng does not compute this architecture's log-probs correctly ({type(lm.base).__name__})",
            code="model-unsupported",
            where="a probe of 17 tokens against the model's own forward",
            expected=f"mean difference per token <= {probe.tolerance:g} nats",
            found=f"{difference:.4g} nats",
            remedy="please report the architecture; it changes its logits in a way that dpoeng does not know",
        )


def _share_prompts(lm: CausalLM, attention: Attention, probe: _Probe) -> str | None:
    """Uses the shared layout with the first attention that gives the model's numbers; else says why none does."""
    refusal = without = ""
    for way in ways_to_attend(attention, lm.device.type, lm.dtype):
        use_layout(lm, "shared", f"each prompt run once for both responses; attention: {way}{without}")
        lm.attention = way
        try:
            difference = probe.difference(lm)
            refusal = f"sharing the prompt moves the model's numbers by {difference:.3g} nats a token"
        except (ValueError, TypeError, RuntimeError, NotImplementedError, ImportError) as error:
            difference = float("inf")
            refusal = f"its attention cannot be replaced ({type(error).__name__}: {str(error).splitlines()[0]})"
        if difference <= probe.tolerance:
            return None
        without = f" ({way}: {refusal})"
    return refusal


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
