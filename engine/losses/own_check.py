"""Checks a user's loss before training: names everything that would spoil a run, before the first step.

The made-up pairs are the same each time. Gradients are compared with finite differences of the loss.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch

from dpoeng.cache.errors import UserError
from dpoeng.engine.losses.own import OwnLoss
from dpoeng.engine.losses.sums import PreferenceBatch, loss_inputs

CONSTANT_PARTS = "holds_parts_constant"
"""Set to True on a loss that detaches a part on purpose: its gradient then differs from its slope."""

# Tokens of the chosen and the rejected response of each made-up pair.
_LENGTHS = ((3, 5), (1, 2), (6, 1), (4, 4))
_STEP = 1e-5
_TOLERANCE = 1e-5


def check_own_losses(names: Sequence[str], beta: float, *, per_token: bool = True) -> None:
    """Tries each user-written loss in `names` on made-up pairs, in float64 on the CPU.

    Args:
        names: `loss_type`.
        beta: as in the run.
        per_token: whether the cache has the reference's log-probs per token; otherwise they are NaN, as in the run.

    Raises:
        UserError: a loss cannot be found; fails; returns anything but one finite number per pair; has no gradient or
            one that differs from finite differences; or changes between calls or with a pair's neighbours.
    """
    for name in names:
        if isinstance(name, OwnLoss):
            for _ in try_loss(name, beta, per_token=per_token):
                pass


def try_loss(own: OwnLoss, beta: float, *, per_token: bool = True) -> Iterator[tuple[str, str]]:
    """The checks of `check_own_losses` one after the other: what each asks, and what it saw. Raises at the first fault.

    Yields:
        (question, finding) of a check that the loss has passed.
    """
    yield "found", f"{inspect.getsourcefile(inspect.unwrap(own.function)) or 'a function'}, code {own.digest[:16]}"
    pairs = _made_up_pairs(per_token)
    at_the_start = replace(pairs, policy=pairs.reference.clone().requires_grad_())
    for batch, when in ((at_the_start, "while the policy still equals the reference"), (pairs, "after some training")):
        batch.policy.grad = None
        losses = _losses(own, batch, beta, when)
        yield "one finite loss a pair", f"{_shown(losses)}, {when}"
        if not losses.requires_grad:
            raise _unfit(own, "a loss with a gradient", "a constant: it was detached, or uses only the reference")
        (gradient,) = torch.autograd.grad(losses.sum(), batch.policy)
        if not bool(gradient.isfinite().all()):
            raise _unfit(own, "a loss with a finite gradient", f"NaN or infinity, {when}")
        yield "finite gradient", f"at most {float(gradient.abs().max()):.3g} a token, {when}"
    _check_neighbours(own, pairs, beta)
    yield "independent of neighbours", f"{len(_LENGTHS)} pairs one by one, in another order and called again"
    if getattr(own.function, CONSTANT_PARTS, False):
        yield "gradient is the slope", f"not compared: {CONSTANT_PARTS} says that parts are detached on purpose"
        return
    difference, tokens = _check_gradient(own, pairs, beta), len(pairs.policy)
    yield "gradient is the slope", f"within {difference:.1g} of finite differences, at {tokens} tokens"


def _made_up_pairs(per_token: bool) -> PreferenceBatch:
    lengths = torch.tensor(_LENGTHS).reshape(-1)
    draw = partial(torch.rand, int(lengths.sum()), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    reference = -3 * draw() - 0.05
    return PreferenceBatch(
        policy=(reference + draw() - 0.5).clamp(max=-0.01).requires_grad_(),
        reference=reference,
        branch=torch.repeat_interleave(torch.arange(len(lengths)), lengths),
        pairs=len(_LENGTHS),
        per_token=per_token,
    )


def _losses(own: OwnLoss, batch: PreferenceBatch, beta: float, when: str) -> torch.Tensor:
    """The loss of a batch, [B] float64, after checks of shape and value."""
    try:
        losses = own.function(loss_inputs(batch, beta))
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        failure = f"{type(error).__name__}: {error}, at {frame.filename}:{frame.lineno}"
        raise _unfit(own, "a function that runs", failure) from error
    expected = f"a tensor [B], one loss per pair, here [{batch.pairs}]"
    if not isinstance(losses, torch.Tensor):
        raise _unfit(own, expected, f"{type(losses).__name__}")
    if losses.shape != (batch.pairs,) or not losses.dtype.is_floating_point:
        mean = "; do not take the mean, dpoeng does" if losses.dim() == 0 else ""
        raise _unfit(own, expected, f"{losses.dtype} {list(losses.shape)}{mean}")
    if not bool(losses.isfinite().all()):
        sums = "" if batch.per_token else "; this cache has only sums over responses, so the reference's tokens are NaN"
        raise _unfit(own, "a loss of finite numbers", f"{_shown(losses)}, {when}{sums}")
    return losses.double()


@torch.no_grad()
def _check_neighbours(own: OwnLoss, pairs: PreferenceBatch, beta: float) -> None:
    """A step can be split into any forwards, so a pair's loss may not depend on the pairs next to it."""
    together = _losses(own, pairs, beta, "after some training")
    again = _losses(own, pairs, beta, "when called again")
    if not torch.equal(together, again):
        raise _unfit(own, "a loss that is the same at each call", f"{_shown(together)}, then {_shown(again)}")
    for chosen in ([3, 2, 1, 0], [0], [1], [2], [3]):
        apart = _losses(own, _some(pairs, chosen), beta, f"with {len(chosen)} pairs")
        if not torch.allclose(apart, together[chosen], rtol=1e-9, atol=1e-12):
            difference = (
                f"{_shown(together[chosen])} next to others, {_shown(apart)} for pairs {chosen} alone, in this order"
            )
            raise _unfit(own, "a loss that does not change with a pair's neighbours", difference)


def _check_gradient(own: OwnLoss, pairs: PreferenceBatch, beta: float) -> float:
    """Compares each token's derivative with the slope between both sides of it; returns the largest difference."""
    largest = 0.0
    (gradient,) = torch.autograd.grad(_losses(own, pairs, beta, "").sum(), pairs.policy)
    with torch.no_grad():
        for token in range(len(gradient)):
            step = torch.zeros_like(gradient)
            step[token] = _STEP
            up, down = (
                _losses(own, replace(pairs, policy=pairs.policy.detach() + sign * step), beta, "near it").sum()
                for sign in (1, -1)
            )
            slope = float((up - down) / (2 * _STEP))
            # Rounding error of the losses, divided by the step.
            noise = 1e-12 * (1 + float(up.abs())) / _STEP
            largest = max(largest, abs(slope - float(gradient[token])))
            if abs(slope - float(gradient[token])) > _TOLERANCE * max(1.0, abs(slope)) + noise:
                raise _unfit(
                    own,
                    f"a loss whose gradient is the slope of its value (or my_loss.{CONSTANT_PARTS} = True where parts "
                    "are detached on purpose)",
                    f"gradient {float(gradient[token]):.6g}, slope {slope:.6g} at a token",
                )
    return largest


def _some(batch: PreferenceBatch, pairs: Sequence[int]) -> PreferenceBatch:
    """Selected pairs of a batch, in this order."""
    tokens = [torch.nonzero(batch.branch == 2 * pair + side).squeeze(1) for pair in pairs for side in (0, 1)]
    at = torch.cat(tokens)
    branch = torch.repeat_interleave(torch.arange(len(tokens)), torch.tensor([len(each) for each in tokens]))
    policy, reference = batch.policy.detach()[at], batch.reference[at]
    return replace(batch, policy=policy, reference=reference, branch=branch, pairs=len(pairs))


def _shown(losses: torch.Tensor) -> str:
    return "[" + ", ".join(f"{loss:.6g}" for loss in losses.tolist()) + "]"


def _unfit(own: OwnLoss, expected: str, found: str) -> UserError:
    return UserError(
        f"your loss is not usable for training: it must be {expected}",
        code="loss-own-unfit",
        where=f"--loss-type {own}, tried on {len(_LENGTHS)} made-up pairs before the run",
        found=found,
        remedy="correct the function; docs/losses.md shows an example and its arguments",
    )
