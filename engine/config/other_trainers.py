"""The argument names of other trainers, and what each is in dpoeng.

Which release has which name was read from the signatures (`trl_names.json`, made by docs/make_trl_versions.py); what a
name means here was written by hand (`foreign_names.yaml`). Used by messages about unknown fields and by migration.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

import yaml

OtherTrainer = Literal["trl", "axolotl", "ms-swift", "open-instruct"]
OTHER_TRAINERS: Final[tuple[OtherTrainer, ...]] = get_args(OtherTrainer)
"""Trainers that `dpoeng cache export` writes for, or says why not."""

# The classes whose names are known from their signatures, and how they are called in a message.
OWNERS = {
    "DPOConfig": ("TRL's DPOConfig", "trl"),
    "DPOTrainer": ("TRL's DPOTrainer", "trl"),
    "TrainingArguments": ("transformers' TrainingArguments", "transformers"),
    "ModelConfig": ("TRL's ModelConfig", "trl"),
    "ScriptArguments": ("TRL's ScriptArguments", "trl"),
}


@dataclass(frozen=True, slots=True)
class Meaning:
    """A foreign name's meaning here. At most one of `field`, `instead` and `needless` is set.

    Attributes:
        field: a field of dpoeng that takes the same value.
        instead: what to do in dpoeng.
        needless: why nothing is to be done.
        note: how a field of the same name differs.
        renamed: the name that took its place where it came from, and the release in which it did.
    """

    field: str | None = None
    instead: str | None = None
    needless: str | None = None
    note: str | None = None
    renamed: tuple[str, str] | None = None


def meaning(name: str, source: str = "trl", *, fields: Container[str]) -> Meaning | None:
    """Return the meaning of a name of `source` (trl, peft, bitsandbytes, axolotl, llama_factory); None: unknown there.

    `fields` are dpoeng's own: one that is named as TRL's means the same, unless `foreign_names.yaml` says more.
    """
    entry = _meanings().get(source, {}).get(name)
    says_more = entry is not None and ("needless" in entry or "instead" in entry)
    if source == "trl" and name in fields and not says_more:
        signed = entry is not None or name in signatures()["names"]
        return Meaning(field=name, note=entry.get("note") if entry else None) if signed else None
    if entry is None:
        return None
    renamed = entry.get("renamed")
    return Meaning(
        field=entry.get("as"),
        instead=entry.get("instead"),
        needless=entry.get("needless"),
        note=entry.get("note"),
        renamed=(str(renamed[0]), str(renamed[1])) if renamed else None,
    )


def releases(name: str) -> str:
    """Return the classes and releases that have a name, e.g. `TRL's DPOConfig 0.9 to 0.25`."""
    known = signatures()
    places = []
    for owner, entry in known["names"].get(name, {}).items():
        title, package = OWNERS[owner]
        newest = known["versions"][package][-1]
        stretches = [
            f"since {_minor(first)}" if last == newest else f"{_minor(first)} to {_minor(last)}"
            for first, last in entry["in"]
        ]
        places.append(f"{title} {', '.join(stretches)}")
    return "; ".join(places)


def remedy(name: str, found: Meaning) -> str:
    """One sentence: what to write instead of `name`."""
    if found.field:
        return f"write {found.field}"
    if found.instead:
        text = found.instead.removeprefix("nothing: ")
        return f"in dpoeng: {text}" if text == found.instead else f"remove it; {text}"
    return f"remove {name}: {found.needless}"


@functools.cache
def signatures() -> dict[str, Any]:
    """trl_names.json: `versions`, package -> releases read; `requires`, [since which TRL, oldest transformers that it
    accepts]; `names`, name -> owner -> releases and defaults.
    """
    text = Path(__file__).with_name("trl_names.json").read_text(encoding="utf-8")
    known: dict[str, Any] = json.loads(text)
    return known


@functools.cache
def _meanings() -> dict[str, dict[str, dict[str, Any]]]:
    text = Path(__file__).with_name("foreign_names.yaml").read_text(encoding="utf-8")
    # The pure-Python safe loader: what is read is ours, and an error path need not be fast.
    meanings: dict[str, dict[str, dict[str, Any]]] = yaml.safe_load(text)
    return meanings


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])
