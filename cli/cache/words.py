"""Helpers of `dpoeng cache`: argument types, sizes in words, choice of a reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dpoeng.cache.words import counted

if TYPE_CHECKING:
    from dpoeng.cache.reader import View
    from dpoeng.cache.store import Store

FOLDER = click.Path(path_type=Path, file_okay=False)
FILE = click.Path(path_type=Path, dir_okay=False)


def example(*lines: str) -> str:
    """The examples at the end of a help text."""
    return "\n".join(["\b", "Example:", *(f"  {line}" for line in lines)])


def sources_of(view: View) -> list[Path]:
    """The source files of a view's pairs: no output may replace them."""
    return [Path(name) for name in view.meta.get("files") or {}]


def choose(store: Store, prefix: str | None, *, trunks: bool = False) -> str:
    """The only reference whose digest begins with `prefix`; with `trunks`, searches those, too."""
    from dpoeng.cache.errors import CacheError

    digests = store.spec_digests() if trunks else store.reference_digests()
    matches = [digest for digest in digests if digest.startswith(prefix or "")]
    if len(matches) != 1:
        raise CacheError(
            "this does not name one reference",
            code="cache-which-spec",
            where=str(store.root),
            expected="the beginning of one of: " + (", ".join(digests) or "(none)"),
            found=prefix or counted(len(digests), "reference"),
            remedy="`dpoeng cache info` describes each" if digests else "run `dpoeng precompute-ref` first",
            exit_status=2,
        )
    return matches[0]


def short(value: Any) -> str:
    """A value in at most 200 characters."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 200 else text[:199] + "…"


def size(count: float) -> str:
    """Bytes in words: `1.5 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
