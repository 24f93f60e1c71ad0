"""Phase one: runs the frozen reference once over pairs that the cache lacks, and commits its log-probs."""

from __future__ import annotations

import itertools
import re
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from dpoeng.cache.errors import UserError
from dpoeng.cache.index import KeyIndex
from dpoeng.cache.schema import PairIds, first_of_each
from dpoeng.cache.spec import ReferenceSpec
from dpoeng.cache.store import Store
from dpoeng.cache.trunk.index import TrunkIndex
from dpoeng.cache.words import counted
from dpoeng.engine.config.fields import PrecomputeConfig
from dpoeng.engine.data.hub import hub_view_name, is_hub
from dpoeng.engine.data.in_memory import RowsInMemory
from dpoeng.engine.data.pairs import PairFile, ensure_unchanged, stream_pairs
from dpoeng.engine.data.readers import COMPRESSIONS, FORMATS
from dpoeng.engine.data.rejects import Reject, check_reject_share
from dpoeng.engine.data.token_rows import SomeIds, TokenRows
from dpoeng.engine.data.tokenization import TokenizedData, tokenize_pairs
from dpoeng.engine.memory.offloading import decide_forward
from dpoeng.engine.models.loading import pick_device, with_stored_quantization
from dpoeng.engine.models.model import CausalLM, device_name, library_versions
from dpoeng.engine.models.quantized import require_bitsandbytes
from dpoeng.engine.models.sources import ModelSource, find_adapter, find_model
from dpoeng.engine.models.tokenizer import TokenizerChoice, choose_tokenizer, load_chosen, remark_on
from dpoeng.engine.reference.drift import check_drift
from dpoeng.engine.reference.identity import spec_in_cache
from dpoeng.engine.reference.limits import check_disk, check_ids, check_positions, longest_text
from dpoeng.engine.reference.loading import load_reference
from dpoeng.engine.reference.shards import Part, plan_shards
from dpoeng.engine.reference.trunk_pass import (
    TrunkWork,
    TrunkWriter,
    plan_trunk,
    put_trunk,
    rehearsal_pairs,
    rehearse,
    store_states,
    storing,
)
from dpoeng.engine.reference.view import reference_record, source_record, write_pairs_view, write_rejects_file
from dpoeng.engine.runtime.distributed import Group, process_group
from dpoeng.engine.runtime.progress import QUIET, Progress
from dpoeng.engine.runtime.stopping import keeping_signals
from dpoeng.engine.scoring.layer_passes import computed_positions
from dpoeng.engine.scoring.layout import batches_of_pairs, separate, share_prompts
from dpoeng.engine.scoring.passes import Batches, score_batches

VISIBLE_WITHIN_S: Final = 60.0
"""How long the first process waits for the other processes' commits to become visible."""


@dataclass(slots=True)
class PrecomputeSummary:
    """Result of phase one. `pairs` counts those of the view; `computed` and `reused` count distinct pairs.

    `rows` are those of the files that were used: a ranked one is several pairs of responses. `computed_tokens` went
    through the model, padding included; `apart_tokens` would have if each response had a separate row.

    `layers_read_bytes` is set if layers were loaded one at a time. `pending` pairs belong to other parts that are not
    done; while there are any, the view is not written, and `views` counts the cache's views. `trunk_texts` and
    `trunk_bytes` are the hidden states that this process stored.
    """

    cache: Path
    view: str
    spec: str
    pairs: int
    computed: int
    reused: int
    quarantined: int
    filtered: int
    rejects: list[Reject] = field(repr=False)
    rejects_file: Path | None
    data: TokenizedData = field(repr=False)
    source: PairFile = field(repr=False)
    part: Part
    reports: bool = True
    pending: int = 0
    views: int = 0
    rows: int = 0
    computed_tokens: int = 0
    apart_tokens: int = 0
    seconds: float = 0.0
    layout: str = ""
    layout_reason: str = ""
    device: str = ""
    peak_bytes: int | None = None
    predicted_bytes: int | None = None
    layers_read_bytes: int | None = None
    reference_accuracy: float = 0.0
    trunk_layer: int | None = None
    trunk_texts: int = 0
    trunk_bytes: int = 0
    reference: dict[str, Any] = field(default_factory=dict)


def precompute_reference(config: PrecomputeConfig, progress: Progress = QUIET) -> PrecomputeSummary:
    """Runs phase one. After an interruption, a second run computes only what is missing and gives the same bytes.

    Under torchrun the processes share the work; the first one finishes it and reports. With `config.shard` this process
    does one part, and the job that finds all parts done finishes the work.

    Raises:
        UserError: the data, the model, the configuration or the cache is not usable; or another process of the same run
            has ended.
    """
    with process_group() as group:
        return _precompute(config, group, progress if group.is_first else QUIET)


def _precompute(config: PrecomputeConfig, group: Group, progress: Progress) -> PrecomputeSummary:
    work = plan_work(config, group, progress)
    summary = PrecomputeSummary(
        cache=config.cache,
        view=work.view_name,
        spec=work.spec.digest,
        pairs=len(work.data.pairs),
        rows=work.data.rows,
        computed=sum(len(shard) for shard in work.mine),
        reused=len(work.reused),
        quarantined=len(work.index.quarantined) + (len(work.trunk.index.quarantined) if work.trunk else 0),
        filtered=work.file.filtered,
        rejects=[*work.file.rejects, *work.data.rejects],
        rejects_file=None,
        data=work.data,
        source=work.file,
        part=work.part,
        reports=group.is_first,
        device=device_name(work.device),
        trunk_layer=work.trunk.layer if work.trunk else None,
    )
    if work.mine or (work.trunk and work.trunk.mine):
        work = compute(work, summary, progress)
    group.wait()  # until all have committed their shards
    if group.is_first:
        # A network file system may show other machines' files with a delay.
        finish(work, summary, progress, patience_s=VISIBLE_WITHIN_S if group.size > 1 else 0.0)
    return summary


@dataclass(frozen=True, slots=True)
class Work:
    """The work of phase one, known before the model is loaded.

    Attributes:
        config: with the base's stored quantization and with `batch_tokens` set.
        asked_batch: whether the user set `batch_tokens`.
        source: the base.
        adapter: the SFT adapter, or None.
        device: device of this process.
        view_name: name of the view to write.
        file: the pairs as read.
        data: the pairs as token ids.
        distinct: the tokens of the pairs, without duplicates.
        reused: which of these the cache has already.
        store: the cache.
        spec: the reference's identity.
        index: pairs that the cache has already.
        part: the share of this process.
        mine: shards of this process, without the pairs that the cache has.
        trunk: hidden states to store as well, or None.
    """

    config: PrecomputeConfig
    asked_batch: bool
    source: ModelSource
    adapter: ModelSource | None
    device: torch.device
    view_name: str
    file: PairFile
    data: TokenizedData
    distinct: SomeIds
    reused: npt.NDArray[np.int64]
    store: Store
    spec: ReferenceSpec
    index: KeyIndex
    part: Part
    mine: Sequence[Sequence[PairIds]]
    trunk: TrunkWork | None = None


def plan_work(config: PrecomputeConfig, group: Group, progress: Progress) -> Work:
    """Reads the pairs, identifies the reference, and looks up which pairs the cache lacks.

    Raises:
        UserError: the data, the model, the configuration or the cache is not usable.
    """
    if not config.pairs:
        raise UserError(
            "no pairs given",
            code="config-missing",
            where="pairs",
            expected="at least one file, e.g. dpoeng precompute-ref pairs.jsonl --model sft-model",
            remedy="name the file, or write `pairs: [pairs.jsonl]` into dpoeng.yaml",
        )
    source = find_model(required_model(config))
    config = with_stored_quantization(config, source)
    adapter = find_adapter(config.adapter) if config.adapter else None
    device = pick_device(config.device, group.local_rank)
    require_bitsandbytes(config.quantization)
    asked_batch = config.batch_tokens is not None
    config = config.model_copy(update={"batch_tokens": config.batch_tokens or default_batch_tokens(device)})
    view_name = config.name or default_view_name(config.pairs[0])
    part = _part(config.shard, group)
    choice = choose_tokenizer(source, config.adapter, config.tokenizer)
    file, data = _read(config, choice, progress)

    store = Store.open(config.cache, create=True)
    with group.first_on_machine():  # hashes the weights and stores the result for the others
        spec = spec_in_cache(store, config, source, adapter, progress)
    store.put_spec(spec)
    distinct = SomeIds(data.pairs, first_of_each(data.keys))
    keys = data.keys[distinct.places]
    group.agree("models", spec.digest, "give every process the same model, adapter and precision")
    together = xxhash.xxh3_128_hexdigest(b"".join(sorted(map(bytes, keys))))
    group.agree("pairs", together, "give every process the same files")
    index, reused, missing = _look_up(store, spec.digest, distinct, keys, config.shard_tokens, progress)
    mine = [distinct.at(shard) for shard in part.of(missing) if len(shard)]
    trunk = None
    if config.trunk_layer:
        trunk_work = put_trunk(store, spec, source, config.trunk_layer)
        trunk = plan_trunk(store, trunk_work, distinct, keys, missing, config.shard_tokens, part, progress.note)
    return Work(
        config, asked_batch, source, adapter, device, view_name, file, data, distinct, reused, store, spec, index, part,
        mine, trunk,
    )  # fmt: skip


def _look_up(
    store: Store,
    spec_digest: str,
    distinct: SomeIds,
    keys: npt.NDArray[np.uint8],
    shard_tokens: int,
    progress: Progress,
) -> tuple[KeyIndex, npt.NDArray[np.int64], list[npt.NDArray[np.int64]]]:
    """Looks pairs up in the cache -> cached rows, their pairs, and shards of the missing ones (some may be empty)."""
    index = store.lookup(spec_digest)
    for name in index.quarantined:
        progress.note(f"object {name} of the cache was damaged: moved to quarantine, and its pairs are recomputed")
    # Plan over what the last finished run left, not over what is there now: a run that is killed and restarted then
    # writes the same shards as an undisturbed one (see plan_shards).
    sealed = store.lookup(spec_digest, sealed=True, known=index)
    held = np.fromiter((ids in index for ids in distinct), bool, len(distinct))
    whole = held.copy()  # rows left by the last finished run
    if sealed.objects != index.objects:
        whole[held] = [distinct[i] in sealed for i in np.flatnonzero(held).tolist()]
    fresh = np.flatnonzero(~whole)
    shards = [fresh[shard] for shard in plan_shards(distinct.at(fresh), keys[fresh], shard_tokens)]
    return index, np.flatnonzero(held), [shard[~held[shard]] for shard in shards]


def compute(work: Work, summary: PrecomputeSummary, progress: Progress) -> Work:
    """Scores this process's pairs with the reference and commits them, shard by shard; fills in `summary`.

    Returns:
        the work, with the `batch_tokens` that fit.

    Raises:
        UserError: no room on disk or in memory; ids or lengths that the model does not support; or older values that it
            does not reproduce.
    """
    pairs, trunk = work.distinct, work.trunk
    check_disk(work.store.root, work.mine, trunk.n_bytes if trunk else 0)
    began = time.perf_counter()
    shards = [*work.mine, *(trunk.mine if trunk else ())]
    chooses = work.device.type == "cuda" and not work.asked_batch
    by_layer, summary.predicted_bytes, batch_tokens = decide_forward(
        work.config, work.source, shards, work.device, progress.note, everything=pairs if chooses else None
    )
    assert batch_tokens is not None
    config = work.config.model_copy(update={"batch_tokens": batch_tokens})
    ranked = work.file.kind == "ranked"
    longest = longest_text(pairs)
    lm = load_reference(config, work.source, work.adapter, work.device, longest, by_layer=by_layer, ranked=ranked)
    for remark in lm.remarks:
        progress.note(remark)
    summary.layout, summary.layout_reason = lm.layout, lm.layout_reason
    check_ids(pairs, lm, work.source.name)
    check_positions(pairs, lm)
    check_drift(
        lm,
        work.store,
        work.spec.digest,
        work.index,
        work.distinct.at(work.reused),
        work.data.keys[work.distinct.places[work.reused]],
        quantization=config.quantization,
        batch_tokens=batch_tokens,
        progress=progress,
    )
    writer = None
    provenance = {"versions": library_versions(), "device": summary.device, "layout": lm.layout}
    if trunk is not None:
        rehearse(lm, trunk.layer, rehearsal_pairs(lm, shards))
        writer = TrunkWriter(work.store, trunk, provenance)
    _score(lm, work, batch_tokens, summary, provenance, writer, progress)
    if trunk is not None and writer is not None:
        _store_states(lm, trunk, batch_tokens, writer, progress)
        summary.trunk_texts, summary.trunk_bytes = trunk.texts, writer.stored_bytes
    summary.layers_read_bytes = lm.by_layer.bytes_read() if lm.by_layer is not None else None
    summary.seconds = time.perf_counter() - began
    return replace(work, config=config)


def finish(work: Work, summary: PrecomputeSummary, progress: Progress, *, patience_s: float) -> None:
    """Writes the view and the list of rejects if every pair is in the cache; otherwise counts the pending ones.

    Args:
        work: the work of the run.
        summary: receives the figures.
        progress: receives notes.
        patience_s: seconds to wait for pairs that other processes have committed.

    Raises:
        UserError: a file of pairs has changed since it was read, or the cache cannot be written.
    """
    store, spec = work.store, work.spec
    index, summary.pending = _look_again(store, spec.digest, work.index, work.distinct, patience_s=patience_s)
    if summary.pending:
        return
    if work.trunk is not None:
        trunk = TrunkIndex.look_up(store, work.trunk.spec.digest, known=work.trunk.index)
        summary.pending = sum(not trunk.holds(ids) for ids in work.distinct)
        if summary.pending:
            return
        store.seal(work.trunk.spec.digest)
    store.seal(spec.digest)

    ensure_unchanged(work.file.files)
    summary.reference = reference_record(work.config, work.source, work.adapter, spec)
    meta = {
        "reference": summary.reference,
        **source_record(work.config, work.file, len(summary.rejects), summary.device),
    }
    write_pairs_view(store, spec.digest, work.view_name, work.data, meta, known=index, progress=progress)
    summary.views = len(store.views())
    summary.rejects_file = write_rejects_file(store, work.view_name, summary.rejects, progress)
    if work.file.kind == "pairs":
        summary.reference_accuracy = _reference_accuracy(index, work.distinct)
    elif work.file.kind == "ranked":
        summary.reference_accuracy = _ranking_accuracy(index, work.data.pairs)


def required_model(config: PrecomputeConfig) -> str:
    """The base that the configuration names; raises UserError if it names none."""
    if config.model is None:
        raise UserError(
            "no model given",
            code="config-missing",
            where="--model",
            expected="the SFT model: a directory, a .gguf file or a hub id",
            remedy="add --model DIR (and --adapter DIR for a LoRA SFT checkpoint), or write `model: DIR` into "
            "dpoeng.yaml in this folder",
        )
    return config.model


def _part(shard: str | None, group: Group) -> Part:
    """The share of this process: from `--shard`, or from its rank under torchrun."""
    if shard is None:
        return Part(group.rank + 1, group.size)
    if group.size > 1:
        raise UserError(
            "--shard cannot be combined with torchrun",
            code="shard-and-ranks",
            where="--shard",
            expected="either --shard, or several processes started by torchrun",
            found=f"--shard {shard}, and WORLD_SIZE {group.size}",
            remedy="leave --shard out: the processes divide the work",
        )
    return Part.parse(shard)


def _read(config: PrecomputeConfig, choice: TokenizerChoice, progress: Progress) -> tuple[PairFile, TokenizedData]:
    """The pairs, as read and as token ids; raises UserError if too few of them are usable."""
    tokenizer = load_chosen(choice)
    if remark := remark_on(choice, tokenizer):
        progress.note(remark)
    file, pairs = stream_pairs(
        config.pairs,
        columns=config.columns,
        where=config.where,
        max_reject_share=config.max_reject_share,
        prompt_format=config.prompt_format,
        ranked_pairs=config.ranked_pairs,
    )
    data = tokenize_pairs(
        pairs,
        tokenizer,
        max_length=config.max_length,
        max_prompt_length=config.max_prompt_length,
        truncation_mode=config.truncation_mode,
        append_eos=config.append_eos,
        train_on=config.train_on,
    )
    if remark := file.column_remark():
        progress.note(remark)
    for name in file.files:
        if is_hub(name):
            progress.note(f"pairs of the hub, pinned: {name}")
    if not data.pairs:
        raise UserError(
            "no usable pair after tokenisation",
            code="data-empty",
            where=", ".join(map(str, config.pairs)),
            expected="pairs with response tokens within max_length",
            found=f"{counted(len(data.rejects), 'pair')} rejected, the first: {data.rejects[0].reason}, "
            f"{data.rejects[0].detail}"
            if data.rejects
            else None,
            remedy="see all reasons with `dpoeng check PAIRS --model MODEL`; raise --max-length if texts are too long",
            exit_status=3,
        )
    check_reject_share([*file.rejects, *data.rejects], file.count + len(file.rejects), config.max_reject_share)
    return file, data


def _look_again(
    store: Store, spec_digest: str, index: KeyIndex, pairs: Sequence[PairIds], *, patience_s: float
) -> tuple[KeyIndex, int]:
    """The index with everything committed since, and how many pairs it still lacks.

    Waits until all pairs are there, or for `patience_s` seconds.
    """
    limit = time.monotonic() + patience_s
    while True:
        index = store.lookup(spec_digest, known=index)
        lacking = sum(ids not in index for ids in pairs)
        if not lacking or time.monotonic() >= limit:
            return index, lacking
        time.sleep(0.5)


def default_batch_tokens(device: torch.device) -> int:
    """Positions per forward: enough to keep the device busy, with little memory compared to the weights."""
    return 16384 if device.type == "cuda" else 2048


def default_view_name(path: Path | RowsInMemory) -> str:
    """`data/pairs.train.jsonl.gz` -> `pairs.train`; invalid names get a hash."""
    stem = hub_view_name(str(path)) if is_hub(str(path)) else path.name or Path(str(path)).resolve().name
    for endings in (COMPRESSIONS, FORMATS):
        stem = next((stem.removesuffix(ending) for ending in endings if stem.endswith(ending)), stem)
    plain = re.sub(r"[^A-Za-z0-9._-]", "-", stem)
    return plain if plain == stem else f"{plain}-{xxhash.xxh3_64_hexdigest(stem.encode())[:6]}"


def _score(
    lm: CausalLM,
    work: Work,
    batch_tokens: int,
    summary: PrecomputeSummary,
    provenance: Mapping[str, Any],
    writer: TrunkWriter | None,
    progress: Progress,
) -> None:
    planned = [(shard, batches_of_pairs(shard, batch_tokens)) for shard in work.mine]
    positions = sum(positions for _, batches in planned for _, positions in batches)
    if lm.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(lm.device)
    flat = Batches([(shard, batch) for shard, batches in planned for batch, _ in batches])
    ends = {int(end) - 1 for end in np.cumsum([len(batches) for _, batches in planned])}
    committed = 0

    def pause() -> None:
        if pending.number:
            name = signal.Signals(pending.number).name
            progress.note(f"received {name}: {counted(committed, 'pair')} of this run are committed")
            pending.hand_on(pending.number)

    with (
        progress.task("reference log-probs", positions, "tokens") as advance,
        keeping_signals() as pending,
        storing(lm, writer),
    ):
        scored = score_batches(lm, flat, ends=ends, note=progress.note, advance=advance, pause=pause)
        for shard, batches in planned:
            for batch, _ in batches:
                groups, _ = share_prompts([shard[i] for i in batch])
                summary.computed_tokens += computed_positions(lm, groups)
                summary.apart_tokens += sum(one.total_tokens for group in groups for one in separate(group))
            rows = [row for _ in batches for row in next(scored)]
            # A shard is whole or absent: a kill costs at most one shard (layer by layer: one pass), and a restart
            # writes the bytes of an undisturbed run.
            work.store.commit_shard(work.spec.digest, rows, provenance)
            committed += len(rows)
    if lm.device.type == "cuda":
        summary.peak_bytes = torch.cuda.max_memory_allocated(lm.device)


def _store_states(lm: CausalLM, trunk: TrunkWork, batch_tokens: int, writer: TrunkWriter, progress: Progress) -> None:
    """Computes the states of pairs whose log-probs the cache has: their forwards end at the trunk's layer."""
    planned = [(shard, batches_of_pairs(shard, batch_tokens)) for shard in trunk.mine]
    sizes = [positions for _, batches in planned for _, positions in batches]
    if not sizes:
        return
    flat = Batches([(shard, batch) for shard, batches in planned for batch, _ in batches])
    with progress.task("hidden states", sum(sizes), "tokens") as advance, storing(lm, writer, stops=True):
        for positions, _ in zip(sizes, store_states(lm, flat, progress.note), strict=True):
            advance(positions, f"{writer.stored_bytes / 1e6:.0f} MB written")


def _reference_accuracy(index: KeyIndex, pairs: SomeIds) -> float:
    """Share of distinct pairs whose chosen response the reference already finds more likely."""
    right = 0
    for ids in pairs:
        pair = index.get(ids)
        assert pair is not None, "every pair is committed"
        right += pair.chosen_sum > pair.rejected_sum
    return right / len(pairs)


def _ranking_accuracy(index: KeyIndex, pairs: TokenRows) -> float:
    """Share of pairs of a better and a worse response of a row of which the reference finds the former likelier."""
    right = compared = 0
    for _, row in itertools.groupby(pairs, lambda pair: (pair.source_file, pair.source_row)):
        stored = [(pair.extra.get("scores"), index.get(pair.ids)) for pair in row]
        scores = np.array(stored[0][0])
        sums = np.array([total for _, pair in stored if pair for total in (pair.chosen_sum, pair.rejected_sum)])
        better = np.argwhere(scores[:, None] > scores[None, :])
        right += int((sums[better[:, 0]] > sums[better[:, 1]]).sum())
        compared += len(better)
    return right / compared
