"""Scores pairs of token ids, in batches that fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from dpoeng.cache.errors import UserError
from dpoeng.cache.schema import PairIds, ScoredPair
from dpoeng.engine.models.model import CausalLM
from dpoeng.engine.runtime.out_of_memory import in_parts, no_way_back, too_large
from dpoeng.engine.runtime.progress import QUIET
from dpoeng.engine.scoring.forward import score_groups
from dpoeng.engine.scoring.layout import share_prompts


@torch.no_grad()  # not inference_mode: training reuses tensors that a sharded base gathers here
def score_pairs(lm: CausalLM, pairs: Sequence[PairIds]) -> list[ScoredPair]:
    """Log-probs of every scored token of these pairs, in one forward; each prompt and response is computed once.

    Raises:
        UserError: the model gave a value that is not a log-prob.
    """
    groups, branches = share_prompts(pairs)
    token_logps, offsets = score_groups(lm, groups)
    values = token_logps.float().cpu().numpy()
    scored = []
    for i, ids in enumerate(pairs):
        chosen, rejected = (values[offsets[branch] : offsets[branch + 1]].copy() for branch in branches[i])
        if not (np.isfinite(chosen).all() and np.isfinite(rejected).all()):
            raise UserError(
                "the model gave a value that is not a log-prob",
                code="reference-not-finite",
                where=f"pair {i} of a batch of {len(pairs)}, {ids.total_tokens} tokens",
                expected="finite numbers",
                found="NaN or infinity",
                remedy="some models overflow float16: use --dtype bfloat16 or float32",
                exit_status=5,
            )
        # For a certain token, rounding in the log-sum-exp can give +1e-7.
        scored.append(ScoredPair(ids, np.minimum(chosen, 0.0), np.minimum(rejected, 0.0)))
    return scored


def too_long(some: Sequence[PairIds], said: str) -> UserError:
    """The error for pairs that do not fit into one forward, with what torch said."""
    shorter = "use fewer bits with --quantization, or a shorter --max-length"
    return too_large(some, said, phase="scoring", helps=shorter)


def score_within_memory(
    lm: CausalLM,
    pairs: Sequence[PairIds],
    *,
    note: Callable[[str], None] = QUIET.note,
) -> list[ScoredPair]:
    """`score_pairs`, in smaller forwards if memory runs out.

    Raises:
        UserError: a single pair does not fit.
    """
    if lm.sharded:
        with no_way_back("out of memory", "scoring over a sharded base", "shard it over more cards"):
            return score_pairs(lm, pairs)
    return in_parts(lambda some: score_pairs(lm, some), pairs, note=note, describe=too_long)
