"""Stores results by the content that they depend on, in a growing file of JSON lines.

A result that is needed again, after a kill or by another call, is read and not recomputed. Each line is written at
once, so that a kill loses only the current result. Independent of the kind of results.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import xxhash

from dpoeng.engine.runs.metrics import read_lines
from dpoeng.engine.runtime.folders import unwritable


def content_key(*parts: Any) -> str:
    """A hash of JSON values; the order of names in an object does not count."""
    text = json.dumps(parts, sort_keys=True)
    return xxhash.xxh3_128_hexdigest(text.encode("ascii"))


class Kept:
    """The content of a file of `{"key": ..., "value": ...}` lines, which can grow.

    If several lines have the same key, the last one counts. One process writes at a time: see `runs/lock`.
    """

    def __init__(self, path: Path) -> None:
        """Reads the file if it exists, and cuts off a last line that a kill left incomplete.

        Raises:
            UserError: a line is damaged, or the file cannot be written.
        """
        self._path = path
        lines = read_lines(path)
        self._values: dict[str, Any] = {str(line.get("key")): line.get("value") for line in lines}
        try:
            if path.is_file():
                data = path.read_bytes()
                if data and not data.endswith(b"\n"):
                    with path.open("rb+") as file:
                        file.truncate(data.rfind(b"\n") + 1)
        except OSError as error:
            raise unwritable(path.parent, error) from error

    def get(self, key: str) -> Any:
        """The value; None if there is none."""
        return self._values.get(key)

    def put(self, key: str, value: Any) -> None:
        """Stores a JSON value other than None.

        Raises:
            UserError: the disk is full, or the folder is not writable.
        """
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "value": value}) + "\n")
        except OSError as error:
            raise unwritable(self._path.parent, error) from error
        self._values[key] = value
