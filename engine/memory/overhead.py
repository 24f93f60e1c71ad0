"""Adds what simulation cannot see: parameters counted from config.json, estimates of runtime and fragmentation."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpoeng.cache.errors import UserError
from dpoeng.cache.words import GIB, MIB
from dpoeng.engine.config.fields import Quantization
from dpoeng.engine.memory.simulate import STAYING
from dpoeng.engine.memory.tracker import Peak
from dpoeng.engine.models.loading import whole_model

KNOWN_MODELS = Path(__file__).with_name("known_models.jsonl")


# --------------------------------------------------------------------------- models


def known_models() -> dict[str, dict[str, Any]]:
    """Name -> fields of config.json, for models that dpoeng knows without a network."""
    lines = KNOWN_MODELS.read_text(encoding="utf-8").splitlines()
    return {record["name"]: record["config"] for record in map(json.loads, lines)}


def model_fields(name: str) -> dict[str, Any]:
    """The fields of config.json in a folder, or of a known model by its full or short name, or a variant's.

    Raises:
        UserError: there is no such folder, and the name is unknown.
    """
    folder = Path(name).expanduser()
    file = folder if folder.name == "config.json" else folder / "config.json"
    if file.is_file():
        fields: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return fields
    models = known_models()
    known = _find_known(name, models)
    if known is not None:
        return known
    short = {_shape_name(model.split("/")[1]): model for model in reversed(models)}
    wanted = _shape_name(name.split("/")[-1])
    parts = sorted(filter(wanted.startswith, short), key=len, reverse=True)  # qwen3-8b of qwen3-8b-bnb-4bit
    near = [short[n] for n in parts[:1] or difflib.get_close_matches(wanted, short, n=3)]
    raise UserError(
        f"dpoeng does not know the size of {name}",
        code="model-not-found",
        where="--model",
        expected=(f"perhaps {', '.join(near)}; " if near else "")
        + f"a folder with config.json, or one of: {', '.join(models)}",
        found=name,
        remedy=(f"write --model {near[0]} if the layers have the same sizes, or " if near else "")
        + "download config.json (a few hundred bytes) into a folder and name that folder",
    )


# Stages of training and dates of release, which change no shape. Not here: -fp8, -awq, -4bit and the like, because
# weights in another format need other memory.
_VARIANT = re.compile(r"-(it|pt|base|chat|instruct|think|thinking|reasoning|sft|dpo|bf16|\d{4})(?=-|$)")


def _shape_name(name: str) -> str:
    """The name that all variants of one shape share: qwen3-4b for Qwen3-4B-Instruct-2507."""
    return _VARIANT.sub("", name.lower())


def _find_known(name: str, models: Mapping[str, dict[str, Any]]) -> dict[str, Any] | None:
    """The fields of the model with this full or short name, or else of the first with the same shape."""
    names = {form.lower(): fields for model, fields in models.items() for form in (model, model.split("/")[1])}
    shapes = {_shape_name(form): fields for form, fields in reversed(names.items())}
    fields = names.get(name.lower()) or shapes.get(_shape_name(name))
    if fields is None or "-bf16" not in name.lower():
        return fields
    return {key: value for key, value in fields.items() if key != "quantization_config"}


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
    lm = whole_model(fields)
    embedding, head = lm.base.get_input_embeddings().weight, lm.base.get_output_embeddings().weight
    total = sum(parameter.numel() for parameter in lm.base.parameters())
    apart = 0 if head is embedding else int(embedding.numel())
    return {"layers": total - int(head.numel()) - apart, "head": int(head.numel()), "embedding": apart}
