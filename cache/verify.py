"""Looks over a whole cache and says what is wrong, changing nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dpoeng.cache.errors import CacheError
from dpoeng.cache.files import QUARANTINE
from dpoeng.cache.reader import View, open_table
from dpoeng.cache.records import DIGEST, Commit, ObjectRef, damaged
from dpoeng.cache.store import THREADS, Store, commit_name, commits_folder, manifest_name, object_name

Depth = Literal["open", "semantic", "full"]
DEPTHS: tuple[Depth, ...] = ("open", "semantic", "full")


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: where, what should be there, what is."""

    where: str
    expected: str
    found: str


@dataclass
class VerifyReport:
    """What a verification saw.

    Attributes:
        depth: how deep it looked.
        problems: empty for a sound cache.
        counts: specs, objects, rows, manifests, views, quarantined.
        bytes: size of all objects and tables.
        seconds: how long it took.
    """

    depth: Depth
    problems: list[Problem] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    bytes: int = 0
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return not self.problems
