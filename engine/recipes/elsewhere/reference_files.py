"""Writes a view's reference log-probs in another trainer's file format, or raises if it has none.

The formats come from the sources of TRL 1.16, open-instruct, Axolotl (with TRL 1.8) and ms-swift, November 2026.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from dpoeng.cache.errors import UserError
from dpoeng.cache.exchange.export import export_sums, is_sums_export
from dpoeng.cache.files import replacing
from dpoeng.cache.foreign.tables import arrow_batches, reading
from dpoeng.cache.reader import View
from dpoeng.cache.schema import PairIds, as_ids
from dpoeng.engine.config.other_trainers import OtherTrainer
from dpoeng.engine.data.data_folders import data_files
from dpoeng.engine.recipes.elsewhere.lookup import Lookup, Side, pair_of

_READ_NONE: Final = {
    "axolotl": (
        "it passes its rows to TRL, which computes its own and ignores such columns",
        "call dpoeng.trl.with_cached_reference(trainer, CACHE) in a plugin's post_trainer_create (see "
        "docs/other-trainers.md); or train with dpoeng: `dpoeng migrate CONFIG.yml`",
    ),
    "ms-swift": (
        "its templates drop such columns, and its loss does not read them from a file",
        "train with dpoeng: `dpoeng train --cache CACHE`; ms-swift with LoRA computes its reference in every step",
    ),
}
_SIDES: Final = ("chosen", "rejected")
_MASKED: Final = -100


def export_for(trainer: OtherTrainer, view: View, path: Path, rows: Path | None = None) -> int:
    """Writes the reference log-probs of a view for another trainer.

    Args:
        trainer: the trainer.
        view: the view to write.
        path: for TRL `.parquet` or `.jsonl`: its token columns and sums, in the order of the view's source. For
            open-instruct the `.pt` file that its log names as the reference logprobs cache path.
        rows: open-instruct: the folder of its tokenised data set; the file has a value for each of its rows.

    Returns:
        The number of rows.

    Raises:
        UserError: the trainer cannot read such files, its format cannot express a row, or a row of `rows` is missing.
    """
    if trainer in _READ_NONE:
        why, remedy = _READ_NONE[trainer]
        raise UserError(
            f"{trainer} cannot read reference log-probs from a file",
            code="export-trainer",
            where=f"--for {trainer}",
            found=why,
            remedy=remedy,
        )
    if trainer == "open-instruct":
        return _for_open_instruct(view, path, rows)
    if rows is not None:
        raise _unfit("--rows is for open-instruct", "--rows", f"--for {trainer}")
    for i in range(len(view)):
        if not _plain(view[i].ids):
            file, number = view.source(i)
            raise _unfit(
                f"{trainer} does not support unscored response tokens",
                f"{file}:{number}",
                "a token across the prompt's end, or a user's turn within the response",
            )
    return export_sums(view, path)


def is_file_for(trainer: OtherTrainer, path: Path) -> bool:
    """Whether a file was written for this trainer. Raises ValueError if its content does not fit its ending."""
    return trainer == "trl" and is_sums_export(path)


def longest_of(view: View) -> int:
    """Tokens of the longest prompt + response."""
    found = view.numbers()
    return int((found.prompt_tokens + np.maximum(found.chosen_tokens, found.rejected_tokens)).max())


def _plain(ids: PairIds) -> bool:
    return not (ids.chosen_start or ids.rejected_start or ids.chosen_gaps or ids.rejected_gaps)


def _for_open_instruct(view: View, path: Path, rows: Path | None) -> int:
    """Writes open-instruct's TensorCache: two float32 tensors [N], in the order of its rows' `index`."""
    import torch

    if rows is None or path.suffix != ".pt":
        raise UserError(
            "open-instruct needs a .pt file with one value per row of its tokenised data set",
            code="export-trainer",
            where="--for open-instruct",
            expected="FILE as its log names it ('Reference logprobs cache path'), and --rows: the folder of its rows",
            found=f"{path.name}, " + ("no --rows" if rows is None else f"--rows {rows}"),
            remedy="run open_instruct/dpo.py with your options and `--cache_dataset_only`; it writes rows, logs FILE",
        )
    indices: list[int] = []
    pairs: list[PairIds | None] = []
    for row in _tokenised(rows):
        indices.append(int(row.get("index", len(indices))))
        sides = [_side(row[f"{side}_input_ids"], row[f"{side}_labels"]) for side in _SIDES]
        pairs.append(pair_of(sides[0], sides[1]))
    if sorted(indices) != list(range(len(indices))):
        raise _unfit("some rows are missing", f"{rows}, column index", "a repeated or missing index")
    found = Lookup(view).find(
        pairs, where=str(rows), remedy="score these rows with open-instruct's model, chat template and --max-length"
    )
    tensors = {f"{side}_logps": torch.empty(len(found), dtype=torch.float32) for side in _SIDES}
    for index, pair in zip(indices, found, strict=True):
        tensors["chosen_logps"][index], tensors["rejected_logps"][index] = pair.chosen_sum, pair.rejected_sum
    with replacing(path) as temporary:
        torch.save(tensors, temporary)
    return len(found)


def _side(ids: list[int], labels: list[int]) -> Side:
    return Side(as_ids(ids), np.asarray(labels) != _MASKED)


def _tokenised(folder: Path) -> Iterator[dict[str, Any]]:
    """Reads the rows of a folder that the datasets library saved."""
    needed = {f"{side}_{name}" for side in _SIDES for name in ("input_ids", "labels")}
    files = data_files(folder, lambda file: file.suffix == ".arrow") if folder.is_dir() else []
    for file in files:
        with reading(file, "Arrow"):
            for batch, too_long in arrow_batches(file):
                if not needed <= set(batch.schema.names) or too_long.any():
                    raise _unfit("these are not tokenised pairs", str(file), ", ".join(batch.schema.names))
                yield from batch.to_pylist()
    if not files:
        raise _unfit("no such folder of rows", str(folder), "no folder")


def _unfit(message: str, where: str, found: str) -> UserError:
    return UserError(
        message,
        code="export-trainer",
        where=where,
        found=found,
        remedy="use rows that open-instruct tokenised, or a view of plain prompts and responses; "
        "docs/other-trainers.md lists each trainer's formats",
    )
