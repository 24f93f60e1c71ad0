"""Checks that values computed by another release or device agree with those of this one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from dpoeng.cache.errors import UserError
from dpoeng.cache.index import KeyIndex
from dpoeng.cache.records import Commit
from dpoeng.cache.schema import PairIds
from dpoeng.cache.store import Store
from dpoeng.cache.words import counted
from dpoeng.engine.models.model import CausalLM, device_name, library_versions
from dpoeng.engine.reference.parity import compare_with_cache, parity_tolerance, spread
from dpoeng.engine.runtime.progress import Progress

DRIFT_SAMPLE: Final = 8
"""Number of reused pairs to score again if other libraries or another device computed them."""


def check_drift(
    lm: CausalLM,
    store: Store,
    spec_digest: str,
    index: KeyIndex,
    reused: Sequence[PairIds],
    keys: npt.NDArray[np.uint8],
    *,
    quantization: str,
    batch_tokens: int,
    progress: Progress,
) -> None:
    """Scores a few reused pairs again if their records name other libraries or another device.

    Versions are not part of the identity: nearly all releases give the same numbers, and a miss would cost days. So
    values of two releases may be mixed, and this check finds a release that changed them. It costs little, because the
    model is loaded anyway for the missing pairs.

    Raises:
        UserError: the old and new values differ by more than rounding.
    """
    foreign, changes = _foreign(store, spec_digest, index, keys, device_name(lm.device))
    if not len(foreign):
        return
    pairs = (index.get(reused[foreign[i]]) for i in spread(range(len(foreign)), DRIFT_SAMPLE))
    sample = [pair for pair in pairs if pair is not None]
    report = compare_with_cache(
        lm,
        sample,
        range(len(sample)),
        beta=0.1,
        batch_tokens=batch_tokens,
        tolerance=parity_tolerance(lm, quantization, str(lm.dtype).removeprefix("torch.")),
    )
    if not report.ok:
        raise UserError(
            "the reference no longer reproduces its cached log-probs",
            code="reference-drifted",
            where=f"{store.root}: {report.pairs} of {counted(len(foreign), 'pair')} computed by {changes}",
            expected=f"mean difference per token <= {report.tolerance:g} nats",
            found=f"mean {report.mean_diff:.4g}, largest {report.max_diff:.4g} nats",
            remedy="continue with the versions and the device that computed them (`dpoeng cache info` lists these), or "
            "recompute all pairs in another folder with --cache",
            exit_status=4,
        )
    progress.note(
        f"{len(foreign)} reused pairs were computed by {changes}: {report.pairs} of them were scored again "
        f"and agree (mean difference {report.mean_diff:.2g} nats per token)"
    )


def _foreign(
    store: Store, spec_digest: str, index: KeyIndex, keys: npt.NDArray[np.uint8], device: str
) -> tuple[list[int], str]:
    """Reused pairs that other libraries or another device computed, and a description of the difference."""
    if not len(keys):
        return [], ""
    now = _computed_by({"versions": library_versions(), "device": device})
    then = {
        outcome.object.name: _computed_by(outcome.provenance)
        for _, outcome in store.read_commits(spec_digest)
        if isinstance(outcome, Commit)
    }
    shards, _ = index.locate(keys)
    makers = {int(shard): then.get(index.objects[shard].name, now) for shard in np.unique(shards)}
    others = {shard: maker for shard, maker in makers.items() if maker != now}
    changes = {
        f"{name} {maker[name]}, now {now[name]}"
        for maker in others.values()
        for name in now
        if maker[name] != now[name]
    }
    return np.flatnonzero(np.isin(shards, list(others))).tolist(), "; ".join(sorted(changes))


def _computed_by(provenance: Mapping[str, Any]) -> dict[str, str]:
    """The parts of a record that can change a number: the libraries, and the device without its number of threads."""
    versions = provenance.get("versions", {})
    made = {name: str(versions.get(name, "unknown")) for name in ("torch", "transformers", "peft", "bitsandbytes")}
    return {**made, "device": re.sub(r", \d+ threads?", "", str(provenance.get("device", "unknown")))}
