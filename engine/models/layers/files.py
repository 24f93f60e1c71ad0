"""Single decoder layers read from a checkpoint's safetensors files. Imports transformers.

transformers loads the model without its layers; later it loads one layer at a time by the same function, so names,
conversions (experts that are stacked) and quantisation are those of any other load, and so are the numbers. It has no
hook for that: the loader is a subclass of the model's class, as in `fsdp_loading`, that passes for its parent.
The files stay mapped: on a CPU, weights that need no conversion are never copied.
"""

from __future__ import annotations

import copy
import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dpoeng.engine.models.checkpoint_tensors import refuse_mismatched, refuse_missing
from dpoeng.engine.models.fsdp_loading import empty_model_of
from dpoeng.engine.models.model import decoder_layers, decoder_of
from dpoeng.engine.models.sources import ModelSource

Tensors = dict[str, torch.Tensor]
"""Parameters and buffers of one layer, by their names within it."""


class _Slice:
    """A tensor of a file that is read when transformers asks for it; counts what is read."""

    def __init__(self, tensor: Any, count: Callable[[int], None], *, pin: bool) -> None:
        self._tensor, self._count, self._pin = tensor, count, pin

    def __getitem__(self, index: Any) -> torch.Tensor:
        read: torch.Tensor = self._tensor[index]
        self._count(read.nbytes)
        return read.pin_memory() if self._pin else read

    def get_dtype(self) -> str:
        """safetensors' name of the dtype."""
        return str(self._tensor.get_dtype())

    def get_shape(self) -> list[int]:
        """The shape as it is stored."""
        return list(self._tensor.get_shape())


@dataclass(slots=True)
class LayerFiles:
    """The layers of one checkpoint.

    Attributes:
        template: a copy of the model whose layers have no values; layers are read into it and taken out again.
        prefixes: the name of each layer in the model.
        tensors: of each layer, its tensors in the files.
        settings: how transformers loads them.
        spans: of each layer, (file, first byte, bytes) of what it needs.
        bytes_read: read so far, of layers.
        reads: layers read so far.
    """

    template: Any
    prefixes: Sequence[str]
    tensors: list[dict[str, _Slice]]
    settings: Any
    source: ModelSource
    spans: list[list[tuple[Path, int, int]]] = field(default_factory=list)
    bytes_read: int = 0
    reads: int = 0

    def names(self, number: int) -> list[str]:
        """Names within layer `number` of what the files hold of it."""
        layer = self.template.get_submodule(self.prefixes[number])
        kept = {name for name, _ in layer.named_buffers()} & set(layer.state_dict())
        return [*(name for name, _ in layer.named_parameters()), *sorted(kept)]

    def shapes(self, number: int) -> tuple[Any, ...]:
        """What tells kinds of layers apart."""
        layer = self.template.get_submodule(self.prefixes[number])
        return tuple((name, tuple(tensor.shape)) for name, tensor in layer.state_dict().items())

    def read(self, number: int) -> Tensors:
        """One layer on the device, quantised if the model is.

        Raises:
            UserError: the files lack a part of it, or hold it in another shape.
        """
        from transformers.core_model_loading import convert_and_load_state_dict_in_model

        layer, prefix = self.template.get_submodule(self.prefixes[number]), self.prefixes[number]
        names = self.names(number)
        empty = {name: _get(layer, name) for name in names}
        with _one_thread():
            found, _ = convert_and_load_state_dict_in_model(self.template, self.tensors[number], self.settings)
        refuse_missing([f"{prefix}.{name}" for name in names if f"{prefix}.{name}" in found.missing_keys], self.source)
        refuse_mismatched([one for one in found.mismatched_keys if one[0].startswith(f"{prefix}.")], self.source)
        read = {name: _get(layer, name) for name in names}
        for name, tensor in read.items():
            tensor.requires_grad_(False)
            put(layer, name, empty[name])
        self.reads += 1
        return read

    def announce(self, number: int) -> None:
        """Tells the system that a layer will be read soon, so that the disk works meanwhile."""
        if not hasattr(os, "posix_fadvise"):
            return
        for file, begin, size in self.spans[number]:
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, begin, size, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)

    def add(self, n_bytes: int) -> None:
        """So much has been read."""
        self.bytes_read += n_bytes


def layered_class(
    source: ModelSource, made: list[LayerFiles], prepared: tuple[Any, Any] | None = None
) -> tuple[Any, Any]:
    """A checkpoint's model class, which loads everything but the decoder's layers; and its config.

    When a model has been loaded by the class, `made` holds the files of its layers. `prepared`: class and config of a
    model that is changed first (`fsdp_loading.prepared_class`), as one that begins at a trunk is.
    """
    if prepared is None:
        config, model = empty_model_of(source)
        parent = type(model)
    else:
        parent, config = prepared

    def load(
        model: Any, state_dict: Any, checkpoint_files: Sequence[str], load_config: Any, expected_keys: Any = None
    ) -> tuple[Any, Any]:
        from transformers.core_model_loading import convert_and_load_state_dict_in_model

        del state_dict, expected_keys
        files = LayerFiles(None, _prefixes(model), [], load_config, source)
        rest, files.tensors = _divide(model, checkpoint_files, load_config, files)
        found, _ = convert_and_load_state_dict_in_model(model, rest, load_config)
        for prefix in files.prefixes:
            layer = model.get_submodule(prefix)
            held = layer.state_dict(keep_vars=True)
            for name, tensor in held.items():
                found.missing_keys.discard(f"{prefix}.{name}")
                if isinstance(tensor, torch.Tensor):
                    tensor._is_hf_initialized = True  # type: ignore[attr-defined]
        files.bytes_read = 0  # of layers alone
        files.spans = _spans(checkpoint_files, files.tensors)
        made.append(files)
        return found, None

    fields = {"_load_pretrained_model": staticmethod(load), "__module__": parent.__module__}
    return type(parent.__name__, (parent,), fields), config


def _prefixes(model: Any) -> list[str]:
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(layer)] for layer in decoder_layers(decoder_of(model))]


def _divide(
    model: Any, files: Sequence[str], settings: Any, count: LayerFiles
) -> tuple[dict[str, _Slice], list[dict[str, _Slice]]]:
    """The tensors of the files: those of no layer, and those of each layer."""
    from safetensors import safe_open
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = settings.weight_mapping or []
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    known = model.state_dict()
    of_layer = {
        name: number for number, prefix in enumerate(count.prefixes) for name in known if name.startswith(f"{prefix}.")
    }
    pin = any(torch.device(place).type == "cuda" for place in (settings.device_map or {}).values())
    rest: dict[str, _Slice] = {}
    layers: list[dict[str, _Slice]] = [{} for _ in count.prefixes]
    for file in files:
        held: Any = safe_open(file, framework="pt", device="cpu")
        for name in held.keys():  # noqa: SIM118  (a safetensors file is no dictionary)
            renamed, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
            if renamed not in known:
                renamed, _ = rename_source_key(name, [], [], model.base_model_prefix, known)
            number = of_layer.get(renamed)
            (rest if number is None else layers[number])[name] = _Slice(held.get_slice(name), count.add, pin=pin)
    return rest, layers


def _spans(files: Sequence[str], layers: Sequence[Mapping[str, Any]]) -> list[list[tuple[Path, int, int]]]:
    """Where each layer's tensors lie, by the headers of the files."""
    places: dict[str, tuple[Path, int, int]] = {}
    for file in files:
        with Path(file).open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            header = json.loads(opened.read(length))
        for name, fields in header.items():
            if name != "__metadata__":
                begin, end = fields["data_offsets"]
                places[name] = Path(file), 8 + length + begin, end - begin
    return [[places[name] for name in layer] for layer in layers]


def template_of(base: Any) -> Any:
    """A copy of a model in everything but its tensors, which both share."""
    tensors = [*base.parameters(), *base.buffers()]
    memo: dict[int, Any] = {id(tensor): tensor for tensor in tensors}
    quantizer = getattr(base, "hf_quantizer", None)
    if quantizer is not None:
        memo[id(quantizer)] = quantizer
    return copy.deepcopy(base, memo)


def put(layer: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Gives a layer a parameter or buffer, past what its modules do when one is assigned."""
    path, _, last = name.rpartition(".")
    module = layer.get_submodule(path)
    (module._parameters if last in module._parameters else module._buffers)[last] = tensor  # type: ignore[assignment]


def _get(layer: nn.Module, name: str) -> torch.Tensor:
    path, _, last = name.rpartition(".")
    found = getattr(layer.get_submodule(path), last)
    assert isinstance(found, torch.Tensor)
    return found


@contextmanager
def _one_thread() -> Iterator[None]:
    """transformers reads with threads of its own, which know nothing of this thread's CUDA stream."""
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
