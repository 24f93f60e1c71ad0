"""What `dpoeng init` proposes for a model, pairs and a GPU. Weights are counted from files; nothing is loaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from dpoeng.cache.errors import UserError
from dpoeng.engine.config_template import Line

GIB = 2**30
# Of the memory, what weights may take: the rest is for activations, LoRA and optimizer, and CUDA itself.
WEIGHTS_SHARE = 0.6
# Bytes a weight: 16 bits; 8 bits; 4 bits with their scales. Embedding and head stay in 16 bits, which these leave out.
BYTES = {"none": 2.0, "8bit": 1.0, "4bit": 0.56}


def suggest(pairs: Sequence[Path], model: str | None, adapter: str | None, *, gpu_bytes: int | None) -> dict[str, Line]:
    """Fields with values, in the file's order.

    Raises:
        UserError: a file or folder that was named is not there.
    """
    lines: dict[str, Line] = {}
    for path in pairs:
        if not path.exists():
            raise _missing("pairs", str(path))
    if pairs:
        lines["pairs"] = Line([str(path) for path in pairs])
    if model is not None:
        if model.startswith((".", "/", "~")) and not Path(model).expanduser().exists():
            raise _missing("--model", model)
        lines["model"] = Line(model)
    if adapter is not None:
        if adapter.startswith((".", "/", "~")) and not Path(adapter).expanduser().exists():
            raise _missing("--adapter", adapter)
        lines["adapter"] = Line(adapter)
        lines["adapter_mode"] = Line("continue", ("the SFT adapter is trained further; stack puts a new one on it",))
    weights = count_weights(Path(model).expanduser()) if model is not None else None
    memory = gpu_bytes if gpu_bytes is not None else _gpu_memory()
    if weights is not None and memory is not None:
        lines["quantization"] = _quantization(weights, memory)
    if memory is not None and weights is not None and weights > 3e9:
        lines["per_device_train_batch_size"] = Line(1, ("a large model: one pair in one forward",))
        lines["gradient_accumulation_steps"] = Line(8, ("as many pairs a step as by default",))
    return lines


def count_weights(model: Path) -> int | None:
    """Number of weights, from the headers of the safetensors files; None if there are none."""
    total = 0
    for file in sorted(model.glob("*.safetensors")) if model.is_dir() else ():
        try:
            with file.open("rb") as stream:
                header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
            for name, tensor in header.items():
                if name != "__metadata__":
                    size = 1
                    for length in tensor["shape"]:
                        size *= length
                    total += size
        except (OSError, ValueError, KeyError, TypeError, MemoryError, OverflowError):
            return None
    return total or None


def _quantization(weights: int, memory: int) -> Line:
    fits = [kind for kind, size in BYTES.items() if weights * size <= WEIGHTS_SHARE * memory]
    kind = fits[0] if fits else "4bit"
    text = f"calculated: {weights / 1e9:.3g}e9 weights take {weights * BYTES[kind] / GIB:.3g} of {memory / GIB:.3g} GiB"
    return Line(kind, (text if fits else f"{text}; this will hardly fit",))


def _gpu_memory() -> int | None:
    import torch

    return int(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else None


def _missing(where: str, name: str) -> UserError:
    return UserError(
        f"{name} is not there",
        code="init-missing",
        where=where,
        expected="a file or folder that exists",
        found="nothing of that name",
        remedy="correct the path",
    )
