"""Reads single decoder layers from a checkpoint's safetensors files. Imports transformers.

transformers loads the model without its layers, and later one layer at a time with the same function, so names,
conversions (stacking of experts), quantisation and numbers are those of any other load. It has no hook for this: the
loader is a subclass of the model's class that uses its parent's name, as in `fsdp_loading`. The files stay mapped: on a
CPU, weights that need no conversion are never copied.
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
from dpoeng.engine.models.fsdp_loading import prepared_class
from dpoeng.engine.models.model import decoder_layers, decoder_of
from dpoeng.engine.models.sources import ModelSource

Tensors = dict[str, torch.Tensor]
"""Parameters and buffers of one layer, by their names in the layer."""


class _Slice:
    """A tensor in a file, read on demand; counts the bytes read."""

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
        template: a copy of the model without layer weights; layers are read into it and taken out again.
        prefixes: the name of each layer in the model.
        tensors: for each layer, its tensors in the files.
        settings: transformers' loading settings.
        spans: for each layer, (file, first byte, bytes) of its tensors.
        bytes_read: bytes of layers read so far.
        reads: number of layers read so far.
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
        """Names, within layer `number`, of its tensors in the files."""
        layer = self.template.get_submodule(self.prefixes[number])
        saved_buffers = {name for name, _ in layer.named_buffers()} & set(layer.state_dict())
        return [*(name for name, _ in layer.named_parameters()), *sorted(saved_buffers)]

    def shapes(self, number: int) -> tuple[Any, ...]:
        """Shapes, which distinguish kinds of layers."""
        layer = self.template.get_submodule(self.prefixes[number])
        # Not of the state: bitsandbytes adds scales to it once a layer has been read.
        return tuple((name, tuple(_get(layer, name).shape)) for name in self.names(number))

    def read(self, number: int) -> Tensors:
        """Reads one layer to the device, quantised if the model is.

        Raises:
            UserError: the files lack a part of it, or have it in another shape.
        """
        from transformers.core_model_loading import convert_and_load_state_dict_in_model

        layer, prefix = self.template.get_submodule(self.prefixes[number]), self.prefixes[number]
        names = self.names(number)
        empty = {name: _get(layer, name) for name in names}
        with _one_thread():
            info, _ = convert_and_load_state_dict_in_model(self.template, self.tensors[number], self.settings)
        refuse_missing([f"{prefix}.{name}" for name in names if f"{prefix}.{name}" in info.missing_keys], self.source)
        refuse_mismatched([one for one in info.mismatched_keys if one[0].startswith(f"{prefix}.")], self.source)
        read = {name: _get(layer, name) for name in names}
        for name, tensor in read.items():
            tensor.requires_grad_(False)
            put(layer, name, empty[name])
        self.reads += 1
        return read

    def announce(self, number: int) -> None:
        """Tells the system that a layer will be read soon, so that the disk starts early."""
        if not hasattr(os, "posix_fadvise"):
            return
        for file, begin, size in self.spans[number]:
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, begin, size, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)

    def add(self, n_bytes: int) -> None:
        """Counts bytes read."""
        self.bytes_read += n_bytes


def layered_class(
    source: ModelSource, made: list[LayerFiles], prepared: tuple[Any, Any] | None = None
) -> tuple[Any, Any]:
    """A checkpoint's model class that loads everything except the decoder's layers; and its config.

    After a model has been loaded with the class, `made` contains the files of its layers. `prepared`: class and config
    of a model that is changed before loading (`fsdp_loading.prepared_class`), such as one that begins at a trunk.
    """
    parent, config = prepared or prepared_class(source)

    def load(
        model: Any, state_dict: Any, checkpoint_files: Sequence[str], load_config: Any, expected_keys: Any = None
    ) -> tuple[Any, Any]:
        from transformers.core_model_loading import convert_and_load_state_dict_in_model

        del state_dict, expected_keys
        files = LayerFiles(None, _prefixes(model), [], load_config, source)
        rest, files.tensors = _divide(model, checkpoint_files, load_config, files)
        info, _ = convert_and_load_state_dict_in_model(model, rest, load_config)
        for prefix in files.prefixes:
            layer = model.get_submodule(prefix)
            state = layer.state_dict(keep_vars=True)
            for name, tensor in state.items():
                info.missing_keys.discard(f"{prefix}.{name}")
                if isinstance(tensor, torch.Tensor):
                    tensor._is_hf_initialized = True  # type: ignore[attr-defined]
        files.bytes_read = 0  # count only layers
        files.spans = _spans(checkpoint_files, files.tensors)
        made.append(files)
        return info, None

    fields = {"_load_pretrained_model": staticmethod(load), "__module__": parent.__module__}
    return type(parent.__name__, (parent,), fields), config


def _prefixes(model: Any) -> list[str]:
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(layer)] for layer in decoder_layers(decoder_of(model))]


def _divide(
    model: Any, files: Sequence[str], settings: Any, count: LayerFiles
) -> tuple[dict[str, _Slice], list[dict[str, _Slice]]]:
    """The tensors in the files: those outside layers, and those of each layer."""
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
        handle: Any = safe_open(file, framework="pt", device="cpu")
        for name in handle.keys():  # noqa: SIM118  (a safetensors file is no dictionary)
            renamed, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
            if renamed not in known:
                renamed, _ = rename_source_key(name, [], [], model.base_model_prefix, known)
            number = of_layer.get(renamed)
            (rest if number is None else layers[number])[name] = _Slice(handle.get_slice(name), count.add, pin=pin)
    return rest, layers


def _spans(files: Sequence[str], layers: Sequence[Mapping[str, Any]]) -> list[list[tuple[Path, int, int]]]:
    """The byte ranges of each layer's tensors, from the files' headers."""
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
    """A copy of a model that shares its tensors."""
    tensors = [*base.parameters(), *base.buffers()]
    memo: dict[int, Any] = {id(tensor): tensor for tensor in tensors}
    quantizer = getattr(base, "hf_quantizer", None)
    if quantizer is not None:
        memo[id(quantizer)] = quantizer
    return copy.deepcopy(base, memo)


def put(layer: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Sets a parameter or buffer of a layer, bypassing what its modules do on assignment."""
    path, _, last = name.rpartition(".")
    module = layer.get_submodule(path)
    (module._parameters if last in module._parameters else module._buffers)[last] = tensor  # type: ignore[assignment]


def _get(layer: nn.Module, name: str) -> torch.Tensor:
    path, _, last = name.rpartition(".")
    tensor = getattr(layer.get_submodule(path), last)
    assert isinstance(tensor, torch.Tensor)
    return tensor


@contextmanager
def _one_thread() -> Iterator[None]:
    """Makes transformers read in this thread: its own threads do not know this thread's CUDA stream."""
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
