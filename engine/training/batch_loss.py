"""Runs pairs through the policy and compares them with their cached values, for steps and evaluations."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch

from dpoeng.cache.errors import UserError
from dpoeng.cache.schema import ScoredGroup, ScoredPair, ScoredRow
from dpoeng.engine.losses.batch import LossState, PairSums, PreferenceBatch, PreferenceLoss, pair_sums, preference_loss
from dpoeng.engine.losses.names import LossSettings
from dpoeng.engine.losses.sums import RankedRows
from dpoeng.engine.models.model import CausalLM
from dpoeng.engine.runtime.distributed import ALONE, Group
from dpoeng.engine.runtime.out_of_memory import in_parts, no_way_back, too_large
from dpoeng.engine.runtime.progress import QUIET
from dpoeng.engine.scoring.forward import head_log_collision, head_logps, on_device, predict_groups
from dpoeng.engine.scoring.layer_passes import Forwards, in_passes
from dpoeng.engine.scoring.layout import IndexArray, PromptGroup, row_group
from dpoeng.engine.training.rows import WeightArray

Part = TypeVar("Part", PairSums, PreferenceLoss)


def batch_loss(
    lm: CausalLM,
    rows: Sequence[ScoredRow],
    settings: LossSettings,
    weights: WeightArray | None = None,
    *,
    state: LossState | None = None,
    mean_tokens: float | None = None,
    per_token: bool = True,
    gumbel: torch.Tensor | None = None,
) -> PreferenceLoss:
    """The loss of these rows, with gradient if enabled; see `batch_sums` and `preference_loss`."""
    sums = batch_sums(lm, rows, settings, weights, per_token=per_token)
    gumbel = gumbel.to(sums.chosen_ratio.device) if gumbel is not None else None
    return preference_loss(sums, settings, state=state, mean_tokens=mean_tokens, gumbel=gumbel)


def batch_sums(
    lm: CausalLM,
    rows: Sequence[ScoredRow],
    settings: LossSettings,
    weights: WeightArray | None = None,
    *,
    per_token: bool = True,
) -> PairSums:
    """Scores rows with the policy, with gradient if enabled, and compares them with their cached values.

    `per_token` is False if the cache has only sums over whole responses.
    """
    unpaired, sides = settings.rows == "unpaired", _sides(settings)
    predictors, targets, offsets = predict_groups(lm, groups_of(rows, settings))
    policy = head_logps(lm, predictors, targets)
    collision = head_log_collision(lm, predictors) if settings.use_weighting else None
    ranked = [row for row in rows if isinstance(row, ScoredGroup)]
    if ranked:
        assert len(ranked) == len(rows), "a view has one kind of rows"
        return pair_sums(_ranked_batch(lm, ranked, settings, policy, offsets, collision, weights, per_token), settings)
    pairs = [row for row in rows if isinstance(row, ScoredPair)]
    reference = np.concatenate([side for pair in pairs for side in (pair.chosen_logps, pair.rejected_logps)[:sides]])
    branch = np.repeat(np.arange(0, 2 * len(pairs), 3 - sides), np.diff(offsets))
    batch = PreferenceBatch(
        policy=policy,
        reference=on_device(lm, reference),
        branch=on_device(lm, branch),
        pairs=len(pairs),
        log_collision=collision,
        weights=None if weights is None else on_device(lm, weights),
        desirable=on_device(lm, np.array([pair.scores[0] for pair in pairs])) if unpaired else None,
        per_token=per_token,
    )
    return pair_sums(batch, settings)


def _ranked_batch(
    lm: CausalLM,
    rows: Sequence[ScoredGroup],
    settings: LossSettings,
    policy: torch.Tensor,
    offsets: IndexArray,
    collision: torch.Tensor | None,
    weights: WeightArray | None,
    per_token: bool,
) -> PreferenceBatch:
    """The pairs of ranked rows, whose responses have been run once: a token is there once for each pair that has it."""
    compared = [compared_in(row.scores, settings) for row in rows]
    sizes = np.array([len(row.scores) for row in rows])
    scores = np.concatenate([row.scores for row in rows])
    # [B, 2] places of chosen and rejected among all responses.
    places = np.concatenate([first + some for first, some in zip(np.cumsum(sizes) - sizes, compared, strict=True)])
    lengths = np.diff(offsets)
    tokens = np.concatenate([np.arange(offsets[place], offsets[place + 1]) for place in places.ravel()])
    index = on_device(lm, tokens)
    reference = on_device(lm, np.concatenate([logps for row in rows for logps in row.logps]))
    response = on_device(lm, np.repeat(np.arange(len(scores)), lengths))
    total = torch.zeros(len(scores), dtype=torch.float64, device=policy.device)
    weights = np.ones(len(rows)) if weights is None else weights
    return PreferenceBatch(
        policy=policy.index_select(0, index),
        reference=reference.index_select(0, index),
        branch=on_device(lm, np.repeat(np.arange(places.size), lengths[places.ravel()])),
        pairs=len(places),
        log_collision=None if collision is None else collision.index_select(0, index),
        per_token=per_token,
        ranked=RankedRows(
            pairs=torch.tensor([len(some) for some in compared]),
            margins=on_device(lm, scores[places[:, 0]] - scores[places[:, 1]]),
            weights=on_device(lm, weights),
            sizes=torch.from_numpy(sizes),
            ratios=total.index_add(0, response, (policy - reference).double()),
            scores=on_device(lm, scores),
        ),
    )


def compared_in(scores: Sequence[float], settings: LossSettings) -> IndexArray:
    """The pairs [B, 2] of a row's responses that losses of pairs compare, the better one first.

    `pairs_in_row` `all`: each with each that is worse; `best`: the first of the best with each that is worse.
    """
    known = np.asarray(scores)
    better = np.argwhere(known[:, None] > known[None, :])
    if settings.pairs_in_row == "best":
        better = better[better[:, 0] == int(known.argmax())]
    return better


def pair_count(row: ScoredRow, settings: LossSettings) -> int:
    """How many pairs the losses see of a row."""
    return len(compared_in(row.scores, settings)) if isinstance(row, ScoredGroup) else 1


def mean_chosen_tokens(rows: Sequence[ScoredRow], settings: LossSettings) -> float:
    """The mean number of scored tokens of chosen responses: of ranked rows, of each row's mean over its pairs."""

    def of(row: ScoredRow) -> float:
        if isinstance(row, ScoredPair):
            return len(row.chosen_logps)
        logps = row.logps
        return float(np.mean([len(logps[place]) for place in compared_in(row.scores, settings)[:, 0]]))

    return float(np.mean([of(row) for row in rows]))


def groups_of(rows: Sequence[ScoredRow], settings: LossSettings) -> list[PromptGroup]:
    """What a forward runs for some rows: each prompt, and each response once."""
    return [row_group(row, _sides(settings)) for row in rows]


def _sides(settings: LossSettings) -> int:
    """Number of responses to run: an unpaired row's second response only if the loss reads it."""
    return 1 if settings.rows == "unpaired" and not settings.reads_mismatched else 2


@torch.no_grad()
def evaluate(
    lm: CausalLM,
    rows: Sequence[ScoredRow],
    settings: LossSettings,
    weights: WeightArray | None = None,
    *,
    batch_size: int,
    state: LossState | None = None,
    per_token: bool = True,
    note: Callable[[str], None] = QUIET.note,
    group: Group = ALONE,
) -> PreferenceLoss:
    """The loss of held-out pairs as one batch, however they are split; a group of processes shares the work.

    Batches are split as in one process, so that a pair's numbers do not depend on the number of processes.
    """

    def score(some: Sequence[int]) -> list[PairSums]:
        return [
            batch_sums(
                lm,
                [rows[i] for i in some],
                settings,
                None if weights is None else weights[list(some)],
                per_token=per_token,
            )
        ]

    def too_long(some: Sequence[int], problem: str) -> UserError:
        return too_large([rows[i] for i in some], problem, phase="evaluation", helps="hold out shorter pairs")

    batches = [range(begin, min(len(rows), begin + batch_size)) for begin in range(0, len(rows), batch_size)]

    def mine() -> list[tuple[int, PairSums]]:
        if lm.by_layer is not None:
            own = list(group.mine(len(batches)))
            of_rows = lambda some: groups_of([rows[i] for i in some], settings)  # noqa: E731
            found = in_passes(lm, Forwards([batches[i] for i in own], of_rows, too_long, note), score)
            return [(number, PairSums.join(sums)) for number, sums in zip(own, found, strict=True)]
        parts = []
        for number, counts in turns(group, len(batches), sharded=lm.sharded):
            if lm.sharded:
                with no_way_back("out of memory", "evaluation", "use a smaller --per-device-eval-batch-size"):
                    scored = score(batches[number])
            else:
                scored = in_parts(score, batches[number], note=note, describe=too_long)
            if counts:
                parts.append((number, PairSums.join(scored)))
        return parts

    return preference_loss(PairSums.join(in_order(group, mine, sharded=lm.sharded)), settings, state=state)


def turns(group: Group, count: int, *, sharded: bool) -> list[tuple[int, bool]]:
    """Which of `count` forwards this process does, and whether each counts.

    Over a sharded base a forward gathers layers from all processes, so all of them run the same number. A process that
    has run out repeats its last forward, which does not count.
    """
    extra = group.idle(count) if sharded else 0
    return [(number, True) for number in group.mine(count)] + [(count - 1, False)] * extra


def in_order(group: Group, work: Callable[[], list[tuple[int, Part]]], *, sharded: bool) -> list[Part]:
    """The numbered parts computed by all processes, in every process, sorted by number.

    Raises:
        MemoryError: a process ran out of memory; all raise it, unless the base is sharded.
    """
    if group.size == 1:
        return [part for _, part in work()]
    shares = group.each(lambda: [(number, part.on_host()) for number, part in work()], in_step=sharded)
    # Sort by number, not by process, so that sums over them equal those of a single process.
    return [part for _, part in sorted(itertools.chain.from_iterable(shares), key=lambda one: one[0])]
