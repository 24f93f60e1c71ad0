"""Builds a `StoredWeight` from tensors of a file: order and packing of codes, and the weights per scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dpoeng.engine.models.stored.formats import Format
from dpoeng.engine.models.stored.weights import StoredWeight, code_table

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)

# The column (of eight) of each four bits in a word of AWQ, the lowest bits first.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def read_weight(stored: Format, parts: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> StoredWeight:
    """Reads one matrix.

    Args:
        stored: the format.
        parts: by meaning (`codes`, `scales`, ...), as in the files.
        shape: (O, I) of the matrix.

    Raises:
        ValueError: the parts do not fit the shape, or libraries disagree about their meaning.
    """
    if stored.method == "gptq":
        return _gptq(stored, parts, shape)
    if stored.method == "awq":
        return _awq(stored, parts, shape)
    codes, scales = parts["codes"], _as_floats(parts["scales"])
    if codes.dtype == torch.int8 and stored.method == "fp8":  # experts of four bits in an FP8 checkpoint
        codes = codes.view(torch.uint8)
    if any(size != 1 for size in scales.shape[2:]):
        raise ValueError(f"scales of {scales.dim()} dimensions, {tuple(scales.shape)}")
    scales = scales.reshape(1, 1) if scales.numel() == 1 else scales.reshape(len(scales), -1)
    block = _block(stored, scales, shape)
    divisor = parts["divisor"].reshape(1).float() if "divisor" in parts else None
    groups = _groups(parts.get("groups"), shape[1], shape[1] // block[1], block[1])
    if codes.dtype in (*_FLOAT8, torch.int8):
        _expect("codes", codes.shape, shape)
        zeros = parts.get("zeros")
        zeros = None if zeros is None or codes.dtype in _FLOAT8 else zeros.reshape(scales.shape)
        return StoredWeight(codes, scales, shape, block, zeros, groups, None, divisor)
    if codes.dtype == torch.uint8:  # four bits each, floats
        _expect("codes", codes.shape, (shape[0], shape[1] // 2))
        table = code_table(4, 0, codes.device, floats=True)
        return StoredWeight(codes, scales, shape, block, None, groups, table, divisor)
    if codes.dtype != torch.int32:
        raise ValueError(f"codes in {codes.dtype}")
    bits = stored.bits if codes.shape[1] == -(-shape[1] * stored.bits // 32) else 32 * codes.shape[1] // shape[1]
    _check_bits(bits)
    _expect("codes", codes.shape, (shape[0], -(-shape[1] * bits // 32)))
    zeros = None
    if "zeros" in parts:  # packed along the rows
        _expect_words("zero points", parts["zeros"])
        zeros = _unpacked(parts["zeros"].T.contiguous().view(torch.uint8), bits)[:, : shape[0]].T.contiguous()
        _expect("zero points", zeros.shape, scales.shape)
    table = code_table(bits, 0 if zeros is not None else 1 << (bits - 1), codes.device)
    return StoredWeight(codes.view(torch.uint8), scales, shape, block, zeros, groups, table)


def _gptq(stored: Format, parts: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> StoredWeight:
    """Words [I / n, O] of n consecutive codes of a column, zero points [G, O / n], scales [G, O]."""
    rows, columns = shape
    words, scales = parts["codes"], parts["scales"].T.contiguous()
    _expect_words("codes", words)
    _expect_words("zero points", parts["zeros"])
    bits = 32 * words.shape[0] // columns
    _check_bits(bits)
    _expect("codes", words.shape, (columns * bits // 32, rows))
    block = _block(stored, scales, shape)
    zeros: torch.Tensor | None = None
    offset = 1 << (bits - 1)
    if not parts["zeros"].is_meta:
        held = _unpacked(parts["zeros"].contiguous().view(torch.uint8), bits)[:, :rows].T
        _expect("zero points", held.shape, scales.shape)
        if stored.zero_offset and bool((held == (1 << bits) - 1).any()):
            # Written as 0 - 1: some programs read it as the largest code plus 1, others as 0.
            raise ValueError("a zero point of 0 in GPTQ's first layout, which programs read in two ways")
        held = held.int() + stored.zero_offset
        zeros = None if bool((held == offset).all()) else held.to(torch.int16).contiguous()
    elif not stored.symmetric:
        zeros = torch.empty(scales.shape, dtype=torch.int16, device="meta")
    table = code_table(bits, offset if zeros is None else 0, words.device)
    groups = _groups(parts.get("groups"), columns, scales.shape[1], block[1])
    codes = words.T.contiguous().view(torch.uint8)
    return StoredWeight(codes, scales, shape, block, zeros, groups, table)


def _awq(stored: Format, parts: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> StoredWeight:
    """Words [I, O / 8] of eight codes across columns in AWQ's order; zero points [G, O / 8] likewise, scales [G, O]."""
    rows, columns = shape
    _expect_words("codes", parts["codes"])
    _expect_words("zero points", parts["zeros"])
    _expect("codes", parts["codes"].shape, (columns, rows // 8))
    scales = parts["scales"].T.contiguous()
    codes = _awq_codes(parts["codes"]).T  # [O, I]
    packed = codes[:, 0::2] | codes[:, 1::2] << 4
    zeros = _awq_codes(parts["zeros"]).T.contiguous()
    _expect("zero points", zeros.shape, scales.shape)
    table = code_table(4, 0, packed.device)
    return StoredWeight(packed.contiguous(), scales, shape, _block(stored, scales, shape), zeros, None, table)


def _awq_codes(words: torch.Tensor) -> torch.Tensor:
    each = _unpacked(words.contiguous().view(torch.uint8), 4).view(len(words), -1, 8)
    back = sorted(range(8), key=_AWQ_ORDER.__getitem__)
    return each[:, :, back].flatten(1)


def _unpacked(held: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes [A, n * B] in bytes [A, B], the lowest bits first."""
    parts = [held >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)]
    return torch.stack(parts, dim=-1).flatten(1)


def _as_floats(scales: torch.Tensor) -> torch.Tensor:
    """Converts scales stored as exponents of two (one byte, bias 127) to floats."""
    return scales.view(torch.float8_e8m0fnu) if scales.dtype == torch.uint8 else scales


def _block(stored: Format, scales: torch.Tensor, shape: tuple[int, int]) -> tuple[int, int]:
    """The rows and columns that share a scale, from the format or from the scales' shape."""
    found = []
    for size, count, said in zip(shape, scales.shape, stored.block, strict=True):
        even = size if count == 1 else size // count if size % count == 0 else 0
        block = said if said and -(-size // said) == count else even
        if not block:
            raise ValueError(f"scales {tuple(scales.shape)} for a matrix {shape}")
        found.append(int(block))
    return found[0], found[1]


def _groups(held: torch.Tensor | None, inputs: int, count: int, width: int) -> torch.Tensor | None:
    """The scale's column of each of `inputs`, of `count` columns, or None if they are consecutive."""
    if held is None or held.is_meta:
        return None
    if held.is_floating_point():
        raise ValueError(f"groups in {held.dtype}")
    _expect("groups", held.shape, (inputs,))
    if bool((held == -1).all()):  # compressed-tensors': not used
        return None
    low, high = int(held.min()), int(held.max())
    if low < 0 or high >= count:
        raise ValueError(f"inputs of groups {low} to {high} where there are {count}")
    held = held.to(torch.int32)
    plain = torch.arange(len(held), dtype=torch.int32, device=held.device) // width
    return None if torch.equal(held, plain) else held


def _check_bits(bits: int) -> None:
    if bits not in (2, 4, 8):
        raise ValueError(f"codes of {bits} bits, which cross bytes")


def _expect_words(name: str, found: torch.Tensor) -> None:
    if found.dtype != torch.int32:  # of another width, the bytes would be other codes
        raise ValueError(f"{name} in {found.dtype}, not in words of 32 bits")


def _expect(name: str, found: Any, wanted: tuple[int, ...] | torch.Size) -> None:
    if tuple(found) != tuple(wanted):
        raise ValueError(f"{name} {tuple(found)} where the matrix needs {tuple(wanted)}")


def stored_parts(stored: Format, shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    """The parts of a matrix in a format, without values: for `dpoeng plan`."""
    rows, columns = shape
    height, width = (size if said is None else said for size, said in zip(shape, stored.block, strict=True))
    grid = (-(-rows // height), -(-columns // width))

    def empty(dtype: torch.dtype, *sizes: int) -> torch.Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    bits, per_word = stored.bits, 32 // stored.bits
    if stored.method == "gptq":
        words = empty(torch.int32, columns // per_word, rows)
        zeros = empty(torch.int32, grid[1], rows // per_word)
        return {"codes": words, "scales": empty(torch.float16, grid[1], rows), "zeros": zeros}
    if stored.method == "awq":
        words, zeros = (empty(torch.int32, count, rows // 8) for count in (columns, grid[1]))
        return {"codes": words, "scales": empty(torch.float16, grid[1], rows), "zeros": zeros}
    named = str(stored.record.get("format", ""))
    if stored.method == "mxfp4" or "mxfp4" in named:
        return {"codes": empty(torch.uint8, rows, columns // 2), "scales": empty(torch.uint8, *grid)}
    if "nvfp4" in named:
        scales = empty(torch.float8_e4m3fn, *grid)
        return {"codes": empty(torch.uint8, rows, columns // 2), "scales": scales, "divisor": empty(torch.float32, 1)}
    if named == "pack-quantized":
        found = {"codes": empty(torch.int32, rows, -(-columns * bits // 32)), "scales": empty(torch.bfloat16, *grid)}
        return found if stored.symmetric else {**found, "zeros": empty(torch.int32, -(-rows // per_word), grid[1])}
    codes = torch.int8 if "int" in stored.words else torch.float8_e4m3fn
    scale = torch.bfloat16 if stored.method == "compressed-tensors" else torch.float32
    scale = torch.uint8 if "mxfp8" in named else scale
    found = {"codes": empty(codes, rows, columns), "scales": empty(scale, *grid)}
    return found if stored.symmetric else {**found, "zeros": empty(torch.int8, *grid)}
