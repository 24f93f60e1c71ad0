"""Measures the reference cache: opening, reading, verifying, looking up, hashing weights."""

from __future__ import annotations

import numpy as np

from dpoeng.cache.schema import PairIds, ScoredPair, as_ids


def synthetic_rows(
    count: int, *, seed: int = 0, mean_prompt: int = 60, mean_response: int = 60, vocabulary: int = 50_000
) -> list[ScoredPair]:
    """Pairs as phase one would write them: random ids and log-probs, lengths uniform from 1 to twice the mean."""
    random = np.random.default_rng(seed)
    lengths = np.stack(
        [random.integers(1, 2 * mean + 1, count) for mean in (mean_prompt, mean_response, mean_response)], axis=1
    )
    ids = as_ids(random.integers(0, vocabulary, int(lengths.sum())))
    logps = -random.standard_exponential(int(lengths[:, 1:].sum()), dtype=np.float32)
    id_ends, logp_ends = lengths.ravel().cumsum(), lengths[:, 1:].ravel().cumsum()
    id_parts = np.split(ids, id_ends[:-1])
    logp_parts = np.split(logps, logp_ends[:-1])
    return [
        ScoredPair(PairIds(*id_parts[3 * i : 3 * i + 3]), *logp_parts[2 * i : 2 * i + 2])  # type: ignore[arg-type]
        for i in range(count)
    ]
