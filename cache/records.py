"""The small JSON files of a cache: canonical, with their own checksum, and strictly checked.

A sealed record has two lines: the body as canonical JSON, and `{"xxh3_128":"<hex>"}`, the hash of the first line's
bytes with its newline. Any JSON Lines tool can read it, and truncation or a flipped bit is noticed. No record contains
a time,
host or path: the same work gives the same bytes, whenever and wherever it is done.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import xxhash

from dpoeng.cache.errors import CacheError

DIGEST = re.compile(r"[0-9a-f]{32}")
VIEW_NAME = re.compile(r"[A-Za-z0-9._-]{1,200}")
ROW_KINDS = ("pairs", "unpaired", "ranked")
"""The kinds of a view's rows: `rows` in its `meta`, pairs if absent. See docs/cache-format.md."""
MAX_RESPONSES = 1024
"""Limit for the responses of a ranked row: all are compared with each other. Published rows have some ten."""


def canonical_json(value: Any) -> bytes:
    """The one spelling of a JSON value: ASCII, sorted keys, no spaces, whole numbers without a decimal point.

    Raises:
        TypeError: a value that JSON has no form for, or a key that is not a string (json would convert it silently).
        ValueError: NaN or infinity.
    """
    return json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        if odd := [key for key in value if not isinstance(key, str)]:
            raise TypeError(f"keys of a record must be strings, found {odd[0]!r}")
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)  # lora_alpha 16 and 16.0 are the same value, so they must hash alike
    return value


def seal(body: Mapping[str, Any]) -> bytes:
    """The bytes of a sealed record."""
    line = canonical_json(body) + b"\n"
    return line + canonical_json({"xxh3_128": xxhash.xxh3_128_hexdigest(line)}) + b"\n"


def unseal(data: bytes, where: str) -> dict[str, Any]:
    """The body of a sealed record.

    Raises:
        CacheError: any byte differs from what `seal` writes.
    """
    body = parse_canonical(data.partition(b"\n")[0], where)
    if seal(body) != data:
        raise damaged(where, "a record whose last line is the hash of its first", "another hash, or no hash")
    return body


def parse_canonical(data: bytes, where: str) -> dict[str, Any]:
    """Parses a JSON object in canonical form (so without duplicate keys, NaN or spaces)."""
    try:
        body = json.loads(data)
        canonical = canonical_json(body)
    except (ValueError, TypeError, RecursionError) as error:
        raise damaged(where, "canonical JSON", f"{type(error).__name__}: {error}"[:200]) from None
    if not isinstance(body, dict) or canonical != data:
        raise damaged(where, "a JSON object in canonical form", "something else")
    return body


def damaged(where: str, expected: str, found: str) -> CacheError:
    """The error for a file whose bytes are not what they should be."""
    return CacheError(
        "a cache file is damaged",
        where=where,
        expected=expected,
        found=found,
        remedy="run the same `dpoeng precompute-ref` again: it moves the file to quarantine and recomputes its rows",
    )


@dataclass(frozen=True, slots=True, order=True)
class ObjectRef:
    """A record's reference to an object: its name (32 hex digits), number of rows and size in bytes."""

    name: str
    rows: int
    bytes: int

    def to_json(self) -> list[Any]:
        return [self.name, self.rows, self.bytes]


@dataclass(frozen=True, slots=True)
class Commit:
    """`runs/<spec>/commits/<object>.json`: states that this object's rows belong to this spec."""

    spec: str
    object: ObjectRef
    provenance: Mapping[str, Any]

    def encode(self) -> bytes:
        return seal(
            {
                "kind": "commit",
                "spec": self.spec,
                "object": self.object.to_json(),
                "provenance": self.provenance,
            }
        )

    @classmethod
    def decode(cls, data: bytes, where: str, *, spec: str, name: str) -> Commit:
        fields = Fields(unseal(data, where), where, "commit")
        fields.expect("spec", spec)
        reference = fields.reference("object")
        if reference.name != name:
            raise damaged(where, f"the record of object {name}", f"the record of object {reference.name}")
        return cls(spec, reference, fields.get("provenance", dict))


@dataclass(frozen=True, slots=True)
class Manifest:
    """`runs/<spec>/manifest-<generation>.json`: all objects of a spec when a run finished, sorted by name."""

    spec: str
    generation: int
    objects: tuple[ObjectRef, ...]

    def encode(self) -> bytes:
        return seal(
            {
                "kind": "manifest",
                "spec": self.spec,
                "generation": self.generation,
                "objects": [reference.to_json() for reference in self.objects],
            }
        )

    @classmethod
    def decode(cls, data: bytes, where: str, *, spec: str, generation: int) -> Manifest:
        fields = Fields(unseal(data, where), where, "manifest")
        fields.expect("spec", spec)
        fields.expect("generation", generation)
        return cls(spec, generation, fields.references("objects"))


@dataclass(frozen=True, slots=True)
class ViewRecord:
    """`views/<name>.json`: a data set as rows of the cache. The table `views/<hash>.arrow` lists the rows.

    Attributes:
        name: name of the view.
        spec: digest of the reference that computed its numbers.
        table: one row for every row of the source, in its order.
        objects: the objects in use; the table's column `object` is an index into this list.
        files: the source files; the table's column `file` is an index into this list.
        meta: how the pairs were built.
    """

    name: str
    spec: str
    table: ObjectRef
    objects: tuple[ObjectRef, ...]
    files: tuple[str, ...]
    meta: Mapping[str, Any]

    def encode(self) -> bytes:
        return seal(
            {
                "kind": "view",
                "name": self.name,
                "spec": self.spec,
                "table": self.table.to_json(),
                "objects": [reference.to_json() for reference in self.objects],
                "files": self.files,
                "meta": self.meta,
            }
        )

    @classmethod
    def decode(cls, data: bytes, where: str, *, name: str) -> ViewRecord:
        fields = Fields(unseal(data, where), where, "view")
        fields.expect("name", name)
        files = fields.get("files", list)
        if not all(isinstance(file, str) for file in files):
            raise damaged(f"{where}: files", "names of source files", "something else")
        return cls(
            name,
            fields.digest("spec"),
            fields.reference("table"),
            fields.references("objects"),
            tuple(files),
            fields.get("meta", dict),
        )


class Fields:
    """Reads the members of a record and checks each one's type."""

    def __init__(self, body: dict[str, Any], where: str, kind: str) -> None:
        self._body = body
        self._where = where
        self.expect("kind", kind)

    def get(self, name: str, kind: type) -> Any:
        value = self._body.get(name)
        if type(value) is not kind:  # not isinstance: a bool is an int to it
            raise damaged(f"{self._where}: {name}", kind.__name__, type(value).__name__)
        return value

    def expect(self, name: str, value: str | int) -> None:
        if (actual := self.get(name, type(value))) != value:
            raise damaged(f"{self._where}: {name}", str(value), str(actual)[:200])

    def digest(self, name: str) -> str:
        value: str = self.get(name, str)
        if not DIGEST.fullmatch(value):
            raise damaged(f"{self._where}: {name}", "32 hex digits", value[:200])
        return value

    def reference(self, name: str) -> ObjectRef:
        return self._reference(name, self.get(name, list))

    def references(self, name: str) -> tuple[ObjectRef, ...]:
        refs = tuple(self._reference(name, item) for item in self.get(name, list))
        if list(refs) != sorted(refs, key=lambda item: item.name) or len({item.name for item in refs}) != len(refs):
            raise damaged(f"{self._where}: {name}", "objects sorted by name, each once", "another order")
        return refs

    def _reference(self, name: str, item: Any) -> ObjectRef:
        match item:
            case [str(digest), int(rows), int(size)] if DIGEST.fullmatch(digest) and rows >= 0 and size > 0:
                if not isinstance(rows, bool) and not isinstance(size, bool):  # a bool is an int in Python
                    return ObjectRef(digest, rows, size)
        raise damaged(f"{self._where}: {name}", "[object name, rows, bytes]", repr(item)[:200])
