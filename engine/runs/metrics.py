"""Writes a run's metrics under the field's standard names, one JSON object per line, identical between equal runs.

Timings go to a separate file, so that a resumed run's log equals that of an undisturbed run, byte for byte.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dpoeng.cache.errors import UserError
from dpoeng.cache.files import replacing
from dpoeng.engine.runtime.folders import refuse_link

METRICS_FILE = "metrics.jsonl"
TIMINGS_FILE = "timings.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"
HELD_OUT_FILE = "held_out.jsonl"

_BY_STEP = (METRICS_FILE, TIMINGS_FILE, EVALUATIONS_FILE)


class MetricsLog:
    """Appends metrics, timings and evaluations, and cuts them back to a step when a run continues from there.

    Single held-out pairs are kept only for one evaluation: that of the adapter that would be saved if the run ended
    now.

    Of several processes only one `writes`; in the others all of this does nothing.
    """

    def __init__(self, folder: Path, *, writes: bool = True) -> None:
        """Raises UserError if a log is a link."""
        for name in (*_BY_STEP, HELD_OUT_FILE):
            refuse_linked_log(folder / name)
        self._writes = writes
        self._metrics = folder / METRICS_FILE
        self._timings = folder / TIMINGS_FILE
        self._evaluations = folder / EVALUATIONS_FILE
        self._held_out = folder / HELD_OUT_FILE
        self.also: Callable[[int, Mapping[str, Any]], None] = lambda step, metrics: None
        """Called with every line of results, for trackers."""

    def rewind(self, step: int) -> None:
        """Drops every line of a later step, and a last line cut short by a kill.

        Raises:
            UserError: a line of an earlier step is damaged; later damaged lines are written again.
        """
        for path in (self._metrics, self._timings, self._evaluations):
            if self._writes and path.is_file():
                kept_lines = _lines_until(path, step)
                if len(kept_lines) != path.stat().st_size:
                    with replacing(path) as temporary:
                        temporary.write_bytes(kept_lines)

    def write(self, step: int, epoch: float, metrics: dict[str, float]) -> None:
        """Writes one line of results."""
        self._append(self._metrics, {"step": step, "epoch": round(epoch, 4), **metrics})
        self.also(step, {"epoch": epoch, **metrics})

    def write_timing(self, step: int, timing: dict[str, float]) -> None:
        """Writes one line of timings."""
        self._append(self._timings, {"step": step, **timing})

    def write_evaluation(self, step: int, record: dict[str, Any]) -> None:
        """Writes one full evaluation, with intervals and groups."""
        self._append(self._evaluations, {"step": step, **record})

    def write_held_out(self, step: int, pairs: Sequence[Mapping[str, Any]]) -> None:
        """Writes each held-out pair, replacing those of an earlier step."""
        if self._writes:
            lines = "".join(json.dumps({"step": step, **pair}) + "\n" for pair in pairs)
            with replacing(self._held_out) as temporary:
                temporary.write_text(lines, encoding="utf-8")

    def read(self) -> list[dict[str, Any]]:
        """Every line of metrics.jsonl."""
        return read_lines(self._metrics)

    def read_evaluations(self) -> list[dict[str, Any]]:
        """Every line of evaluations.jsonl."""
        return read_lines(self._evaluations)

    def _append(self, path: Path, record: dict[str, Any]) -> None:
        if self._writes:
            append_line(path, record)


def refuse_linked_log(path: Path) -> None:
    """Raises UserError if a log is a link: in a stranger's folder it could make other files grow."""
    refuse_link(path, "a log in this folder", "put the file itself there, or name another folder with --output-dir")


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Appends a JSON object. A link could lead out of the folder, and a pipe would never end: OSError for both."""

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)

    with open(path, "a", encoding="utf-8", opener=opener) as file:
        file.write(json.dumps(record) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a log; leaves out a last line that is being written or was cut by a kill.

    Raises:
        UserError: a line is damaged.
    """
    if not path.is_file():
        return []
    return [_parsed(path, number, line) for number, line in enumerate(_whole_lines(path), 1)]


def _lines_until(path: Path, step: int) -> bytes:
    """The bytes of a log's lines up to a step."""
    lines = _whole_lines(path)
    keep = []
    for number, line in enumerate(lines, 1):
        try:
            keep.append(_parsed(path, number, line)["step"] <= step)
        except UserError:
            keep.append(None)
    last = max((place for place, kept in enumerate(keep) if kept), default=-1)
    for place in range(last):
        if keep[place] is None:
            _parsed(path, place + 1, lines[place])  # raises
    return b"".join(line + b"\n" for line, kept in zip(lines, keep, strict=True) if kept)


def _whole_lines(path: Path) -> list[bytes]:
    return path.read_bytes().split(b"\n")[:-1]


def _int64(digits: str) -> int:
    if len(digits) > 20 or not -(2**63) <= int(digits) < 2**63:
        raise ValueError(f"{digits[:30]} has more than 64 bits")
    return int(digits)


def _parsed(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line, parse_int=_int64)
        problem = _fault(path.name, value) if isinstance(value, dict) else "not a JSON object"
    except (ValueError, RecursionError) as error:
        problem = str(error)
    if problem:
        raise damaged_line(path, number, problem)
    return value  # type: ignore[no-any-return]


def _fault(name: str, line: Mapping[str, Any]) -> str:
    """Describes what no run writes into a log of this name; empty if there is nothing."""
    step: Any = line.get("step")
    if name in (*_BY_STEP, HELD_OUT_FILE) and not (_is_number(step) and 0 <= step < math.inf):
        return "not a JSON object with a step"
    texts = ("source", "prompt")
    if name == HELD_OUT_FILE and not (
        all(isinstance(line.get(text), str) for text in texts)
        and all(_is_number(value) for field, value in line.items() if field not in texts)
    ):
        return "not a held-out pair"
    return "not an evaluation" if name == EVALUATIONS_FILE and not _is_evaluation(line, "step") else ""


def _is_evaluation(line: Any, *more: str) -> bool:
    """Whether a line, or a group in it, has numbers, metrics and intervals where evaluations have them."""
    if not isinstance(line, dict):
        return False
    metrics: Any = line.get("metrics")
    bounds: Any = line.get("intervals")
    groups: Any = line.get("groups", {})
    counts = [line[name] for name in ("pairs", "prompts", "ties", *more) if name in line]
    return (
        all(isinstance(one, dict) for one in (metrics, bounds, groups))
        and all(_is_number(value) for value in (*counts, *metrics.values()))
        and all(isinstance(both, list) and len(both) == 2 and all(map(_is_number, both)) for both in bounds.values())
        and all(isinstance(column, dict) and all(map(_is_evaluation, column.values())) for column in groups.values())
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def damaged_line(path: Path, number: int, problem: str) -> UserError:
    """The error for a line of a log that nothing here has written."""
    if path.name == HELD_OUT_FILE:
        remedy = "train this run again with --no-resume: comparisons need each of its held-out pairs"
    elif path.name in _BY_STEP:
        remedy = f"remove this line from {path.name}: its figures are lost; checkpoints and result do not depend on it"
    else:
        remedy = f"remove this line from {path.name}: what it holds is then asked or computed again"
    return UserError(
        "the run's log is damaged",
        code="run-damaged",
        where=f"{path}:{number}",
        found=problem,
        remedy=remedy,
        exit_status=3,
    )
