"""Stores results by the content that they depend on, in a growing file of JSON lines.

A result that is needed again, after a kill or by another call, is read and not recomputed. Each line is written at
once, so that a kill loses only the current result. Independent of the kind of results.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

from dpoeng.engine.runs.metrics import append_line, damaged_line, read_lines, refuse_linked_log
from dpoeng.engine.runtime.folders import unwritable


def content_key(*parts: Any) -> str:
    """A hash of JSON values; the order of names in an object does not count."""
    text = json.dumps(parts, sort_keys=True)
    return xxhash.xxh3_128_hexdigest(text.encode("ascii"))


class Kept:
    """The content of a file of `{"key": ..., "value": ...}` lines, which can grow.

    If several lines have the same key, the last one counts. One process writes at a time: see `runs/lock`.
    """

    def __init__(self, path: Path, fits: Callable[[Any], bool] = lambda value: True) -> None:
        """Reads the file if it exists, and cuts off a last line that a kill left incomplete.

        Args:
            path: the file.
            fits: whether a value is of the kind that is stored here.

        Raises:
            UserError: a line is damaged, the file is a link, or it cannot be written.
        """
        refuse_linked_log(path)
        self._path = path
        self._values: dict[str, Any] = {}
        for number, line in enumerate(read_lines(path), 1):
            if not fits(line.get("value")):
                raise damaged_line(path, number, f"not what is stored here: {str(line.get('value'))[:80]}")
            self._values[str(line.get("key"))] = line["value"]
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
            append_line(self._path, {"key": key, "value": value})
        except OSError as error:
            raise unwritable(self._path.parent, error) from error
        self._values[key] = value
