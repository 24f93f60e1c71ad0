"""One optimizer step of phase two. Its input, including dropout, depends only on its number and the seed.

Several processes share a step's forwards. Each forward has the same pairs and dropout as in one process; then the
gradients are summed once. torch's DistributedDataParallel does the same with a wrapper. Without it, a step can have any
number of forwards in any process, pass over each twice, and restart when memory runs out, all of which the wrapper's
hooks in the backward pass make hard. LoRA's gradients are small, so nothing is gained by sending them during the
backward.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from dpoeng.cache.errors import UserError
from dpoeng.cache.schema import ScoredRow, lengths_of
from dpoeng.cache.words import counted
from dpoeng.engine.losses.batch import PairSums, PreferenceLoss, next_state, preference_loss
from dpoeng.engine.losses.metrics import preference_metrics
from dpoeng.engine.models.experts.balance import Seen
from dpoeng.engine.models.fsdp_rows import clip_gradients, take_gradients
from dpoeng.engine.runtime.out_of_memory import attempt, no_way_back, too_large
from dpoeng.engine.training.batch_loss import (
    batch_loss,
    batch_sums,
    groups_of,
    in_order,
    mean_chosen_tokens,
    pair_count,
    turns,
)
from dpoeng.engine.training.layer_step import Begin, gradient_by_layer
from dpoeng.engine.training.rows import WeightArray
from dpoeng.engine.training.run import Run

Micro = tuple[Sequence[ScoredRow], WeightArray | None]
"""Rows of one forward, and the user's weights of them."""

_FACTORS = (2.0**12, 2.0**8, 2.0**4, 1.0)
"""Factors of a float16 step's loss."""

_SMALLER = "use a smaller --per-device-train-batch-size with more --gradient-accumulation-steps"


def train_step(run: Run, step: int) -> dict[str, float]:
    """One optimizer step over the scheduled pairs; the loss is their mean however they are split."""
    parts, grad_norm = _gradient_within_memory(run, step)
    if step == 0 and run.starts_within is not None:
        _check_start(parts, run.starts_within)
    metrics = preference_metrics(parts)
    metrics["grad_norm"] = grad_norm
    metrics["learning_rate"] = float(run.scheduler.get_last_lr()[0])
    if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
        raise _not_finite(run, step, parts, metrics)
    _update(run)
    run.scheduler.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.loss_state = next_state(run.loss_state, PairSums.join([part.sums for part in parts]), run.settings)
    return metrics


def _check_start(parts: Sequence[PreferenceLoss], tolerance: float) -> None:
    """Checks that the first training forward reproduces the cache: only then does the policy start as the reference.

    The comparison before training runs in another mode, without recomputed layers and without gradients.

    Raises:
        UserError: they differ; nothing has been trained.
    """
    sums = PairSums.join([part.sums for part in parts])
    tokens = torch.cat([sums.chosen_tokens, sums.rejected_tokens]).clamp(min=1)
    ratios = torch.cat([sums.chosen_ratio, sums.rejected_ratio]).detach() / tokens
    difference = float(ratios.abs().mean())
    if math.isfinite(difference) and difference > tolerance:  # NaN and infinity are reported with their pairs
        raise UserError(
            "the first training forward does not reproduce the cached log-probs",
            code="parity-failed",
            where=f"step 1, {counted(len(sums.chosen_tokens), 'pair')}, before anything was trained",
            expected=f"mean difference per token <= {tolerance:g} nats",
            found=f"{difference:.4g} nats",
            remedy="please report the architecture: its training mode changes the numbers; try "
            "--no-gradient-checkpointing",
            exit_status=4,
        )


def _not_finite(run: Run, step: int, parts: Sequence[PreferenceLoss], metrics: dict[str, float]) -> UserError:
    """The error, which names the pairs whose log-probs or loss are NaN if the gradient is not the cause."""
    numbers = torch.cat([part.chosen_logps + part.rejected_logps for part in parts])
    if not run.settings.sorts_pairs:  # otherwise the i-th loss does not belong to the i-th pair
        numbers = numbers + torch.cat([part.losses.detach() for part in parts])
    wrong = (~numbers.isfinite()).tolist()
    rows = [run.source_of(row) for row, is_bad in zip(run.schedule.rows_of_step(step), wrong, strict=True) if is_bad]
    named = ", at " + "; ".join(rows[:5]) + (f" and {len(rows) - 5} more" if rows[5:] else "") if rows else ""
    return UserError(
        "the loss or its gradient is NaN or infinite",
        code="training-not-finite",
        where=f"step {step + 1}{named}",
        expected="finite numbers",
        found=f"loss {metrics['loss']}, gradient norm {metrics['grad_norm']}",
        remedy="check the pairs, if some are named; lower learning_rate, or use a wider dtype; the newest "
        "checkpoint is from before this step",
        exit_status=5,
    )


def _gradient_within_memory(run: Run, step: int) -> tuple[list[PreferenceLoss], float]:
    """The step's gradient, with fewer pairs per forward if memory runs out: see docs/memory.md.

    A step that ran out is repeated, so that its result is that of an undisturbed one. If it runs out again, the number
    of pairs per forward is halved for the rest of the run, which then continues as if configured that way.

    All processes do this together: if one runs out, all repeat the step. Over a sharded base this is impossible,
    because the others wait in the middle of a forward.

    Raises:
        UserError: a single pair does not fit, or the base is sharded.
    """
    if run.lm.sharded:  # a repeated step would gather layers again, and no other process would take part
        with no_way_back("out of memory over a sharded base", f"phase two, step {step + 1}", _SMALLER):
            return _gradient(run, step)
    while True:
        result, problem = attempt(lambda: _gradient(run, step))
        if result is not None:
            return result
        run.optimizer.zero_grad(set_to_none=True)
        if run.micro_batch == 1:
            rows = [run.train_rows[i] for i in run.schedule.rows_of_step(step)]
            raise too_large(
                [max(rows, key=lambda row: sum(lengths_of(row)))],
                problem,
                phase=f"phase two, step {step + 1}",
                helps="turn on --gradient-checkpointing, use --optim paged_adamw_8bit, a base in fewer bits, or "
                "run phase one again with a shorter --max-length",
            )
        run.micro_batch = (run.micro_batch + 1) // 2
        run.progress.note(
            f"out of memory at step {step + 1}: repeating the step, and continuing, with "
            f"{counted(run.micro_batch, 'pair')} per forward; the pairs of a step stay the same"
        )


def _gradient(run: Run, step: int) -> tuple[list[PreferenceLoss], float]:
    """Forward and backward of one step from the beginning: its losses, and the norm of its gradient.

    float16 has no numbers below 6e-8, and loses most of a gradient that is divided by a step's pairs. There the loss
    is multiplied by a power of two, and the gradient of the trained float32 divided by it; by a smaller one if anything
    overflows. Each step begins with the largest, so that a resumed run does as well.
    (Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740, section 3.2)
    """
    for factor in _FACTORS if run.lm.dtype == torch.float16 else (1.0,):
        parts, norm = _scaled_gradient(run, step, factor)
        if math.isfinite(norm):
            break
    return parts, norm


def _scaled_gradient(run: Run, step: int, factor: float) -> tuple[list[PreferenceLoss], float]:
    run.optimizer.zero_grad(set_to_none=True)  # an attempt that ran out of memory may have left gradients
    for weight in (*run.lm.masters, *run.lm.parts):
        weight.grad = None  # may remain if memory ran out before its master took it over
    indices = run.schedule.rows_of_step(step)
    rows = [run.train_rows[i] for i in indices]
    weights = None if run.train_weights is None else run.train_weights[indices]
    micros = list(_chunks(rows, weights, run.micro_batch))
    whole = run.settings.whole_batch and len(micros) > 1
    head = partial(_backward_of_whole_batch if whole else _backward_of_parts, run, step, micros, factor)
    begin = partial(_seed, run.config.seed, step)
    if run.lm.by_layer is None:
        parts = head(begin)
    else:
        own_groups = {micro: groups_of(micros[micro][0], run.settings) for micro in run.group.mine(len(micros))}
        tell = partial(_tell, run, step)
        parts = gradient_by_layer(run.lm, own_groups, begin, head, group=run.group, tell=tell)
    take_gradients(run.lm)
    for parameter in run.whole if factor != 1 else ():
        if parameter.grad is not None:
            parameter.grad.div_(factor)
    limit = run.config.max_grad_norm if run.config.max_grad_norm > 0 else math.inf
    where = f"phase two, step {step + 1}, gradients of all processes"
    with no_way_back("out of memory", where, _SMALLER) if run.group.size > 1 else contextlib.nullcontext():
        _add_gradients(run, run.whole)
        return parts, clip_gradients(run.lm, run.whole, run.group, limit)


def _backward_of_parts(
    run: Run, step: int, micros: Sequence[Micro], factor: float, begin: Begin
) -> list[PreferenceLoss]:
    """Forward and backward of each part, one after the other; the loss is the mean over all their pairs."""
    rows = [pair for batch, _ in micros for pair in batch]
    mean_tokens = mean_chosen_tokens(rows, run.settings)

    def work() -> list[tuple[int, PreferenceLoss]]:
        parts = []
        for micro, counts in turns(run.group, len(micros), sharded=run.lm.sharded):
            batch, weights = micros[micro]
            begin(micro)
            with run.balance.watching() if run.balance is not None else contextlib.nullcontext() as seen:
                part = batch_loss(
                    run.lm,
                    batch,
                    run.settings,
                    weights,
                    state=run.loss_state,
                    mean_tokens=mean_tokens,
                    per_token=run.per_token,
                    gumbel=_gumbel(run, step, batch) if run.settings.whole_batch else None,
                )
            loss = part.losses.sum() / len(rows)
            if seen is not None:
                part, added = _with_balance(part, seen)
                loss = loss + added * (len(batch) / len(rows))
            # A forward that is repeated for other processes also runs its backward, which gathers layers, too;
            # multiplied by 0, the loss adds nothing to the gradient.
            factor_here = factor if counts else 0.0
            torch.autograd.backward(loss if factor_here == 1 else factor_here * loss)
            if counts:
                parts.append((micro, part))
        return parts

    return in_order(run.group, work, sharded=run.lm.sharded)


def _with_balance(part: PreferenceLoss, seen: Seen) -> tuple[PreferenceLoss, torch.Tensor]:
    """Returns the part with its routers' balancing loss for the log, and that loss times its coefficient."""
    auxiliary = seen.loss()
    logged = auxiliary.detach().to(part.losses).expand_as(part.losses)
    return replace(part, auxiliary=logged), seen.balance.coefficient * auxiliary


def _add_gradients(run: Run, parameters: Sequence[torch.nn.Parameter]) -> None:
    """Sums the gradients of these parameters over all processes. A parameter that no process used gets none."""
    if run.group.size == 1:
        return
    # A process without forwards in a step, or whose forwards did not use a parameter, lacks a gradient that others
    # have. All processes must call the sum with the same tensors, or it never returns.
    has_gradient = run.group.gather([parameter.grad is not None for parameter in parameters])
    used = [parameter for parameter, *where in zip(parameters, *has_gradient, strict=True) if any(where)]
    for parameter in used:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    run.group.add([parameter.grad for parameter in used if parameter.grad is not None])


def _update(run: Run) -> None:
    """The optimizer's step. If it runs out of memory half-way, weights and moments may no longer match."""
    with no_way_back(
        "out of memory in the optimizer step",
        "phase two, after the gradients",
        "use --optim adamw_torch_fused or paged_adamw_8bit; the same command continues from the newest checkpoint if "
        "the optimizer stays the same",
    ):
        run.optimizer.step()
        run.lm.take_masters()


def _backward_of_whole_batch(
    run: Run, step: int, micros: Sequence[Micro], factor: float, begin: Begin
) -> list[PreferenceLoss]:
    """The exact gradient of a loss that combines the pairs of a step, however many forwards the step is split into.

    Each part runs twice: without gradient, for the sums that the loss and its derivatives need; and with gradient, to
    propagate these derivatives. Dropout draws the same both times. Gao et al. 2021, https://arxiv.org/abs/2101.06983
    """
    shares = turns(run.group, len(micros), sharded=run.lm.sharded)

    def sums_of(micro: int) -> PairSums:
        batch, weights = micros[micro]
        begin(micro)
        return batch_sums(run.lm, batch, run.settings, weights, per_token=run.per_token)

    @torch.no_grad()
    def look() -> list[tuple[int, PairSums]]:
        sums = [(micro, sums_of(micro)) for micro, _ in shares]
        return [part for part, (_, counts) in zip(sums, shares, strict=True) if counts]

    leaves = PairSums.join(in_order(run.group, look, sharded=run.lm.sharded)).leaves()
    gumbel = _gumbel(run, step, [row for batch, _ in micros for row in batch]).to(leaves.weights.device)
    whole = preference_loss(leaves, run.settings, state=run.loss_state, gumbel=gumbel)
    torch.autograd.backward(whole.losses.mean())
    cuts = _cuts(run, micros)

    def carry() -> None:
        for micro, counts in shares:
            part = sums_of(micro)
            pulls = []
            for name, x in part.with_gradient.items():
                pull = leaves.with_gradient[name].grad
                if pull is not None:
                    pull = pull[cuts[name == "row_ratios"][micro]]
                    factor_here = factor if counts else 0.0
                    pulls.append((x, (pull if factor_here == 1 else factor_here * pull).to(x.device)))
            # Chain rule: the whole loss's derivatives by this part's sums, carried back through the part's forward.
            torch.autograd.backward([x for x, _ in pulls], [pull for _, pull in pulls])

    run.group.each(carry, in_step=run.lm.sharded)
    return [whole]


def _cuts(run: Run, micros: Sequence[Micro]) -> tuple[list[slice], list[slice]]:
    """Which pairs of a step each forward has, and which responses of ranked rows."""

    def slices(count: Callable[[ScoredRow], int]) -> list[slice]:
        ends = np.cumsum([0, *(sum(map(count, batch)) for batch, _ in micros)]).tolist()
        return [slice(begin, end) for begin, end in itertools.pairwise(ends)]

    return slices(lambda row: pair_count(row, run.settings)), slices(lambda row: len(row.scores))


def _tell(run: Run, step: int, text: str) -> None:
    run.tell(f"step {step + 1}: {text}")


def _gumbel(run: Run, step: int, rows: Sequence[ScoredRow]) -> torch.Tensor:
    """Draws for losses that select among the pairs of a step, [B] float64; independent of how the step is split."""
    pairs = sum(pair_count(row, run.settings) for row in rows)
    return torch.from_numpy(np.random.default_rng([run.config.seed, step, pairs]).gumbel(size=pairs))


def _seed(seed: int, step: int, micro: int) -> None:
    """Seeds dropout from the position in the run only, independent of everything that happened before."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, micro]).generate_state(1, np.uint64)[0] >> 1))


def _chunks(rows: Sequence[ScoredRow], weights: WeightArray | None, size: int) -> Iterator[Micro]:
    for begin in range(0, len(rows), size):
        part = slice(begin, begin + size)
        yield rows[part], None if weights is None else weights[part]
