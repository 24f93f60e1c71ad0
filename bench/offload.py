"""Runs both phases layer by layer over a model that is larger than its memory limit: random weights of a known shape.

It calls the commands' own code: `precompute-ref` and `train` with `layer_offloading: on`. Anonymous memory is memory
that the system cannot reclaim: tensors, caches, libraries. Pages of the mapped files do not count.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dpoeng.bench.measuring.records import named_settings, stamp
from dpoeng.cache.errors import UserError
from dpoeng.cache.words import GIB
from dpoeng.engine.config.fields import Dtype, PrecomputeConfig, Quantization, TrainConfig
from dpoeng.engine.memory.overhead import model_fields
from dpoeng.engine.models.loading import empty_model
from dpoeng.engine.models.model import DTYPES
from dpoeng.engine.recipes.precompute import precompute_reference
from dpoeng.engine.recipes.train import train
from dpoeng.engine.runtime.progress import QUIET, Progress

SAMPLE_EVERY_S = 0.05
_POOL = 1 << 24


@dataclass(frozen=True, slots=True)
class OffloadSettings:
    """Settings of the measurement.

    Attributes:
        model: a folder with config.json, or a known name: the shape.
        layers: only this many of its layers.
        dtype: dtype of the files and of the computation.
        quantization: precision of a layer in memory.
        pairs: total number of pairs, which is also a step's.
        batch_size: pairs per forward.
        tokens: tokens of a prompt and of each response.
        steps: optimizer steps.
        folder: where the model's files are written; they are removed at the end.
    """

    model: str = "Qwen/Qwen2.5-14B"
    layers: int | None = None
    dtype: Dtype = "bfloat16"
    quantization: Quantization = "none"
    pairs: int = 4
    batch_size: int = 2
    tokens: int = 24
    steps: int = 2
    folder: Path | None = None


def bench_offload(settings: OffloadSettings, progress: Progress = QUIET) -> dict[str, Any]:
    """Writes the model, runs both phases over it, and returns the record.

    Raises:
        UserError: the shape is unknown, or the disk has no room for the files.
    """
    record = stamp("offload", torch.device("cpu"), {**named_settings(settings), "folder": None})
    with tempfile.TemporaryDirectory(prefix="dpoeng-offload-", dir=settings.folder) as scratch:
        folder = Path(scratch)
        file_bytes, layer_bytes = save_random_model(settings, folder / "model", progress)
        _write_pairs(folder / "pairs.jsonl", settings)
        phases = [_phase_one(settings, folder, progress), _phase_two(settings, folder, progress)]
    for phase in phases:
        phase["layer_reads"] = round(phase.pop("layers_read_bytes") / layer_bytes, 3)
    return {**record, "file_bytes": file_bytes, "layer_bytes": layer_bytes, "phases": phases}


# --------------------------------------------------------------------------- the phases


def _phase_one(settings: OffloadSettings, folder: Path, progress: Progress) -> dict[str, Any]:
    config = PrecomputeConfig.model_validate(
        {
            "pairs": (folder / "pairs.jsonl",),
            "model": str(folder / "model"),
            "cache": folder / "cache",
            "dtype": settings.dtype,
            "quantization": settings.quantization,
            "device": "cpu",
            "layer_offloading": "on",
        }
    )
    with anonymous_memory() as figures:
        summary = precompute_reference(config, progress)
    return {"phase": "phase one", "passes": 1, "layers_read_bytes": summary.layers_read_bytes, **figures}


def _phase_two(settings: OffloadSettings, folder: Path, progress: Progress) -> dict[str, Any]:
    config = TrainConfig.model_validate(
        {
            "cache": folder / "cache",
            "output_dir": folder / "out",
            "device": "cpu",
            "eval_share": 0.0,
            "max_steps": settings.steps,
            "per_device_train_batch_size": settings.batch_size,
            "gradient_accumulation_steps": -(-settings.pairs // settings.batch_size),
            "parity_pairs": settings.batch_size,
            "layer_offloading": "on",
        }
    )
    with anonymous_memory() as figures:
        summary = train(config, progress)
    return {"phase": "phase two", "steps": summary.steps, "layers_read_bytes": summary.layers_read_bytes, **figures}


@contextmanager
def anonymous_memory() -> Iterator[dict[str, float]]:
    """Seconds, CPU seconds and highest anonymous memory of a block, written into the mapping at its end."""
    figures: dict[str, float] = {}
    done = threading.Event()
    highest = anonymous_bytes()

    def sample() -> None:
        nonlocal highest
        while not done.wait(SAMPLE_EVERY_S):
            highest = max(highest, anonymous_bytes())

    thread = threading.Thread(target=sample, daemon=True)
    began, began_cpu = time.perf_counter(), time.process_time()
    thread.start()
    try:
        yield figures
    finally:
        done.set()
        thread.join()
        figures |= {
            "seconds": round(time.perf_counter() - began, 2),
            "cpu_s": round(time.process_time() - began_cpu, 2),
            "anonymous_bytes": highest,
        }


def anonymous_bytes() -> int:
    """Resident memory of this process that does not belong to a file."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


# --------------------------------------------------------------------------- model and pairs


def save_random_model(settings: OffloadSettings, folder: Path, progress: Progress = QUIET) -> tuple[int, int]:
    """Writes a checkpoint with one file per layer, using the memory of one.

    Returns:
        bytes of all files, and of the layers' tensors.

    Raises:
        UserError: the disk has no room.
    """
    from safetensors.torch import save_file

    dtype = DTYPES["float32" if settings.dtype == "auto" else settings.dtype]
    fields = model_fields(settings.model)
    lm = empty_model(
        fields, quantization="none", dtype=dtype, layers=None if settings.layers is None else range(settings.layers)
    )
    tied = lm.base.config.tie_word_embeddings
    shapes = {n: t.shape for n, t in lm.base.state_dict().items() if not (tied and n == "lm_head.weight")}
    parts: dict[str, dict[str, torch.Size]] = {}
    for name, shape in shapes.items():
        number = name.split(".layers.")[1].split(".")[0] if ".layers." in name else "rest"
        parts.setdefault(number, {})[name] = shape
    sizes = {part: sum(shape.numel() * dtype.itemsize for shape in of.values()) for part, of in parts.items()}
    whole = sum(sizes.values())
    folder.mkdir(parents=True)
    _refuse_small_disk(folder, whole)
    draw = _drawer(dtype)
    index: dict[str, str] = {}
    with progress.task("writing random weights", whole, "B") as advance:
        for at, (part, of) in enumerate(parts.items()):
            file = f"model-{at + 1:05}-of-{len(parts):05}.safetensors"
            save_file({name: draw(name, shape) for name, shape in of.items()}, folder / file, {"format": "pt"})
            index |= dict.fromkeys(of, file)
            advance(sizes[part], "")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config = {**lm.base.config.to_dict(), "dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(config, default=str))
    _save_tokenizer(folder)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")), whole - sizes.get("rest", 0)


def _drawer(dtype: torch.dtype) -> Callable[[str, torch.Size], torch.Tensor]:
    """Returns a function that makes tensors: norms of 1, and parts of one pool of random numbers."""
    random = torch.Generator().manual_seed(0)
    pool = torch.randn(_POOL, generator=random).mul_(0.02).to(dtype)

    def draw(name: str, shape: torch.Size) -> torch.Tensor:
        if "norm" in name:
            return torch.ones(shape, dtype=dtype)
        begin = int(torch.randint(_POOL, (), generator=random))
        start = torch.cat([pool[begin:], pool[:begin]])
        count = shape.numel()
        return start.repeat(-(-count // _POOL))[:count].reshape(shape).contiguous()

    return draw


def _refuse_small_disk(folder: Path, wanted: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < 1.1 * wanted:
        raise UserError(
            "the disk has no room for this model's files",
            code="bench-disk-small",
            where=str(folder),
            expected=f"{1.1 * wanted / GIB:.1f} GiB",
            found=f"{free / GIB:.1f} GiB free",
            remedy="name another --folder, or fewer --layers",
            exit_status=5,
        )


def _save_tokenizer(folder: Path) -> None:
    """Writes a tokenizer with one token per byte: enough for made-up texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<|end|>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>")
    made.save_pretrained(folder)


def _write_pairs(file: Path, settings: OffloadSettings) -> None:
    """Writes distinct texts with a given number of bytes, which is also that of tokens."""

    def text(word: str, number: int) -> str:
        return (f"{word} {number:03} " * settings.tokens)[: settings.tokens]

    names = ("prompt", "chosen", "rejected")
    rows = [{name: text(name, number) for name in names} for number in range(settings.pairs)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
