"""Hashes of model weights, tensor by tensor: independent of how files are split, sensitive to a single flipped bit.

Reads safetensors through its header and GGUF through the `gguf` package; never torch, never pickle.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import xxhash

from dpoeng.cache.errors import CacheError
from dpoeng.cache.files import replacing
from dpoeng.cache.records import canonical_json, seal, unseal

Progress = Callable[[int, int], None]

_HEADER_LIMIT: Final = 100_000_000  # safetensors' own limit
_BITS: Final = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64,
    "F32": 32, "I32": 32, "U32": 32,
    "F16": 16, "BF16": 16, "I16": 16, "U16": 16,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I8": 8, "U8": 8, "BOOL": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
_THREADS: Final = min(8, os.cpu_count() or 1)
_SETTLED_NS: Final = 2_000_000_000
# GGUF metadata that changes no log-prob: names, licences, and the tokenizer, which acts only through token ids.
_GGUF_IGNORED: Final = ("general.", "tokenizer.", "GGUF.", "split.")


@dataclass(frozen=True, slots=True)
class TensorDigest:
    """Identity of a tensor: dtype (as the file names it), shape, and xxh3_128 of its bytes in 32 hex digits."""

    dtype: str
    shape: tuple[int, ...]
    xxh3_128: str

    def to_json(self) -> list[Any]:
        return [self.dtype, list(self.shape), self.xxh3_128]


@dataclass(frozen=True, slots=True)
class _Span:
    """Byte range of a tensor in its file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def weight_digests(
    files: Sequence[Path],
    *,
    progress: Progress | None = None,
    memo: Path | None = None,
    without: Collection[str] = (),
) -> dict[str, TensorDigest]:
    """Hashes every byte of every tensor in the files.

    Args:
        files: safetensors or GGUF, single files or shards.
        progress: called with (bytes done, total bytes) after each tensor, from one thread at a time.
        memo: folder that stores digests by (device, inode, size, mtime, ctime) of a file. A file that changed less than
            two seconds ago is not stored, since it could change again within one tick of the clock.
        without: names of tensors that are not hashed.

    Returns:
        Digests by tensor name, sorted. GGUF files add the entry `gguf:metadata` for the settings in their header.

    Raises:
        CacheError: a file is missing, damaged, in another format, or changed while it was read; or two files contain
            the same tensor.
    """
    meter = _Meter(progress, sum(_stat(file).st_size for file in files))
    all_digests: dict[str, TensorDigest] = {}
    for file in files:
        digests = _file_digests(file, meter, memo, frozenset(without))
        for name in digests.keys() & all_digests.keys():
            if name != _GGUF_METADATA or digests[name] != all_digests[name]:
                raise _bad_weights(file, "each tensor in one file", f"{name} in a second one")
        all_digests |= digests
    return dict(sorted(all_digests.items()))


def combined_digest(digests: Mapping[str, TensorDigest]) -> str:
    """One hash, 32 hex digits, over names, dtypes, shapes and digests, sorted by name."""
    return xxhash.xxh3_128_hexdigest(canonical_json({name: item.to_json() for name, item in digests.items()}))


_GGUF_METADATA: Final = "gguf:metadata"


def _file_digests(file: Path, meter: _Meter, memo: Path | None, without: frozenset[str]) -> dict[str, TensorDigest]:
    before = _stat(file)
    if memo:
        remembered = _recall(memo, before, ())
        if remembered is None and without:
            remembered = _recall(memo, before, without)
        if remembered is not None:
            meter.add(before.st_size)
            return {name: digest for name, digest in remembered.items() if name not in without}
    with _mapped(file) as data:
        if bytes(data[:4]) == b"GGUF":
            spans, digests = _gguf_spans(file, before.st_size)
        else:
            spans, digests = _safetensors_spans(file, data), {}
        spans = {name: span for name, span in spans.items() if name not in without}

        def hash_one(item: tuple[str, _Span]) -> tuple[str, TensorDigest]:
            name, span = item
            digest = xxhash.xxh3_128_hexdigest(data[span.start : span.end])
            meter.add(span.end - span.start)
            return name, TensorDigest(span.dtype, span.shape, digest)

        with ThreadPoolExecutor(_THREADS) as pool:
            digests |= dict(pool.map(hash_one, spans.items()))
        data.release()
    meter.add(before.st_size - sum(span.end - span.start for span in spans.values()))
    after = _stat(file)
    if _identity(after) != _identity(before):
        raise _bad_weights(file, "a file at rest", "one that changed while it was hashed")
    if memo and time.time_ns() - max(after.st_mtime_ns, after.st_ctime_ns) > _SETTLED_NS:
        _remember(memo, after, without, digests)
    return digests


def _safetensors_spans(file: Path, data: memoryview) -> dict[str, _Span]:
    """Parses and checks a header: https://huggingface.co/docs/safetensors/index#format."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or not 2 <= length <= min(_HEADER_LIMIT, len(data) - 8):
        raise _bad_weights(file, "a safetensors or GGUF file", "another kind of header")
    try:
        header = json.loads(bytes(data[8 : 8 + length]), object_pairs_hook=_unique)
        if not isinstance(header, dict):
            raise ValueError("the header is not a JSON object")
        spans = {
            name: _Span(
                str(item["dtype"]),
                tuple(int(size) for size in item["shape"]),
                8 + length + int(item["data_offsets"][0]),
                8 + length + int(item["data_offsets"][1]),
            )
            for name, item in header.items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise _bad_weights(file, "a safetensors header", f"{type(error).__name__}: {error}"[:200]) from None
    position = 8 + length
    for name, span in sorted(spans.items(), key=lambda item: (item[1].start, item[1].end)):
        bits = _BITS.get(span.dtype)
        if bits is None:
            raise _bad_weights(file, f"a known dtype for {name}", span.dtype)
        if (
            span.start != position
            or (span.end - span.start) * 8 != math.prod(span.shape) * bits
            or min(span.shape, default=0) < 0
        ):
            raise _bad_weights(file, f"{name} right after the previous tensor, as long as its shape", f"{span}")
        position = span.end
    if position != len(data):
        raise _bad_weights(file, f"{position} bytes", f"{len(data)} bytes")
    return spans


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise ValueError("a key appears twice in one object")
    return unique


def _gguf_spans(file: Path, size: int) -> tuple[dict[str, _Span], dict[str, TensorDigest]]:
    """Spans of the tensors, and one digest over all header settings that can change a log-prob."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise CacheError(
            "reading GGUF needs the gguf package",
            code="weights-gguf",
            where=str(file),
            remedy="pip install 'gguf>=0.17'",
            exit_status=5,
        ) from None
    try:
        reader = GGUFReader(file)
        spans = {
            tensor.name: _Span(
                tensor.tensor_type.name,
                tuple(int(size) for size in tensor.shape),
                int(tensor.data_offset),
                int(tensor.data_offset + tensor.n_bytes),
            )
            for tensor in reader.tensors
        }
        settings = {
            name: [bytes(part).hex() for part in field.parts]
            for name, field in reader.fields.items()
            if not name.startswith(_GGUF_IGNORED) or name == "general.architecture"
        }
    except (ValueError, KeyError, IndexError, UnicodeDecodeError, OverflowError, MemoryError) as error:
        raise _bad_weights(file, "a GGUF file", f"{type(error).__name__}: {error}"[:200]) from None
    if len(spans) != len(reader.tensors) or any(span.end > size for span in spans.values()):
        raise _bad_weights(file, "tensors with distinct names inside the file", "repeated names, or a tensor outside")
    digest = xxhash.xxh3_128_hexdigest(canonical_json(settings))
    return spans, {_GGUF_METADATA: TensorDigest("metadata", (), digest)}


# -- remembering ------------------------------------------------------------------------------------------------------


def _identity(status: os.stat_result) -> list[int]:
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _memo_file(memo: Path, identity: Sequence[Any]) -> Path:
    return memo / f"{xxhash.xxh3_128_hexdigest(canonical_json(identity))}.json"


def _memo_key(status: os.stat_result, without: Collection[str]) -> list[Any]:
    """Identity of a file's digests: the file, and the tensors that were not hashed if there are any."""
    return [*_identity(status), *([sorted(without)] if without else [])]


def _recall(memo: Path, status: os.stat_result, without: Collection[str]) -> dict[str, TensorDigest] | None:
    """Return the remembered digests of a file; None if there are none or they are damaged."""
    identity = _memo_key(status, without)
    path = _memo_file(memo, identity)
    try:
        body = unseal(path.read_bytes(), str(path))
        if body["file"] != identity:
            return None
        return {
            name: TensorDigest(kind, tuple(shape), digest) for name, (kind, shape, digest) in body["tensors"].items()
        }
    except (OSError, CacheError, KeyError, ValueError, TypeError, AttributeError):
        return None


def _remember(
    memo: Path, status: os.stat_result, without: Collection[str], digests: Mapping[str, TensorDigest]
) -> None:
    """Best effort: if the folder cannot be written, the next run only hashes again."""
    identity = _memo_key(status, without)
    with contextlib.suppress(OSError):
        memo.mkdir(parents=True, exist_ok=True)
        with replacing(_memo_file(memo, identity)) as temporary:
            temporary.write_bytes(seal({"file": identity, "tensors": {k: d.to_json() for k, d in digests.items()}}))


# -- helpers ----------------------------------------------------------------------------------------------------------


class _Meter:
    """Adds up bytes from several threads and reports them to one progress function."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self._done += count
            if self._progress:
                self._progress(self._done, self._total)


def _stat(file: Path) -> os.stat_result:
    try:
        return file.stat()
    except OSError as error:
        raise _bad_weights(file, "a weight file", error.strerror or str(error)) from None


@contextlib.contextmanager
def _mapped(file: Path) -> Iterator[memoryview]:
    """The bytes of a file, mapped; hashing a map is twice as fast as reading into a buffer."""
    with file.open("rb") as handle:
        try:
            mapping = mmap.mmap(handle.fileno(), 0, prot=mmap.PROT_READ)
        except ValueError:
            raise _bad_weights(file, "a weight file", "an empty file") from None
        mapping.madvise(mmap.MADV_SEQUENTIAL)
        yield memoryview(mapping)


def _bad_weights(file: Path, expected: str, found: str) -> CacheError:
    return CacheError(
        "cannot read these weights",
        code="weights-bad",
        where=str(file),
        expected=expected,
        found=found,
        remedy="download or save the checkpoint again, in safetensors",
        exit_status=3,
    )
