"""Tiny checkpoints as others quantise them, and the plain checkpoint that they stand for.

Written from the formats' descriptions with numpy and loops, without any code of dpoeng: codes are drawn at random, so
that every code and every zero point is met. Layouts: FP8, https://arxiv.org/abs/2412.19437 3.3; compressed-tensors,
https://github.com/vllm-project/compressed-tensors; GPTQ's and AWQ's int32 words as AutoGPTQ and AutoAWQ write them;
MXFP4, https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

Parts = dict[str, torch.Tensor]
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32)
GROUP = 16


def _spread(grid: np.ndarray, block: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    """Each number of a grid at all weights of its block."""
    return np.array([[grid[i // block[0], j // block[1]] for j in range(shape[1])] for i in range(shape[0])])


def _grid(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def _scales(random: np.random.Generator, *shape: int, size: float = 0.1) -> np.ndarray:
    return (size * (0.5 + random.random(shape))).astype(np.float32)


def fp8(
    random: np.random.Generator, shape: tuple[int, int], block: tuple[int, int], scale: str = "weight_scale_inv"
) -> tuple[Parts, np.ndarray]:
    """Codes in e4m3 and a float32 scale for each block, the last ones cut off."""
    codes = torch.from_numpy(random.normal(size=shape).astype(np.float32)).to(torch.float8_e4m3fn)
    scales = _scales(random, *_grid(shape, block))
    return {"weight": codes, scale: torch.from_numpy(scales)}, codes.float().numpy() * _spread(scales, block, shape)


def _words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes packed along the last dimension into int32, the first in the lowest bits."""
    each = 32 // bits
    padded = np.zeros((codes.shape[0], -(-codes.shape[1] // each) * each), dtype=np.uint32)
    padded[:, : codes.shape[1]] = codes
    words = np.zeros((codes.shape[0], padded.shape[1] // each), dtype=np.uint32)
    for j in range(padded.shape[1]):
        words[:, j // each] |= padded[:, j] << np.uint32(bits * (j % each))
    return words.view(np.int32)


def packed(
    random: np.random.Generator, shape: tuple[int, int], *, symmetric: bool, bits: int = 4, order: bool = False
) -> tuple[Parts, np.ndarray]:
    """compressed-tensors' pack-quantized, in groups; with `order`, inputs belong to groups in any order."""
    codes = random.integers(0, 1 << bits, shape)
    count = shape[1] // GROUP
    scales = torch.from_numpy(_scales(random, shape[0], count, size=0.04)).to(torch.bfloat16)
    zeros = (
        np.full((shape[0], count), 1 << (bits - 1)) if symmetric else random.integers(0, 1 << bits, (shape[0], count))
    )
    group = random.permutation(shape[1]) // GROUP if order else np.arange(shape[1]) // GROUP
    parts = {
        "weight_packed": torch.from_numpy(_words(codes, bits)),
        "weight_scale": scales,
        "weight_shape": torch.tensor(shape, dtype=torch.int64),
        **({} if symmetric else {"weight_zero_point": torch.from_numpy(_words(zeros.T, bits).T.copy())}),
        **({"weight_g_idx": torch.from_numpy(group.astype(np.int32))} if order else {}),
    }
    return parts, (codes - zeros[:, group]).astype(np.float32) * scales.float().numpy()[:, group]


def int8(random: np.random.Generator, shape: tuple[int, int]) -> tuple[Parts, np.ndarray]:
    """compressed-tensors' int-quantized, a scale a row."""
    codes = random.integers(-128, 128, shape)
    scales = torch.from_numpy(_scales(random, shape[0], 1, size=0.002)).to(torch.bfloat16)
    parts = {"weight": torch.from_numpy(codes.astype(np.int8)), "weight_scale": scales}
    return parts, codes.astype(np.float32) * scales.float().numpy()


def float8(random: np.random.Generator, shape: tuple[int, int]) -> tuple[Parts, np.ndarray]:
    """compressed-tensors' float-quantized, a scale a row."""
    parts, _ = fp8(random, shape, (1, shape[1]), "weight_scale")
    parts["weight_scale"] = parts["weight_scale"].to(torch.bfloat16)
    return parts, parts["weight"].float().numpy() * parts["weight_scale"].float().numpy()


def nvfp4(random: np.random.Generator, shape: tuple[int, int]) -> tuple[Parts, np.ndarray]:
    """Two e2m1 floats a byte, an e4m3 scale for 16 of them, and a number that divides the scales."""
    codes = random.integers(0, 16, shape)
    scales = torch.from_numpy(_scales(random, shape[0], shape[1] // 16, size=100.0)).to(torch.float8_e4m3fn)
    divisor = np.float32(1700.0)
    parts = {
        "weight_packed": torch.from_numpy((codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8)),
        "weight_scale": scales,
        "weight_global_scale": torch.tensor([float(divisor)]),
    }
    return parts, E2M1[codes] * _spread(scales.float().numpy() / divisor, (1, 16), shape)


def gptq(
    random: np.random.Generator, shape: tuple[int, int], *, bits: int, symmetric: bool, order: bool, offset: int
) -> tuple[Parts, np.ndarray]:
    """GPTQ's words down the columns; zero points are stored less `offset`."""
    codes, count = random.integers(0, 1 << bits, shape), shape[1] // GROUP
    zeros = (
        np.full((shape[0], count), 1 << (bits - 1)) if symmetric else random.integers(1, 1 << bits, (shape[0], count))
    )
    scales = torch.from_numpy(_scales(random, shape[0], count, size=0.04)).to(torch.float16)
    group = random.permutation(shape[1]) // GROUP if order else np.arange(shape[1]) // GROUP
    parts = {
        "qweight": torch.from_numpy(_words(codes, bits).T.copy()),
        "qzeros": torch.from_numpy(_words((zeros - offset).T, bits)),
        "scales": scales.T.contiguous(),
        "g_idx": torch.from_numpy(group.astype(np.int32)),
    }
    return parts, (codes - zeros[:, group]).astype(np.float32) * scales.float().numpy()[:, group]


def _awq_words(codes: np.ndarray) -> np.ndarray:
    """Eight codes that follow each other in a row to a word; the i-th four bits hold the column of this order."""
    words = np.zeros((codes.shape[0], codes.shape[1] // 8), dtype=np.uint32)
    for i, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        words |= codes[:, column::8].astype(np.uint32) << np.uint32(4 * i)
    return words.view(np.int32)


def awq(random: np.random.Generator, shape: tuple[int, int]) -> tuple[Parts, np.ndarray]:
    """AWQ's GEMM layout."""
    codes, count = random.integers(0, 16, shape), shape[1] // GROUP
    zeros = random.integers(0, 16, (shape[0], count))
    scales = torch.from_numpy(_scales(random, shape[0], count, size=0.04)).to(torch.float16)
    parts = {
        "qweight": torch.from_numpy(_awq_words(codes.T)),
        "qzeros": torch.from_numpy(_awq_words(zeros.T)),
        "scales": scales.T.contiguous(),
    }
    spread = (1, GROUP)
    return parts, (codes - _spread(zeros, spread, shape)).astype(np.float32) * _spread(
        scales.float().numpy(), spread, shape
    )


def _compressed(stored: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "symmetric": True, **weights}}
    if stored in ("float-quantized", "int-quantized"):
        group["input_activations"] = {"num_bits": 8, "dynamic": True}
    return {
        "quant_method": "compressed-tensors",
        "format": stored,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


FORMATS: dict[
    str, tuple[dict[str, Any], Callable[[np.random.Generator, tuple[int, int]], tuple[Parts, np.ndarray]]]
] = {
    "fp8 blocks": ({"quant_method": "fp8", "weight_block_size": [16, 32]}, lambda r, s: fp8(r, s, (16, 32))),
    "fp8 tensor": ({"quant_method": "fp8"}, lambda r, s: fp8(r, s, s)),
    "fbgemm": ({"quant_method": "fbgemm_fp8"}, lambda r, s: fp8(r, s, (1, s[1]), "weight_scale")),
    "float-quantized": (
        _compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
        float8,
    ),
    "int-quantized": (_compressed("int-quantized", num_bits=8, strategy="channel"), int8),
    "pack-quantized": (
        _compressed("pack-quantized", strategy="group", group_size=GROUP),
        lambda r, s: packed(r, s, symmetric=True),
    ),
    "pack-quantized, zero points": (
        _compressed("pack-quantized", strategy="group", group_size=GROUP, symmetric=False),
        lambda r, s: packed(r, s, symmetric=False),
    ),
    "pack-quantized, 8 bits, any order": (
        _compressed("pack-quantized", strategy="group", group_size=GROUP, num_bits=8),
        lambda r, s: packed(r, s, symmetric=True, bits=8, order=True),
    ),
    "nvfp4": (_compressed("nvfp4-pack-quantized", type="float", strategy="tensor_group", group_size=16), nvfp4),
    "gptq": (
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True},
        lambda r, s: gptq(r, s, bits=4, symmetric=True, order=False, offset=1),
    ),
    "gptq, any order": (
        {"quant_method": "gptq", "bits": 8, "group_size": GROUP, "sym": False, "desc_act": True},
        lambda r, s: gptq(r, s, bits=8, symmetric=False, order=True, offset=1),
    ),
    "gptq_v2": (
        {"quant_method": "gptq", "bits": 2, "group_size": GROUP, "sym": False, "checkpoint_format": "gptq_v2"},
        lambda r, s: gptq(r, s, bits=2, symmetric=False, order=False, offset=0),
    ),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}, awq),
}
"""Name -> quantization_config, and what makes a matrix: its parts, and what it stands for."""


def write_stored(plain: Path, into: Path, name: str) -> None:
    """Quantises the linear layers of a saved model: `into` gets codes, and `plain` the numbers that they stand for."""
    record, make = FORMATS[name]
    _write(plain, into, record, make, _is_linear, ".")


def write_mxfp4(plain: Path, into: Path) -> None:
    """The same of gpt-oss's experts, stored as [E, O, I / 32, 16] bytes and an exponent for each 32 weights."""

    def make(random: np.random.Generator, shape: tuple[int, ...]) -> tuple[Parts, np.ndarray]:
        experts, columns, rows = shape  # the model's own are transposed
        codes = random.integers(0, 16, (experts, rows, columns))
        exponents = random.integers(122, 126, (experts, rows, columns // 32))
        blocks = (codes[..., 0::2] | codes[..., 1::2] << 4).astype(np.uint8).reshape(experts, rows, columns // 32, 16)
        parts = {"_blocks": torch.from_numpy(blocks), "_scales": torch.from_numpy(exponents.astype(np.uint8))}
        wide = E2M1[codes] * np.repeat(2.0 ** (exponents - 127.0), 32, axis=2).astype(np.float32)
        return parts, wide.transpose(0, 2, 1)

    record = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    _write(plain, into, record, make, lambda key, _: key.endswith(("gate_up_proj", "down_proj")), "")


def _is_linear(key: str, tensor: torch.Tensor) -> bool:
    return key.endswith(("_proj.weight", "w1.weight", "w2.weight", "w3.weight")) and tensor.dim() == 2


def _write(
    plain: Path,
    into: Path,
    record: dict[str, Any],
    make: Any,
    is_coded: Callable[[str, torch.Tensor], bool],
    joint: str,
) -> None:
    random = np.random.default_rng(0)
    shutil.copytree(plain, into)
    tensors, stored = load_file(plain / "model.safetensors"), {}
    for key, tensor in list(tensors.items()):
        if is_coded(key, tensor):
            parts, wide = make(random, tuple(tensor.shape))
            tensors[key] = torch.from_numpy(np.ascontiguousarray(wide.astype(np.float32)))
            stored |= {key.removesuffix(".weight") + joint + part: part_tensor for part, part_tensor in parts.items()}
        else:
            stored[key] = tensor
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    save_file(stored, into / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((into / "config.json").read_text(encoding="utf-8"))
    (into / "config.json").write_text(json.dumps(fields | {"quantization_config": record}), encoding="utf-8")
