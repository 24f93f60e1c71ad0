"""Adds what simulation cannot see: parameters counted from config.json, estimates of runtime and fragmentation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dpoeng.cache.errors import UserError
from dpoeng.cache.words import GIB, MIB
from dpoeng.engine.config.fields import Quantization
from dpoeng.engine.memory.simulate import STAYING
from dpoeng.engine.memory.tracker import Peak
from dpoeng.engine.models.loading import empty_model

KNOWN_MODELS = Path(__file__).with_name("known_models.jsonl")


# --------------------------------------------------------------------------- models


def known_models() -> dict[str, dict[str, Any]]:
    """Name -> fields of config.json, for models that dpoeng knows without a network."""
    lines = KNOWN_MODELS.read_text(encoding="utf-8").splitlines()
    return {record["name"]: record["config"] for record in map(json.loads, lines)}


def model_fields(name: str) -> dict[str, Any]:
    """The fields of config.json in a folder, or of a known model by its full or short name.

    Raises:
        UserError: there is no such folder, and the name is unknown.
    """
    folder = Path(name).expanduser()
    file = folder if folder.name == "config.json" else folder / "config.json"
    if file.is_file():
        fields: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return fields
    wanted = name.lower().removesuffix("-instruct")
    for known, fields in known_models().items():
        if wanted in (known.lower(), known.lower().split("/")[1]):
            return fields
    raise UserError(
        f"dpoeng does not know the size of {name}",
        code="model-not-found",
        where="--model",
        expected="a folder with config.json, or one of: " + ", ".join(known_models()),
        found=name,
        remedy="download config.json (a few hundred bytes) into a folder and name that folder",
    )


def weights_bytes(parts: Mapping[str, int], quantization: Quantization) -> int:
    """A lower bound of the base's weights in bytes, from `count_parameters`; embedding and head stay in 16 bits.

    Weights that are stored quantised count as 4 bits; the simulation uses their real number of bits.
    """
    return int(parts["layers"] * {"none": 2.0, "8bit": 1.0}.get(quantization, 0.5)) + 2 * (
        parts["head"] + parts["embedding"]
    )


def estimate_overhead() -> dict[str, int]:
    """Estimates GPU memory besides live tensors, which is not simulated.

    - The CUDA context with the kernels of torch, triton and bitsandbytes: 0.5 to 0.6 GiB on recent cards.
    - cuBLAS's and cuBLASLt's workspaces: 32 MiB each on Hopper, less on older cards.
    """
    return {"CUDA context": int(0.6 * GIB), "cuBLAS workspaces": 64 * MIB}


FRAGMENTATION = 0.05
"""Fragmentation: share that the allocator's blocks add to what is allocated and freed within a step."""


def needed_bytes(peak: Peak, estimates: Mapping[str, int]) -> int:
    """Peak of tensors, plus estimates, plus fragmentation of everything that does not stay for the whole run."""
    staying = sum(n for kind, n in peak.by_kind.items() if kind in STAYING)
    return peak.n_bytes + sum(estimates.values()) + int(FRAGMENTATION * (peak.n_bytes - staying))


def count_parameters(fields: Mapping[str, Any]) -> dict[str, int]:
    """Parameters of the base: `layers`, `head`, `embedding`."""
    lm = empty_model(fields, quantization="none", dtype=torch.bfloat16)
    embedding, head = lm.base.get_input_embeddings().weight, lm.base.get_output_embeddings().weight
    total = sum(parameter.numel() for parameter in lm.base.parameters())
    apart = 0 if head is embedding else int(embedding.numel())
    return {"layers": total - int(head.numel()) - apart, "head": int(head.numel()), "embedding": apart}
