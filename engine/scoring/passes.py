"""Scores batches of pairs: one batch after the other, or a whole pass layer by layer, with the same numbers."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import torch

from dpoeng.cache.schema import PairIds, ScoredPair
from dpoeng.cache.words import counted, speed
from dpoeng.engine.config.fields import Attention
from dpoeng.engine.models.layers.trial import try_by_layers
from dpoeng.engine.models.model import CausalLM
from dpoeng.engine.models.model_config import layer_lists
from dpoeng.engine.runtime.progress import QUIET, Advance
from dpoeng.engine.scoring.attention import use_layout
from dpoeng.engine.scoring.choose_layout import choose_layout
from dpoeng.engine.scoring.forward import on_device, predict_groups
from dpoeng.engine.scoring.layer_passes import Forwards, in_passes, sum_positions
from dpoeng.engine.scoring.layout import Branch, PromptGroup, pair_group, share_prompts
from dpoeng.engine.scoring.pairs import score_pairs, score_within_memory, too_long

Batch = Sequence[PairIds]


@dataclass(frozen=True, slots=True)
class Batches(Sequence[Batch]):
    """Parts of longer sequences; a batch's pairs are read when it is accessed."""

    parts: Sequence[tuple[Batch, range]]

    def __len__(self) -> int:
        return len(self.parts)

    @overload
    def __getitem__(self, i: int) -> Batch: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[Batch]: ...
    def __getitem__(self, i: int | slice) -> Batch | Sequence[Batch]:
        if isinstance(i, slice):
            return Batches(self.parts[i])
        pairs, places = self.parts[i]
        return [pairs[place] for place in places]

    @staticmethod
    def of(batches: Sequence[Batch]) -> Batches:
        """Wraps existing batches."""
        return Batches([(batch, range(len(batch))) for batch in batches])

    @property
    def pairs(self) -> int:
        """Number of pairs in all batches."""
        return sum(len(places) for _, places in self.parts)


def score_batches(
    lm: CausalLM,
    batches: Batches,
    *,
    ends: Collection[int] = (),
    note: Callable[[str], None] = QUIET.note,
    advance: Advance = lambda _amount, _shown: None,
    pause: Callable[[], None] = lambda: None,
) -> Iterator[list[ScoredPair]]:
    """Yields the scored pairs of each batch, in order, as they are done.

    Args:
        lm: the model. If it runs `by_layer`, a pass takes as many batches as there is room for hidden states.
        batches: each goes through one forward.
        ends: batches after which something is stored: passes end there if possible.
        note: receives messages about batches that were split because memory ran out.
        advance: called with the number of tokens done, counting each prompt and response once.
        pause: called after one of `ends` once everything done has been yielded; it may raise.

    Raises:
        UserError: a single pair does not fit, or the model gave a value that is not a log-prob.
    """
    if lm.by_layer is None:
        for at, rows in enumerate(_one_by_one(lm, batches, note, advance)):
            yield rows
            if at in ends:
                pause()
        return
    forwards = Forwards(batches, lambda some: share_prompts(some)[0], too_long, note)
    finish = lambda some: score_pairs(lm, some)  # noqa: E731
    yield from in_passes(lm, forwards, finish, ends=ends, advance=advance, pause=pause)


def _one_by_one(
    lm: CausalLM, batches: Batches, note: Callable[[str], None], advance: Advance
) -> Iterator[list[ScoredPair]]:
    done, total, began = 0, batches.pairs, time.perf_counter()
    for batch in batches:
        rows = score_within_memory(lm, batch, note=note)
        done += len(batch)
        rate = speed(done, time.perf_counter() - began, "pairs")
        advance(sum_positions(share_prompts(batch)[0]), f"{done} of {counted(total, 'pair')}, {rate}")
        yield rows


# --------------------------------------------------------------------------- trials


def choose_how_to_score(
    lm: CausalLM,
    wanted: str = "auto",
    attention: Attention = "auto",
    longest: int | None = None,
    known: Sequence[PairIds] = (),
    *,
    ranked: bool = False,
) -> None:
    """`choose_layout`; for a model that runs by layer over a few of its layers, with a trial of running by layer.

    `known`: for a model that begins at a trunk, pairs with stored states; see `choose_layout` and `_probe`. `ranked`:
    whether the rows are ranked. Only they share beginnings of responses: pairs keep the bytes that caches have.

    Raises:
        UserError: as in `choose_layout`, or layers exchange more than hidden states.
    """
    if lm.by_layer is None:
        choose_layout(lm, wanted, attention, longest, known, tree=ranked)
        return
    by_layer, probe = lm.by_layer, _probe(lm, known)
    use_layout(lm, "separate")
    with by_layer.standing_in(), torch.no_grad():
        with by_layer.gates.observing():
            if lm.entry is None:
                ids = on_device(lm, np.arange(4, dtype=np.int64) % lm.vocab_size)
                lm.backbone(input_ids=ids[None], use_cache=False)
            else:
                predict_groups(lm, probe)
        with by_layer.gates.only_first(_with_all_kinds(lm)):
            choose_layout(lm, wanted, attention, longest, known, tree=ranked)
    states = try_by_layers(by_layer.gates, by_layer.standing_in, lambda: predict_groups(lm, probe)[0])
    pairs_positions = sum(state.shape[0] * state.shape[1] for state in states)
    by_layer.bytes_per_position = -(-sum(state.nbytes for state in states) // pairs_positions)


def _probe(lm: CausalLM, known: Sequence[PairIds]) -> list[PromptGroup]:
    """A few random tokens; of a model that begins at a trunk, the two shortest pairs whose states are stored."""
    if lm.entry is not None:
        return [pair_group(ids) for ids in sorted(known, key=lambda ids: ids.total_tokens)[:2]]
    generator = np.random.default_rng(1)

    def draw(count: int) -> Any:
        return generator.integers(0, lm.vocab_size, count, dtype=np.int32)

    return [
        PromptGroup(draw(4), (Branch(draw(3)), Branch(draw(2)))),
        PromptGroup(draw(2), (Branch(draw(2)), Branch(draw(4), start=1))),
    ]


_MOST_LAYERS = 12


def _with_all_kinds(lm: CausalLM) -> int:
    """Number of first layers that include every kind of layer: by type and by the config's lists."""
    assert lm.by_layer is not None
    lists = layer_lists(lm.base.config)[lm.entry.number if lm.entry is not None else 0 :]
    kinds = lists if len(lists) == lm.by_layer.gates.count else [()] * lm.by_layer.gates.count
    last = max(kinds.index(kind) for kind in set(kinds))
    return min(max(last + 1, 2), _MOST_LAYERS)
