"""What the reference is: its full identity, and whether a loaded model still agrees with cached values."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpoeng.cache.errors import UserError
from dpoeng.cache.fingerprint import combined_digest, weight_digests
from dpoeng.cache.reader import View
from dpoeng.cache.schema import PairIds, ScoredPair
from dpoeng.cache.spec import ReferenceSpec
from dpoeng.engine.adapters import load_reference_adapter
from dpoeng.engine.config import PrecomputeConfig, TrainConfig
from dpoeng.engine.layout import batches_of_pairs, share_prompts
from dpoeng.engine.model import CausalLM, load_model, pick_device, resolve_dtype, set_mode
from dpoeng.engine.oom import in_parts, no_way_back, too_large
from dpoeng.engine.progress import QUIET, Progress
from dpoeng.engine.scoring import choose_layout, score_groups
from dpoeng.engine.sources import ModelSource, adapter_config, find_adapter, find_model, forward_config

SCORING_VERSION = 1
"""Raised when a change of this code moves log-probs by more than rounding."""


def digest_memo() -> Path:
    """Where digests of weight files are remembered between runs."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "dpoeng" / "digests"


def weights_identity(source: ModelSource, progress: Progress = QUIET) -> str:
    """One digest over all tensors by name, dtype, shape and bytes; the same however the checkpoint is sharded."""
    total = sum(path.stat().st_size for path in source.weight_files)
    with progress.task("hashing weights", total, "B") as advance:
        done = 0

        def report(hashed: int, _total: int) -> None:
            nonlocal done
            advance(hashed - done, "")
            done = hashed

        return combined_digest(weight_digests(source.weight_files, progress=report, memo=digest_memo()))


def reference_spec(
    config: PrecomputeConfig, source: ModelSource, adapter: ModelSource | None, progress: Progress = QUIET
) -> ReferenceSpec:
    """All that determines a cached number, and nothing else.

    The tokenizer, the template and truncation are not in it: they act through the token ids, which key each row. Nor is
    the batch plan, on which numbers depend by rounding alone.
    """
    quantization: dict[str, Any] | None = None
    if config.quantization == "8bit":
        quantization = {"method": "bitsandbytes-int8", "activations": "exact", "skip": ["lm_head"]}
    elif config.quantization == "4bit":
        quantization = {
            "method": f"bitsandbytes-{config.bnb_4bit_quant_type}",
            "double_quant": config.bnb_4bit_use_double_quant,
            "skip": ["lm_head"],
        }
    return ReferenceSpec.from_fields(
        {
            "weights": weights_identity(source, progress),
            "config": forward_config(source),
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


def load_policy_base(
    config: TrainConfig,
    reference: Mapping[str, Any],
    device: torch.device,
    *,
    on_host: bool = False,
    tokenizer: bool = False,
    shard: Callable[[Any], None] | None = None,
) -> CausalLM:
    """The base on which the policy stands: the one that a view's `reference` record names, unless config overrides.

    With `on_host` it is left in the host's memory, in the dtype that it would have on `device`. With `shard` this
    process reads its share of it; see `load_model`.
    """
    source = find_model(config.model or reference["model"], revision=reference.get("revision"))
    dtype = resolve_dtype(source, config.dtype or reference["dtype"], device)
    return load_model(
        source,
        quantization=config.quantization or reference["quantization"],
        dtype=str(dtype).removeprefix("torch."),
        device=torch.device("cpu") if on_host else device,
        quant_type=reference["bnb_4bit_quant_type"],
        double_quant=reference["bnb_4bit_use_double_quant"],
        tokenizer=tokenizer,
        shard=shard,
    )


@torch.no_grad()  # not inference_mode: what a sharded base gathers here is used again in training
def score_pairs(lm: CausalLM, pairs: Sequence[PairIds]) -> list[ScoredPair]:
    """Log-probs of every scored token of some pairs, in one forward; each prompt and each response of it is run once.

    Raises:
        UserError: the model gave a value that is no log-probability.
    """
    groups, branches = share_prompts(pairs)
    token_logps, offsets = score_groups(lm, groups)
    values = token_logps.float().cpu().numpy()
    scored = []
    for i, ids in enumerate(pairs):
        chosen, rejected = (values[offsets[branch] : offsets[branch + 1]].copy() for branch in branches[i])
        if not (np.isfinite(chosen).all() and np.isfinite(rejected).all()):
            raise UserError(
                "the model gave a value that is no log-probability",
                code="reference-not-finite",
                where=f"pair {i} of a batch of {len(pairs)}, {ids.total_tokens} tokens",
                expected="finite numbers",
                found="NaN or infinity",
                remedy="some models overflow float16: use --dtype bfloat16 or float32",
                exit_status=5,
            )
        # Rounding in the log-sum-exp can leave +1e-7 where the token is certain.
        scored.append(ScoredPair(ids, np.minimum(chosen, 0.0), np.minimum(rejected, 0.0)))
    return scored


def score_within_memory(
    lm: CausalLM,
    pairs: Sequence[PairIds],
    *,
    note: Callable[[str], None] = QUIET.note,
    score: Callable[[CausalLM, Sequence[PairIds]], list[ScoredPair]] | None = None,
) -> list[ScoredPair]:
    """`score_pairs`, in smaller forwards where memory runs out.

    Raises:
        UserError: a pair alone does not fit.
    """

    def too_long(some: Sequence[PairIds], said: str) -> UserError:
        shorter = "hold the base in fewer bits with --quantization, or use a shorter --max-length"
        return too_large(some, said, phase="scoring", helps=shorter)

    work = score or score_pairs
    if lm.sharded:
        with no_way_back("out of memory", "scoring over a sharded base", "hold it on more cards"):
            return work(lm, pairs)
    return in_parts(lambda some: work(lm, some), pairs, note=note, describe=too_long)


@dataclass(frozen=True, slots=True)
class ParityReport:
    """Policy against cache on the same tokens. Differences are per token, absolute, in nats.

    Attributes:
        pairs: pairs compared.
        tokens: tokens compared.
        mean_diff: mean |difference|.
        max_diff: largest |difference|.
        reward_noise: root mean square of beta times the difference of a pair's margin: the spurious reward margin that
            training starts with.
        tolerance: largest `mean_diff` that is accepted.
    """

    pairs: int
    tokens: int
    mean_diff: float
    max_diff: float
    reward_noise: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether the cached values are this model's (false for NaN)."""
        return self.mean_diff <= self.tolerance


def parity_tolerance(lm: CausalLM, reference_quantization: str, reference_dtype: str) -> float:
    """Mean |difference| per token, nats, that rounding explains; a wrong model is well above.

    The same scoring code on the same machine repeats exactly in most cases; what is allowed for is another batch shape
    (bfloat16: 0.03 was seen) or another device. Where policy and reference were asked for in different precisions, the
    gap between these is expected, and reported.
    """
    dtype = str(lm.dtype).removeprefix("torch.")
    if lm.quantization != reference_quantization:
        return 1.0 if "4bit" in (lm.quantization, reference_quantization) else 0.3
    if dtype != reference_dtype:
        return 0.1
    return {"float32": 2e-3, "bfloat16": 6e-2, "float16": 2e-2}[dtype]


def spread(rows: Sequence[int], count: int) -> list[int]:
    """At most `count` of some rows, evenly spread over them."""
    count = min(count, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


def compare_with_cache(
    lm: CausalLM,
    view: View | Sequence[ScoredPair],
    rows: Sequence[int],
    *,
    beta: float,
    batch_tokens: int,
    tolerance: float,
) -> ParityReport:
    """Scores some rows of a view with the loaded model and compares them with the cached values.

    Where the view holds sums only, a response's difference is spread evenly over its tokens.
    """
    sums = isinstance(view, View) and view.spec.holds_sums
    cached = [view[row] for row in rows]
    diffs: list[np.ndarray[Any, np.dtype[np.float64]]] = []
    margins: list[float] = []
    for batch, _ in batches_of_pairs([pair.ids for pair in cached], batch_tokens):
        live = score_within_memory(lm, [cached[i].ids for i in batch])
        for i, now in zip(batch, live, strict=True):
            chosen = now.chosen_logps.astype(np.float64) - cached[i].chosen_logps
            rejected = now.rejected_logps.astype(np.float64) - cached[i].rejected_logps
            if sums:
                chosen, rejected = (np.full(len(side), side.mean()) for side in (chosen, rejected))
            diffs += [np.abs(chosen), np.abs(rejected)]
            margins.append(float(chosen.sum() - rejected.sum()))
    every = np.concatenate(diffs)
    return ParityReport(
        pairs=len(cached),
        tokens=len(every),
        mean_diff=float(every.mean()),
        max_diff=float(every.max()),
        reward_noise=beta * math.sqrt(float(np.mean(np.square(margins)))),
        tolerance=tolerance,
    )


def load_reference(
    config: PrecomputeConfig, source: ModelSource, adapter: ModelSource | None, device: torch.device
) -> CausalLM:
    """The frozen reference exactly as named, in the mode and layout in which both phases score."""
    lm = load_model(
        source,
        quantization=config.quantization,
        dtype=config.dtype,
        device=device,
        quant_type=config.bnb_4bit_quant_type,
        double_quant=config.bnb_4bit_use_double_quant,
        tokenizer=False,
    )
    if adapter is not None:
        lm = load_reference_adapter(lm, adapter)
    set_mode(lm, training=False)
    choose_layout(lm, config.layout, config.attention)
    return lm


def recompute(
    view: View, count: int, *, model: str | None = None, adapter: str | None = None, device: str = "auto"
) -> ParityReport:
    """The fourth depth of verification: scores some rows of a view anew with its reference and compares.

    Args:
        view: an open view.
        count: rows to score, spread over the view.
        model: where the base is now; default: where it was.
        adapter: where the SFT adapter is now; default: where it was.
        device: as in `PrecomputeConfig`.

    Raises:
        UserError: the model cannot be found or loaded.
    """
    reference = view.meta["reference"]
    config = PrecomputeConfig(
        **{
            **{name: value for name, value in reference.items() if name in PrecomputeConfig.model_fields},
            "model": model or reference["model"],
            "adapter": adapter or reference["adapter"],
            "device": device,
        }
    )
    assert config.model is not None
    source = find_model(config.model, revision=reference["revision"])
    lm = load_reference(
        config, source, find_adapter(config.adapter) if config.adapter else None, pick_device(config.device)
    )
    return compare_with_cache(
        lm,
        view,
        spread(range(len(view)), count),
        beta=0.1,
        batch_tokens=reference["batch_tokens"],
        tolerance=parity_tolerance(lm, reference["quantization"], reference["dtype"]),
    )
