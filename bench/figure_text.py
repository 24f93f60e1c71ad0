"""Pieces of the figures in README and docs: reading records, and formatting values, machines and tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"

Record = dict[str, Any]
BASES = {"8bit": "8 bits", "4bit": "4 bits", "none": "bfloat16"}


def read(kind: str, results: Path = RESULTS) -> list[Record]:
    """The records of a kind measured on CPUs, oldest first; empty if there is no file."""
    file = results / f"{kind}-cpu.jsonl"
    return lines_of(file) if file.is_file() else []


def lines_of(file: Path) -> list[Record]:
    """The records of a file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def where(record: Record) -> str:
    """The machine, its load at the start, library versions, commit and day."""
    machine, versions = record["machine"], record["versions"]
    commit = str(record["commit"])
    changed = " with uncommitted changes" if commit.endswith("+") else ""
    return (
        f"{record['device_kind']}, {machine['processor']}, {threads(record)} on {machine['cores']} cores, load "
        f"{machine['load']:g} at the start, torch {versions['torch']}, triton {versions['triton']}, commit "
        f"{commit.removesuffix('+')}{changed}, {record['date'][:10]}"
    )


def threads(record: Record) -> str:
    """The number of threads, in words."""
    n = record["machine"]["threads"]
    return f"{n} thread{'s' if n > 1 else ''}"


def ranged(record: Record, name: str) -> str:
    """A ratio with the range of its repeats."""
    if name not in record:
        return "–"
    ratio = record[name]
    several = ratio["low"] < ratio["high"]
    return f"**{ratio['median']:.2f}**" + (f" ({ratio['low']:.2f}–{ratio['high']:.2f})" if several else "")


def table(rows: list[list[str]]) -> str:
    """A table in Markdown; the first row is its head."""
    head, *body = rows
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *body))
