"""A GGUF file as an ordinary transformers model and tokenizer, which can be saved, quantised and trained.

transformers reads GGUF, but its result cannot be used directly (as of 5.23):

- the model counts as quantised by a method that cannot be saved, so `save_pretrained` and quantisers refuse it;
- numbers that GGUF stores as float32 arrive as the nearest double (`rms_norm_eps` 9.999999747378752e-06, not 1e-5),
  so the config differs from that of the same model in safetensors;
- it knows only some ways to split text before byte-pair encoding and uses GPT-2's for all others: SmolLM2's newlines
  and spaces before digits then get other ids than in training.

This module fixes these three. It is independent of preference data and of the cache. The format is described in
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import struct
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from dpoeng.cache.errors import UserError
from dpoeng.cache.files import hash_file

if TYPE_CHECKING:
    import torch

CONVERTED_FROM = "converted_from.json"
"""File in a converted checkpoint that names the GGUF file it was made from."""

# Text splitters by `tokenizer.ggml.pre` for which transformers' choice was checked or is replaced here. Others are left
# to transformers; if it does not know them either, `UntestedTokenizerWarning` says so.
_SAME_AS_GPT2 = frozenset({"gpt-2"})
_SINGLE_DIGITS = frozenset({"smollm"})

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9


class UntestedTokenizerWarning(UserWarning):
    """The GGUF file names an untested way of splitting text; token ids may differ from the original's."""


def load_gguf(path: str | Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Loads a GGUF file, dequantised, as an ordinary causal LM in evaluation mode and its tokenizer.

    Args:
        path: the `.gguf` file.
        dtype: floating-point type of the returned weights.

    Returns:
        `(model, tokenizer)`: a transformers `PreTrainedModel` without any quantiser, and its fast tokenizer with the
        file's chat template, if it has one.

    Raises:
        UserError: not a GGUF file, damaged, an architecture that transformers cannot read, or no `gguf` package.
    """
    return load_gguf_model(path, dtype), load_gguf_tokenizer(path)


def load_gguf_model(path: str | Path, dtype: torch.dtype) -> Any:
    """Loads only the model; see `load_gguf`."""
    path = Path(path)
    read_metadata(path)
    _require_gguf_package(path)
    with _loading(path):
        return _load_model(path, dtype)


def load_gguf_tokenizer(path: str | Path) -> Any:
    """Loads only the tokenizer; takes about a second, because no weights are read."""
    path = Path(path)
    metadata = read_metadata(path)
    with _loading(path):
        return _load_tokenizer(path, metadata)


def convert_gguf(path: str | Path, out_dir: str | Path, dtype: torch.dtype) -> Path:
    """Writes a GGUF file as a normal checkpoint: config, safetensors, tokenizer, chat template.

    The bytes depend only on the file, the dtype and the library versions. The folder appears whole or not at all. A
    folder converted from the same bytes to the same dtype is left unchanged.

    Args:
        path: the `.gguf` file.
        out_dir: folder to create.
        dtype: floating-point type of the saved weights.

    Returns:
        `out_dir`.

    Raises:
        UserError: as `load_gguf`, or `out_dir` contains something else.
    """
    path, out_dir = Path(path), Path(out_dir)
    read_metadata(path)  # report a wrong file before hashing it
    origin = {"xxh3_128": hash_file(path), "dtype": str(dtype).removeprefix("torch.")}
    if out_dir.exists():
        if _read_origin(out_dir) == origin:
            return out_dir
        if not out_dir.is_dir() or any(out_dir.iterdir()):
            raise UserError(
                "the folder for the converted model is already in use",
                code="gguf-output-exists",
                where=str(out_dir),
                expected=f"no such folder, or one converted from {path.name} to {origin['dtype']}",
                remedy="name another folder, or remove this one",
            )
    model, tokenizer = load_gguf(path, dtype)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}-", dir=out_dir.parent))
    try:
        with _no_bars():
            model.save_pretrained(work)
            tokenizer.save_pretrained(work)
        (work / CONVERTED_FROM).write_text(json.dumps(origin, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        work.chmod(0o755)  # mkdtemp makes it private
        work.replace(out_dir)  # an empty folder at the target is replaced
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return out_dir


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The scalar key-value pairs in the header of a GGUF file; arrays appear as their length.

    Raises:
        UserError: the file is missing, is not GGUF version 2 or 3, or ends too early.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError("no such GGUF file", code="gguf-missing", where=str(path), remedy="check the path")
    with path.open("rb") as file:
        try:
            magic, version, _, count = struct.unpack("<4sIQQ", _read(file, 24))
            if magic != b"GGUF" or version not in (2, 3):
                raise UserError(
                    "not a readable GGUF file",
                    code="gguf-format",
                    where=str(path),
                    expected="GGUF version 2 or 3, little-endian",
                    found=f"first bytes {magic!r}, version {version}",
                    remedy="convert the model again with a current llama.cpp, or give it as safetensors",
                )
            return {_read_string(file): _read_value(file) for _ in range(count)}
        except (EOFError, KeyError, UnicodeDecodeError) as error:
            raise UserError(
                "the GGUF file's header is damaged or cut off",
                code="gguf-format",
                where=str(path),
                found=str(error) or type(error).__name__,
                remedy="download the file again",
            ) from error


def _load_model(path: Path, dtype: torch.dtype) -> Any:
    import transformers

    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    # Pass the config, because the `gguf` package takes seconds for each read of a large vocabulary.
    config = transformers.AutoConfig.from_pretrained(**source)
    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # otherwise some architectures keep their weights in GGUF's blocks
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(**source, config=config, dtype=dtype, **options)
    clean = type(config).from_dict(_clean_config(config.to_dict()))
    clean.dtype = dtype
    model = type(loaded).from_pretrained(None, config=clean, state_dict=loaded.state_dict(), dtype=dtype)
    model.generation_config = loaded.generation_config
    return model.eval()


def _clean_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config of the same model in safetensors: without traces of GGUF, and with the original decimals."""
    dropped = ("quantization_config", "_name_or_path", "_model_name_or_path", "transformers_version")
    return {key: _shortest_decimals(value) for key, value in config.items() if key not in dropped}


def _shortest_decimals(value: Any) -> Any:
    """Turns doubles that equal a float32 into its shortest decimal: 9.999999747378752e-06 -> 1e-05.

    A float32 forward is the same with either, because it rounds the scalar to float32.
    """
    if isinstance(value, dict):
        return {key: _shortest_decimals(inner) for key, inner in value.items()}
    if isinstance(value, float) and float(np.float32(value)) == value:
        return float(str(np.float32(value)))
    return value


def _load_tokenizer(path: Path, metadata: dict[str, Any]) -> Any:
    from tokenizers import pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(path.parent), gguf_file=path.name)
    backend = tokenizer.backend_tokenizer
    if metadata.get("tokenizer.ggml.model") == "gpt2":  # byte-level BPE; sentencepiece has no splitter
        splitter = metadata.get("tokenizer.ggml.pre")
        if splitter in _SINGLE_DIGITS:
            backend.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            )
        elif splitter not in _SAME_AS_GPT2 and _splits_as_gpt2(backend):
            warnings.warn(
                f"{path.name}: dpoeng and transformers do not know the text splitter {splitter!r}, so GPT-2's is used. "
                "Token ids may differ from those the model was trained with. Compare with the original tokenizer, "
                "or use the model's safetensors checkpoint.",
                UntestedTokenizerWarning,
                stacklevel=4,
            )
    context = next((value for key, value in metadata.items() if key.endswith(".context_length")), None)
    if isinstance(context, int) and tokenizer.model_max_length > context:
        tokenizer.model_max_length = context
    return tokenizer


def _splits_as_gpt2(backend: Any) -> bool:
    """Whether transformers used its default splitter, which it uses for files that it does not know."""
    splitter = json.loads(backend.to_str())["pre_tokenizer"]
    return splitter is not None and splitter["type"] == "ByteLevel" and bool(splitter["use_regex"])


def _require_gguf_package(path: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise UserError(
            "GGUF files need the package gguf",
            code="gguf-package",
            where=str(path),
            remedy="pip install 'gguf>=0.17'",
            exit_status=5,
        )


@contextmanager
def _loading(path: Path) -> Iterator[None]:
    """Loads without progress bars; turns errors about a file's content into one that names the file."""
    try:
        with _no_bars():
            yield
    except (ValueError, KeyError, IndexError, NotImplementedError) as error:
        raise UserError(
            "transformers cannot read this GGUF file",
            code="gguf-unsupported",
            where=str(path),
            found=f"{type(error).__name__}: {error}",
            remedy="use the model's safetensors checkpoint, or download the file again if it may be cut off",
        ) from error


@contextmanager
def _no_bars() -> Iterator[None]:
    """Hides transformers' progress bars. Its GGUF reader draws one that no setting turns off, so that is replaced."""
    from transformers import modeling_gguf_pytorch_utils as reader
    from transformers.utils import logging

    bars_enabled, bar = logging.is_progress_bar_enabled(), getattr(reader, "tqdm", None)
    logging.disable_progress_bar()
    reader.tqdm = lambda iterable, **_: iterable
    try:
        yield
    finally:
        reader.tqdm = bar
        if bars_enabled:
            logging.enable_progress_bar()


def _read_value(file: IO[bytes]) -> Any:
    """Reads one value; its type comes before it."""
    (kind,) = struct.unpack("<I", _read(file, 4))
    if kind == _STRING:
        return _read_string(file)
    if kind == _ARRAY:
        return _skip_array(file)
    return struct.unpack(_SCALARS[kind], _read(file, struct.calcsize(_SCALARS[kind])))[0]


def _skip_array(file: IO[bytes], depth: int = 8) -> int:
    """Skips an array of scalars or strings, and returns its length."""
    kind, length = struct.unpack("<IQ", _read(file, 12))
    if kind == _STRING:
        for _ in range(length):
            (size,) = struct.unpack("<Q", _read(file, 8))
            _skip(file, size)
    elif kind == _ARRAY:
        if not depth:
            raise EOFError("arrays nested too deeply")
        for _ in range(length):
            _skip_array(file, depth - 1)
    else:
        _skip(file, struct.calcsize(_SCALARS[kind]) * length)
    return int(length)


def _skip(file: IO[bytes], size: int) -> None:
    """Skips `size` bytes, which must exist: a length of 2^63 is no file's."""
    _require(file, size)
    file.seek(size, os.SEEK_CUR)


def _read_string(file: IO[bytes]) -> str:
    (size,) = struct.unpack("<Q", _read(file, 8))
    return _read(file, size).decode("utf-8")


def _read(file: IO[bytes], size: int) -> bytes:
    """Reads exactly `size` bytes; never allocates a length beyond the end of the file."""
    _require(file, size)
    return file.read(size)


def _require(file: IO[bytes], size: int) -> None:
    remaining = os.fstat(file.fileno()).st_size - file.tell()
    if size > remaining:
        raise EOFError(f"{size} bytes expected, {max(remaining, 0)} left")


def _read_origin(folder: Path) -> Any:
    try:
        return json.loads((folder / CONVERTED_FROM).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
