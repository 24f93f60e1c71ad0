"""One forward of phase one, one step of phase two, on the `meta` device: the memory they would take, without taking it.

What runs is the real thing: the model's own modules, bitsandbytes' layers, peft's adapters, `dpoeng.engine.scoring`,
the loop's step with its checkpointing and optimizer. Replaced are only what cannot run without a device: which
attention kernel is called, and what the log-prob kernels and bitsandbytes' products take for themselves.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from dpoeng.cache.schema import PairIds, ScoredPair
from dpoeng.engine import batch, scoring
from dpoeng.engine.adapters import make_trainable
from dpoeng.engine.config import Quantization, TrainConfig
from dpoeng.engine.fsdp import divided_parameters
from dpoeng.engine.layout import pair_group
from dpoeng.engine.lora import use_peft_product
from dpoeng.engine.memory_tracker import MemoryTracker
from dpoeng.engine.metrics import MetricsLog
from dpoeng.engine.model import (
    CausalLM,
    Layout,
    decoder_layers,
    embedding_on_host,
    empty_model,
    enable_gradient_checkpointing,
    set_mode,
    use_layout,
)
from dpoeng.engine.optim import Named, build_optimizer, build_scheduler
from dpoeng.engine.order import plan_schedule
from dpoeng.engine.progress import QUIET
from dpoeng.engine.quantized import quantized_tensors
from dpoeng.engine.run_state import HeldOut, Run
from dpoeng.engine.scoring import score_groups
from dpoeng.engine.simulate_fsdp import gather_layers, part_bytes
from dpoeng.engine.step import train_step
from dpoeng.kernels.cpu_linear import as_on_cpu
from dpoeng.kernels.head import Head, sum_dtype
from dpoeng.kernels.head_gradient import tiled_gradients
from dpoeng.kernels.tiled_logps import tiled_logps

WEIGHTS, MASTERS, ADAPTERS = "weights", "master weights", "adapters"
GRADIENTS, OPTIMIZER, REFERENCE = "gradients", "optimizer", "reference model"
STAYING = (WEIGHTS, MASTERS, ADAPTERS, OPTIMIZER)
"""What is there for the whole run."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Lengths of a pair in tokens."""

    prompt: int
    chosen: int
    rejected: int

    def scored(self) -> ScoredPair:
        """A pair of these lengths."""
        prompt, chosen, rejected = (np.zeros(n, dtype=np.int32) for n in (self.prompt, self.chosen, self.rejected))
        ids = PairIds(prompt, chosen, rejected)
        return ScoredPair(ids, np.zeros(self.chosen, np.float32), np.zeros(self.rejected, np.float32))


@dataclass(frozen=True, slots=True)
class Setup:
    """All that the memory of a step depends on.

    Attributes:
        model: the fields of config.json.
        dtype: compute dtype.
        quantization: how the base is held.
        double_quant: 4bit: whether the scales are quantised.
        config: what is trained, the optimizer, and whether layers are recomputed (`gradient_checkpointing` True or
            False).
        layout: whether a prompt is run once for both branches.
        kernels: whose kernels: a GPU's or a CPU's.
        accumulates: whether gradients of an earlier forward are there already.
        full_logits: log-probs from whole logits in float32, as plain PyTorch has it.
        second_model: a reference model of the same precision beside the policy.
        stock: as peft and transformers have it: their LoRA product, the embedding on the device.
        shards: over how many devices the frozen layers are divided (FSDP2); what one of them holds is told.
    """

    model: Mapping[str, Any]
    dtype: torch.dtype
    quantization: Quantization
    config: TrainConfig
    double_quant: bool = True
    layout: Layout = "shared"
    kernels: Literal["cuda", "cpu"] = "cuda"
    accumulates: bool = True
    full_logits: bool = False
    second_model: bool = False
    stock: bool = False
    shards: int = 1

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return int(self.model["num_hidden_layers"])

    def with_layers(self, count: int) -> Setup:
        """The same with another number of layers."""
        fields = {**self.model, "num_hidden_layers": count}
        if fields.get("layer_types"):
            fields["layer_types"] = fields["layer_types"][:count]
        return replace(self, model=fields)


def build(setup: Setup, *, policy: bool = True) -> CausalLM:
    """The model of a setup on the meta device, as phase two trains it, or as the reference."""
    lm = empty_model(setup.model, quantization=setup.quantization, dtype=setup.dtype, double_quant=setup.double_quant)
    if policy:
        lm = make_trainable(lm, setup.config, "new" if setup.config.use_peft else "full")
        if setup.config.gradient_checkpointing:
            enable_gradient_checkpointing(lm, inputs_on_host=setup.config.activation_offloading)
    if setup.stock:
        use_peft_product(lm.model)
    use_layout(lm, setup.layout)
    return lm


# --------------------------------------------------------------------------- what is run


def trace_step(setup: Setup, pairs: Sequence[Pair]) -> MemoryTracker:
    """One optimizer step of phase two over one micro-batch."""
    lm = build(setup)
    set_mode(lm, training=True)
    trainable = lm.trainable_parameters()
    config = setup.config.model_copy(
        update={"per_device_train_batch_size": len(pairs), "gradient_accumulation_steps": 1, "max_steps": 2}
    )
    optimizer, state_bytes = _optimizer(setup, config, trainable)
    if setup.accumulates:
        # As if an earlier forward of the step had left them.
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
    tracker.hold((p.grad for _, p in trainable if p.grad is not None), GRADIENTS)
    tracker.hold((t for state in optimizer.state.values() for t in state.values()), OPTIMIZER)
    tracker.hold_bytes(state_bytes, OPTIMIZER)

    def before_optimizer(*_: Any) -> None:
        tracker.hold((p.grad for _, p in trainable if p.grad is not None), GRADIENTS)
        tracker.in_optimizer = True

    optimizer.register_step_pre_hook(before_optimizer)
    with _kernels_of(setup.kernels), head_of(setup), tracker:
        train_step(run, 0)
    return tracker


def _optimizer(setup: Setup, config: TrainConfig, trainable: Named) -> tuple[torch.optim.Optimizer, int]:
    """The optimizer with its moments made, and bytes of moments that are no tensors here."""
    for _, parameter in trainable:
        parameter.grad = torch.zeros_like(parameter)
    if config.optim != "adamw_torch":
        # bitsandbytes and torch's fused kernel update in place: two moments of 8 bits and a float32 a block of 256
        # each, or of 32; paged ones can leave the device.
        paged, narrow = "paged" in config.optim, "8bit" in config.optim
        sizes = [0 if paged else parameter.numel() for _, parameter in trainable]
        moments = sum(2 * (n + n // 64 if narrow and n >= 4096 else 4 * n) for n in sizes)
        return torch.optim.SGD([parameter for _, parameter in trainable], lr=0.1), moments
    optimizer = build_optimizer(config, trainable)
    if setup.kernels == "cuda" and config.optim == "adamw_torch":
        for group in optimizer.param_groups:
            group["foreach"] = True  # what AdamW chooses on a GPU
    optimizer.step()
    return optimizer, 0


def trace_forward(setup: Setup, pairs: Sequence[Pair], *, policy: bool) -> MemoryTracker:
    """One forward without gradient: phase one's, or the evaluation's of the policy in training."""
    lm = build(setup, policy=policy)
    set_mode(lm, training=False)
    tracker = _tracker(setup, lm)
    if policy and not setup.config.use_peft:  # an adapter's moments are little beside it
        optimizer, state_bytes = _optimizer(setup, setup.config, lm.trainable_parameters())
        tracker.hold((t for state in optimizer.state.values() for t in state.values()), OPTIMIZER)
        tracker.hold_bytes(state_bytes, OPTIMIZER)
        optimizer.zero_grad(set_to_none=True)
    with torch.no_grad(), _kernels_of(setup.kernels), head_of(setup), tracker:
        score_groups(lm, [pair_group(pair.scored().ids) for pair in pairs])
    return tracker


def model_bytes(setup: Setup, lm: CausalLM) -> dict[str, int]:
    """Bytes of the base, of its masters and of all adapters on the device, each storage once."""
    tracker = MemoryTracker(lm.device.type)
    _hold_model(tracker, setup, lm)
    return dict(tracker.peak().by_kind)


def _tracker(setup: Setup, lm: CausalLM) -> MemoryTracker:
    tracker = MemoryTracker("meta", handlers=_handlers(setup.kernels), vocabulary=lm.vocab_size)
    _hold_model(tracker, setup, lm)
    tracker.watch_layers(decoder_layers(lm.backbone))
    if setup.shards > 1:
        gather_layers(tracker, decoder_layers(lm.backbone), setup.shards, through_gloo=setup.kernels == "cpu")
    if setup.second_model:
        tracker.hold_bytes(model_bytes(setup, lm)[WEIGHTS], REFERENCE)
    return tracker


def _hold_model(tracker: MemoryTracker, setup: Setup, lm: CausalLM) -> None:
    embedding = lm.base.get_input_embeddings().weight
    for layer in decoder_layers(lm.backbone) if setup.shards > 1 else ():
        for parameter in divided_parameters(layer):
            tracker.see(parameter, WEIGHTS, part_bytes(parameter, setup.shards))
    on_host = setup.kernels == "cuda" and not setup.stock and setup.shards == 1
    elsewhere = on_host and embedding_on_host(lm.base, lm.quantization)
    for name, tensor in [*lm.model.named_parameters(), *lm.model.named_buffers()]:
        if not (elsewhere and tensor is embedding):
            tracker.hold([tensor], ADAPTERS if ".lora_" in name else WEIGHTS)
    tracker.hold(lm.masters.values(), MASTERS)
    tracker.hold(quantized_tensors(lm.model), WEIGHTS)


# --------------------------------------------------------------------------- what stands in for a device


def _attention(
    device_type: str,
    original: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """The kernel that torch would choose on a device; on the meta device it would choose the one of all scores."""
    if not query.is_meta:
        result: torch.Tensor = original(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
        return result
    aten = torch.ops.aten
    if attn_mask is not None and attn_mask.dtype == torch.bool:  # as `convert_boolean_attn_mask` of torch does
        hidden, attn_mask = attn_mask.logical_not(), torch.zeros_like(attn_mask, dtype=query.dtype)
        attn_mask.masked_fill_(hidden, float("-inf"))
        del hidden
    if device_type == "cpu":
        out = aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
        )
    elif attn_mask is None and query.dtype != torch.float32 and query.shape[-1] <= 256:
        out = aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)
    else:
        if enable_gqa:  # dpoeng.engine.attention repeats them on a GPU
            repeats = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
        wants_gradient = torch.is_grad_enabled() and query.requires_grad
        out = aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, wants_gradient, dropout_p, is_causal, scale=scale
        )
    attended: torch.Tensor = out[0]
    return attended


@contextlib.contextmanager
def _kernels_of(device_type: str) -> Iterator[None]:
    original = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = functools.partial(_attention, device_type, original)
    try:
        with as_on_cpu() if device_type == "cpu" else contextlib.nullcontext():
            yield
    finally:
        F.scaled_dot_product_attention = original


@contextlib.contextmanager
def head_of(setup: Setup) -> Iterator[None]:
    """With `full_logits`, log-probs as plain PyTorch computes them, on any device."""
    ours = scoring.head_logps
    if setup.full_logits:
        batch.head_logps = scoring.head_logps = _full_logits  # type: ignore[attr-defined]
    try:
        yield
    finally:
        batch.head_logps = scoring.head_logps = ours  # type: ignore[attr-defined]


def _full_logits(lm: CausalLM, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logps = torch.log_softmax(lm.head(hidden).float(), dim=-1)
    return logps.gather(1, targets[:, None]).squeeze(1)


# Each takes (tracker, operation, args, kwargs), adds what the operation holds inside, and returns its result.


def _gpu_train_logps(tracker: MemoryTracker, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    from dpoeng.kernels.unit_gradient import chunk_shape

    hidden, weight, narrow = args[0], args[1], args[8]
    rows, columns = chunk_shape(hidden.shape[0], weight.shape[0])
    tracker.scratch(rows * columns * (hidden.element_size() if narrow else 4))
    return func(*args, **kwargs)


def _gpu_score_logps(tracker: MemoryTracker, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    from dpoeng.kernels.tiles import LINEAR_16, LINEAR_32

    hidden, weight = args[0], args[1]
    columns = LINEAR_32.cols if hidden.dtype == torch.float32 else min(tile.cols for tile in LINEAR_16.values())
    tiles = -(-weight.shape[0] // columns)
    tracker.scratch((2 * tiles + 1) * hidden.shape[0] * 4)
    return func(*args, **kwargs)


def _gpu_head_gradients(tracker: MemoryTracker, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    from dpoeng.kernels.head_gradient import SLICE
    from dpoeng.kernels.unit_gradient import chunk_shape

    weight = args[1]
    rows, columns = chunk_shape(args[0].shape[0], weight.shape[0])
    result = func(*args, **kwargs)
    # Beside the results: the chunk, the sum in float32 where that is not the result, and the part that is added to it.
    total = 0 if weight.dtype == torch.float32 else 4 * weight.numel()
    part = 4 * min(SLICE, weight.shape[0]) * weight.shape[1]
    tracker.scratch(4 * rows * columns, total, part, *(one.nbytes for one in result))
    return result


def _product_4bit(tracker: MemoryTracker, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # The weight is written out in the dtype of the input; its scales before it.
    shape = args[2]
    result = func(*args, **kwargs)
    elements = int(np.prod(shape))
    tracker.scratch(elements * args[0].element_size(), elements // int(args[4]) * 8, result.nbytes)
    return result


def _cpu_logps(tracker: MemoryTracker, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    hidden, weight, targets, bias, softcap, scale, temperature = args[:7]
    gradient = torch.empty_like(hidden) if "train" in str(func) else None
    with tracker:
        logps = tiled_logps(hidden, Head(weight, bias, softcap, scale, temperature), targets, gradient)
    return logps if gradient is None else (logps, gradient)


def _cpu_head_logps(tracker: MemoryTracker, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    hidden, weight, targets, bias, softcap, scale, temperature = args[:7]
    with tracker:
        sums = hidden.new_empty((3, hidden.shape[0]), dtype=sum_dtype(hidden.dtype))
        return tiled_logps(hidden, Head(weight, bias, softcap, scale, temperature), targets, sums=sums), sums


def _bincount(tracker: MemoryTracker, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # How long it is depends on values; dpoeng always asks for a length that is enough.
    return args[0].new_empty(args[2] if len(args) > 2 else kwargs["minlength"], dtype=torch.int64)


def _cpu_head_gradients(tracker: MemoryTracker, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    hidden, weight, targets, bias, softcap, scale, temperature, _, sums, upstream = args
    with tracker:
        return tiled_gradients(hidden, Head(weight, bias, softcap, scale, temperature), targets, sums, upstream)


_INSIDE: dict[str, dict[str, Any]] = {
    "cuda": {
        "aten::bincount": _bincount,
        "dpoeng::token_logps_train": _gpu_train_logps,
        "dpoeng::token_logps_score": _gpu_score_logps,
        "dpoeng::token_logps_head": _gpu_score_logps,
        "dpoeng::token_logps_head_backward": _gpu_head_gradients,
        "bitsandbytes::gemm_4bit": _product_4bit,
    },
    "cpu": {
        "aten::bincount": _bincount,
        "dpoeng::token_logps_train": _cpu_logps,
        "dpoeng::token_logps_score": _cpu_logps,
        "dpoeng::token_logps_head": _cpu_head_logps,
        "dpoeng::token_logps_head_backward": _cpu_head_gradients,
        "bitsandbytes::gemm_4bit": _product_4bit,
    },
}


def _handlers(device_type: str) -> dict[Any, Any]:
    """Operation -> handler, for the libraries that are loaded."""
    found = {}
    for name, handler in _INSIDE[device_type].items():
        library, operation = name.split("::")
        with contextlib.suppress(AttributeError):
            found[getattr(getattr(torch.ops, library), operation).default] = handler
    return found
