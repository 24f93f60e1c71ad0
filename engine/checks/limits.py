"""Reads from a checkpoint's files how many token ids and positions the model has, without loading it."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_POSITIONS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length", "n_ctx")
_EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "embed_in.weight",
    "tok_embeddings.weight",
)


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """How many token ids and positions a model has; None if its files do not say."""

    vocabulary: int | None
    positions: int | None


def read_limits(folder: Path, adapter: Path | None = None) -> ModelLimits:
    """Reads the limits from a folder with config.json; an adapter's embedding overrides the number of ids."""
    config = _json(folder / "config.json")
    fields = {**config, **(config.get("text_config") or {})}
    rows = [_embedding_rows(place) for place in (folder, adapter) if place is not None]
    vocabulary = max((count for count in rows if count is not None), default=None)
    if vocabulary is None and isinstance(fields.get("vocab_size"), int):
        vocabulary = fields["vocab_size"]
    positions = next((fields[name] for name in _POSITIONS if isinstance(fields.get(name), int)), None)
    return ModelLimits(vocabulary, positions if positions and positions > 0 else None)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # loading the model reports damaged files
    return value if isinstance(value, dict) else {}


def _embedding_rows(folder: Path) -> int | None:
    """Rows of the input embedding, from the headers of the safetensors files."""
    index = _json(folder / "model.safetensors.index.json").get("weight_map")
    names = set(index.values()) if isinstance(index, Mapping) else {"model.safetensors", "adapter_model.safetensors"}
    for name in sorted(names):
        for tensor, entry in _header(folder / str(name)).items():
            if tensor.endswith(_EMBEDDINGS) and isinstance(entry, dict) and entry.get("shape"):
                return int(entry["shape"][0])
    return None


def _header(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            value = json.loads(file.read(length)) if length < 100 << 20 else {}
    except (OSError, ValueError, struct.error):
        return {}
    return value if isinstance(value, dict) else {}
