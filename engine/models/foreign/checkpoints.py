"""Checks a stranger's checkpoint before anything is allocated, matched or opened.

Weight files must be in the named folder, headers and sizes must be plausible, and an adapter's patterns must terminate.
Reads names, JSON and the first bytes of files; loads no weights.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from re import _constants as sre  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any, Final

from dpoeng.cache.errors import UserError

MAX_HEADER_BYTES: Final = 32 << 20  # DeepSeek-V3 has 91,991 tensors: about 12 MB
MAX_RANK: Final = 1 << 16
MAX_ALPHA: Final = 1e6
MAX_LAYERS: Final = 10_000
MAX_PATTERN: Final = 1 << 16

# Field of a config.json, at any depth -> its smallest and largest allowed value.
_SIZES: Final = {
    "vocab_size": (1, 1 << 24),
    "hidden_size": (1, 1 << 20),
    "n_embd": (1, 1 << 20),
    "d_model": (1, 1 << 20),
    "head_dim": (1, 1 << 16),
    "intermediate_size": (0, 1 << 24),
    "moe_intermediate_size": (0, 1 << 24),
    "num_attention_heads": (0, 1 << 16),
    "num_key_value_heads": (0, 1 << 16),
    "num_hidden_layers": (1, MAX_LAYERS),
    "n_layer": (1, MAX_LAYERS),
    "num_experts": (0, 1 << 16),
    "num_local_experts": (0, 1 << 16),
    "n_routed_experts": (0, 1 << 16),
}

# Small embeddings are allocated without a check: loading reports truncated files better.
_SMALL: Final = 1 << 27


def shard_files(folder: Path, index: Path, fields: Mapping[str, Any]) -> list[Path]:
    """The weight files in an index, sorted by name; does not check whether they exist.

    Raises:
        UserError: the index has no map, or names a file outside the folder.
    """
    named = fields.get("weight_map", {})
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
        raise _wrong(index, "weight_map", "tensor names, each with the name of a file", type(named).__name__)
    for name in sorted(set(named.values())):
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or PureWindowsPath(name).drive or path.suffix != ".safetensors":
            raise _wrong(index, "weight_map", "names of .safetensors files inside the folder", name[:200])
    return [folder / name for name in sorted(set(named.values()))]


def check_headers(files: Iterable[Path]) -> None:
    """Refuses safetensors files with an implausibly long header, because it is parsed whole.

    Raises:
        UserError: names the file and the limit. Other kinds of files are left to their loader.
    """
    for file in files:
        with file.open("rb") as opened:
            first = opened.read(8)
        if len(first) == 8 and MAX_HEADER_BYTES < struct.unpack("<Q", first)[0] <= file.stat().st_size:
            size = struct.unpack("<Q", first)[0]
            raise _wrong(file, "header", f"at most {MAX_HEADER_BYTES >> 20} MiB of header", f"{size} bytes")


def check_sizes(where: Path, fields: Mapping[str, Any], weight_bytes: int) -> None:
    """Refuses implausible sizes, before transformers allocates memory for them.

    Args:
        where: the config.json.
        fields: its contents.
        weight_bytes: total size of all weight files.

    Raises:
        UserError: names the field, its range and its value.
    """
    parts = [fields, *(part for part in fields.values() if isinstance(part, dict))]
    for part in parts:
        for name, (least, most) in _SIZES.items():
            size_value = part.get(name)
            for size in size_value if isinstance(size_value, list) else [size_value]:
                if size is not None and not (_is_int(size) and least <= size <= most):
                    raise _wrong(where, name, f"a whole number from {least} to {most}", str(size)[:80])
        vocabulary, width = part.get("vocab_size"), part.get("hidden_size")
        if (
            isinstance(vocabulary, int)
            and isinstance(width, int)
            and vocabulary * width > max(2 * weight_bytes, _SMALL)
        ):
            expected = f"an embedding that fits into the weight files, {weight_bytes} bytes"
            raise _wrong(where, "vocab_size, hidden_size", expected, f"{vocabulary} times {width} numbers")


def check_adapter_ranges(where: str, fields: Mapping[str, Any]) -> None:
    """Refuses adapter settings of the wrong type or range, and patterns that may never terminate.

    Raises:
        UserError: names the field, the allowed values and its value.
    """
    for name, most in (("r", MAX_RANK), ("lora_alpha", MAX_ALPHA)):
        patterns = fields.get("rank_pattern" if name == "r" else "alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise _wrong(where, f"{name} by module", "patterns, each with a number", type(patterns).__name__)
        values = [fields[name]] if name in fields else []
        for value in (*values, *patterns.values()):
            whole = _is_int(value) and 1 <= value <= most
            number = (isinstance(value, float) and math.isfinite(value)) or _is_int(value)
            if not (whole if name == "r" else number and abs(value) <= most):
                span = f"a whole number from 1 to {most}" if name == "r" else f"a number of at most {most:.0f}"
                raise _wrong(where, name, span, str(value)[:80])
        for pattern in patterns:
            check_pattern(where, "rank_pattern" if name == "r" else "alpha_pattern", pattern)
    for name in ("target_modules", "exclude_modules", "layers_pattern"):
        value = fields.get(name)
        if isinstance(value, str):
            check_pattern(where, name, value)
        elif value is not None and not (isinstance(value, list) and all(isinstance(one, str) for one in value)):
            raise _wrong(where, name, "a pattern, or a list of names", str(value)[:80])
        elif name == "layers_pattern":
            for pattern in value or ():
                check_pattern(where, name, pattern)
    _check_replication(where, fields.get("layer_replication"))


def _check_replication(where: str, ranges: Any) -> None:
    if ranges in (None, []):
        return
    pairs = isinstance(ranges, list) and all(isinstance(one, list) and len(one) == 2 for one in ranges)
    if not pairs or not all(_is_int(edge) for one in ranges for edge in one):
        raise _wrong(where, "layer_replication", "pairs of a first and a last layer", str(ranges)[:80])
    if any(not 0 <= first < last for first, last in ranges) or sum(b - a for a, b in ranges) > MAX_LAYERS:
        expected = f"ranges of layers, at most {MAX_LAYERS} layers in total"
        raise _wrong(where, "layer_replication", expected, str(ranges)[:80])


def check_pattern(where: str, field: str, pattern: str) -> None:
    """Refuses an invalid regular expression, and one whose matching can take exponentially long.

    Python's `re` tries all ways to divide a text among repeats: nested repeats do not finish on a name of 40 letters.
    So a repeated part may match in only one way, and the number of adjacent repeats is limited.

    Raises:
        UserError: quotes the pattern.
    """
    try:
        if len(pattern) > MAX_PATTERN:
            raise ValueError(f"{len(pattern)} characters; the limit is {MAX_PATTERN}")
        ways, repeats = choices(pattern)
        if ways > _MAX_WAYS or repeats > _MAX_REPEATS:
            raise ValueError(f"too many ways to match: {pattern[:120]}")
    except (re.error, ValueError, RecursionError, OverflowError) as error:
        raise _wrong(where, field, "a pattern without repeats inside repeats", str(error)[:200]) from None


_MAX_WAYS = 1_000_000
_MAX_REPEATS = 5  # adjacent ones: each is tried at every letter of a name


def choices(pattern: str) -> tuple[int, int]:
    """Like `_ways`, for a pattern.

    Raises:
        ValueError, re.error: a repeat contains something with several ways to match, or the pattern is invalid.
    """
    return _ways(_parser.parse(pattern))


def _ways(parsed: Sequence[tuple[Any, Any]]) -> tuple[int, int]:
    """The number of ways in which a sequence can choose among alternatives, and of adjacent repeats.

    Raises:
        ValueError: a repeat contains something with several ways to match.
    """
    ways, repeats = 1, 0
    for operation, argument in parsed:
        if operation in (sre.MAX_REPEAT, sre.MIN_REPEAT, sre.POSSESSIVE_REPEAT):
            least, most, held = argument
            inner_ways, inner_repeats = _ways(held)
            if most > 1 and (inner_ways > 1 or inner_repeats):
                raise ValueError("a repeat that contains alternatives or another repeat")
            ways *= inner_ways + (1 if least == 0 and most == 1 else 0)
            repeats += inner_repeats + (1 if least != most and most > 1 else 0)
        else:
            several = argument[1] if operation is sre.BRANCH else _held(operation, argument)
            branches = [_ways(one) for one in several]
            ways *= max(1, sum(one for one, _ in branches))
            repeats += max((one for _, one in branches), default=0)
    return ways, repeats


def _held(operation: Any, argument: Any) -> list[Any]:
    """The sequences inside a group, a look-around or a condition."""
    if operation is sre.SUBPATTERN:
        return [argument[-1]]
    if operation in (sre.ASSERT, sre.ASSERT_NOT):
        return [argument[1]]
    if operation is sre.ATOMIC_GROUP:
        return [argument]
    return [one for one in argument[1:] if one is not None] if operation is sre.GROUPREF_EXISTS else []


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _wrong(where: Path | str, field: str, expected: str, found: str) -> UserError:
    return UserError(
        "a checkpoint file contains impossible or unsupported values",
        code="checkpoint-claims",
        where=f"{where}, {field}",
        expected=expected,
        found=found,
        remedy="get the checkpoint again from a source you trust",
    )
