"""The reference's full identity."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from dpoeng.cache.errors import CacheError
from dpoeng.cache.fingerprint import combined_digest, weight_digests
from dpoeng.cache.spec import ReferenceSpec
from dpoeng.cache.store import Store
from dpoeng.engine.config.fields import PrecomputeConfig
from dpoeng.engine.models.checkpoint_names import Beside, beside_language
from dpoeng.engine.models.experts.targets import has_routed_experts
from dpoeng.engine.models.loading import pick_device, resolve_dtype
from dpoeng.engine.models.sources import (
    ModelSource,
    adapter_config,
    forward_config,
    stored_format,
    stored_quantization,
)
from dpoeng.engine.runtime.progress import QUIET, Progress

SCORING_VERSION = 1
"""Increased when a change of this code moves log-probs by more than rounding."""


def digest_memo() -> Path:
    """File that stores digests of weight files between runs."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "dpoeng" / "digests"


def weights_identity(source: ModelSource, progress: Progress = QUIET, *, without: Collection[str] = ()) -> str:
    """One digest over all tensors (name, dtype, shape, bytes); independent of how the checkpoint is sharded.

    `without` names tensors that do not count.
    """
    total = sum(path.stat().st_size for path in source.weight_files)
    with progress.task("hashing weights", total, "B") as advance:
        hashed_bytes = 0

        def report(hashed: int, _total: int) -> None:
            nonlocal hashed_bytes
            advance(hashed - hashed_bytes, "")
            hashed_bytes = hashed

        digests = weight_digests(source.weight_files, progress=report, memo=digest_memo(), without=without)
        return combined_digest(digests)


def reference_spec(
    config: PrecomputeConfig,
    source: ModelSource,
    adapter: ModelSource | None,
    progress: Progress = QUIET,
    *,
    beside: Beside | None = None,
) -> ReferenceSpec:
    """Everything that determines a cached number, and nothing else.

    Tokenizer, template and truncation are not included: they act through the token ids, which key each row. Nor is the
    batch plan, which affects only rounding, nor what is `beside` the language model (by default: `beside_language`).
    """
    beside = beside_language(source) if beside is None else beside
    quantization: dict[str, Any] | None = None
    if config.quantization == "8bit":
        quantization = {"method": "bitsandbytes-int8", "activations": "exact", "skip": ["lm_head"]}
    elif config.quantization == "4bit":
        quantization = {
            "method": f"bitsandbytes-{config.bnb_4bit_quant_type}",
            "double_quant": config.bnb_4bit_use_double_quant,
            "skip": ["lm_head"],
        }
    elif config.quantization == "stored":
        quantization = {"method": f"stored-{stored_format(source).method}", "activations": "exact"}
    if quantization is not None and stored_quantization(source) is None and has_routed_experts(source):
        quantization["experts"] = "stacked"  # their weights are quantised too, unlike in older caches
    return ReferenceSpec.from_fields(
        {
            "weights": weights_identity(source, progress, without=beside.tensors),
            "config": {name: value for name, value in forward_config(source).items() if name not in beside.fields},
            "adapter": None
            if adapter is None
            else {"weights": weights_identity(adapter, progress), "config": adapter_config(adapter)},
            "quantization": quantization,
            "dtype": str(resolve_dtype(source, config.dtype, pick_device(config.device))).removeprefix("torch."),
            "scoring": {
                "version": SCORING_VERSION,
                "layout": "separate" if config.layout == "separate" else "shared",
            },
        }
    )


def spec_in_cache(
    store: Store,
    config: PrecomputeConfig,
    source: ModelSource,
    adapter: ModelSource | None,
    progress: Progress = QUIET,
) -> ReferenceSpec:
    """The spec of a reference; its older form if that is the one that a cache has.

    Caches made before towers for images and sound were left out have these in the identity. They stay valid for the
    same checkpoint.
    """
    beside = beside_language(source)
    spec = reference_spec(config, source, adapter, progress, beside=beside)
    known = store.reference_digests() if beside != Beside() else []
    whole = forward_config(source)
    if spec.digest in known or not any(_config_of(store, digest) == whole for digest in known):
        return spec
    older = reference_spec(config, source, adapter, progress, beside=Beside())
    if older.digest not in known:
        return spec
    progress.note(
        f"this cache identifies {source.name} together with its parts for images and sound, as older versions did; a "
        "checkpoint with other such parts counts as another reference"
    )
    return older


def _config_of(store: Store, digest: str) -> Any:
    """The model's config in a spec; None for a damaged one."""
    try:
        return store.spec(digest).fields.get("config")
    except CacheError:
        return None
