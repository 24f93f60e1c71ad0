"""Counts the kernel launches, bytes and FLOPs of a training step on a GPU, by part, without one.

It runs the real step (model, adapters, checkpointing and loss) on the meta device with a GPU's kernels. Each
operation that would reach the device is a launch; its bytes are those of the tensors it reads and writes, each once;
its FLOPs are those of its matrix products. Caches are not modelled, so the bytes are those without any cache.

One layer is the difference between a model with three layers and one with two. The last layer computes less, because
most of its positions are not scored; that is subtracted from `outside`. The optimizer is torch's fused AdamW.
Times are estimates from these counts and a card's data sheet, never measurements.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dpoeng.engine.config.fields import Quantization, TrainConfig
from dpoeng.engine.losses.batch import PreferenceLoss
from dpoeng.engine.losses.names import LossSettings
from dpoeng.engine.memory.cards import Gpu
from dpoeng.engine.memory.overhead import model_fields
from dpoeng.engine.memory.simulate import Pair, Setup, build
from dpoeng.engine.memory.stand_ins import kernels_of
from dpoeng.engine.models.model import decoder_layers, set_mode
from dpoeng.engine.models.model_config import config_of, sizes
from dpoeng.engine.models.quantized import quantized_tensors
from dpoeng.engine.models.trunk.layers import trunk_layer
from dpoeng.engine.runtime.distributed import ALONE
from dpoeng.engine.training.batch_loss import batch_loss, groups_of
from dpoeng.engine.training.layer_step import Begin, gradient_by_layer
from dpoeng.kernels.tiles import chunk_rows

ATTENTION_PRODUCTS, MLP_PRODUCTS, WIDENING, LORA, ATTENTION = (
    "attention's products", "MLP's products", "widening", "LoRA", "attention"
)  # fmt: skip
NORMS, ROTARY, GATES, REST, HEAD, OPTIMIZER = "norms", "rotary", "gates", "residuals, copies", "head", "optimizer"
_FUSED = {"rms_norm": NORMS, "rms_norm_backward": NORMS, "rotary": ROTARY, "gated": GATES, "gated_backward": GATES}

# The share of a data sheet's rates that is reached: products of these sizes, copies. A launch's time on the host, with
# Python around it.
_OF_FLOPS, _OF_BANDWIDTH, _LAUNCH_S = 0.75, 0.8, 6e-6

BUS_GB_PER_S = 25.0
"""From host memory to a card: PCIe 4.0 with 16 lanes. `dpoeng doctor` measures it."""

# Views and allocations: no kernel runs for them.
_NO_LAUNCH = frozenset(
    "view t transpose permute expand slice split split_with_sizes unsqueeze squeeze select detach alias as_strided "
    "_unsafe_view reshape _reshape_alias empty empty_like new_empty empty_strided new_empty_strided unbind lift_fresh "
    "narrow is_same_size unsafe_split diagonal resize_ chunk _local_scalar_dense".split()
)
_PRODUCTS = frozenset({"mm", "addmm", "addmm_", "bmm"})
_WRITES_ALONE = frozenset({"zeros_like", "fill_", "zero_", "new_zeros", "zeros", "ones", "full", "arange", "ones_like"})


@dataclass(frozen=True, slots=True)
class StepSettings:
    """Settings of a count. `model` is a folder with config.json, or a known name.

    Attributes:
        layer_offloading: whether layers are loaded one at a time, which recomputes them.
        trunk_layer: where the step begins, by number or as a share of the depth; None for all layers.
    """

    model: str
    quantization: Quantization = "none"
    prompt: int = 1024
    chosen: int = 1024
    rejected: int = 1024
    batch_size: int = 2
    lora_r: int = 16
    gradient_checkpointing: bool = True
    layer_offloading: bool = False
    trunk_layer: float | None = None


@dataclass(slots=True)
class Counts:
    """Launches, bytes and FLOPs of matrix products, by part."""

    launches: Counter[str] = field(default_factory=Counter)
    n_bytes: Counter[str] = field(default_factory=Counter)
    flop: Counter[str] = field(default_factory=Counter)

    def less(self, other: Counts) -> Counts:
        """Returns this minus `other`."""
        difference = Counts()
        for name in ("launches", "n_bytes", "flop"):
            mine, theirs = getattr(self, name), getattr(other, name)
            getattr(difference, name).update({key: mine[key] - theirs[key] for key in mine if mine[key] != theirs[key]})
        return difference


@dataclass(frozen=True, slots=True)
class StepCounts:
    """Counts of a decoder layer (forward, recomputation, backward) and of everything outside the layers.

    The first layer computes no gradient of its input, and the last one only scored positions: what they save compared
    with the others is subtracted from `outside`.

    Attributes:
        layers: number of layers that run.
        tokens: tokens of all pairs.
        bus_bytes: bytes per layer between host and GPU, if layers are loaded one at a time.
    """

    layer: Counts
    outside: Counts
    optimizer: Counts
    layers: int
    tokens: int
    bus_bytes: int = 0

    def record(self) -> dict[str, Any]:
        """The counts for JSON."""
        fields: dict[str, Any] = {"layers": self.layers, "tokens": self.tokens, "layer_bus_bytes": self.bus_bytes}
        for place, counts in (("layer", self.layer), ("outside", self.outside), ("optimizer", self.optimizer)):
            for name in ("launches", "n_bytes", "flop"):
                fields[f"{place}_{name}"] = dict(getattr(counts, name))
        return fields

    def seconds(self, gpu: Gpu, bus_gb_per_s: float = BUS_GB_PER_S) -> float | None:
        """Estimates a card's time: for each part the time of its bytes or FLOPs; of launches or bus if that is longer.

        None if the card's rates are unknown.
        """
        if not gpu.flops or not gpu.bytes_per_s:
            return None
        # Summed over the step first: what the first and the last layer leave out is negative in `outside`.
        places = [(self.layer, self.layers), (self.outside, 1), (self.optimizer, 1)]
        device = 0.0
        for part in {part for counts, _ in places for part in (*counts.n_bytes, *counts.flop)}:
            flop = sum(times * counts.flop[part] for counts, times in places)
            n_bytes = sum(times * counts.n_bytes[part] for counts, times in places)
            device += max(flop / (_OF_FLOPS * gpu.flops), n_bytes / (_OF_BANDWIDTH * gpu.bytes_per_s))
        launches = sum(times * counts.launches.total() for counts, times in places) * _LAUNCH_S
        return max(device, launches, self.layers * self.bus_bytes / (bus_gb_per_s * 1e9))


def count_step(settings: StepSettings) -> StepCounts:
    """Counts one forward and backward of phase two in bfloat16, with FlashAttention over shared prompts.

    Raises:
        UserError: the model is unknown.
    """
    fields = model_fields(settings.model)
    config = TrainConfig.model_validate(
        {"lora_r": settings.lora_r, "gradient_checkpointing": settings.gradient_checkpointing}
    )
    setup = Setup(model=fields, dtype=torch.bfloat16, quantization=settings.quantization, config=config)
    if settings.trunk_layer:
        setup = replace(setup, trunk_layer=trunk_layer(settings.trunk_layer, setup.layers))
    setup = replace(setup, by_layer=settings.layer_offloading)
    pairs = [Pair(settings.prompt, settings.chosen, settings.rejected)] * settings.batch_size
    two, three = (_count(_shallow(setup, depth), pairs) for depth in (2, 3))
    layer = three.less(two)
    tokens = settings.batch_size * (settings.prompt + settings.chosen + settings.rejected)
    outside, bus_bytes = two.less(layer).less(layer), _bus_bytes(setup, tokens) if setup.by_layer else 0
    return StepCounts(layer, outside, _count_optimizer(setup), setup.layers, tokens, bus_bytes)


def _shallow(setup: Setup, depth: int) -> Setup:
    """The first layers of a model, the last one again where it has fewer."""
    return setup.with_layers([min(layer, setup.layers - 1) for layer in range(depth)])


def _bus_bytes(setup: Setup, tokens: int) -> int:
    """Of a layer in a step of one forward: its weights twice; the states that enter it three times, gradients twice."""
    lm = build(_shallow(setup, 2))
    layer = decoder_layers(lm.backbone)[0]
    held = [*(p for name, p in layer.named_parameters() if ".lora_" not in name), *quantized_tensors(layer)]
    weights = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in held}
    return 2 * sum(weights.values()) + 5 * tokens * sizes(config_of(setup.model)).hidden * setup.dtype.itemsize


def _count_optimizer(setup: Setup) -> Counts:
    """torch's fused AdamW: a launch processes at most 36 tensors and 320 chunks of 65,536 entries.

    It reads weight, gradient and two moments and writes all but the gradient, each in float32.
    """
    two, three = (
        [parameter.numel() for _, parameter in build(_shallow(setup, depth)).trainable_parameters()] for depth in (2, 3)
    )
    layer = three[: len(three) - len(two)] if len(three) > len(two) else []
    per_layer = (sum(three) - sum(two), len(three) - len(two), sum(-(-n // 65536) for n in layer))
    entries, tensors, chunks = (n * setup.layers for n in per_layer)
    counts = Counts()
    counts.launches[OPTIMIZER] = max(-(-tensors // 36), -(-chunks // 320))
    counts.n_bytes[OPTIMIZER] = 28 * entries
    return counts


def _count(setup: Setup, pairs: Sequence[Pair]) -> Counts:
    lm = build(setup)
    set_mode(lm, training=True)
    rows, settings = [pair.scored() for pair in pairs], LossSettings.of(setup.config)
    counter = _Counter(sizes(config_of(setup.model)).inner)

    def head(begin: Begin) -> list[PreferenceLoss]:
        begin(0)
        part = batch_loss(lm, rows, settings)
        torch.autograd.backward(part.losses.sum() / len(rows))
        return [part]

    with kernels_of("cuda"):
        if lm.by_layer is not None:
            with counter:
                gradient_by_layer(lm, {0: groups_of(rows, settings)}, lambda _: None, head, group=ALONE)
            return counter.counts
        with counter:
            head(lambda _: None)
    return counter.counts


class _Counter(TorchDispatchMode):
    def __init__(self, inner: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts = Counts()
        self.inner = inner  # width of the MLP, by which its products differ from attention's

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        if name in _NO_LAUNCH or not any(tensor.is_meta for tensor in [*inputs, *outputs]):
            return result
        part, counts = self._part(name, inputs), self.counts
        if part == HEAD and name == "token_logps_train":
            self._count_head(args)
            return result
        counts.launches[part] += 1
        counts.n_bytes[part] += _moved(name, inputs, outputs, args, kwargs)
        if name in _PRODUCTS:
            a, b = args[1:3] if name.startswith("addmm") else args[:2]
            counts.flop[part] += 2 * a.numel() * b.shape[-1]
        return result

    def _part(self, name: str, inputs: list[torch.Tensor]) -> str:
        if "low_rank" in name:
            return LORA
        if name == "widen_int8" or name.startswith(("dequantize", "gemm_4bit")):
            return WIDENING
        if "attn" in name or "attention" in name:
            return ATTENTION
        if name.startswith(("token_logps", "scale_rows")):
            return HEAD
        if name in _PRODUCTS:
            return MLP_PRODUCTS if any(self.inner in tensor.shape for tensor in inputs) else ATTENTION_PRODUCTS
        return _FUSED.get(name, REST)

    def _count_head(self, args: tuple[Any, ...]) -> None:
        """Counts the launches inside `unit_gradient.chunked_logps`: product, pass and product per chunk."""
        hidden, weight = args[:2]
        n, vocabulary = hidden.shape[0], weight.shape[0]
        chunks = -(-n // chunk_rows(vocabulary))
        self.counts.launches[HEAD] += 3 * chunks
        # float32 logits written and read twice, 16-bit gradients over them written and read; the weight twice per
        # chunk.
        self.counts.n_bytes[HEAD] += n * vocabulary * 16 + 2 * chunks * weight.nbytes + 3 * hidden.nbytes
        self.counts.flop[HEAD] += 4 * hidden.numel() * vocabulary


def _moved(
    name: str, inputs: list[torch.Tensor], outputs: list[torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> int:
    """Bytes read and written: each tensor once, broadcast ones at their size in memory."""
    written = sum(_held(tensor) for tensor in outputs)
    if name in _WRITES_ALONE:
        return written
    read = sum(_held(tensor) for tensor in {id(tensor): tensor for tensor in inputs}.values())
    if name == "add_low_rank":  # it writes its first argument, and reads it only to add to it
        adds = args[-1]
        return written + read + (_held(args[0]) if adds else 0)
    # Only written. One that is also a summand (`addmm` in place) is among the arguments too, so it counts as read.
    target = args[0] if name == "copy_" else kwargs.get("out")
    if isinstance(target, torch.Tensor) and (name == "copy_" or not any(target is given for given in args)):
        read -= _held(target)
    return written + read


def _held(tensor: torch.Tensor) -> int:
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count * tensor.element_size()
