"""Tracks live tensor storage, operation by operation: its peak, when it occurs, and what it consists of.

A dispatch mode sees every operation that creates a tensor, in forward, backward and optimizer, and a weak reference
tells when a storage is freed. A storage counts once, however many views it has. This works on real tensors and on the
`meta` device, where nothing is allocated: so `dpoeng plan` can simulate a step that would not fit on this machine.

Not visible: memory that a library uses inside an operation (`scratch` adds the known part of it), and the allocator's
rounding and fragmentation.
"""

from __future__ import annotations

import bisect
import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from dpoeng.engine.config.fields import Attention
from dpoeng.engine.memory.meta_results import result_of

Phase = Literal["forward", "backward", "optimizer"]

SAVED = "saved activations"
TRANSIENT = "transient"
LOGITS = "logits"

_COPY = torch.ops.aten._to_copy.default
_ITEM = torch.ops.aten._local_scalar_dense.default


@dataclass(slots=True)
class _Storage:
    """One storage: its bytes, the first and last sample of its life, the layers that made it, and its kind if known."""

    n_bytes: int
    born: int
    phase: Phase
    layers: tuple[int, ...]
    kind: str | None
    died: int | None = None


@dataclass(frozen=True, slots=True)
class Peak:
    """A peak: bytes alive, in total and by kind; and for each layer, by kind, the bytes that it owns or has made."""

    n_bytes: int
    by_kind: Mapping[str, int]
    by_layer: Mapping[int, Mapping[str, int]] = field(default_factory=dict, compare=False, repr=False)


class MemoryTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages on one type of device while the context is active.

    Args:
        device_type: `meta`, `cpu` or `cuda`; other devices are not counted.
        handlers: operation -> `handler(tracker, operation, args, kwargs)`, called instead of it.
        vocabulary: width that identifies logits; 0 for none.

    Attributes:
        samples: bytes alive after each change.
        phases: the phase of each sample.
        layers: the running decoder layer at each sample: -1 before the first, their number after the last, one more
            after the backward.
        live_bytes: bytes alive now.
        in_optimizer: set it while the optimizer runs.
        layer: the running decoder layer, updated by `watch_layers`.
        attention: how the simulated model attends over shared prompts; None over separate ones.
    """

    def __init__(
        self, device_type: str, *, handlers: Mapping[Any, Callable[..., Any]] | None = None, vocabulary: int = 0
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device_type = device_type
        self.vocabulary = vocabulary
        self.handlers = handlers or {}
        self.samples: list[int] = []
        self.phases: list[Phase] = []
        self.layers: list[int] = []
        self.live_bytes = 0
        self.in_optimizer = False
        self.layer = -1
        self.attention: Attention | None = None
        self._count = 0
        self._owner: dict[int, int] = {}
        self._entered: Counter[int | str] = Counter()
        self._backward_begins: list[int] = []
        self._storages: list[_Storage] = []
        self._alive: dict[int, tuple[_Storage, Any]] = {}
        self._values: MutableMapping[torch.Tensor, torch.Tensor] = WeakTensorKeyDictionary()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and torch's wrapper takes a twentieth of the time

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _ITEM and args[0].device.type == "meta":
            value = self._values.get(args[0])
            if value is not None:
                return value.item()
            # Without values, a step only asks whether its numbers are finite.
            return 1.0 if args[0].is_floating_point() else 1
        if func is _COPY and args[0].is_meta and kwargs.get("device") == torch.device("cpu"):
            return torch.ones(args[0].shape, dtype=args[0].dtype)  # a step's metrics
        self._end_backward()
        handler = self.handlers.get(func)
        result = result_of(func, args, kwargs) if handler is None else handler(self, func, args, kwargs)
        leaves = (result,) if isinstance(result, torch.Tensor) else tree_leaves(result)
        inside = 0 <= self.layer < self._count
        for leaf, layers in zip(leaves, itertools.repeat(None) if inside else self._makers(leaves, args), strict=False):
            if isinstance(leaf, torch.Tensor):
                self.see(leaf, layers=layers)
        if handler is None and isinstance(result, torch.Tensor) and result.is_meta and not result.is_floating_point():
            self._follow(result, func, args, kwargs)
        return result

    def _makers(self, leaves: Sequence[Any], args: tuple[Any, ...]) -> Iterable[tuple[int, ...] | None]:
        """For each result outside the layers, the layers from whose tensors it is made: of a list, one by one."""
        first = next((a for a in args if isinstance(a, torch.Tensor) or (isinstance(a, (list, tuple)) and a)), None)
        if isinstance(first, torch.Tensor):
            return itertools.repeat(self._layers_of(first))
        if first is None or not isinstance(first[0], torch.Tensor):
            return itertools.repeat(None)
        each = [self._layers_of(tensor) for tensor in first]
        return each if len(leaves) == len(each) else itertools.repeat(tuple(itertools.chain(*each)))

    def _layers_of(self, tensor: torch.Tensor) -> tuple[int, ...]:
        key = tensor.untyped_storage()._cdata
        return self._alive[key][0].layers if key in self._alive else (self._owner.get(key, self.layer),)

    def _follow(self, result: torch.Tensor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keeps the values of integers that come from the host, and of tensors computed only from them.

        Programs branch on them: padded rows need a mask, others do not.
        """
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if func._schema.is_mutable:
            for tensor in inputs:
                self._values.pop(tensor, None)
        elif inputs and all(t.device.type == "cpu" or t in self._values for t in inputs):
            on_host = {**kwargs, "device": torch.device("cpu")} if "device" in kwargs else kwargs
            values, named = tree_map_only(torch.Tensor, lambda t: self._values.get(t, t), (args, on_host))
            self._values[result] = func(*values, **named)

    def own(self, tensors: Iterable[torch.Tensor], layer: int) -> None:
        """Says which layer some tensors belong to, before they are counted."""
        for tensor in tensors:
            self._owner[tensor.untyped_storage()._cdata] = layer

    def hold(self, tensors: Iterable[torch.Tensor], kind: str, *, of: torch.Tensor | None = None) -> None:
        """Counts tensors that exist already, or sets their kind; they belong to the layer of the tensor `of`."""
        for tensor in tensors:
            self.see(tensor, kind, layers=None if of is None else self._layers_of(of))

    def see(
        self,
        tensor: torch.Tensor,
        kind: str | None = None,
        n_bytes: int | None = None,
        layers: tuple[int, ...] | None = None,
    ) -> None:
        """Counts a tensor's storage if it is new, and sets its kind if given.

        `n_bytes` is the size to count if this device has only a part; `layers` made it, by default the running one.
        """
        if tensor.device.type != self.device_type:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            if kind is not None:
                self._alive[key][0].kind = kind
            return
        if kind is None and self.vocabulary and tensor.dim() > 1 and tensor.shape[-1] == self.vocabulary:
            kind = LOGITS
        made_by = layers or (self._owner.get(key, self.layer),)
        size = storage.nbytes() if n_bytes is None else n_bytes
        record = _Storage(size, len(self.samples), self._phase(), made_by, kind)
        self._storages.append(record)
        self._alive[key] = (record, weakref.ref(storage, lambda _: self._forget(key)))
        self.live_bytes += record.n_bytes
        self._sample(0)

    def hold_bytes(self, n_bytes: int, kind: str, *, of: torch.Tensor | None = None, layer: int = -1) -> None:
        """Counts memory that stays until the end and is not a tensor here."""
        layers = (layer,) if of is None else self._layers_of(of)
        self._storages.append(_Storage(n_bytes, len(self.samples), self._phase(), layers, kind))
        self.live_bytes += n_bytes
        self._sample(0)

    def scratch(self, *n_bytes: int, kind: str = TRANSIENT) -> None:
        """Memory that one operation uses and frees before it ends, besides its result."""
        now = len(self.samples)
        self._storages.append(_Storage(sum(n_bytes), now, self._phase(), (self.layer,), kind, died=now))
        self._sample(sum(n_bytes))

    def _sample(self, extra: int) -> None:
        phase, before = self._phase(), self.phases[-1] if self.phases else None
        if phase != before and before is not None:
            self._end_backward()
            if phase == "backward":
                self._backward_begins.append(len(self.samples))
        self.samples.append(self.live_bytes + extra)
        self.phases.append(phase)
        self.layers.append(self.layer)

    def _end_backward(self) -> None:
        if self.phases and self.phases[-1] == "backward" and self._phase() == "forward":
            self.layer = self._count + 1

    def watch_layers(self, layers: Sequence[nn.Module], decoder: nn.Module, *, told: bool = False) -> None:
        """Records which of a decoder's layers is running; in order in the forward, in reverse in the backward.

        If `told`, only calls of `enter` say so.
        """
        self._count = len(layers)
        decoder.register_forward_pre_hook(lambda *_: self._entered.update(["decoder"]))
        for number, layer in enumerate(() if told else layers):
            layer.register_forward_pre_hook(lambda *_, number=number: self.enter(number))
            layer.register_forward_hook(lambda _layer, _inputs, output, number=number: self._after(number, output))

    def enter(self, number: int) -> None:
        """A layer begins to run."""
        if self._phase() == "forward":  # in the backward, a layer rerun by checkpointing is already set
            self.layer = number
            self._entered[number] += 1

    @property
    def loops(self) -> bool:
        """Whether a layer ran more than once in a forward of the decoder."""
        return self._entered["decoder"] < max(self._entered[number] for number in range(self._count))

    def _after(self, number: int, output: Any) -> None:
        if self._phase() != "forward":
            return
        self.layer = number + 1
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                leaf.register_hook(lambda _: setattr(self, "layer", number))  # type: ignore[no-untyped-call]

    def _phase(self) -> Phase:
        if in_backward():
            return "backward"
        return "optimizer" if self.in_optimizer else "forward"

    def _forget(self, key: int) -> None:
        record, _ = self._alive.pop(key)
        record.died = len(self.samples) - 1
        self.live_bytes -= record.n_bytes

    def stretches(self) -> dict[tuple[Phase, int], Peak]:
        """The peak of each phase in each layer."""
        tops: dict[tuple[Phase, int], int] = {}
        for i, place in enumerate(zip(self.phases, self.layers, strict=True)):
            if place not in tops or self.samples[i] > self.samples[tops[place]]:
                tops[place] = i
        return {place: self.peak(i, i + 1) for place, i in tops.items()}

    def peak(self, first: int = 0, last: int | None = None) -> Peak:
        """The highest of the samples `[first, last)`, with everything alive then."""
        window = self.samples[first:last]
        top = max(window)
        at = first + window.index(top)
        by_kind: dict[str, int] = {}
        by_layer: dict[int, dict[str, int]] = {}
        for storage in self._storages:
            if storage.born > at:
                break
            if storage.died is None or storage.died >= at:
                kind = storage.kind or (SAVED if _kept_for_backward(storage, self._backward_begins) else TRANSIENT)
                by_kind[kind] = by_kind.get(kind, 0) + storage.n_bytes
                for layer in storage.layers:
                    kinds = by_layer.setdefault(layer, {})
                    kinds[kind] = kinds.get(kind, 0) + storage.n_bytes // len(storage.layers)
        assert sum(by_kind.values()) == top, "every storage that was alive is counted once"
        return Peak(top, by_kind, by_layer)


def in_backward() -> bool:
    """Whether autograd is running a backward."""
    return bool(torch._C._current_graph_task_id() >= 0)


def _kept_for_backward(storage: _Storage, backward_begins: list[int]) -> bool:
    """Created in a forward, and alive when the following backward begins."""
    if storage.phase != "forward":
        return False
    i = bisect.bisect_right(backward_begins, storage.born)
    return i < len(backward_begins) and (storage.died is None or storage.died >= backward_begins[i])
