"""Measures the memory of both phases and compares it with `dpoeng plan`; also a step with each kind of reference.

All cases run in one process on one batch: phase one's forward; a step with cached log-probs; the same with layers
loaded one at a time, and from a trunk at two thirds of the depth (random states); a step that first runs the reference
by switching the adapter off; one that runs a second model; and the same in plain PyTorch, with whole logits, one row
per response and peft's own LoRA. All but the last use dpoeng's code, so those with a reference differ only in it. The
reference's forward comes before the policy's, when nothing is kept for a backward pass yet: the minimum that a
reference in the step can cost.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from dpoeng.bench.measuring.allocator import trace_allocator
from dpoeng.bench.measuring.measure import PeakMemory, held_bytes, release_memory, touch
from dpoeng.bench.measuring.records import named_settings, stamp
from dpoeng.bench.measuring.workload import first_pairs_of, model_or_embedded
from dpoeng.cache.schema import PairIds, ScoredRow
from dpoeng.engine.config.fields import Dtype, Quantization, TrainConfig
from dpoeng.engine.memory.any_depth import forward_memory, step_memory
from dpoeng.engine.memory.overhead import model_fields
from dpoeng.engine.memory.simulate import OPTIMIZER, Pair, Setup
from dpoeng.engine.memory.stand_ins import head_of
from dpoeng.engine.memory.tracker import MemoryTracker, Peak
from dpoeng.engine.models.adapters import as_reference, make_trainable
from dpoeng.engine.models.loading import embedding_on_host, load_model, pick_device
from dpoeng.engine.models.lora_product import use_peft_product
from dpoeng.engine.models.model import CausalLM, decoder_layers, enable_gradient_checkpointing, set_mode
from dpoeng.engine.models.model_config import config_of, sizes
from dpoeng.engine.models.quantized import quantized_tensors
from dpoeng.engine.runs.metrics import MetricsLog
from dpoeng.engine.runtime.distributed import ALONE, Group
from dpoeng.engine.runtime.progress import QUIET, Advance, Progress
from dpoeng.engine.scoring.attention import use_layout
from dpoeng.engine.scoring.choose_layout import choose_layout
from dpoeng.engine.scoring.pairs import score_pairs
from dpoeng.engine.training.optimizer import build_optimizer, build_scheduler
from dpoeng.engine.training.order import plan_schedule
from dpoeng.engine.training.rows import HeldOut
from dpoeng.engine.training.run import Run
from dpoeng.engine.training.step import train_step

PHASE_ONE, CACHED, BY_LAYER, FROM_TRUNK, ADAPTER_OFF, TWO_MODELS, WHOLE_LOGITS = (
    "phase one", "cached reference", "layer by layer", "from the trunk", "adapter off", "two models",
    "two models, whole logits",
)  # fmt: skip
TRUNK_SHARE = 2 / 3
POOL = 64
"""The number of pairs read; the longest of them are the batch, because they decide whether a run fits."""


@dataclass(frozen=True, slots=True)
class MemorySettings:
    """Settings. `model` None is the built-in one; without `pairs`, synthetic pairs of real lengths.

    Attributes:
        batch_size: pairs per forward, in both phases.
        gradient_checkpointing: whether layers are recomputed in the backward pass.
    """

    model: str | None = None
    pairs: tuple[Path, ...] = ()
    dtype: Dtype = "auto"
    quantization: Quantization = "none"
    device: str = "auto"
    batch_size: int = 2
    max_length: int = 512
    lora_r: int = 16
    gradient_checkpointing: bool = True


@dataclass(frozen=True, slots=True)
class CaseMemory:
    """One case. Bytes are those of tensors with weights, except `process_bytes`.

    Attributes:
        predicted_bytes: the simulated peak, as `dpoeng plan` prints it.
        by_kind: its parts.
        measured_bytes: the allocator's peak.
        process_bytes: the process's peak, above its memory before the model was loaded: resident memory on
            a CPU, memory reserved by the allocator on a GPU.
        outline: (milliseconds, bytes) over the step, the maximum of each interval.
    """

    case: str
    predicted_bytes: int
    by_kind: dict[str, int]
    measured_bytes: int
    process_bytes: int
    outline: list[tuple[float, int]]

    @property
    def difference(self) -> float:
        """Measured over predicted, less 1."""
        return self.measured_bytes / self.predicted_bytes - 1


def bench_memory(settings: MemorySettings, progress: Progress = QUIET) -> dict[str, Any]:
    """Measures all cases and returns the record.

    Raises:
        UserError: the model or the pairs are not usable.
    """
    device = pick_device(settings.device)
    record = stamp("memory", device, named_settings(settings))
    with tempfile.TemporaryDirectory(prefix="dpoeng-bench-") as scratch:
        source = model_or_embedded(settings.model, Path(scratch), settings.pairs)

        def load(**more: Any) -> CausalLM:
            how: dict[str, Any] = {"quantization": settings.quantization, "dtype": settings.dtype, "device": device}
            return load_model(source, tokenizer=False, **how, **more)

        release_memory(device)
        before = held_bytes(device)
        lm = load()
        set_mode(lm, training=False)
        choose_layout(lm, "auto")
        pool = first_pairs_of(settings.pairs, source, POOL, vocabulary=lm.vocab_size, max_length=settings.max_length)
        pairs = sorted(pool, key=lambda pair: -pair.total_tokens)[: settings.batch_size]
        setup = Setup(
            model=model_fields(str(source.folder)),
            dtype=lm.dtype,
            quantization=settings.quantization,
            config=TrainConfig.model_validate(
                {
                    "lora_r": settings.lora_r,
                    "gradient_checkpointing": settings.gradient_checkpointing,
                    "per_device_train_batch_size": len(pairs),
                    "gradient_accumulation_steps": 1,
                }
            ),
            layout=lm.layout,
            kernels="cuda" if device.type == "cuda" else "cpu",
            accumulates=False,
        )
        cases = measure_cases(lm, load, pairs, setup, before=before, progress=progress)
    record["versions"]["dtype"] = str(lm.dtype).removeprefix("torch.")
    return {
        **record,
        "layout": setup.layout,
        "layout_reason": lm.layout_reason,
        "lengths": [[len(p.prompt_ids), len(p.chosen_ids), len(p.rejected_ids)] for p in pairs],
        "results": [{**asdict(case), "difference": case.difference} for case in cases],
    }


def measure_cases(
    lm: CausalLM,
    load: Callable[..., CausalLM],
    pairs: Sequence[PairIds],
    setup: Setup,
    *,
    before: int = 0,
    progress: Progress = QUIET,
) -> list[CaseMemory]:
    """Measures every case on one batch; plain PyTorch's is left out if its prediction assumes another placement.

    Args:
        lm: the newly loaded model, its layout chosen; it has a LoRA afterwards.
        load: loads the same model once more, with `by_layer` or a `trunk_layer`.
        pairs: the batch.
        setup: the simulated setup; the measurement uses its config and layout.
        before: bytes of the process before `lm` was loaded, see `held_bytes`.
        progress: advanced after each case.
    """
    # Plain PyTorch is predicted with its embedding on the device; if dpoeng keeps it on the host, they differ.
    placed_alike = lm.device.type != "cuda" or not embedding_on_host(lm.base, lm.quantization)
    lengths = [Pair(len(ids.prompt_ids), len(ids.chosen_ids), len(ids.rejected_ids)) for ids in pairs]
    with progress.task("memory", 7 if placed_alike else 6, "cases") as advance:
        cases = _Cases(lm.device, before, advance)
        touch(lm.base)
        rows = score_pairs(lm, pairs)
        forward = forward_memory(setup, lengths, policy=False).peak
        cases.add(PHASE_ONE, lambda: score_pairs(lm, pairs), tensor_bytes(lm), forward)
        with training_run(lm, rows, setup.config) as run:
            step = _counted_step(run)
            step()  # allocates the optimizer's moments, and whatever libraries keep from their first call
            cached = step_memory(setup, lengths).peak
            cases.add(CACHED, step, tensor_bytes(lm, run.optimizer), cached)
            _measure_by_layer(cases, load, rows, setup, lengths)
            _measure_from_trunk(cases, load, rows, setup, lengths)
            _measure_adapter_off(cases, run, step, pairs, forward_memory(setup, lengths, policy=True).peak, cached)
            _measure_second_model(cases, run, step, load(), pairs, setup, lengths, whole_logits=placed_alike)
    return cases.measured


@dataclass(frozen=True, slots=True)
class _Cases:
    """Measures one case after the other. `before`: bytes of the process before any model was loaded."""

    device: torch.device
    before: int
    advance: Advance
    measured: list[CaseMemory] = field(default_factory=list)

    def add(self, case: str, work: Callable[[], object], held: int, predicted: Peak) -> None:
        """Runs `work` twice, for its tensors and for the process; `held`: bytes of tensors that exist before it."""
        tensors, outline = _tensor_peak(work, self.device, held, self.before)
        process = _process_peak(work, self.device, self.before)
        by_kind = dict(predicted.by_kind)
        self.measured.append(CaseMemory(case, predicted.n_bytes, by_kind, tensors, process, outline))
        self.advance(1, case)


def _measure_by_layer(
    cases: _Cases, load: Callable[..., CausalLM], rows: Sequence[ScoredRow], setup: Setup, lengths: Sequence[Pair]
) -> None:
    """A step of another model whose layers are loaded one at a time.

    Where the files hold what is computed with, a layer is mapped and not copied: the allocator does not see it, and its
    bytes are added.
    """
    lm = load(by_layer=True)
    assert lm.by_layer is not None
    layers = decoder_layers(lm.backbone)
    with lm.by_layer.gates.observing(), torch.no_grad():
        lm.backbone(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=lm.device), use_cache=False)
    use_layout(lm, setup.layout)
    trace = trace_allocator(lambda: lm.by_layer.gates.need(0), lm.device)  # type: ignore[union-attr]
    mapped = max(0, _tensors_bytes([*layers[0].parameters(), *quantized_tensors(layers[0])]) - trace.peak_bytes)
    with training_run(lm, rows, setup.config) as run:
        step = _counted_step(run)
        step()
        base = {id(p) for layer in layers for name, p in layer.named_parameters() if ".lora_" not in name}
        held = [p for p in lm.model.parameters() if id(p) not in base]
        held += [t for state in run.optimizer.state.values() for t in state.values()]
        expected = step_memory(replace(setup, by_layer=True), lengths).peak
        cases.add(BY_LAYER, step, _tensors_bytes(held) + (mapped if lm.device.type == "cpu" else 0), expected)


def _measure_from_trunk(
    cases: _Cases, load: Callable[..., CausalLM], rows: Sequence[ScoredRow], setup: Setup, lengths: Sequence[Pair]
) -> None:
    """A step of another model that begins at two thirds of the depth, from random states in the host's memory."""
    layer = round(TRUNK_SHARE * setup.layers)
    if not 0 < layer < setup.layers:
        return
    lm = load(trunk_layer=layer)
    use_layout(lm, setup.layout)
    width = sizes(config_of(setup.model)).hidden
    states = torch.randn(max(len(r.ids.prompt_ids) + r.ids.total_tokens for r in rows), width).to(lm.dtype)
    lm.states = lambda prompt, response: states[: len(prompt if response is None else response)]
    with training_run(lm, rows, setup.config) as run:
        step = _counted_step(run)
        step()
        expected = step_memory(replace(setup, trunk_layer=layer), lengths).peak
        cases.add(FROM_TRUNK, step, tensor_bytes(lm, run.optimizer), expected)


def _tensors_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of tensors themselves, each once: of one that is mapped, not those of its file."""
    return sum({t.data_ptr(): min(t.nbytes, t.untyped_storage().nbytes()) for t in tensors}.values())


def _measure_adapter_off(
    cases: _Cases, run: Run, step: Callable[[], object], pairs: Sequence[PairIds], forward: Peak, cached: Peak
) -> None:
    """A step that first runs the reference by switching the adapter off.

    `forward` and `cached` are the predicted peaks of that forward, without an optimizer, and of the step alone.
    """

    def work() -> None:
        set_mode(run.lm, training=False)
        with as_reference(run.lm, "new"):
            run.train_rows = score_pairs(run.lm, pairs)
        set_mode(run.lm, training=True)
        step()

    work()
    moments = cached.by_kind.get(OPTIMIZER, 0)
    with_moments = Peak(forward.n_bytes + moments, {**forward.by_kind, OPTIMIZER: moments})
    predicted = max(cached, with_moments, key=lambda peak: peak.n_bytes)
    cases.add(ADAPTER_OFF, work, tensor_bytes(run.lm, run.optimizer), predicted)


def _measure_second_model(
    cases: _Cases,
    run: Run,
    step: Callable[[], object],
    reference: CausalLM,
    pairs: Sequence[PairIds],
    setup: Setup,
    lengths: Sequence[Pair],
    *,
    whole_logits: bool,
) -> None:
    """A step that first runs a second model; with `whole_logits`, all of it in plain PyTorch and peft."""
    lm = run.lm
    set_mode(reference, training=False)
    use_layout(reference, lm.layout)
    touch(reference.base)

    def work() -> None:
        run.train_rows = score_pairs(reference, pairs)
        step()

    def held() -> int:
        return tensor_bytes(lm, run.optimizer) + tensor_bytes(reference)

    work()
    cases.add(TWO_MODELS, work, held(), step_memory(replace(setup, second_model=True), lengths).peak)
    if not whole_logits:
        return
    use_peft_product(lm.model)
    use_layout(lm, "separate")
    use_layout(reference, "separate")
    plain = replace(setup, layout="separate", second_model=True, full_logits=True, stock=True)
    with head_of(full_logits=True):
        work()
        cases.add(WHOLE_LOGITS, work, held(), step_memory(plain, lengths).peak)


@contextlib.contextmanager
def training_run(
    lm: CausalLM, rows: Sequence[ScoredRow], config: TrainConfig, *, group: Group = ALONE
) -> Iterator[Run]:
    """Phase two, ready for its first step, on one batch that repeats; makes `lm` trainable."""
    make_trainable(lm, config, "new" if config.use_peft else "full")
    if config.gradient_checkpointing and lm.by_layer is None:  # which recomputes layers by itself
        enable_gradient_checkpointing(lm, inputs_on_host=config.activation_offloading)
    set_mode(lm, training=True)
    optimizer = build_optimizer(config, lm.trainable_parameters())
    steps = 1000
    with tempfile.TemporaryDirectory(prefix="dpoeng-bench-") as folder:
        yield Run(
            config=config,
            lm=lm,
            train_rows=rows,
            train_weights=None,
            held_out=HeldOut((), None, (), {}),
            schedule=plan_schedule(len(rows), batch=len(rows), epochs=steps, max_steps=steps, seed=0),
            optimizer=optimizer,
            scheduler=build_scheduler(config, optimizer, steps),
            log=MetricsLog(Path(folder)),
            progress=QUIET,
            group=group,
        )


def tensor_bytes(lm: CausalLM, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Bytes of the model's and the optimizer's tensors on the model's device, each storage once."""
    tracker = MemoryTracker(lm.device.type)
    tracker.hold(
        [*lm.model.parameters(), *lm.model.buffers(), *lm.masters.values(), *quantized_tensors(lm.model)], "model"
    )
    if optimizer is not None:
        tracker.hold((t for state in optimizer.state.values() for t in state.values()), OPTIMIZER)
    return tracker.live_bytes


def _counted_step(run: Run) -> Callable[[], object]:
    done = iter(range(1 << 30))
    return lambda: train_step(run, next(done))


def _tensor_peak(
    work: Callable[[], object], device: torch.device, held: int, before: int
) -> tuple[int, list[tuple[float, int]]]:
    release_memory(device)
    if device.type == "cuda":
        held = int(torch.cuda.memory_allocated(device)) - before
        torch.cuda.reset_peak_memory_stats(device)
    trace = trace_allocator(work, device)
    peak = held + trace.peak_bytes
    if device.type == "cuda":
        peak = int(torch.cuda.max_memory_allocated(device)) - before
    return peak, [(ms, held + n_bytes) for ms, n_bytes in trace.outline()]


def _process_peak(work: Callable[[], object], device: torch.device, before: int) -> int:
    with PeakMemory(device, before) as memory:
        work()
    return int(torch.cuda.max_memory_reserved(device)) if device.type == "cuda" else memory.peak_bytes
