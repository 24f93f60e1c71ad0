"""Live tensor storage through a piece of work, operation by operation: how high it rises, when, and what it is made of.

A dispatch mode sees every operation that makes a tensor, in forward, backward and optimizer alike, and a weak reference
tells when a storage is freed. A storage counts once, however many views it has. It works on real tensors and on the
`meta` device, where nothing is allocated: that is how `dpoeng plan` knows a step that would not fit where it is asked.

Not seen: memory that a library takes for itself inside an operation (`scratch` adds what is known of that), and the
allocator's rounding and fragmentation.
"""

from __future__ import annotations

import bisect
import weakref
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

Phase = Literal["forward", "backward", "optimizer"]

SAVED = "saved activations"
TRANSIENT = "transient"
LOGITS = "logits"

_COPY = torch.ops.aten._to_copy.default
_ITEM = torch.ops.aten._local_scalar_dense.default


@dataclass(slots=True)
class _Storage:
    """One storage: bytes, the samples between which it lived (both included), and what it is if that was said."""

    n_bytes: int
    born: int
    phase: Phase
    kind: str | None
    died: int | None = None


@dataclass(frozen=True, slots=True)
class Peak:
    """The highest point of a stretch of work: bytes alive in all, and by kind."""

    n_bytes: int
    by_kind: Mapping[str, int]


class MemoryTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages on one kind of device while it is entered.

    Args:
        device_type: `meta`, `cpu` or `cuda`; what lies elsewhere is not counted.
        handlers: for these operations, `handler(tracker, operation, args, kwargs)` is called instead.
        vocabulary: width by which logits are recognised; 0 for none.

    Attributes:
        samples: bytes alive after each change.
        phases: the phase of each sample.
        layers: the decoder layer at work at each sample: -1 before the first, their number after the last, one more
            after the backward.
        live_bytes: bytes alive now.
        in_optimizer: set it while the optimizer works.
        layer: the decoder layer at work; `watch_layers` keeps it.
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
        self._count = 0
        self._backward_begins: list[int] = []
        self._storages: list[_Storage] = []
        self._alive: dict[int, tuple[_Storage, Any]] = {}
        self._values: MutableMapping[torch.Tensor, torch.Tensor] = WeakTensorKeyDictionary()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _ITEM and args[0].device.type == "meta":
            value = self._values.get(args[0])
            if value is not None:
                return value.item()
            # Where there are no values, a step only asks whether its numbers are finite.
            return 1.0 if args[0].is_floating_point() else 1
        if func is _COPY and args[0].is_meta and kwargs.get("device") == torch.device("cpu"):
            return torch.ones(args[0].shape, dtype=args[0].dtype)  # a step's metrics
        handler = self.handlers.get(func)
        result = func(*args, **kwargs) if handler is None else handler(self, func, args, kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.see(leaf)
        if handler is None and isinstance(result, torch.Tensor) and result.is_meta:
            self._follow(result, func, args, kwargs)
        return result

    def _follow(self, result: torch.Tensor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keeps the values of whole numbers that come from the host, and of what is made of nothing else.

        A program asks them how to go on: rows that are padded need a mask, others do not.
        """
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if func._schema.is_mutable:
            for tensor in inputs:
                self._values.pop(tensor, None)
        elif (
            inputs
            and not result.is_floating_point()
            and all(t.device.type == "cpu" or t in self._values for t in inputs)
        ):
            on_host = {**kwargs, "device": torch.device("cpu")} if "device" in kwargs else kwargs
            own, named = tree_map_only(torch.Tensor, lambda t: self._values.get(t, t), (args, on_host))
            self._values[result] = func(*own, **named)

    def hold(self, tensors: Iterable[torch.Tensor], kind: str) -> None:
        """Counts tensors that are there already, or says what they are."""
        for tensor in tensors:
            self.see(tensor, kind)

    def see(self, tensor: torch.Tensor, kind: str | None = None, n_bytes: int | None = None) -> None:
        """Counts a tensor's storage if it is new, and names its kind if one is given.

        `n_bytes` is what counts where this device holds a part only.
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
        record = _Storage(storage.nbytes() if n_bytes is None else n_bytes, len(self.samples), self._phase(), kind)
        self._storages.append(record)
        self._alive[key] = (record, weakref.ref(storage, lambda _: self._forget(key)))
        self.live_bytes += record.n_bytes
        self._sample(0)

    def hold_bytes(self, n_bytes: int, kind: str) -> None:
        """Counts memory that stays to the end and is no tensor here."""
        self._storages.append(_Storage(n_bytes, len(self.samples), self._phase(), kind))
        self.live_bytes += n_bytes
        self._sample(0)

    def scratch(self, *n_bytes: int, kind: str = TRANSIENT) -> None:
        """Memory that one operation takes and gives back before it ends, beside its result."""
        now = len(self.samples)
        self._storages.append(_Storage(sum(n_bytes), now, self._phase(), kind, died=now))
        self._sample(sum(n_bytes))

    def _sample(self, extra: int) -> None:
        phase, before = self._phase(), self.phases[-1] if self.phases else None
        if phase == "forward" and before == "backward":
            self.layer = self._count + 1
        if phase == "backward" and before not in (None, "backward"):
            self._backward_begins.append(len(self.samples))
        self.samples.append(self.live_bytes + extra)
        self.phases.append(phase)
        self.layers.append(self.layer)

    def watch_layers(self, layers: Sequence[nn.Module]) -> None:
        """Notes which of these modules, run one after the other, is at work: forward, and backward the other way."""
        self._count = len(layers)
        for number, layer in enumerate(layers):
            layer.register_forward_pre_hook(lambda *_, number=number: self._at(number))
            layer.register_forward_hook(lambda _layer, _inputs, output, number=number: self._after(number, output))

    def _at(self, number: int) -> None:
        if self._phase() == "forward":  # a layer that checkpointing runs again is at work already
            self.layer = number

    def _after(self, number: int, output: Any) -> None:
        self._at(number + 1)
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad and self._phase() == "forward":
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
        """The highest point of each phase in each layer."""
        tops: dict[tuple[Phase, int], int] = {}
        for i, place in enumerate(zip(self.phases, self.layers, strict=True)):
            if place not in tops or self.samples[i] > self.samples[tops[place]]:
                tops[place] = i
        return {place: self.peak(i, i + 1) for place, i in tops.items()}

    def peak(self, first: int = 0, last: int | None = None) -> Peak:
        """The highest of the samples `[first, last)`, with what was alive then."""
        window = self.samples[first:last]
        top = max(window)
        at = first + window.index(top)
        by_kind: dict[str, int] = {}
        for storage in self._storages:
            if storage.born > at:
                break
            if storage.died is None or storage.died >= at:
                kind = storage.kind or (SAVED if _kept_for_backward(storage, self._backward_begins) else TRANSIENT)
                by_kind[kind] = by_kind.get(kind, 0) + storage.n_bytes
        assert sum(by_kind.values()) == top, "every storage that was alive is counted once"
        return Peak(top, by_kind)


def in_backward() -> bool:
    """Whether autograd is at work."""
    return bool(torch._C._current_graph_task_id() >= 0)


def _kept_for_backward(storage: _Storage, backward_begins: list[int]) -> bool:
    """Made in a forward, and alive when the backward after it begins."""
    if storage.phase != "forward":
        return False
    i = bisect.bisect_right(backward_begins, storage.born)
    return i < len(backward_begins) and (storage.died is None or storage.died >= backward_begins[i])
