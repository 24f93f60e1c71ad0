"""Phase one: run the frozen reference once over the pairs that the cache lacks, and commit its log-probs."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from dpoeng.cache.errors import CacheError, UserError
from dpoeng.cache.files import disk_error
from dpoeng.cache.reader import View
from dpoeng.cache.records import Commit
from dpoeng.cache.schema import PairIds, pair_key
from dpoeng.cache.store import KeyIndex, Store, ViewEntry
from dpoeng.engine.adapters import load_reference_adapter
from dpoeng.engine.config import PrecomputeConfig
from dpoeng.engine.layout import batches_by_tokens
from dpoeng.engine.model import (
    CausalLM,
    device_name,
    library_versions,
    load_model,
    load_tokenizer,
    pick_device,
    require_bitsandbytes,
    set_mode,
)
from dpoeng.engine.pairs import PairFile, ensure_unchanged, read_pairs
from dpoeng.engine.progress import QUIET, Progress
from dpoeng.engine.reference import (
    ParityReport,
    compare_with_cache,
    parity_tolerance,
    reference_spec,
    score_pairs,
    spread,
)
from dpoeng.engine.rejects import Reject, check_reject_share, write_rejects
from dpoeng.engine.scoring import choose_layout
from dpoeng.engine.sources import ModelSource, find_adapter, find_model
from dpoeng.engine.tokens import TokenizedData, tokenize_pairs

DRIFT_SAMPLE: Final = 8
"""Reused pairs that are scored again where other libraries or another device computed them."""

_STORED_BYTES_A_TOKEN = 8  # an id and a log-prob
_STORED_BYTES_A_PAIR = 64  # key, sums, offsets


@dataclass(slots=True)
class PrecomputeSummary:
    """What phase one did. `pairs` counts rows of the view; `computed` and `reused` count distinct pairs."""

    cache: Path
    view: str
    spec: str
    pairs: int
    computed: int
    reused: int
    quarantined: int
    filtered: int
    rejects: list[Reject]
    rejects_file: Path | None
    data: TokenizedData
    source: PairFile
    computed_tokens: int = 0
    seconds: float = 0.0
    layout: str = ""
    layout_reason: str = ""
    device: str = ""
    peak_bytes: int | None = None
    reference_accuracy: float = 0.0
    reference: dict[str, Any] = field(default_factory=dict)


def precompute_reference(config: PrecomputeConfig, progress: Progress = QUIET) -> PrecomputeSummary:
    """Runs phase one. Run again after an interruption, it computes only what is missing, and ends with the same bytes.

    Raises:
        UserError: the data, the model, the configuration or the cache is not usable as it is.
    """
    if not config.pairs:
        raise UserError(
            "no preference pairs were named",
            code="config-missing",
            where="pairs",
            expected="one file or more, e.g. dpoeng precompute-ref pairs.jsonl --model sft-model",
            remedy="name the file, or write `pairs: [pairs.jsonl]` into dpoeng.yaml",
        )
    if config.model is None:
        raise UserError(
            "no model was named",
            code="config-missing",
            where="--model",
            expected="the SFT model: a directory, a .gguf file or a hub id",
            remedy="add --model DIR (and --adapter DIR for a LoRA SFT checkpoint), or write `model: DIR` into "
            "dpoeng.yaml in this folder",
        )
    source = find_model(config.model)
    adapter = find_adapter(config.adapter) if config.adapter else None
    device = pick_device(config.device)
    require_bitsandbytes(config.quantization)
    config = config.model_copy(update={"batch_tokens": config.batch_tokens or default_batch_tokens(device)})
    view_name = config.name or default_view_name(config.pairs[0])

    file = read_pairs(
        config.pairs,
        columns=config.columns,
        where=config.where,
        max_reject_share=config.max_reject_share,
        prompt_format=config.prompt_format,
    )
    data = tokenize_pairs(
        file.pairs,
        load_tokenizer(source),
        max_length=config.max_length,
        max_prompt_length=config.max_prompt_length,
        truncation_mode=config.truncation_mode,
        append_eos=config.append_eos,
    )
    if not data.pairs:
        raise UserError(
            "no pair is left after tokenisation",
            code="data-empty",
            where=", ".join(map(str, config.pairs)),
            expected="pairs that keep response tokens within max_length",
            found=f"{len(data.rejects)} pairs rejected, the first: {data.rejects[0].reason}" if data.rejects else None,
            remedy="raise --max-length, or look at the prompts",
            exit_status=3,
        )
    check_reject_share([*file.rejects, *data.rejects], len(file.pairs) + len(file.rejects), config.max_reject_share)

    store = Store.open(config.cache, create=True)
    spec = reference_spec(config, source, adapter, progress)
    spec_digest = store.put_spec(spec)
    index = store.lookup(spec_digest)
    for name in index.quarantined:
        progress.note(f"object {name} of the cache was damaged; it was set aside and its pairs are computed again")

    keys = [pair_key(pair.ids) for pair in data.pairs]
    unique = {key: pair.ids for key, pair in zip(keys, data.pairs, strict=True)}
    # Planned over what the last finished run left, not over what is there now: see plan_shards.
    sealed = store.lookup(spec_digest, sealed=True)
    shards = plan_shards({key: ids for key, ids in unique.items() if ids not in sealed}, config.shard_tokens)
    missing = [[ids for ids in shard if ids not in index] for shard in shards]
    to_compute = sum(len(shard) for shard in missing)
    summary = PrecomputeSummary(
        cache=config.cache,
        view=view_name,
        spec=spec_digest,
        pairs=len(data.pairs),
        computed=to_compute,
        reused=len(unique) - to_compute,
        quarantined=len(index.quarantined),
        filtered=file.filtered,
        rejects=[*file.rejects, *data.rejects],
        rejects_file=None,
        data=data,
        source=file,
        device=device_name(device),
    )
    if to_compute:
        _check_disk(store.root, missing)
        began = time.perf_counter()
        lm = load_reference(config, source, adapter, device)
        summary.layout, summary.layout_reason = lm.layout, lm.layout_reason
        _check_ids(unique.values(), lm, source)
        reused = {key: ids for key, ids in unique.items() if ids in index}
        _check_drift(lm, store, spec_digest, index, reused, config, progress)
        _compute(lm, store, spec_digest, missing, config, summary, progress)
        summary.seconds = time.perf_counter() - began
        index = store.lookup(spec_digest)
    store.seal(spec_digest)

    ensure_unchanged(file.files)
    summary.reference = {
        "model": _portable(source),
        "revision": source.revision,
        "adapter": _portable(adapter) if adapter else None,
        "quantization": config.quantization,
        "dtype": spec.fields["dtype"],
        "llm_int8_threshold": config.llm_int8_threshold,
        "bnb_4bit_quant_type": config.bnb_4bit_quant_type,
        "bnb_4bit_use_double_quant": config.bnb_4bit_use_double_quant,
        "batch_tokens": config.batch_tokens,
        "layout": config.layout,
    }
    entries = [
        ViewEntry(pair.source_file, pair.source_row, key, pair.extra)
        for pair, key in zip(data.pairs, keys, strict=True)
    ]
    meta = {
        "reference": summary.reference,
        "tokens": {
            "max_length": config.max_length,
            "max_prompt_length": config.max_prompt_length,
            "truncation_mode": config.truncation_mode,
            "append_eos": config.append_eos,
        },
        "files": {str(path): digest for path, digest in file.files.items()},
        "where": config.where,
        "columns": config.columns,
        "prompt_format": config.prompt_format,
        "rejects": len(summary.rejects),
        "versions": library_versions(),
        "device": summary.device,
    }
    try:
        store.write_view(spec_digest, view_name, entries, meta)
    except CacheError as error:
        if error.code != "cache-read-only" or not _view_holds(config.cache, view_name, spec_digest, keys):
            raise
        progress.note(f"the cache is read-only: its view {view_name!r} holds these pairs, and stays as it was written")
    rejects_file = config.cache / "rejects" / f"{view_name}.jsonl"
    summary.rejects_file = _write_rejects(rejects_file, summary.rejects, progress)
    summary.reference_accuracy = _reference_accuracy(index, unique)
    return summary


def default_batch_tokens(device: torch.device) -> int:
    """Positions in one forward: enough to keep the device busy, little beside the weights."""
    return 16384 if device.type == "cuda" else 2048


def default_view_name(path: Path) -> str:
    """`data/pairs.jsonl.gz` -> `pairs`."""
    stem = path.name.split(".")[0] or path.resolve().name
    return re.sub(r"[^A-Za-z0-9._-]", "-", stem)


def _check_disk(root: Path, missing: Sequence[Sequence[PairIds]]) -> None:
    """Refuses before the model is loaded what would fail with a full disk after hours."""
    needed = sum(_STORED_BYTES_A_TOKEN * ids.total_tokens + _STORED_BYTES_A_PAIR for shard in missing for ids in shard)
    free = shutil.disk_usage(root).free
    if needed > free:
        raise UserError(
            "the disk has no room for the log-probs that are to be computed",
            code="cache-disk-small",
            where=str(root),
            expected=f"{needed / 1e6:.1f} MB free",
            found=f"{free / 1e6:.1f} MB",
            remedy="free some space, or choose another folder with --cache",
            exit_status=5,
        )


def plan_shards(fresh: dict[bytes, PairIds], shard_tokens: int) -> list[list[PairIds]]:
    """Which pairs are stored together: a pure function of the set of pairs that are new since the last finished run.

    It does not look at what an unfinished run has committed already. So a run that is killed and started again, or
    that is done by several processes, writes the same files as one that was left alone. The longest pairs come first:
    what will not fit into memory fails at once, and batches hold pairs of like length.
    """
    ordered = sorted(fresh.items(), key=lambda item: (-item[1].total_tokens, item[0]))
    lengths = [ids.total_tokens for _, ids in ordered]
    return [[ordered[i][1] for i in shard] for shard in batches_by_tokens(lengths, shard_tokens)]


def load_reference(
    config: PrecomputeConfig, source: ModelSource, adapter: ModelSource | None, device: torch.device
) -> CausalLM:
    """The frozen reference exactly as named, in the mode and layout in which both phases score."""
    lm = load_model(
        source,
        quantization=config.quantization,
        dtype=config.dtype,
        device=device,
        int8_threshold=config.llm_int8_threshold,
        quant_type=config.bnb_4bit_quant_type,
        double_quant=config.bnb_4bit_use_double_quant,
        tokenizer=False,
    )
    if adapter is not None:
        lm = load_reference_adapter(lm, adapter)
    set_mode(lm, training=False)
    choose_layout(lm, config.layout)
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
            "layout": reference["layout"],
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


def _compute(
    lm: CausalLM,
    store: Store,
    spec_digest: str,
    shards: Sequence[Sequence[PairIds]],
    config: PrecomputeConfig,
    summary: PrecomputeSummary,
    progress: Progress,
) -> None:
    provenance = {"versions": library_versions(), "device": summary.device, "layout": lm.layout}
    summary.computed_tokens = sum(ids.total_tokens for shard in shards for ids in shard)
    if lm.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(lm.device)
    assert config.batch_tokens is not None
    pairs_done, began = 0, time.perf_counter()
    with progress.task("reference log-probs", summary.computed_tokens, "tokens") as advance:
        for shard in shards:
            rows = []
            for batch in batches_by_tokens([ids.total_tokens for ids in shard], config.batch_tokens):
                pairs = [shard[i] for i in batch]
                rows += score_pairs(lm, pairs)
                pairs_done += len(pairs)
                speed = pairs_done / (time.perf_counter() - began)
                shown = f"{pairs_done} of {summary.computed} pairs, {speed:.2f} pairs/s"
                advance(sum(ids.total_tokens for ids in pairs), shown)
            if rows:
                store.commit_shard(spec_digest, rows, provenance)
    if lm.device.type == "cuda":
        summary.peak_bytes = torch.cuda.max_memory_allocated(lm.device)


def _check_drift(
    lm: CausalLM,
    store: Store,
    spec_digest: str,
    index: KeyIndex,
    reused: dict[bytes, PairIds],
    config: PrecomputeConfig,
    progress: Progress,
) -> None:
    """Scores a few reused pairs again, where their records name other libraries or another device than these.

    A version is no part of the identity: nearly all releases give the same numbers, and a miss would cost days. So
    values of two releases may stand side by side, and this finds the release that moved them. It costs next to nothing,
    since the model has been loaded anyway for the pairs that are missing.

    Raises:
        UserError: the values of then and now differ by more than rounding explains.
    """
    if not reused:
        return
    now = _computed_by({"versions": library_versions(), "device": device_name(lm.device)})
    then = {
        outcome.object.name: _computed_by(outcome.provenance)
        for _, outcome in store.read_commits(spec_digest)
        if isinstance(outcome, Commit)
    }
    shards, _ = index.locate(np.frombuffer(b"".join(reused), np.uint8).reshape(-1, 16))
    makers = [then.get(index.objects[shard].name, now) for shard in shards]
    foreign = [ids for ids, maker in zip(reused.values(), makers, strict=True) if maker != now]
    if not foreign:
        return
    changes = sorted(
        {f"{name} {maker[name]}, now {now[name]}" for maker in makers for name in now if maker[name] != now[name]}
    )
    found = (index.get(foreign[i]) for i in spread(range(len(foreign)), DRIFT_SAMPLE))
    sample = [pair for pair in found if pair is not None]
    report = compare_with_cache(
        lm,
        sample,
        range(len(sample)),
        beta=0.1,
        batch_tokens=config.batch_tokens or default_batch_tokens(lm.device),
        tolerance=parity_tolerance(lm, config.quantization, str(lm.dtype).removeprefix("torch.")),
    )
    if not report.ok:
        raise UserError(
            "the reference no longer gives the numbers that the cache holds for it",
            code="reference-drifted",
            where=f"{config.cache}: {report.pairs} of {len(foreign)} pairs that were computed by " + "; ".join(changes),
            expected=f"mean difference per token <= {report.tolerance:g} nats",
            found=f"mean {report.mean_diff:.4g}, largest {report.max_diff:.4g} nats",
            remedy="go on with the versions and the device that computed them (`dpoeng cache info` lists these), or "
            "compute all pairs anew in another folder with --cache",
            exit_status=4,
        )
    progress.note(
        f"{len(foreign)} reused pairs were computed by {'; '.join(changes)}: {report.pairs} of them were scored again "
        f"and agree (mean difference {report.mean_diff:.2g} nats a token)"
    )


def _computed_by(provenance: Mapping[str, Any]) -> dict[str, str]:
    """What of a record can move a number: the libraries that compute, and the device but not its number of threads."""
    versions = provenance.get("versions", {})
    made = {name: str(versions.get(name, "unknown")) for name in ("torch", "transformers", "peft", "bitsandbytes")}
    return {**made, "device": re.sub(r", \d+ threads", "", str(provenance.get("device", "unknown")))}


def _check_ids(pairs: Any, lm: CausalLM, source: ModelSource) -> None:
    highest = max(
        int(part.max()) for ids in pairs for part in (ids.prompt_ids, ids.chosen_ids, ids.rejected_ids) if len(part)
    )
    if highest >= lm.vocab_size:
        raise UserError(
            "the tokenizer gives ids that the model does not have",
            code="tokenizer-mismatch",
            where=source.name,
            expected=f"ids below {lm.vocab_size}",
            found=str(highest),
            remedy="use the tokenizer that belongs to this model; added tokens need resized embeddings",
        )


def _portable(source: ModelSource) -> str:
    """A name by which phase two finds the files from any folder: an absolute path, or the hub id."""
    if source.revision is not None:
        return source.name
    return str(source.weight_files[0].resolve() if source.gguf else source.folder.resolve())


def _view_holds(cache: Path, name: str, spec_digest: str, keys: Sequence[bytes]) -> bool:
    """Whether a view has just these pairs of this reference, in this order."""
    if name not in Store.open(cache).views():
        return False
    view = View.open(cache, name)
    return view.spec.digest == spec_digest and [view.key(row) for row in range(len(view))] == list(keys)


def _write_rejects(path: Path, rejects: list[Reject], progress: Progress) -> Path | None:
    try:
        if rejects:
            path.parent.mkdir(exist_ok=True)
            write_rejects(path, rejects)
        elif path.exists():  # a read-only file system refuses even to remove what is not there
            path.unlink()
    except OSError as error:
        explained = disk_error(error, path)
        if explained.code != "cache-read-only":
            raise explained from error
        progress.note(f"the cache is read-only: {path} is not written anew ({len(rejects)} rows were rejected)")
    return path if rejects and path.is_file() else None


def _reference_accuracy(index: KeyIndex, unique: dict[bytes, PairIds]) -> float:
    """Share of distinct pairs whose chosen response the reference already finds likelier."""
    right = 0
    for ids in unique.values():
        pair = index.get(ids)
        assert pair is not None, "every pair was committed"
        right += pair.chosen_sum > pair.rejected_sum
    return right / len(unique)
