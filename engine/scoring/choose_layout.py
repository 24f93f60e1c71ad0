"""Chooses shared or separate prompts, and the attention, by trying them on a few tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dpoeng.cache.errors import UserError
from dpoeng.cache.schema import IdArray, PairIds
from dpoeng.cache.words import counted
from dpoeng.engine.config.fields import Attention
from dpoeng.engine.models.model import CausalLM
from dpoeng.engine.models.model_config import chooses_tokens, windows
from dpoeng.engine.runtime.out_of_memory import is_out_of_memory
from dpoeng.engine.scoring.attention import use_layout
from dpoeng.engine.scoring.forks import describe_forks, fork_states
from dpoeng.engine.scoring.forward import on_device, position_limit, rotary_limit, score_groups
from dpoeng.engine.scoring.layout import Branch, PromptGroup, pair_group, separate
from dpoeng.engine.scoring.scored_end import end_at_scored
from dpoeng.engine.scoring.texts import places_apart, put_states

# --------------------------------------------------------------------------- the probe

# Allowed mean |difference| per token of a probe, in nats. Random tokens are the hardest case (log-probs near -15); a
# wrong mask or a missing logit scale is wrong by whole nats.
_PROBE_TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.25, torch.float16: 0.05}


SHORTEST = 8
"""Common beginnings of responses run once from so many tokens on: each adds an attention call to every layer."""

_SPARE_TOKENS = 24
"""How much longer than a window its probe is."""

CANNOT = (ValueError, TypeError, RuntimeError, NotImplementedError, ImportError, AttributeError, IndexError, KeyError)
"""Errors that models raise when they run in a way that they were not made for."""


@torch.no_grad()
def choose_layout(
    lm: CausalLM,
    wanted: str = "auto",
    attention: Attention = "auto",
    longest: int | None = None,
    known: Sequence[PairIds] = (),
    *,
    tree: bool = True,
) -> None:
    """Chooses by trying: the shared-prompt layout if it reproduces the model's own numbers, else separate rows.

    A dozen tokens are scored in the shared layout, and by the model's own forward with full logits. This detects
    architectures that depend on more than positions and masks (recurrence, their own attention, logits changed after
    the head), whether or not dpoeng knows their names. If some layers look back only over a window, one text is longer
    than it, because a window that is ignored makes no difference on shorter texts. In the shared layout, common
    beginnings of responses are tried in the same way.

    Args:
        lm: the model; sets its layout, attention, tree and padding.
        wanted: auto, shared or separate.
        attention: the attention for the shared layout.
        longest: tokens of the longest text to score; windows that no text reaches are not tried.
        known: for a model that begins at a trunk: pairs with stored states, used instead of random texts.
        tree: whether common beginnings of responses are tried.

    Raises:
        UserError: `wanted` is impossible, or not even separate rows reproduce the model's own numbers.
    """
    probe = _Probe.draw(lm, longest) if lm.entry is None else _Probe.of(lm, longest, known)
    _try_separate(lm, probe)
    if wanted == "separate":
        use_layout(lm, "separate", "asked for")
        return
    reason = _try_shared(lm, probe, attention, tree)
    if not reason:
        return
    if attention == "varlen":
        raise UserError(
            "varlen attention does not reproduce this model's numbers here",
            code="attention-unsupported",
            where="--attention varlen",
            found=reason,
            remedy="leave --attention out: segments work for every shared prompt",
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


@dataclass(frozen=True, slots=True)
class _Probe:
    """Random texts, the model's own log-probs of them, and the allowed difference."""

    groups: list[PromptGroup]
    expected: list[torch.Tensor]
    tolerance: float

    @staticmethod
    def draw(lm: CausalLM, longest: int | None) -> _Probe:
        generator = np.random.default_rng(0)

        def draw(count: int) -> IdArray:
            return generator.integers(0, lm.vocab_size, count, dtype=np.int32)

        groups = [
            PromptGroup(draw(5), (Branch(draw(3)), Branch(draw(4), start=1))),
            PromptGroup(draw(3), (Branch(draw(2)), Branch(draw(3)))),
        ]
        # Three responses begin alike; the second and third continue from tokens of the first.
        begins, one = draw(2), groups[1].branches[1].ids
        alike = (Branch(np.concatenate([begins, one])), Branch(np.concatenate([begins, one[:1], begins])))
        groups.append(PromptGroup(draw(2), (*alike, Branch(np.concatenate([begins, draw(2)])))))
        reached = windows(lm.base.config, longest)
        length = max(reached, default=0) + _SPARE_TOKENS
        limit = min([n for n in (rotary_limit(lm), position_limit(lm)) if n is not None], default=length)
        length = min(length, limit)
        if reached and length > min(reached):
            # Two lengths, so that one text is padded.
            answer = min(16, length - 1)
            groups.append(PromptGroup(draw(length - answer), (Branch(draw(answer)), Branch(draw(max(1, answer // 3))))))
        use_layout(lm, "separate")
        try:
            expected = _expected(lm, groups)
            later = _looks_ahead(lm, groups[0])
        except CANNOT as error:
            raise _refused(lm, error) from error
        tolerance = _tolerance(lm)
        if later > tolerance:
            raise UserError(
                f"{type(lm.base).__name__} lets a token see later tokens, so its outputs are not log-probs",
                code="model-unsupported",
                where="a probe with another last token",
                expected="the same predictions before that token",
                found=f"mean difference {later:.4g} nats",
                remedy="use a decoder; if config.json has is_decoder, it must be true",
            )
        return _Probe(groups, expected, tolerance)

    @staticmethod
    def of(lm: CausalLM, longest: int | None, known: Sequence[PairIds]) -> _Probe:
        """A probe from stored texts. Causality was checked when they were stored."""
        ordered = sorted(known, key=lambda ids: ids.total_tokens)
        chosen = ordered[:2] + (ordered[2:][-1:] if windows(lm.base.config, longest) else [])
        groups = [pair_group(ids) for ids in chosen]
        use_layout(lm, "separate")
        try:
            return _Probe(groups, _expected(lm, groups), _tolerance(lm))
        except CANNOT as error:
            raise _refused(lm, error) from error

    def difference(self, lm: CausalLM) -> float:
        """The largest mean |difference| of a group, so that a wrong window in one text is not averaged away."""
        scored, expected = score_groups(lm, self.groups)[0], torch.cat(self.expected)
        parts = torch.split((scored - expected).abs(), [len(part) for part in self.expected])
        return max(float(part.mean()) for part in parts)


def _try_separate(lm: CausalLM, probe: _Probe) -> None:
    """Chooses padded separate rows; or each text alone, if padding changes the numbers of other texts.

    Raises:
        UserError: neither reproduces the model's own numbers.
    """
    if not all(bool(part.isfinite().all()) for part in probe.expected):
        raise UserError(
            "the model's outputs are not log-probs",
            code="reference-not-finite",
            where="a probe of 17 tokens",
            expected="finite numbers",
            found="NaN or infinity",
            remedy="with float16, use --dtype bfloat16 or float32; otherwise the weights are damaged",
            exit_status=5,
        )
    error = float("inf")
    for padding in (False,) if chooses_tokens(lm.base.config) else (True, False):
        lm.padding = padding
        try:
            error = probe.difference(lm)
        except CANNOT as failure:
            if is_out_of_memory(failure):
                raise
            if not padding:
                raise _refused(lm, failure) from failure
            continue
        if error <= probe.tolerance:
            return
    raise UserError(
        f"dpoeng does not compute this architecture's log-probs correctly ({type(lm.base).__name__})",
        code="model-unsupported",
        where="a probe against the model's own forward",
        expected=f"mean difference per token <= {probe.tolerance:g} nats",
        found=f"{error:.4g} nats",
        remedy="please report the architecture: it changes its logits in an unknown way",
    )


def _try_shared(lm: CausalLM, probe: _Probe, attention: Attention, tree: bool) -> str:
    """Sets the first way to share prompts that reproduces the model's own numbers; otherwise returns the reasons."""
    reason, without = "", ""
    for name in ways_to_attend(attention, lm.device.type, lm.dtype):
        layers = len(fork_states(lm.backbone))
        told = f"attention: {name}{without}{describe_forks(layers)}"
        use_layout(lm, "shared", f"each prompt runs once for all its responses; {told}")
        lm.attention, lm.tree = name, 0
        try:
            error_of_way = probe.difference(lm)
            reason = f"sharing the prompt changes log-probs by {error_of_way:.3g} nats per token"
        except CANNOT as error:
            if is_out_of_memory(error):
                raise
            error_of_way = float("inf")
            reason = f"its attention cannot be replaced ({type(error).__name__}: {str(error).splitlines()[0]})"
        if error_of_way <= probe.tolerance:
            if tree:
                _try_tree(lm, probe, layers, told)
            try_scored_end(lm, lambda: probe.difference(lm) <= probe.tolerance)
            lm.tree = SHORTEST if lm.tree else 0
            return ""
        without = f" ({name}: {reason})"
    return reason


def _try_tree(lm: CausalLM, probe: _Probe, stateful: int, told: str) -> None:
    """Computes common beginnings of responses once, if that reproduces the model's own numbers; else says why not.

    Sets `tree` for the short texts of the probe.
    """
    why = ""
    if stateful:
        why = f"{counted(stateful, 'layer')} would have to hand a state on at each fork"
    elif lm.entry is not None:
        why = "stored states are those of whole responses"
    else:
        lm.tree, lm.scored_end = 2, False
        try:
            error = probe.difference(lm)
            why = "" if error <= probe.tolerance else f"that changes log-probs by {error:.3g} nats per token"
        except CANNOT as failure:
            if is_out_of_memory(failure):
                raise
            why = f"{type(failure).__name__}: {str(failure).splitlines()[0]}"
    lm.tree = 0 if why else 2
    shared = (
        f", but not a beginning that responses share ({why})" if why else ", and so does a beginning that they share"
    )
    lm.layout_reason = f"each prompt runs once for all its responses{shared}; {told}"


def try_scored_end(lm: CausalLM, reproduces: Callable[[], bool]) -> None:
    """With varlen, computes only scored positions in the last layer, if that reproduces the model's own numbers.

    `reproduces` scores packed rows, and says whether the numbers are right.
    """
    lm.scored_end = False
    if lm.attention != "varlen":
        return
    try:
        lm.scored_end = end_at_scored(lm, reproduces) and reproduces()
    except CANNOT as error:
        if is_out_of_memory(error):
            raise
        lm.scored_end = False


def _refused(lm: CausalLM, error: Exception) -> UserError | Exception:
    """The error for an architecture whose forward, or ours of single texts, fails."""
    if is_out_of_memory(error):
        return error
    return UserError(
        f"this architecture needs more than token ids ({type(lm.base).__name__})",
        code="model-unsupported",
        where="a probe of a few tokens",
        expected="token ids in, a logit for each token out",
        found=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
        remedy="please report the architecture if plain transformers can score texts with it",
    )


def ways_to_attend(wanted: Attention, device_type: str, dtype: torch.dtype) -> tuple[Attention, ...]:
    """The attentions to try, best first. FlashAttention's kernel is only for GPUs and 16 bits."""
    if wanted != "auto":
        return (wanted,)
    return ("varlen", "segments") if device_type == "cuda" and dtype != torch.float32 else ("segments",)


def _expected(lm: CausalLM, groups: Sequence[PromptGroup]) -> list[torch.Tensor]:
    """The model's own log-probs of each group, branch after branch."""
    return [
        torch.cat([_own_logps(lm, PromptGroup(group.prompt_ids, (branch,))) for branch in group.branches])
        for group in groups
    ]


def _tolerance(lm: CausalLM) -> float:
    return _PROBE_TOLERANCE[lm.dtype] * (2.0 if lm.quantization != "none" else 1.0)


def _own_logps(lm: CausalLM, group: PromptGroup) -> torch.Tensor:
    """The model's own forward over one branch: logits at the scored tokens, float64 log-softmax."""
    (single,) = separate(group)
    (branch,) = single.branches
    if lm.entry is not None:
        put_states(lm, places_apart([group]), (1, len(branch.ids)))
    ids = on_device(lm, branch.ids.astype(np.int64))
    places = on_device(lm, branch.positions())
    logits = _own_logits(lm, ids, len(branch.ids) - branch.start + 1)[places - branch.start]
    logps = torch.log_softmax(logits.double(), dim=-1).gather(1, ids[places, None]).squeeze(1)
    return logps.float()


def _own_logits(lm: CausalLM, ids: torch.Tensor, last: int) -> torch.Tensor:
    """The model's logits at the last few tokens; for a long text it computes no others, if it can."""
    keeps = "logits_to_keep" in inspect.signature(lm.base.forward).parameters
    kept = {"logits_to_keep": last} if keeps else {}
    logits: torch.Tensor = lm.base(input_ids=ids[None], use_cache=False, **kept).logits[0]
    return logits[-last:]


def _looks_ahead(lm: CausalLM, group: PromptGroup) -> float:
    """How much the predictions before a text's last token change if that token changes, in nats."""
    ids = on_device(lm, group.prompt_ids.astype(np.int64))
    changed = ids.clone()
    changed[-1] = (ids[-1] + 1) % lm.vocab_size
    before, after = (torch.log_softmax(_own_logits(lm, x, len(ids))[:-1].double(), -1) for x in (ids, changed))
    return float((before - after).abs().mean())
