"""Writes phase one's other results: the view of a source's rows, and the list of rejected rows."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np

from dpoeng.cache.errors import CacheError, UserError
from dpoeng.cache.files import disk_error
from dpoeng.cache.index import KeyIndex
from dpoeng.cache.reader import View
from dpoeng.cache.records import ROW_KINDS
from dpoeng.cache.spec import ReferenceSpec
from dpoeng.cache.store import Store
from dpoeng.cache.table import ViewEntry
from dpoeng.cache.words import counted
from dpoeng.engine.config.fields import PrecomputeConfig
from dpoeng.engine.data.pairs import PairFile
from dpoeng.engine.data.rejects import Reject, is_rejects, write_rejects
from dpoeng.engine.data.tokenization import TokenizedData
from dpoeng.engine.models.model import library_versions
from dpoeng.engine.models.sources import ModelSource
from dpoeng.engine.models.tokenizer import choose_tokenizer
from dpoeng.engine.runtime.outputs import Kind, refuse_output, writing
from dpoeng.engine.runtime.progress import Progress

_REJECTS = Kind("the list of rejected rows", is_rejects, forced=False)


def reference_record(
    config: PrecomputeConfig, source: ModelSource, adapter: ModelSource | None, spec: ReferenceSpec
) -> dict[str, Any]:
    """What phase two needs to load the reference's model; part of the view."""
    return {
        "model": portable_name(source),
        "revision": source.revision,
        "adapter": portable_name(adapter) if adapter else None,
        "quantization": config.quantization,
        "dtype": spec.fields["dtype"],
        "bnb_4bit_quant_type": config.bnb_4bit_quant_type,
        "bnb_4bit_use_double_quant": config.bnb_4bit_use_double_quant,
        "batch_tokens": config.batch_tokens,
        "layout": config.layout,
        "attention": config.attention,
        **choose_tokenizer(source, config.adapter, config.tokenizer).record(),
    }


def source_record(config: PrecomputeConfig, file: PairFile, rejects: int, device: str) -> dict[str, Any]:
    """How the pairs were made, for later readers of the cache; part of the view."""
    return {
        "tokens": {
            "max_length": config.max_length,
            "max_prompt_length": config.max_prompt_length,
            "truncation_mode": config.truncation_mode,
            "append_eos": config.append_eos,
            **({"train_on": config.train_on} if config.train_on != "assistant" else {}),
        },
        "files": {str(path): digest for path, digest in file.files.items()},
        **({"rows": file.kind} if file.kind != "pairs" else {}),
        **({"ranked_pairs": config.ranked_pairs} if file.prompts.of_ranked else {}),
        "where": config.where,
        "columns": config.columns,
        "prompt_format": config.prompt_format,
        "rejects": rejects,
        "versions": library_versions(),
        "device": device,
    }


def write_pairs_view(
    store: Store,
    spec_digest: str,
    name: str,
    data: TokenizedData,
    meta: dict[str, Any],
    *,
    known: KeyIndex,
    progress: Progress,
) -> None:
    """Writes the view of these pairs. Accepts a read-only cache that already has the same view.

    Raises:
        CacheError: as `Store.write_view`.
    """
    entries = (
        ViewEntry(pair.source_file, pair.source_row, key.tobytes(), pair.extra)
        for pair, key in zip(data.pairs, data.keys, strict=True)
    )
    before = _files(store, name)
    try:
        store.write_view(spec_digest, name, entries, meta, known=known)
        if before and before != list(meta["files"]):
            progress.note(
                f"view {name!r} contained pairs of {', '.join(before)}; it now contains these pairs (--name keeps both)"
            )
    except CacheError as error:
        if error.code != "cache-read-only" or not _view_holds(store, name, spec_digest, data):
            raise
        progress.note(f"the cache is read-only: its view {name!r} already has these pairs and stays unchanged")


def write_rejects_file(store: Store, name: str, rejects: list[Reject], progress: Progress) -> Path | None:
    """Writes the rejected rows to `rejects/<view>.jsonl`; None if there are none.

    Raises:
        UserError: another file has this name.
    """
    path = store.root / "rejects" / f"{name}.jsonl"
    try:
        if rejects:
            path.parent.mkdir(exist_ok=True)
            if path.parent.is_symlink():  # nothing is written outside of the cache
                raise OSError(errno.ELOOP, "a symbolic link")
            with writing(path, _REJECTS) as temporary:
                write_rejects(temporary, rejects)
        elif path.exists():  # on a read-only file system even removing a missing file fails
            refuse_output(path, _REJECTS)
            path.unlink()
    except (OSError, UserError) as error:
        cause = error.__cause__ if isinstance(error, UserError) else error
        if not isinstance(cause, OSError):
            raise
        explained = disk_error(cause, path)
        if explained.code != "cache-read-only":
            raise explained from cause
        progress.note(f"the cache is read-only: {path} is not rewritten ({counted(len(rejects), 'row')} rejected)")
    return path if rejects and path.is_file() else None


def portable_name(source: ModelSource) -> str:
    """A name with which phase two finds the files from any folder: an absolute path, or the hub id."""
    if source.revision is not None:
        return source.name
    # Do not resolve links of a GGUF: it is known by its ending, which the target in the hub's cache does not have.
    return str(source.weight_files[0].absolute() if source.gguf else source.folder.resolve())


def _files(store: Store, name: str) -> list[str]:
    """The source files of a view; empty if there is no such view, or it cannot be read."""
    try:
        return list(store.view_record(name).meta.get("files", {})) if name in store.views() else []
    except CacheError:
        return []


def _view_holds(store: Store, name: str, spec_digest: str, data: TokenizedData) -> bool:
    """Whether a view has exactly these pairs of this reference, in this order, with the same metadata."""
    if name not in store.views():
        return False
    view = View.open(store.root, name, rows=ROW_KINDS)
    if view.spec.digest != spec_digest or not np.array_equal(view.keys(), data.keys):
        return False
    rows = zip(range(len(view)), data.pairs, strict=True)
    return view.rows == "pairs" or all(view.extra(row) == pair.extra for row, pair in rows)
