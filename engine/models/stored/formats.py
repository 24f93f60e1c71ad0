"""Reads from config.json how weights are quantised, and which formats dpoeng can widen exactly.

Reads only JSON; loads no library. Tensor names show which tensors are codes, scales and zero points; their shapes show
how many bits a code has and how many weights share a scale: see `reading`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Format:
    """A storage format of weights.

    Attributes:
        method: the name in quant_method.
        words: its name in messages.
        marker: the ending, after the weight's name, of the tensor that marks a quantised weight.
        parts: ending -> its meaning: codes, scales, zeros, groups, divisor; or "" if products do not use it.
        whole: whether the name before the endings is the parameter's, not its module's.
        bits: bits per code.
        block: weights (rows, columns) that share a scale; None: all of them.
        symmetric: whether there are no zero points.
        zero_offset: the offset to add to a stored zero point.
        targets: patterns of quantised modules; empty: all linear layers but the head.
        ignored: patterns of modules that are not quantised.
        activations: how the format's own kernels quantise activations, in words; empty if they do not.
    """

    method: str
    words: str
    marker: str
    parts: Mapping[str, str]
    whole: bool = False
    bits: int = 8
    block: tuple[int | None, int | None] = (None, None)
    symmetric: bool = True
    zero_offset: int = 0
    targets: Sequence[str] = ()
    ignored: Sequence[str] = ()
    activations: str = ""
    record: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sizes = [size for size in self.block if size is not None]
        if not 1 <= self.bits <= 32:
            raise NotWidenedError(f"codes of {str(self.bits)[:20]} bits")
        if len(self.block) != 2 or not all(type(size) is int and 0 < size <= _MOST for size in sizes):
            raise NotWidenedError(f"{str(self.block)[:80]} weights share a scale: not two sizes")
        if not all(isinstance(name, str) for name in (*self.targets, *self.ignored)):
            raise NotWidenedError("names of modules that are no texts")

    def covers(self, module: str) -> bool:
        """Whether a linear layer of this name is quantised, according to config.json; for `dpoeng plan`."""
        named = not self.targets or any(_matches(target, module) for target in self.targets)
        return named and not any(_matches(pattern, module) for pattern in self.ignored)


_MOST = 1 << 31


class NotWidenedError(ValueError):
    """A format that dpoeng cannot widen: the reason, and an alternative."""

    def __init__(self, why: str, instead: str = "") -> None:
        super().__init__(why)
        self.instead = instead


_UNUSED = dict.fromkeys(
    """input_scale activation_scale input_global_scale output_scale weight_shape input_zero_point k_scale
    v_scale""".split(),
    "",
)


def format_of(record: Mapping[str, Any]) -> Format:
    """The format of a quantization_config.

    Raises:
        NotWidenedError: dpoeng cannot read it.
    """
    method = str(record.get("quant_method", "")).replace("_", "-")
    makers = {
        "fp8": _fp8,
        "fbgemm-fp8": _fbgemm,
        "compressed-tensors": _compressed_tensors,
        "mxfp4": _mxfp4,
        "gptq": _gptq,
        "awq": _awq,
    }
    if method not in makers:
        raise NotWidenedError("dpoeng cannot read its method")
    return makers[method](record)


def _fp8(record: Mapping[str, Any]) -> Format:
    block = record.get("weight_block_size")
    parts = {"weight": "codes", "weight_scale_inv": "scales", **_UNUSED}
    return Format(
        "fp8", "FP8", "weight_scale_inv", parts, block=tuple(block) if block else (None, None),
        ignored=tuple(record.get("modules_to_not_convert") or ()), activations="to FP8", record=record,
    )  # fmt: skip


def _fbgemm(record: Mapping[str, Any]) -> Format:
    return Format(
        "fbgemm_fp8", "FP8", "weight_scale", {"weight": "codes", "weight_scale": "scales", **_UNUSED}, block=(1, None),
        ignored=tuple(record.get("modules_to_not_convert") or ()), activations="to FP8", record=record,
    )  # fmt: skip


def _mxfp4(record: Mapping[str, Any]) -> Format:
    # Only experts are quantised; the config names the other modules, and the files have no scales for them.
    return Format(
        "mxfp4", "MXFP4", "_scales", {"_blocks": "codes", "_scales": "scales"}, whole=True, bits=4, block=(1, 32),
        targets=(r"re:.*\.experts(\.|$)",), ignored=tuple(record.get("modules_to_not_convert") or ()), record=record,
    )  # fmt: skip


def _gptq(record: Mapping[str, Any]) -> Format:
    stored = str(record.get("checkpoint_format") or record.get("format") or "gptq")
    if stored not in ("gptq", "gptq_v2"):
        raise NotWidenedError(f"GPTQ codes in the layout of {stored}, which only one kernel reads", "a GPTQ checkpoint")
    bits, group = int(record.get("bits", 4)), int(record.get("group_size", 128))
    return Format(
        "gptq", f"GPTQ, {bits} bits", "qweight",
        {"qweight": "codes", "scales": "scales", "qzeros": "zeros", "g_idx": "groups"},
        bits=bits, block=(1, group if group > 0 else None), symmetric=bool(record.get("sym", True)),
        zero_offset=0 if stored == "gptq_v2" else 1, ignored=tuple(record.get("modules_to_not_convert") or ()),
        record=record,
    )  # fmt: skip


def _awq(record: Mapping[str, Any]) -> Format:
    version = str(record.get("version") or record.get("format") or "gemm").lower()
    if version != "gemm" or int(record.get("bits", 4)) != 4 or not record.get("zero_point", True):
        raise NotWidenedError(
            "AWQ in another layout than GEMM with 4 bits and zero points", "an AWQ checkpoint in that layout"
        )
    group = int(record.get("group_size", 128))
    return Format(
        "awq", "AWQ, 4 bits", "qweight", {"qweight": "codes", "scales": "scales", "qzeros": "zeros"},
        bits=4, block=(1, group if group > 0 else None), symmetric=False,
        ignored=tuple(record.get("modules_to_not_convert") or ()), record=record,
    )  # fmt: skip


_COMPRESSED = frozenset(
    """float-quantized int-quantized naive-quantized mxfp8-quantized pack-quantized nvfp4-pack-quantized
    mxfp4-pack-quantized mixed-precision""".split()
)


def _compressed_tensors(record: Mapping[str, Any]) -> Format:
    groups = list((record.get("config_groups") or {}).values())
    stored = str(record.get("format", "dense"))
    if (record.get("sparsity_config") or {}).get("format", "dense") != "dense" or stored in (
        "marlin-24", "sparse-24-bitmask", "sparse-bitmask"
    ):  # fmt: skip
        raise NotWidenedError(
            "compressed-tensors with sparse weights (2:4 or a bitmask)", "the checkpoint without sparsity"
        )
    if record.get("transform_config"):
        raise NotWidenedError(
            "compressed-tensors with transforms (rotations) between its layers", "one without transforms"
        )
    if stored not in _COMPRESSED or not groups:
        raise NotWidenedError(f"compressed-tensors in the format {stored}", "pack-, int- or float-quantized weights")
    weights = [group.get("weights") or {} for group in groups]
    first = weights[0]
    size, structure = first.get("group_size"), first.get("block_structure")
    strategy = first.get("strategy") or ("group" if size else "tensor")
    blocks = {"tensor": (None, None), "channel": (1, None), "group": (1, size), "tensor_group": (1, size)}
    acts = next((group["input_activations"] for group in groups if group.get("input_activations")), None)
    kinds = sorted({f"{one.get('type', 'int')} {one.get('num_bits', 8)} bits" for one in weights})
    return Format(
        "compressed-tensors", f"compressed-tensors, {', '.join(kinds)}", "weight_scale",
        {"weight": "codes", "weight_packed": "codes", "weight_scale": "scales", "weight_zero_point": "zeros",
         "weight_g_idx": "groups", "weight_global_scale": "divisor", **_UNUSED},
        bits=int(first.get("num_bits", 8)),
        block=tuple(structure) if strategy == "block" and structure else blocks.get(strategy, (None, None)),
        symmetric=bool(first.get("symmetric", True)),
        targets=tuple(target for group in groups for target in group.get("targets") or ()),
        ignored=tuple(record.get("ignore") or ()),
        activations=f"to {acts.get('num_bits', 8)} bits" if acts else "", record=record,
    )  # fmt: skip


def _matches(pattern: str, module: str) -> bool:
    """Whether a pattern means a module: by its class, by a `re:` pattern, by its whole name or part of its path."""
    if pattern in ("Linear", "*"):
        return True
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    return f".{pattern}." in f".{module}." or re.match(rf"(?:{pattern})(\.|$)", module) is not None
