"""Derives the releases of TRL and transformers that accept a script's calls, and their defaults.

There are three sources: the arguments of every release read (`trl_names.json`), the classes that the script imports or
calls, and the transformers versions in TRL's own metadata. docs/trl.md shows the same for the three most common errors.
"""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from packaging.version import InvalidVersion, Version

from dpoeng.cache.errors import UserError
from dpoeng.engine.config.fields import known_fields
from dpoeng.engine.config.other_trainers import meaning, signatures
from dpoeng.engine.migration.fields import at
from dpoeng.engine.migration.scripts import Given

SIGNED = ("DPOConfig", "DPOTrainer", "TrainingArguments")

TRIED = (
    ("0.7.5", "4.36.2"),
    ("0.8.6", "4.39.3"),
    ("0.9.6", "4.42.4"),
    ("0.11.4", "4.45.2"),
    ("0.12.2", "4.46.3"),
    ("0.13.0", "4.47.1"),
    ("0.15.2", "4.49.0"),
    ("0.17.0", "4.51.3"),
    ("0.18.2", "4.52.4"),
    ("0.19.1", "4.53.3"),
    ("0.23.1", "4.56.2"),
    ("0.24.0", "4.57.6"),
    ("0.25.1", "4.57.6"),
    ("0.26.2", "4.57.6"),
    ("0.29.1", "4.57.6"),
    ("1.0.0", "5.4.0"),
    ("1.6.0", "5.10.4"),
    ("1.16.0", "5.23.0"),
)
"""(TRL, transformers) that were installed together and trained: rows of the table in docs/trl.md."""


@dataclass(frozen=True, slots=True)
class Releases:
    """The releases that accept a script or configuration.

    Attributes:
        trl: releases of TRL, oldest first. Only the first of each minor version was read.
        transformers: releases that fit the newest of them.
        without_plain_arguments: true if they fit only after DPOConfig replaces TrainingArguments.
    """

    trl: tuple[str, ...]
    transformers: tuple[str, ...]
    without_plain_arguments: bool = False

    def __str__(self) -> str:
        if not self.trl:
            return "no release accepts all of it"
        trl = _range([_minor(release) for release in self.trl])
        text = f"it fits TRL {trl} with transformers {_range(self.transformers)}"
        if self.without_plain_arguments:
            text = f"no release accepts all of it; with DPOConfig instead of TrainingArguments {text}"
        pair = self.tried()
        return text + (f"; TRL {pair[0]} was tested with transformers {pair[1]}" if pair else "")

    def tried(self) -> tuple[str, str] | None:
        """The newest pair of TRIED within these releases."""
        minors = {Version(version).release[:2] for version in self.trl}
        low, high = (Version(self.transformers[place]).release[:2] for place in (0, -1))
        for trl, transformers in reversed(TRIED):
            if Version(trl).release[:2] in minors and low <= Version(transformers).release[:2] <= high:
                return trl, transformers
        return None


def imported_from_trl(text: str) -> frozenset[str]:
    """The names that a script imports from TRL: `DPOConfig` in `from trl import DPOConfig`."""
    return frozenset(
        alias.name
        for node in ast.walk(ast.parse(textwrap.dedent(text)))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "trl"
        for alias in node.names
    )


def fitting_releases(given: Sequence[Given], imported: Collection[str] = ()) -> Releases:
    """The releases that know every class and argument. `imported`: names that the script imports from TRL."""
    names, versions = signatures()["names"], signatures()["versions"]
    trl, transformers = list(versions["trl"]), list(versions["transformers"])
    for owner in {*imported, *(item.owner for item in given)} & {"DPOConfig", "ModelConfig"}:
        since = versions["trl"].index(_first_release(owner))
        trl = [version for version in trl if versions["trl"].index(version) >= since]
    for item in given:
        owners = names.get(item.name, {})
        if item.owner not in SIGNED or item.source != "trl" or not owners:
            continue
        owner_releases, inherited = owners.get(item.owner), owners.get("TrainingArguments")
        if (
            item.owner != "TrainingArguments"
            and owner_releases is not None
            and not (item.owner == "DPOConfig" and inherited)
        ):
            trl = [version for version in trl if _within(version, owner_releases["in"], versions["trl"])]
        elif inherited is not None and item.owner != "DPOTrainer":
            transformers = [v for v in transformers if _within(v, inherited["in"], versions["transformers"])]
        else:
            trl = []
    if not _plain_arguments(given):
        return _together(trl, transformers)
    # Tried with every release (docs/trl.md): from 0.9 on DPOTrainer reads fields of args that only DPOConfig has.
    as_written = _together([version for version in trl if version.startswith(("0.7.", "0.8."))], transformers)
    if as_written.trl:
        return as_written
    corrected = _together(trl, transformers)
    return Releases(corrected.trl, corrected.transformers, without_plain_arguments=bool(corrected.trl))


def _together(trl: Sequence[str], transformers: Sequence[str]) -> Releases:
    """Releases of TRL with at least one transformers that their metadata accept."""
    accepted = [(v, tuple(t for t in transformers if Version(t) >= _least_transformers(v))) for v in trl]
    fitting = [(version, newer) for version, newer in accepted if newer]
    if not fitting:
        return Releases((), ())
    # The newest TRL requires the newest transformers, so those releases fit all of them.
    return Releases(tuple(version for version, _ in fitting), fitting[-1][1])


def _plain_arguments(given: Sequence[Given]) -> bool:
    """Whether TrainingArguments are passed to DPOTrainer as `args`."""
    return any(item.name == "args" and item.source == "script" for item in given)


def _first_release(owner: str) -> str:
    """The oldest release read that has a class."""
    known, versions = signatures()["names"], signatures()["versions"]["trl"]
    return str(min((o[owner]["in"][0][0] for o in known.values() if owner in o), key=versions.index))


def _least_transformers(trl: str) -> Version:
    """The oldest transformers that a release of TRL accepts."""
    since, versions = signatures()["requires"], signatures()["versions"]["trl"]
    return Version([least for first, least in since if versions.index(first) <= versions.index(trl)][-1])


def _within(version: str, stretches: list[list[str]], known: list[str]) -> bool:
    place = known.index(version)
    return any(known.index(first) <= place <= known.index(last) for first, last in stretches)


def _minor(release: str) -> str:
    """A release of TRL without its patch number, because only one release of each minor version was read."""
    return ".".join(release.split(".")[:2])


def _range(versions: Sequence[str]) -> str:
    return versions[0] if len(versions) == 1 else f"{versions[0]} to {versions[-1]}"


# --------------------------------------------------------------------------- defaults of a release


def release_read(version: str) -> str:
    """The release read that represents `version`: the newest one that is not newer.

    Raises:
        UserError: not a version, or older or newer than the releases read.
    """
    known = signatures()["versions"]["trl"]
    try:
        wanted = Version(version)
    except InvalidVersion:
        wanted = Version("0")
    if not Version(known[0]) <= wanted <= Version(known[-1]):
        raise UserError(
            "dpoeng does not know the defaults of this release of TRL",
            code="usage",
            where="--trl-version",
            expected=f"a release from {known[0]} to {known[-1]}",
            found=version,
            remedy="name the release that the script was written for, as `pip show trl` prints it",
        )
    return str(max((v for v in known if Version(v) <= wanted), key=Version))


def defaults_of(names: Sequence[str], trl: str, *, config: bool) -> dict[str, Any]:
    """Name -> default in a release of TRL, for names with a constant one.

    `config`: the settings are those of a DPOConfig; otherwise of plain TrainingArguments.
    """
    defaults = {name: _default(name, trl, config=config) for name in names}
    return {name: value for name, value in defaults.items() if value is not None}


def _default(name: str, trl: str, *, config: bool) -> Any:
    owners, versions = signatures()["names"].get(name, {}), signatures()["versions"]["trl"]
    order = ("DPOConfig", "TrainingArguments", "DPOTrainer") if config else ("TrainingArguments", "DPOTrainer")
    for owner in (*order, "DPOConfig"):
        entry = owners.get(owner)
        if entry is None or (owner != "TrainingArguments" and not _within(trl, entry["in"], versions)):
            continue
        # transformers' defaults for these names never changed, except for None instead of 0.
        since = [text for first, text in entry["defaults"] if owner == "TrainingArguments"
                 or versions.index(first) <= versions.index(trl)]  # fmt: skip
        try:
            value = ast.literal_eval(since[-1])
        except (ValueError, SyntaxError):
            return None
        return 0.0 if name == "warmup_ratio" else value
    return None


def assumed_release(fits: Releases) -> str:
    """The release that a script was written for, judged by its calls.

    A script that the newest TRL accepts is a current one. For any other, the oldest release that fits is taken, because
    defaults that differ changed in newer ones.
    """
    newest = str(signatures()["versions"]["trl"][-1])
    return newest if not fits.trl or newest in fits.trl else fits.trl[0]


# --------------------------------------------------------------------------- why the newest refuse it


def refusals(given: Sequence[Given]) -> list[str]:
    """Why the newest TRL and transformers refuse these calls, call by call."""
    names, versions = signatures()["names"], signatures()["versions"]
    reasons = []
    for item in given:
        owners = names.get(item.name, {})
        if item.owner not in SIGNED or item.source == "script":
            continue
        accepting = ("DPOConfig", "TrainingArguments") if item.owner == "DPOConfig" else (item.owner,)
        newest = {o: versions["transformers" if o == "TrainingArguments" else "trl"][-1] for o in accepting}
        if any(o in owners and owners[o]["in"][-1][1] == newest[o] for o in accepting):
            continue
        ends = ((o, owners[o]["in"][-1][1]) for o in accepting if o in owners)
        last = next((f"{o} accepted it up to {v if o == 'TrainingArguments' else _minor(v)}" for o, v in ends), "")
        known = meaning(item.name, fields=known_fields())
        renamed = f"; now {known.renamed[0]}" if known and known.renamed else ""
        moved = "DPOConfig" in owners and owners["DPOConfig"]["in"][-1][1] == versions["trl"][-1]
        if item.owner == "DPOTrainer" and moved:
            renamed = "; now an argument of DPOConfig"
        reasons.append(f"{at(item)}{item.name}: {last or f'{item.owner} never accepted it'}{renamed}")
    if _plain_arguments(given):
        reasons.append(
            "args are TrainingArguments, but DPOTrainer reads fields that only DPOConfig has: "
            "'TrainingArguments' object has no attribute 'padding_value' or 'model_init_kwargs'"
        )
    return reasons
