"""One forward of phase one, or one step of phase two, on the `meta` device: gives their memory without using it.

The real code runs: the model's own modules, bitsandbytes' layers, peft's adapters, `scoring.forward`, and the loop's
step with its checkpointing and optimizer. Only what needs a device is replaced: PyTorch's choice of attention kernel,
and the internal memory of attention, of the log-prob kernels and of bitsandbytes' products. The attention of shared
prompts is the one that a run would choose (`_choose_attention`).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from dpoeng.cache.errors import UserError
from dpoeng.cache.schema import PairIds, ScoredGroup, ScoredPair, ScoredRow
from dpoeng.engine.config.fields import Attention, Quantization, TrainConfig
from dpoeng.engine.memory.divided_layers import gather_layers, part_bytes
from dpoeng.engine.memory.stand_ins import handlers, head_of, kernels_of
from dpoeng.engine.memory.tracker import MemoryTracker
from dpoeng.engine.models.adapters import make_trainable
from dpoeng.engine.models.fsdp import divided_parameters
from dpoeng.engine.models.layers.by_layer import ByLayer
from dpoeng.engine.models.layers.gates import Gates
from dpoeng.engine.models.loading import embedding_on_host, empty_model
from dpoeng.engine.models.lora_product import use_peft_product
from dpoeng.engine.models.model import CausalLM, Layout, decoder_layers, enable_gradient_checkpointing, set_mode
from dpoeng.engine.models.model_config import config_of, sizes
from dpoeng.engine.models.quantized import quantized_layers, quantized_tensors
from dpoeng.engine.models.trunk.stand_ins import cut_below
from dpoeng.engine.runs.metrics import MetricsLog
from dpoeng.engine.runtime.progress import QUIET
from dpoeng.engine.scoring.attention import use_layout
from dpoeng.engine.scoring.choose_layout import CANNOT, try_scored_end, ways_to_attend
from dpoeng.engine.scoring.forward import score_groups
from dpoeng.engine.scoring.layer_passes import Forwards, in_passes
from dpoeng.engine.scoring.layout import row_group
from dpoeng.engine.scoring.scored_end import end_of, put_end
from dpoeng.engine.training.optimizer import Named, build_optimizer, build_scheduler, optimizer_on
from dpoeng.engine.training.order import plan_schedule
from dpoeng.engine.training.rows import HeldOut
from dpoeng.engine.training.run import Run
from dpoeng.engine.training.step import train_step

WEIGHTS, MASTERS, ADAPTERS = "weights", "master weights", "adapters"

GRADIENTS, OPTIMIZER, REFERENCE = "gradients", "optimizer", "reference model"

STAYING = (WEIGHTS, MASTERS, ADAPTERS, OPTIMIZER)
"""Kinds of memory that stay for the whole run."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Lengths of a row in tokens: a pair, or a prompt with more responses."""

    prompt: int
    chosen: int
    rejected: int
    more: tuple[int, ...] = ()

    @property
    def responses(self) -> tuple[int, ...]:
        """The length of each."""
        return self.chosen, self.rejected, *self.more

    @property
    def tokens(self) -> int:
        """With the prompt once."""
        return self.prompt + sum(self.responses)

    def scored(self) -> ScoredRow:
        """A row with these lengths."""
        prompt = np.zeros(self.prompt, dtype=np.int32)
        rest = [*self.responses, self.chosen]
        pairs = [
            ScoredPair(
                PairIds(prompt, np.zeros(one, np.int32), np.zeros(other, np.int32)),
                np.zeros(one, np.float32),
                np.zeros(other, np.float32),
            )
            for one, other in zip(rest[: len(rest) - 1 : 2], rest[1::2], strict=False)
        ]
        if not self.more:
            return pairs[0]
        return ScoredGroup(tuple(pairs), tuple(map(float, range(len(self.responses)))))


@dataclass(frozen=True, slots=True)
class Setup:
    """Everything that the memory of a step depends on.

    Attributes:
        model: the fields of config.json.
        dtype: compute dtype.
        quantization: precision of the base.
        double_quant: 4bit: whether the scales are quantised.
        config: what is trained, the optimizer, the attention, and whether layers are recomputed
            (`gradient_checkpointing` True or False).
        layout: whether a prompt is computed once for both branches.
        kernels: the kernels of a GPU or of a CPU.
        ampere: whether the GPU has compute capability 8.0, which FlashAttention and the fused scoring of the head need.
        accumulates: whether gradients of an earlier forward exist already.
        full_logits: log-probs from whole float32 logits, as in plain PyTorch.
        second_model: a reference model of the same precision next to the policy.
        stock: peft's and transformers' defaults: their LoRA product, the embedding on the device.
        shards: number of devices that share the frozen layers (FSDP2); the result is one device's memory.
        chosen: use only these layers; None for all.
        trunk_layer: the model begins at this layer, from stored states, without the layers below.
        recompute: recompute only this many of the first layers; None for all.
        by_layer: load the layers' weights one at a time; two layers are in memory at once.
    """

    model: Mapping[str, Any]
    dtype: torch.dtype
    quantization: Quantization
    config: TrainConfig
    double_quant: bool = True
    layout: Layout = "shared"
    kernels: Literal["cuda", "cpu"] = "cuda"
    ampere: bool = True
    accumulates: bool = True
    full_logits: bool = False
    second_model: bool = False
    stock: bool = False
    shards: int = 1
    chosen: tuple[int, ...] | None = None
    trunk_layer: int = 0
    recompute: int | None = None
    by_layer: bool = False

    @property
    def layers(self) -> int:
        """Decoder layers that run."""
        depth = sizes(config_of(self.model)).layers if self.chosen is None else len(self.chosen)
        return depth - self.trunk_layer

    def with_layers(self, chosen: Sequence[int]) -> Setup:
        """The same setup with only these of the layers that run; 0 is the first, above a trunk if there is one."""
        numbers = self.chosen or range(self.layers + self.trunk_layer)
        below = min(1, self.trunk_layer)  # stand-ins are all equal and have no weights
        kept = [*range(self.trunk_layer - below, self.trunk_layer), *(layer + self.trunk_layer for layer in chosen)]
        return replace(self, chosen=tuple(numbers[layer] for layer in kept), trunk_layer=below)


def build(setup: Setup, *, policy: bool = True) -> CausalLM:
    """The model of a setup on the meta device, as phase two trains it or as the reference."""
    lm = empty_model(
        setup.model,
        quantization=setup.quantization,
        dtype=setup.dtype,
        double_quant=setup.double_quant,
        layers=setup.chosen,
    )
    if setup.trunk_layer:
        lm.entry = cut_below(lm.base, setup.trunk_layer)
        width = sizes(config_of(setup.model)).hidden
        state = torch.empty(1, width, dtype=setup.dtype, device="meta")  # states are kept in host memory
        lm.states = lambda prompt, response: state.expand(len(prompt if response is None else response), width)
    if policy:
        with torch.device("meta"):  # peft makes a LoRA on the default device, with random numbers
            lm = make_trainable(lm, setup.config, "new" if setup.config.use_peft else "full")
    if setup.stock:
        use_peft_product(lm.model)
    if setup.by_layer:
        # On a CPU waiting states are part of the reported memory, unless they wait in a file.
        lm.by_layer = _by_layer(lm)
        lm.by_layer.keeps_meta = setup.kernels == "cpu" and setup.config.offload_folder is None
    use_layout(lm, setup.layout)
    if setup.layout == "shared":
        _choose_attention(lm, setup)
    if policy and setup.config.gradient_checkpointing and not setup.by_layer:
        enable_gradient_checkpointing(lm, inputs_on_host=setup.config.activation_offloading, layers=setup.recompute)
    return lm


def _choose_attention(lm: CausalLM, setup: Setup) -> None:
    """Sets the attention, and whether the last layer computes scored positions only, as `choose_layout` would.

    Here it is known what fails without values. A run also compares numbers: it may take a later one of the ways, and
    then recomputes all layers, because its forecast was for another (`recipes/policy`).
    """
    key = _as_chosen(lm, setup)
    if key in _chosen:
        lm.attention, names = _chosen[key]
        if names is not None:
            put_end(lm, names)
        return
    groups = [row_group(Pair(3, 2, 2).scored())]

    def runs() -> bool:
        score_groups(lm, groups)
        return True

    with torch.no_grad(), kernels_of(setup.kernels), MemoryTracker("meta", handlers=handlers(setup.kernels)):
        for way in ways_to_attend(setup.config.attention, setup.kernels, setup.dtype):
            if way == "varlen" and setup.kernels == "cuda" and not setup.ampere:
                continue
            lm.attention = way
            if way == "segments":  # if even these fail, prompts are not shared: see `any_depth`
                break
            with contextlib.suppress(*CANNOT):
                runs()
                try_scored_end(lm, runs)
                break
    _chosen[key] = (lm.attention, end_of(lm) if lm.scored_end else None)


_chosen: dict[str, tuple[Attention, tuple[str, str] | None]] = {}
"""A setup as `_as_chosen` writes it -> its attention, and the names of the parts of its last layer (`end_of`)."""


def _as_chosen(lm: CausalLM, setup: Setup) -> str:
    """All that a setup's attention depends on, with the kind of the last layer: some models have several."""
    training = {"optim", "gradient_checkpointing", "activation_offloading", "per_device_train_batch_size"}
    written = ("model", "config")
    unlike = ("chosen", "recompute", "accumulates", "shards")
    rest = [str(getattr(setup, field.name)) for field in fields(setup) if field.name not in written + unlike]
    last = list(dict(decoder_layers(lm.backbone)[-1].named_children()))
    return json.dumps([setup.model, setup.config.model_dump(mode="json", exclude=training), rest, last], default=str)


def _by_layer(lm: CausalLM) -> ByLayer:
    """Runs a model without values layer by layer: loads nothing, and does not keep the states on the host."""
    gates = Gates(decoder_layers(lm.backbone), lm.base.get_input_embeddings(), lm.device)
    if lm.entry is not None:
        width = sizes(lm.base.config).hidden
        lm.entry.states = torch.empty(1, 4, width, dtype=lm.dtype, device="meta")
    with gates.observing(), torch.no_grad(), MemoryTracker("meta"):  # the tracker answers requests for values
        lm.backbone(input_ids=torch.zeros(1, 4, dtype=torch.int64, device="meta"), use_cache=False)
    return ByLayer(gates, contextlib.nullcontext, lambda: 0)


# --------------------------------------------------------------------------- the simulated step


def trace_step(setup: Setup, pairs: Sequence[Pair]) -> MemoryTracker:
    """One optimizer step of phase two over one micro-batch."""
    lm = build(setup)
    set_mode(lm, training=True)
    trainable = lm.trainable_parameters()
    config = setup.config.model_copy(
        update={"per_device_train_batch_size": len(pairs), "gradient_accumulation_steps": 1, "max_steps": 2}
    )
    optimizer, moments = _optimizer(setup, config, trainable)
    if setup.accumulates:
        # As if left by an earlier forward of the step.
        optimizer.zero_grad = lambda set_to_none=True: None  # type: ignore[method-assign]
    else:
        optimizer.zero_grad(set_to_none=True)
    rows = [pair.scored() for pair in pairs]
    run = Run(
        config=config,
        lm=lm,
        train_rows=rows,
        train_weights=None,
        held_out=HeldOut((), None, (), {}),
        schedule=plan_schedule(len(rows), batch=len(rows), epochs=1, max_steps=2, seed=0),
        optimizer=optimizer,
        scheduler=build_scheduler(config, optimizer, 2),
        log=MetricsLog(Path()),
        progress=QUIET,
    )
    tracker = _tracker(setup, lm)
    _hold_gradients(tracker, trainable)
    _hold_moments(tracker, optimizer, moments)

    def before_optimizer(*_: Any) -> None:
        _hold_gradients(tracker, trainable)
        tracker.in_optimizer = True

    optimizer.register_step_pre_hook(before_optimizer)
    with kernels_of(setup.kernels), head_of(full_logits=setup.full_logits), tracker:
        train_step(run, 0)
    return tracker


def _hold_gradients(tracker: MemoryTracker, trainable: Named) -> None:
    for _, parameter in trainable:
        if parameter.grad is not None:
            tracker.hold([parameter.grad], GRADIENTS, of=parameter)


def _hold_moments(
    tracker: MemoryTracker, optimizer: torch.optim.Optimizer, moments: Mapping[torch.Tensor, int]
) -> None:
    for parameter, state in optimizer.state.items():
        tracker.hold(state.values(), OPTIMIZER, of=parameter)
    for parameter, n_bytes in moments.items():
        tracker.hold_bytes(n_bytes, OPTIMIZER, of=parameter)


def _optimizer(
    setup: Setup, config: TrainConfig, trainable: Named
) -> tuple[torch.optim.Optimizer, dict[torch.Tensor, int]]:
    """The optimizer with its moments, and for each tensor the bytes of its moments if they are not tensors here."""
    for _, parameter in trainable:
        parameter.grad = torch.zeros_like(parameter)
    name = optimizer_on(config, on_gpu=setup.kernels == "cuda")
    if name != "adamw_torch":
        # bitsandbytes and torch's fused kernel update in place: two 8-bit moments with a float32 for each block of 256,
        # or two of 32 bits; paged ones can leave the device.
        paged, narrow = "paged" in name, "8bit" in name
        sizes: dict[torch.Tensor, int] = {parameter: 0 if paged else parameter.numel() for _, parameter in trainable}
        moments = {p: 2 * (n + n // 64 if narrow and n >= 4096 else 4 * n) for p, n in sizes.items()}
        return torch.optim.SGD([parameter for _, parameter in trainable], lr=0.1), moments
    optimizer = build_optimizer(config, trainable)
    if setup.kernels == "cuda":
        for group in optimizer.param_groups:
            group["foreach"] = True  # AdamW's default on a GPU
    optimizer.step()
    return optimizer, {}


def trace_forward(setup: Setup, pairs: Sequence[Pair], *, policy: bool) -> MemoryTracker:
    """One forward without gradient: phase one's, or the policy's in an evaluation during training."""
    lm = build(setup, policy=policy)
    set_mode(lm, training=False)
    tracker = _tracker(setup, lm)
    if policy and not setup.config.use_peft:  # an adapter's moments are negligible
        optimizer, moments = _optimizer(setup, setup.config, lm.trainable_parameters())
        _hold_moments(tracker, optimizer, moments)
        optimizer.zero_grad(set_to_none=True)
    with torch.no_grad(), kernels_of(setup.kernels), head_of(full_logits=setup.full_logits), tracker:
        groups = [row_group(pair.scored()) for pair in pairs]
        if lm.by_layer is None:
            score_groups(lm, groups)
        else:
            forwards = Forwards([groups], lambda some: some, _does_not_fit)
            list(in_passes(lm, forwards, lambda some: [score_groups(lm, some)]))
    return tracker


def _does_not_fit(_groups: Sequence[Any], said: str) -> UserError:
    """Of nothing that happens: on the meta device a forward takes no memory."""
    raise AssertionError(said)


def _tracker(setup: Setup, lm: CausalLM) -> MemoryTracker:
    inside = handlers(setup.kernels, deterministic=setup.config.full_determinism, fused_head=setup.ampere)
    tracker = MemoryTracker("meta", handlers=inside, vocabulary=lm.vocab_size)
    tracker.attention = lm.attention if setup.layout == "shared" else None
    layers = decoder_layers(lm.backbone)[-setup.layers :]  # without the stand-ins below a trunk
    for number, layer in enumerate(layers):
        tracker.own([*layer.parameters(), *layer.buffers(), *quantized_tensors(layer)], number)
    _hold_model(tracker, setup, lm)
    if setup.second_model:
        for number, kinds in tracker.peak().by_layer.items():
            tracker.hold_bytes(kinds.get(WEIGHTS, 0), REFERENCE, layer=number)
    tracker.watch_layers(layers, lm.backbone, told=lm.by_layer is not None)
    if lm.by_layer is not None:
        lm.by_layer.gates.need = tracker.enter
    if setup.shards > 1:
        gather_layers(tracker, layers, setup.shards, through_gloo=setup.kernels == "cpu")
    return tracker


def _hold_model(tracker: MemoryTracker, setup: Setup, lm: CausalLM) -> None:
    embedding = lm.base.get_input_embeddings().weight
    for layer in decoder_layers(lm.backbone) if setup.shards > 1 else ():
        for parameter in divided_parameters(layer):
            tracker.see(parameter, WEIGHTS, part_bytes(parameter, setup.shards))
    if setup.by_layer:
        _hold_two_layers(tracker, setup, lm)
    on_host = setup.kernels == "cuda" and not setup.stock and setup.shards == 1
    quantization = "8bit" if setup.by_layer else lm.quantization  # it is then on the host if possible
    elsewhere = on_host and embedding_on_host(lm.base, quantization)
    for name, tensor in [*lm.model.named_parameters(), *lm.model.named_buffers()]:
        if not (elsewhere and tensor is embedding):
            tracker.hold([tensor], ADAPTERS if ".lora_" in name else WEIGHTS)
    for weight, master in lm.masters.items():
        tracker.hold([master], MASTERS, of=weight)
    tracker.hold(quantized_tensors(lm.model), WEIGHTS)


def _hold_two_layers(tracker: MemoryTracker, setup: Setup, lm: CausalLM) -> None:
    """The running layer, on a GPU also the one being copied; plus a tensor that is quantised."""
    sizes, arriving = [], 0
    for layer in decoder_layers(lm.backbone):
        frozen = [p for name, p in layer.named_parameters() if ".lora_" not in name]
        for tensor in [*frozen, *quantized_tensors(layer)]:
            tracker.see(tensor, WEIGHTS, 0)
        storages = {
            t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in (*frozen, *quantized_tensors(layer))
        }
        sizes.append(sum(storages.values()))
        if setup.quantization in ("8bit", "4bit"):
            quantised: list[Any] = quantized_layers(layer)
            wide = [linear.in_features * linear.out_features for linear in quantised]
            arriving = max(arriving, 2 * max(wide, default=0))
    there = 2 if setup.kernels == "cuda" else 1
    tracker.hold_bytes(sum(sorted(sizes)[-there:]) + arriving, WEIGHTS)
