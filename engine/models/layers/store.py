"""Keeps the weights of the current layer, and on a GPU of the next one, in a model without other layer weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dpoeng.engine.models.layers.files import LayerFiles, Tensors, put
from dpoeng.engine.models.quantized import scales_of


class LayerStore:
    """Loads a layer's weights when they are needed, and releases those of the previous layer.

    Args:
        files: source of the layers.
        layers: the modules that get the weights; adapters may have wrapped parts of them since.
        device: device of the weights.
    """

    def __init__(self, files: LayerFiles, layers: Sequence[nn.Module], device: torch.device) -> None:
        self.files = files
        self.device = device
        # Remember modules by their names in the bare layer, because peft will move them.
        self._modules = [dict(layer.named_modules()) for layer in layers]
        self._empty: list[Tensors] = []
        for number, layer in enumerate(layers):
            held = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
            self._empty.append({name: without_values(held[name], device) for name in files.names(number)})
        self._here: int | None = None
        self._next: tuple[int, Future[tuple[Tensors, Any]]] | None = None
        self._held: dict[int, Tensors] | None = None
        self._reader = _Reader(files, device) if device.type == "cuda" else None
        for number in range(len(layers)):
            self._place(number, self._empty[number])

    def need(self, number: int) -> None:
        """Returns once the layer's weights are in place. The order is learnt from earlier passes."""
        if self._held is not None or number == self._here:
            return
        backwards = self._here is not None and number < self._here
        self.release()
        self._place(number, self._take(number))
        self._here = number
        coming = number + (-1 if backwards else 1)
        if 0 <= coming < len(self._modules):
            self._prepare(coming)

    def release(self) -> None:
        """Releases the current layer. A prepared one stays."""
        if self._here is not None:
            self._place(self._here, self._empty[self._here])
        self._here = None

    def keep(self, number: int) -> None:
        """Brings a layer's weights into place, to stay there."""
        self._place(number, self.files.read(number))

    @contextmanager
    def standing_in(self) -> Iterator[None]:
        """Within the block, each layer has the weights of the first layer with its shapes: full depth in little memory.

        The results are meaningless, but are computed as in the real model.
        """
        self.release()
        self._drain()
        firsts: dict[tuple[Any, ...], int] = {}
        for number in range(len(self._modules)):
            firsts.setdefault(self.files.shapes(number), number)
        self._held = {first: self.files.read(first) for first in firsts.values()}
        try:
            for number in range(len(self._modules)):
                self._place(number, self._held[firsts[self.files.shapes(number)]])
            yield
        finally:
            self._held = None
            for number in range(len(self._modules)):
                self._place(number, self._empty[number])

    def _take(self, number: int) -> Tensors:
        if self._reader is None:
            return self.files.read(number)
        if self._next is None or self._next[0] != number:
            self._drain()  # never have three layers in memory
            self._next = number, self._reader.begin(number)
        prepared, self._next = self._next, None
        return self._reader.finish(prepared[1])

    def _prepare(self, number: int) -> None:
        if self._reader is None:
            self.files.announce(number)
        elif self._next is None:
            self._next = number, self._reader.begin(number)

    def _drain(self) -> None:
        """Waits for a prepared layer that is not needed."""
        if self._next is not None:
            (_, reading), self._next = self._next, None
            reading.result()

    def _place(self, number: int, tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            path, _, last = name.rpartition(".")
            put(self._modules[number][path], last, tensor)


class _Reader:
    """Reads layers in a thread, from pinned memory to a GPU in a separate stream, while the GPU computes.

    transformers copies tensor by tensor, and quantises in this stream if requested. Not tried on a GPU yet.
    """

    def __init__(self, files: LayerFiles, device: torch.device) -> None:
        self._files, self._device = files, device
        self._threads = ThreadPoolExecutor(1, "layers")
        cuda: Any = torch.cuda
        self._stream, self._event = cuda.Stream(device), cuda.Event

    def begin(self, number: int) -> Future[tuple[Tensors, Any]]:
        """Starts reading a layer as soon as the device has finished its queued work."""
        queued_work = self._event()
        queued_work.record(torch.cuda.current_stream(self._device))
        return self._threads.submit(self._read, number, queued_work)

    def _read(self, number: int, queued_work: Any) -> tuple[Tensors, Any]:
        queued_work.synchronize()  # only now the released layer's memory is free
        with torch.cuda.stream(self._stream):
            tensors = self._files.read(number)
            arrived = self._event()
            arrived.record(self._stream)
        return tensors, arrived

    def finish(self, reading: Future[tuple[Tensors, Any]]) -> Tensors:
        """The layer, once it is on the device: the device's next work waits for it, the host does not."""
        tensors, arrived = reading.result()
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(arrived)
        for tensor in tensors.values():
            for part in (tensor.data, *scales_of(tensor)):
                part.record_stream(stream)  # its memory belongs to the other stream
        return tensors


def without_values(parameter: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A parameter or buffer of the same kind, shape and dtype on a device that takes the memory of one number.

    It is NaN if the dtype has one: a layer that runs without its weights must not go unnoticed.
    """
    kind: Any = type(parameter)
    if kind.__name__ == "Int8Params":
        data = torch.zeros((), dtype=torch.int8, device=device).expand(parameter.shape)
        made: nn.Parameter = kind(data, requires_grad=False, has_fp16_weights=False)
        return made
    if kind.__name__ == "Params4bit":
        data = torch.zeros((), dtype=torch.uint8, device=device).expand(parameter.shape)
        fields = {**parameter.__dict__, "bnb_quantized": True}
        quantised: nn.Parameter = kind(data, requires_grad=False, **fields)
        return quantised
    value = float("nan") if parameter.is_floating_point() else 0
    filled = torch.full((), value, dtype=parameter.dtype, device=device).expand(parameter.shape)
    return nn.Parameter(filled, requires_grad=False) if isinstance(parameter, nn.Parameter) else filled
