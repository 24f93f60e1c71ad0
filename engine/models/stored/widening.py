"""Writes a quantised checkpoint in full precision: widens every code, with the names of a plain checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dpoeng.engine.models.sources import ModelSource, copy_beside, read_fields, stored_format
from dpoeng.engine.models.stored.loading import matrices, widened
from dpoeng.engine.runtime.folders import saving_tensors
from dpoeng.engine.runtime.progress import Progress

INDEX = "model.safetensors.index.json"


def write_widened(source: ModelSource, folder: Path, dtype: torch.dtype, progress: Progress) -> ModelSource:
    """Writes a plain checkpoint into an empty folder, file by file; other tensors keep their dtype.

    Args:
        source: a checkpoint whose `stored_quantization` is `stored`.
        folder: an empty folder.
        dtype: dtype of the widened weights, each rounded once.
        progress: advanced after each file.

    Raises:
        UserError: a weight cannot be widened, or the disk is full.
    """
    stored, places = stored_format(source), dict[str, Path]()
    slices: dict[str, Any] = {}
    for file in source.weight_files:
        opened: Any = safe_open(file, framework="pt")
        for name in opened.keys():  # noqa: SIM118  (a safetensors file is no dictionary)
            slices[name], places[name] = opened.get_slice(name), file
    coded, rest = matrices(slices, stored, source)
    written, total = dict[str, str](), 0
    with progress.task("widening the base", len(source.weight_files), "files") as advance:
        for file in source.weight_files:
            found = {name: part[...] for name, part in rest.items() if places[name] == file}
            mine = (matrix for matrix in coded.values() if places[matrix.key] == file)
            found |= {matrix.name: widened(matrix, dtype) for matrix in mine}
            with saving_tensors():
                save_file(found, folder / file.name, metadata={"format": "pt"})
            written |= dict.fromkeys(found, file.name)
            total += sum(tensor.nbytes for tensor in found.values())
            advance(1, file.name)
    if (source.folder / INDEX).is_file():
        record = {"metadata": {"total_size": total}, "weight_map": dict(sorted(written.items()))}
        (folder / INDEX).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    fields = read_fields(source)
    for part in (fields, fields.get("text_config") or {}):
        part.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    copy_beside(source, folder)
    return ModelSource(source.name, folder, tuple(folder / file.name for file in source.weight_files))
