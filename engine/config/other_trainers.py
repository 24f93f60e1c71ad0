"""Argument names of other trainers, and their meaning in dpoeng.

The names of each release come from the signatures (`trl_names.json`, made by docs/make_trl_versions.py). Their meaning
here is written by hand (`foreign_names.yaml`). Used by messages about unknown fields and by migration.
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
"""Trainers that `dpoeng cache export` supports, or explains why it does not."""

# Classes whose argument names are known from their signatures, and the classes' names in messages.
OWNERS = {
    "DPOConfig": ("TRL's DPOConfig", "trl"),
    "DPOTrainer": ("TRL's DPOTrainer", "trl"),
    "TrainingArguments": ("transformers' TrainingArguments", "transformers"),
    "ModelConfig": ("TRL's ModelConfig", "trl"),
    "ScriptArguments": ("TRL's ScriptArguments", "trl"),
}


@dataclass(frozen=True, slots=True)
class Meaning:
    """The meaning of a foreign name here. At most one of `field`, `instead` and `needless` is set.

    Attributes:
        field: the field of dpoeng that takes the same value.
        instead: what to do in dpoeng.
        needless: why nothing needs to be done.
        note: how the field of the same name differs.
        renamed: its newer name in the other trainer, and the release that renamed it.
    """

    field: str | None = None
    instead: str | None = None
    needless: str | None = None
    note: str | None = None
    renamed: tuple[str, str] | None = None


def meaning(name: str, source: str = "trl", *, fields: Container[str]) -> Meaning | None:
    """The meaning of a name from `source` (trl, peft, bitsandbytes, axolotl, llama_factory); None if unknown there.

    `fields` are dpoeng's: a field with TRL's name has TRL's meaning, unless `foreign_names.yaml` says otherwise.
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
    """The classes and releases that have a name, e.g. `TRL's DPOConfig 0.9 to 0.25`."""
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
    """What to write instead of `name`, in one sentence."""
    if found.field:
        return f"write {found.field}"
    if found.instead:
        text = found.instead.removeprefix("nothing: ")
        return f"in dpoeng: {text}" if text == found.instead else f"remove it; {text}"
    return f"remove {name}: {found.needless}"


@functools.cache
def signatures() -> dict[str, Any]:
    """trl_names.json: `versions`, package -> releases read; `requires`, [first TRL release, oldest transformers that
    it accepts]; `names`, name -> owner -> releases and defaults.
    """
    text = Path(__file__).with_name("trl_names.json").read_text(encoding="utf-8")
    known: dict[str, Any] = json.loads(text)
    return known


@functools.cache
def _meanings() -> dict[str, dict[str, dict[str, Any]]]:
    text = Path(__file__).with_name("foreign_names.yaml").read_text(encoding="utf-8")
    # The pure-Python safe loader is enough: the file is ours, and an error path need not be fast.
    meanings: dict[str, dict[str, dict[str, Any]]] = yaml.safe_load(text)
    return meanings


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])
