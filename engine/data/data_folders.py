"""Finds the data files in a folder: those that `datasets` wrote, or the shards of the hub's layout.

`save_to_disk` lists its files in `state.json`. Leftovers of `map` and `filter` (`cache-*.arrow`) may lie next to them
and contain other rows. Splits are not mixed, so that nobody trains on the test split by accident. Independent of the
rows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dpoeng.cache.errors import UserError

# Words that mark splits in the names of files and folders on the hub.
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_SPLIT_WORD = re.compile(rf"(?:^|[-_. ])({'|'.join(_SPLITS)})(?:$|[-_. \d])", re.IGNORECASE)
_HUB_PART = re.compile(r"(?P<split>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(-[0-9a-f]{8,})?(\..*)?")
"""`train_prefs-00000-of-00003.parquet`: the name of the split and the number of its shard."""
_LEFT_BY_MAP = re.compile(r"(cache-[0-9a-f]+|tmp\w*)(_\d+_of_\d+)?\.arrow")


def data_files(folder: Path, is_data: Callable[[Path], bool]) -> list[Path]:
    """The data files of a folder, sorted by name.

    Args:
        folder: an existing folder.
        is_data: whether a file has a format that dpoeng reads.

    Raises:
        UserError: there are no data files, a file in `state.json` is missing, or they belong to several splits.
    """
    if (folder / "state.json").is_file() and "_data_files" in _read(folder / "state.json"):
        return _saved_files(folder)
    if (folder / "dataset_dict.json").is_file():
        splits = _read(folder / "dataset_dict.json").get("splits") or []
        if len(splits) != 1:
            raise _several(folder, {str(split): str(folder / str(split)) for split in splits})
        name = str(splits[0])
        if Path(name).name != name or not (folder / name).is_dir():  # neither outside nor this folder again
            raise _damaged(folder / "dataset_dict.json", f"split {name!r}"[:200])
        return data_files(folder / name, is_data)
    names = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    files = [file for file in names if is_data(file) and not _LEFT_BY_MAP.fullmatch(file.name)]
    if not files and (folder / "data").is_dir():
        return data_files(folder / "data", is_data)
    if not files:
        raise UserError(
            "the directory contains no data file",
            code="data-no-files",
            where=str(folder),
            expected="files ending in .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow, .feather, or one of the "
            "text kinds + .gz or .zst",
            found=", ".join(file.name for file in names[:5]) or "no files (subdirectories are not searched)",
            remedy="name the files, or the folder with the files",
            exit_status=3,
        )
    check_parts(str(folder), files)
    splits_of = {file: _split(file) for file in files}
    named_splits = {split for split in splits_of.values() if split is not None}
    if len(named_splits) > 1 or (named_splits - {"train"} and None in splits_of.values()):
        raise _several(folder, {split or "no split": str(file) for file, split in splits_of.items()})
    # The hub's names are exact: `train_prefs` and `train_sft` contain the same prompts for different trainings.
    named = {match["split"]: str(file) for file in files if (match := _HUB_PART.fullmatch(file.name))}
    if len(named) > 1:
        raise _several(folder, named)
    return files


def _saved_files(folder: Path) -> list[Path]:
    """The files of `Dataset.save_to_disk`."""
    state = _read(folder / "state.json")
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise UserError(
            "the saved data set selects its rows by a separate index",
            code="data-damaged",
            where=str(folder / "state.json"),
            expected="a data set that stores its rows in its files",
            remedy="call flatten_indices() before save_to_disk(), or to_json() or to_parquet()",
            exit_status=3,
        )
    listed = [entry.get("filename") for entry in state.get("_data_files") or [] if isinstance(entry, dict)]
    files = [folder / Path(str(name)).name for name in listed]
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise UserError(
            "the saved data set lacks files",
            code="data-missing",
            where=str(folder),
            expected=", ".join(missing) or "files listed in state.json",
            remedy="copy the whole folder again",
            exit_status=3,
        )
    return files


def check_parts(where: str, files: Sequence[Path]) -> None:
    """Checks that all files `NAME-00000-of-00003` are there: a broken download must not pass as a smaller data set.

    Raises:
        UserError: some are missing.
    """
    numbers_of: dict[tuple[str, int], set[int]] = {}
    for match in filter(None, (_HUB_PART.fullmatch(file.name) for file in files)):
        numbers_of.setdefault((match["split"], int(match["count"])), set()).add(int(match["number"]))
    missing = [
        f"{split}-{number:05}-of-{count:05}"
        for (split, count), numbers in numbers_of.items()
        for number in range(count)
        if number not in numbers
    ]
    if missing:
        raise UserError(
            "some parts of the data set are missing",
            code="data-missing",
            where=where,
            expected=", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else ""),
            remedy="download or copy the whole folder again, or name the files you want",
            exit_status=3,
        )


def split_of(file: Path) -> str | None:
    """The split that a file belongs to, by its name or that of its folder; None if neither says."""
    part = _HUB_PART.fullmatch(file.name)
    return part["split"] if part else _split(file) or _split(file.parent)


def _split(file: Path) -> str | None:
    match = _SPLIT_WORD.search(file.name.split(".")[0])
    return _SPLITS[match[1].lower()] if match else None


def _several(folder: Path, examples: dict[str, str]) -> UserError:
    first = next(iter(examples.values()), str(folder))
    return UserError(
        "the directory contains several splits of a data set",
        code="data-splits",
        where=str(folder),
        expected="the files of one split, so that you do not train on test data",
        found="; ".join(f"{split}: {name}" for split, name in examples.items()) or "none",
        remedy=f"name the files or the folder of one split, e.g. {first}",
        exit_status=3,
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise _damaged(path, str(error).splitlines()[0]) from None
    return value


def _damaged(path: Path, found: str) -> UserError:
    return UserError(
        "cannot read a file of the saved data set",
        code="data-damaged",
        where=str(path),
        expected="what `datasets` wrote: a JSON object whose splits are folders beside it",
        found=found,
        remedy="copy the folder again",
        exit_status=3,
    )
