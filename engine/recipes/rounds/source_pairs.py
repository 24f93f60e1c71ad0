"""Reads the texts of a view's rows again from the files of phase one."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from pathlib import Path

from dpoeng.cache.errors import UserError
from dpoeng.cache.reader import View
from dpoeng.cache.selection.mixed import AnyView, MixedView
from dpoeng.engine.data.in_memory import is_in_memory
from dpoeng.engine.data.pairs import stream_pairs
from dpoeng.engine.data.shapes import PreferencePair


def source_pairs(view: AnyView, rows: Sequence[int]) -> list[PreferencePair]:
    """The pairs of some rows, in their order, with the prompt format applied.

    Raises:
        UserError: the files are missing or changed, or the pairs came from memory or an import.
    """
    parts = view.parts if isinstance(view, MixedView) else (view,)
    found: dict[int, PreferencePair] = {}
    start = 0
    for part in parts:
        of_part = [row for row in rows if start <= row < start + len(part)]
        own = [operator.index(row) - start for row in of_part]
        found.update(zip(of_part, _pairs_of(part, own), strict=True))
        start += len(part)
    return [found[row] for row in rows]


def _pairs_of(view: View, rows: Sequence[int]) -> list[PreferencePair]:
    if not rows:
        return []
    files: dict[str, str] = view.meta.get("files") or {}
    if not files or any(map(is_in_memory, files)):
        raise _gone(view, "rows from memory, or imported ones, which are in no file")
    try:
        read, pairs = stream_pairs(
            [Path(name) for name in files],
            columns=view.meta["columns"],
            where=view.meta["where"],
            prompt_format=view.meta["prompt_format"],
            ranked_pairs=view.meta.get("ranked_pairs", "best"),
            max_reject_share=1.0,
        )
        # A row with several responses became several pairs.
        wanted = {view.source(row) for row in rows}
        texts: dict[tuple[str, int], list[PreferencePair]] = {}
        for pair in pairs:
            if (pair.source_file, pair.source_row) in wanted:
                texts.setdefault((pair.source_file, pair.source_row), []).append(pair)
    except UserError as error:
        raise _gone(view, f"{error.where or ''} {error.message}".strip()) from error
    if read.files != files:
        raise _gone(view, "other bytes in " + ", ".join(name for name in files if read.files.get(name) != files[name]))
    numbers: dict[tuple[str, int], int] = {}
    of_row: dict[int, PreferencePair] = {}
    for row in range(len(view)):
        place = view.source(row)
        if place in wanted:
            number = numbers.get(place, 0)
            of_row[row], numbers[place] = texts[place][min(number, len(texts[place]) - 1)], number + 1
    return [of_row[row] for row in rows]


def _gone(view: View, found: str) -> UserError:
    return UserError(
        "cannot read the pairs of this view again",
        code="round-pairs",
        where=f"view {view.name}",
        expected="the files that precompute-ref read, unchanged, in the same places",
        found=found,
        remedy="put the files back; or run precompute-ref on a file with these pairs, and train on its view",
        exit_status=3,
    )
