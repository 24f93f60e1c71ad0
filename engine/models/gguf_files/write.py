"""Writes a checkpoint, or a LoRA, as a GGUF file, tensor by tensor; and reads a LoRA back.

The format is described in https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. llama.cpp adds
`alpha / rank * b @ a` of an adapter's tensors to the base's, in its own order of rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import safe_open

from dpoeng.cache.errors import UserError
from dpoeng.engine.models.gguf_files.architecture import Architecture
from dpoeng.engine.models.gguf_files.tokenizer import add_tokenizer
from dpoeng.engine.models.sources import ModelSource
from dpoeng.engine.runtime.progress import Progress

GgufType = Literal["f32", "f16", "bf16", "q8_0"]
_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}


def write_gguf(
    path: Path, source: ModelSource, architecture: Architecture, *, name: str, kind: GgufType, progress: Progress
) -> None:
    """Writes a checkpoint in one file, its tokenizer and chat template in it.

    Vectors (norms, biases) stay in float32, as llama.cpp keeps them.

    Args:
        path: the new file.
        source: the full-precision checkpoint.
        architecture: of it.
        name: of the model, as llama.cpp shows it.
        kind: of the matrices.
        progress: told of each tensor.

    Raises:
        UserError: a weight or the tokenizer has no place in the format.
    """
    import gguf

    writer = gguf.GGUFWriter(path, architecture.name)
    try:
        writer.add_name(name)
        writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[kind]])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for key, value in architecture.keys().items():
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
        add_tokenizer(writer, source.folder, int(architecture.config["vocab_size"]))
        stored: list[tuple[Path, str, Any]] = []
        for file, own, shape in _shapes(source):
            if (theirs := architecture.tensor_name(own)) is not None:
                quantized = _type_of(shape, kind)
                n_bytes = gguf.quant_shape_to_byte_shape(shape, quantized)
                writer.add_tensor_info(theirs, n_bytes, np.dtype(np.uint8), int(np.prod(n_bytes)), quantized)
                stored.append((file, own, quantized))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with progress.task("writing", len(stored), "tensors") as advance:
            for file, own, quantized in stored:
                with safe_open(file, framework="pt") as weights:
                    values = weights.get_tensor(own).float().numpy()
                data = gguf.quants.quantize(architecture.rows(own, values), quantized)
                writer.write_tensor_data(np.ascontiguousarray(data).view(np.uint8))
                advance(1, own)
    finally:
        writer.close()


def write_gguf_adapter(
    path: Path, architecture: Architecture, matrices: Mapping[str, tuple[torch.Tensor, torch.Tensor]], *, name: str
) -> None:
    """Writes a LoRA in float32.

    Args:
        path: the new file.
        architecture: of the base.
        matrices: by the name of the base's weight: A [r, in] and B [out, r], whose product is the update.
        name: as llama.cpp shows it.

    Raises:
        UserError: a weight has no place in the format, or is a tied head.
    """
    import gguf

    writer = gguf.GGUFWriter(path, architecture.name)
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_name(name)
        # The scale is in B, and each tensor's own rank divides alpha: 0 is llama.cpp's word for no scale at all.
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)
        for own, (a, b) in matrices.items():
            theirs = architecture.tensor_name(own)
            if theirs is None:
                raise UserError(
                    "the adapter changes a head that is the embedding",
                    code="gguf-unwritable",
                    where=own,
                    remedy="`dpoeng export OUT --to gguf` writes a whole model",
                )
            writer.add_tensor(f"{theirs}.lora_a", np.ascontiguousarray(a.float().numpy()))
            writer.add_tensor(f"{theirs}.lora_b", architecture.rows(own, b.float().contiguous().numpy()))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def read_gguf_adapter(
    path: Path, architecture: Architecture, names: Mapping[str, Any]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The matrices of an adapter's file, back under the base's own names; `names` are those to look for."""
    import gguf

    stored = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}
    found = {}
    for own in names:
        theirs = architecture.tensor_name(own)
        b = architecture.rows_back(own, stored[f"{theirs}.lora_b"])
        found[own] = torch.from_numpy(stored[f"{theirs}.lora_a"]), torch.from_numpy(b)
    return found


def _shapes(source: ModelSource) -> list[tuple[Path, str, tuple[int, ...]]]:
    """File, name and shape of every weight."""
    found = []
    for file in source.weight_files:
        with safe_open(file, framework="pt") as weights:
            found += [(file, name, tuple(weights.get_slice(name).get_shape())) for name in weights.keys()]  # noqa: SIM118
    return found


def _type_of(shape: tuple[int, ...], kind: GgufType) -> Any:
    """How a tensor is stored: vectors in float32, rows that blocks do not fill in float16."""
    import gguf

    types = gguf.GGMLQuantizationType
    wanted = types[kind.upper()]
    if len(shape) == 1:
        return types.F32
    return wanted if shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0] == 0 else types.F16
