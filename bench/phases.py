"""Measures both phases in one process: pairs and tokens per second, shares of the time, peak memory above the weights.

Layouts are measured in turn (shared, separate, shared, separate, ...) on the same pairs and batches, after an uncounted
round with every length. The code is that of `dpoeng precompute-ref` and `dpoeng train`; phase two reads the cache that
phase one wrote.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from dpoeng.bench.measuring.gpu import EnergyMeter, PoolUse, card_of, copy_bytes_per_s, pool_use
from dpoeng.bench.measuring.measure import (
    PeakMemory,
    Spent,
    TimeSplit,
    gemm_flops,
    held_bytes,
    release_memory,
    synchronize,
    touch,
)
from dpoeng.bench.measuring.records import named_settings, stamp
from dpoeng.bench.measuring.workload import (
    VIEW,
    first_pairs_of,
    model_or_embedded,
    padded_tokens,
    seal_view,
    unique_tokens,
)
from dpoeng.cache.reader import View
from dpoeng.cache.schema import PairIds, as_keys, pair_key
from dpoeng.cache.spec import ReferenceSpec
from dpoeng.cache.store import Store
from dpoeng.engine.config.fields import Dtype, Quantization, TrainConfig
from dpoeng.engine.losses.names import LossSettings
from dpoeng.engine.memory.cards import Gpu
from dpoeng.engine.models.adapters import add_policy_adapter, lora_arguments
from dpoeng.engine.models.loading import load_model, pick_device
from dpoeng.engine.models.model import CausalLM, Layout, enable_gradient_checkpointing, set_mode
from dpoeng.engine.models.quantized import quantized_tensors
from dpoeng.engine.recipes.precompute import default_batch_tokens
from dpoeng.engine.reference.shards import plan_shards
from dpoeng.engine.runtime.outputs import Kind, refuse_output, writing
from dpoeng.engine.runtime.progress import QUIET, Progress
from dpoeng.engine.scoring.attention import use_layout
from dpoeng.engine.scoring.choose_layout import choose_layout
from dpoeng.engine.scoring.layout import batches_of_pairs
from dpoeng.engine.scoring.pairs import score_pairs
from dpoeng.engine.training.batch_loss import batch_loss
from dpoeng.engine.training.optimizer import build_optimizer
from dpoeng.engine.training.rows import Rows


@dataclass(frozen=True, slots=True)
class PhaseSettings:
    """Settings. `model` None is the built-in one; without `pairs`, synthetic pairs of real lengths.

    Attributes:
        batch_size: pairs per step of phase two; phase one packs its default number of tokens.
        steps: steps of phase two in one repeat; phase one scores the pairs of all these steps.
        repeats: counted rounds.
        layers: layers of the built-in model.
        width: hidden size of the built-in model.
    """

    model: str | None = None
    pairs: tuple[Path, ...] = ()
    dtype: Dtype = "auto"
    quantization: Quantization = "none"
    device: str = "auto"
    batch_size: int = 4
    steps: int = 4
    repeats: int = 3
    max_length: int = 512
    lora_r: int = 16
    layers: int = 6
    width: int = 576


@dataclass(slots=True)
class PhaseResult:
    """One phase in one layout. Rates are medians over the repeats.

    Attributes:
        wall_s: each repeat's seconds.
        cpu_s: each repeat's CPU seconds.
        pairs_per_s: pairs per second.
        unique_tokens_per_s: tokens per second, each prompt counted once: the useful work.
        padded_equivalent_per_s: positions per second that padded, separate rows of the same batches would have.
        split: part -> median seconds per repeat.
        peaks_bytes: each repeat's peak above the loaded weights (phase two: weights and adapter).
        peak_bytes: the maximum of these.
        flops: useful FLOP/s: each prompt counted once, frozen weights without a gradient, no padding.
        gemm_flops: FLOP/s of this machine's matrix product on the model's layer shapes: the mean of
            right before and right after each repeat, because the speed of a shared machine changes.
        of_gemm: median over the repeats of useful FLOP/s over `gemm_flops`.
        of_card: `flops` over the card's data sheet; None on a CPU or an unknown card.
        weight_bytes_per_s: bytes of the base that must be read, once per forward and once per backward (twice if
            layers are recomputed), per second.
        of_copy: `weight_bytes_per_s` over the rate of a large copy here.
        of_card_memory: `weight_bytes_per_s` over the card's data sheet, as `of_card`.
        joules_a_pair: energy of the card, median over the repeats; None if the card does not report it.
        pool: on a GPU: the maximum that torch's pool reserved, and the number of retried allocations.
    """

    phase: str
    layout: Layout
    pairs: int
    unique_tokens: int
    padded_equivalent: int
    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    pairs_per_s: float = 0.0
    unique_tokens_per_s: float = 0.0
    padded_equivalent_per_s: float = 0.0
    split: dict[str, Spent] = field(default_factory=dict)
    peaks_bytes: list[int] = field(default_factory=list)
    peak_bytes: int = 0
    peak_method: str = ""
    flops: float = 0.0
    gemm_flops: list[float] = field(default_factory=list)
    of_gemm: float = 0.0
    of_card: float | None = None
    weight_bytes_per_s: float = 0.0
    of_copy: float = 0.0
    of_card_memory: float | None = None
    joules_a_pair: float | None = None
    pool: PoolUse | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of this machine: products (measured on request), copies, and the data sheet of a known card."""

    gemm_flops: Callable[[], float]
    copy_bytes_per_s: float
    card: Gpu | None = None


def bench_phases(settings: PhaseSettings, progress: Progress = QUIET, trace: Path | None = None) -> dict[str, Any]:
    """Measures both phases and returns the record.

    Args:
        settings: the settings of the measurement.
        progress: advanced after each round.
        trace: after the counted rounds one more of each phase runs under torch.profiler, and is written next to this
            name, with the phase appended, for Chrome and Perfetto.

    Raises:
        UserError: the model or the pairs are not usable.
    """
    for phase in ("reference", "training"):
        if trace is not None:
            refuse_output(trace_file(trace, phase), TRACE, inputs=settings.pairs)
    device = pick_device(settings.device)
    with tempfile.TemporaryDirectory(prefix="dpoeng-bench-") as scratch:
        folder = Path(scratch)
        source = model_or_embedded(settings.model, folder, settings.pairs, layers=settings.layers, width=settings.width)
        lm = load_model(
            source, quantization=settings.quantization, dtype=settings.dtype, device=device, tokenizer=False
        )
        pairs = first_pairs_of(
            settings.pairs,
            source,
            settings.batch_size * settings.steps,
            vocabulary=lm.vocab_size,
            max_length=settings.max_length,
        )
        record = stamp("phases", device, named_settings(settings))
        record["versions"]["dtype"] = str(lm.dtype).removeprefix("torch.")
        layers = linear_shapes(lm)
        rows = min(1024, unique_tokens(pairs[: settings.batch_size]))
        gemm = functools.partial(gemm_flops, layers, rows, lm.dtype, device)
        limits = Limits(gemm, copy_bytes_per_s(device), card_of(device))
        results = measure_phases(lm, pairs, folder, settings, limits=limits, progress=progress, trace=trace)
    return {
        **record,
        "gemm_flops": statistics.median(rate for result in results for rate in result.gemm_flops),
        "copy_bytes_per_s": limits.copy_bytes_per_s,
        "card": None if limits.card is None else asdict(limits.card),
        "layout_reason": lm.layout_reason,
        "results": [asdict(result) for result in results],
    }


def measure_phases(
    lm: CausalLM,
    pairs: Sequence[PairIds],
    folder: Path,
    settings: PhaseSettings,
    *,
    limits: Limits,
    progress: Progress = QUIET,
    trace: Path | None = None,
) -> list[PhaseResult]:
    """Measures phase one, then phase two, each in every layout that the model supports.

    Args:
        lm: the newly loaded model; it has a LoRA afterwards.
        pairs: the pairs to score and train on, in this order.
        folder: folder for caches, which are kept.
        settings: batch size, steps, repeats, rank.
        limits: the machine's limits.
        progress: advanced after each round.
        trace: see `bench_phases`.
    """
    set_mode(lm, training=False)
    choose_layout(lm, "auto")
    reason = lm.layout_reason
    layers = linear_shapes(lm)
    touch(lm.base)
    weights = read_bytes(lm)
    layouts: tuple[Layout, ...] = ("shared", "separate") if lm.layout == "shared" else ("separate",)
    rounds = _Rounds(lm, pairs, layouts, settings, limits, progress, trace)

    caches = (folder / f"cache{number}" for number in itertools.count())
    spec = ReferenceSpec.from_fields({"bench": "phases"})
    results = rounds.measure(
        "reference",
        lambda: reference_pass(lm, pairs, next(caches), spec),
        flop=forward_flop(lm, pairs, layers, trained=0)[0],
        weight_bytes=len(reference_batches(lm, pairs)[1]) * weights,
    )

    config = TrainConfig.model_validate({"per_device_train_batch_size": settings.batch_size, "lora_r": settings.lora_r})
    add_policy_adapter(lm, "new", None, lora_arguments(config))
    if lm.device.type == "cuda":
        enable_gradient_checkpointing(lm)
    set_mode(lm, training=True)
    optimizer = build_optimizer(config, lm.trainable_parameters())
    rows = Rows(View.open(folder / "cache0", VIEW), range(len(pairs)))
    trained = sum(parameter.numel() for _, parameter in lm.trainable_parameters())
    passes = 3 if lm.device.type == "cuda" else 2  # on a GPU layers are recomputed
    results += rounds.measure(
        "training",
        lambda: training_pass(lm, rows, optimizer, config),
        flop=sum(forward_flop(lm, pairs, layers, trained=trained)),
        weight_bytes=passes * weights * math.ceil(len(rows) / settings.batch_size),
    )
    lm.layout_reason = reason
    return results


@dataclass(frozen=True, slots=True)
class _Rounds:
    """Measures a phase in every layout in turn, so that other load on the machine affects all of them alike."""

    lm: CausalLM
    pairs: Sequence[PairIds]
    layouts: tuple[Layout, ...]
    settings: PhaseSettings
    limits: Limits
    progress: Progress
    trace: Path | None

    def measure(
        self, phase: str, work: Callable[[], TimeSplit], *, flop: float, weight_bytes: int
    ) -> list[PhaseResult]:
        """Runs `work` in one uncounted round and in all counted ones.

        Args:
            phase: its name.
            work: processes all pairs once.
            flop: FLOP that its result needs, see `forward_flop`.
            weight_bytes: bytes of weights that it must read.
        """
        lm, settings = self.lm, self.settings
        unique, padded = unique_tokens(self.pairs), _padded(self.pairs, settings.batch_size)
        results = {layout: PhaseResult(phase, layout, len(self.pairs), unique, padded) for layout in self.layouts}
        splits: dict[Layout, list[TimeSplit]] = {layout: [] for layout in self.layouts}
        joules: dict[Layout, list[float | None]] = {layout: [] for layout in self.layouts}
        rounds = 1 + settings.repeats
        release_memory(lm.device)
        base = held_bytes(lm.device)
        with self.progress.task(f"{phase} phase", rounds * len(self.layouts), "rounds") as advance:
            gemm = self.limits.gemm_flops()
            for number in range(rounds):
                for layout, result in results.items():
                    use_layout(lm, layout)
                    with PeakMemory(lm.device, base) as memory, EnergyMeter(lm.device) as energy:
                        split = work()
                        split.total()  # waits for a GPU, or its energy would be missing
                    before, gemm = gemm, self.limits.gemm_flops()
                    if number > 0:
                        splits[layout].append(split)
                        joules[layout].append(energy.joules)
                        result.gemm_flops.append((before + gemm) / 2)
                        result.peaks_bytes.append(memory.peak_bytes)
                        result.peak_method = memory.method
                        result.pool = pool_use(lm.device)
                    advance(1, layout)
        for layout, result in results.items():
            _summarise(result, splits[layout], flop, weight_bytes, joules[layout], self.limits)
        if self.trace is not None:
            use_layout(lm, self.layouts[0])
            write_trace(trace_file(self.trace, phase), lm.device, work)
        return list(results.values())


def reference_pass(lm: CausalLM, pairs: Sequence[PairIds], cache: Path, spec: ReferenceSpec) -> TimeSplit:
    """Phase one over `pairs` into a new cache: longest first, with phase one's number of tokens per forward."""
    split = TimeSplit(lm.device)
    with split.part("data"):
        store = Store.open(cache, create=True)
        digest = store.put_spec(spec)
        ordered, batches = reference_batches(lm, pairs)
    rows = []
    with _forward_apart(lm, split):
        for batch in batches:
            with split.part("head"):
                rows += score_pairs(lm, [ordered[i] for i in batch])
    with split.part("data"):
        store.commit_shard(digest, rows, {})
        seal_view(store, digest, pairs)
    return split


def reference_batches(lm: CausalLM, pairs: Sequence[PairIds]) -> tuple[Sequence[PairIds], list[Sequence[int]]]:
    """The pairs in phase one's order, and which of them form each forward."""
    distinct = {pair_key(pair): pair for pair in pairs}
    (order,) = plan_shards(
        list(distinct.values()), as_keys(list(distinct)), sum(pair.total_tokens for pair in distinct.values())
    )
    ordered = [list(distinct.values())[i] for i in order]
    return ordered, [batch for batch, _ in batches_of_pairs(ordered, default_batch_tokens(lm.device))]


def trace_file(trace: Path, phase: str) -> Path:
    """Returns the path of a phase's trace."""
    return trace.with_stem(f"{trace.stem}-{phase}")


def _is_trace(path: Path) -> bool:
    with path.open("rb") as file:
        return b'"schemaVersion"' in file.read(200)


TRACE = Kind("the trace", _is_trace, forced=False)


def write_trace(path: Path, device: torch.device, work: Callable[[], object]) -> None:
    """Runs `work` under torch.profiler and writes the trace, for chrome://tracing or ui.perfetto.dev."""
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=kinds) as profiler:
        work()
        synchronize(device)
    with writing(path, TRACE) as temporary:
        profiler.export_chrome_trace(str(temporary))


def training_pass(lm: CausalLM, rows: Rows, optimizer: torch.optim.Optimizer, config: TrainConfig) -> TimeSplit:
    """Phase two over `rows`, one step per batch."""
    split = TimeSplit(lm.device)
    parameters = [parameter for _, parameter in lm.trainable_parameters()]
    size = config.per_device_train_batch_size
    with _forward_apart(lm, split):
        for begin in range(0, len(rows), size):
            with split.part("data"):
                batch = rows[begin : begin + size]
            with split.part("head"):
                loss = batch_loss(lm, batch, LossSettings.of(config)).losses.mean()
            with split.part("backward"):
                torch.autograd.backward(loss)
            with split.part("optimizer"):
                torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    return split


@contextlib.contextmanager
def _forward_apart(lm: CausalLM, split: TimeSplit) -> Iterator[None]:
    """Counts the layers below the head as `forward` and the rest of scoring (packing, head, loss) as `head`."""
    handles = [
        lm.backbone.register_forward_pre_hook(lambda *_: split.enter("forward")),
        lm.backbone.register_forward_hook(lambda *_: split.leave()),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def linear_shapes(lm: CausalLM) -> list[tuple[int, int]]:
    """(in, out) of every frozen linear layer below the head; without adapters."""
    return [
        (module.in_features, module.out_features)
        for name, module in lm.base.named_modules()
        if isinstance(module, nn.Linear) and module is not lm.head and ".lora_" not in name
    ]


def read_bytes(lm: CausalLM) -> int:
    """Bytes of the base that every forward must read: all but an input embedding that is not also the head."""
    tensors = [*lm.base.parameters(), *quantized_tensors(lm.base)]
    sizes = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}
    embedding: Any = lm.base.get_input_embeddings().weight
    if embedding is not lm.head.weight:
        del sizes[embedding.data_ptr()]
    return sum(sizes.values())


def forward_flop(
    lm: CausalLM, pairs: Sequence[PairIds], layers: Sequence[tuple[int, int]], *, trained: int
) -> tuple[float, float]:
    """FLOP of forward and backward that the result needs: every prompt once, no padding, no attention pair twice.

    A frozen layer costs 2 FLOP per weight and token forward and 2 backward (no gradient of the weight); a trained one 4
    backward; attention 4 per visible pair and channel forward and 8 backward; the head 2 per weight and scored token in
    each direction.
    """
    config = lm.base.config.get_text_config()
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    tokens = unique_tokens(pairs)
    frozen = sum(n_in * n_out for n_in, n_out in layers)
    head = sum(len(p.chosen_ids) + len(p.rejected_ids) for p in pairs) * lm.vocab_size * config.hidden_size
    visible = 0
    for pair in pairs:
        prompt = len(pair.prompt_ids)
        visible += prompt * (prompt + 1) // 2
        visible += sum(n * prompt + n * (n + 1) // 2 for n in (len(pair.chosen_ids), len(pair.rejected_ids)))
    attention = visible * width * config.num_hidden_layers
    forward = 2.0 * tokens * (frozen + trained) + 4.0 * attention + 2.0 * head
    backward = 2.0 * tokens * (frozen + 2 * trained) + 8.0 * attention + 2.0 * head
    return forward, backward


def _summarise(
    result: PhaseResult,
    splits: Sequence[TimeSplit],
    flop: float,
    weight_bytes: int,
    joules: Sequence[float | None],
    limits: Limits,
) -> None:
    totals = [split.total() for split in splits]
    result.peak_bytes = max(result.peaks_bytes)
    result.wall_s = [total.wall_s for total in totals]
    result.cpu_s = [total.cpu_s for total in totals]
    seconds = statistics.median(result.wall_s)
    result.pairs_per_s = result.pairs / seconds
    result.unique_tokens_per_s = result.unique_tokens / seconds
    result.padded_equivalent_per_s = result.padded_equivalent / seconds
    result.flops = flop / seconds
    result.of_gemm = statistics.median(
        flop / wall_s / rate for wall_s, rate in zip(result.wall_s, result.gemm_flops, strict=True)
    )
    result.weight_bytes_per_s = weight_bytes / seconds
    if limits.card is not None:
        result.of_card = result.flops / limits.card.flops
        result.of_card_memory = result.weight_bytes_per_s / limits.card.bytes_per_s
    result.of_copy = result.weight_bytes_per_s / limits.copy_bytes_per_s
    measured = [value for value in joules if value is not None]
    result.joules_a_pair = statistics.median(measured) / result.pairs if measured else None
    for name in splits[0].parts:
        result.split[name] = Spent(
            statistics.median(split.parts[name].wall_s for split in splits),
            statistics.median(split.parts[name].cpu_s for split in splits),
        )


def _padded(pairs: Sequence[PairIds], batch_size: int) -> int:
    return sum(padded_tokens(pairs[i : i + batch_size]) for i in range(0, len(pairs), batch_size))
