"""Results kept by the content that they were made from: a file of JSON lines that only grows.

What is asked for again, after a kill or by another call, is read and not made again. Each line is written at once, so
that a kill costs what was being made. Knows nothing of what is kept.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import xxhash

from dpoeng.engine.runs.metrics import read_lines
from dpoeng.engine.runtime.folders import unwritable


def content_key(*parts: Any) -> str:
    """A hash of values that JSON can hold; the order of names in an object does not count."""
    text = json.dumps(parts, sort_keys=True)
    return xxhash.xxh3_128_hexdigest(text.encode("ascii"))


class Kept:
    """What a file of `{"key": ..., "value": ...}` lines holds, and the way to add to it.

    Of several lines with one key the last counts. One process writes at a time: see `runs/lock`.
    """

    def __init__(self, path: Path) -> None:
        """Reads the file, if there is one, and cuts off a last line that a kill has left unfinished.

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
        """The value; None where there is none."""
        return self._values.get(key)

    def put(self, key: str, value: Any) -> None:
        """Keep a value that JSON can hold; None is not one.

        Raises:
            UserError: the disk is full, or the folder may not be written.
        """
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "value": value}) + "\n")
        except OSError as error:
            raise unwritable(self._path.parent, error) from error
        self._values[key] = value
