"""The record of finished rounds, rounds.json, and atomic writes of each round's files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from dpoeng.cache.errors import UserError
from dpoeng.cache.files import replacing
from dpoeng.engine.runtime.folders import unwritable, write_durably

STUDY = "dpoeng round"
STATE = "rounds.json"


@dataclass(slots=True)
class RoundSummary:
    """The results of one round.

    Attributes:
        number: from 1.
        sampled: folder of the policy that answered.
        reference: digest of the round's reference.
        prompts, answers, cut, empty: counts of the sampling; see `Chosen`.
        mean_score: mean score of the answers, sampled before this round's training; None if the judge compares.
        pairs: new pairs; `left_out` counts the prompts without one, by reason.
        train_pairs, computed, rejected: rows of the round's view, rows that phase one computed for it, and rows that it
            rejected.
        asked, kept: new questions to the judge, and stored replies.
        evaluation: held-out metrics after the round's training.
        result: folder of the trained policy.
    """

    number: int
    sampled: str
    reference: str
    prompts: int
    answers: int
    cut: int
    empty: int
    mean_score: float | None
    pairs: int
    left_out: dict[str, int]
    train_pairs: int
    computed: int
    rejected: int
    asked: int
    kept: int
    evaluation: dict[str, float]
    result: str


def open_state(folder: Path, identity: Mapping[str, Any]) -> list[RoundSummary]:
    """Reads the finished rounds, and creates rounds.json in a new folder.

    Raises:
        UserError: the folder's rounds have other settings, or the file is damaged.
    """
    file = folder / STATE
    if not file.is_file():
        write_state(folder, identity, [])
        return []
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        before = TypeAdapter(dict[str, Any]).validate_python(record["settings"])
        done = TypeAdapter(list[RoundSummary]).validate_json(json.dumps(record["rounds"]), strict=True)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            "the record of these rounds is unreadable",
            code="round-damaged",
            where=str(file),
            found=" ".join(str(error).split())[:300],
            remedy="choose another folder with --output-dir",
            exit_status=3,
        ) from error
    now = json.loads(json.dumps(identity))
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if changed:
        raise UserError(
            "this folder has rounds with other settings",
            code="round-changed",
            where=str(folder),
            expected="; ".join(f"{name} = {_short(before.get(name), now.get(name))}" for name in changed),
            found="; ".join(f"{name} = {_short(now.get(name), before.get(name))}" for name in changed),
            remedy="use the same values to continue, or another --output-dir",
        )
    return done


def _short(one: Any, other: Any) -> str:
    """A setting as JSON; of a dict only the fields that differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        one = {name: value for name, value in one.items() if other.get(name) != value}
    return json.dumps(one)[:200]


def write_state(folder: Path, identity: Mapping[str, Any], done: Sequence[RoundSummary]) -> None:
    """Writes rounds.json; raises UserError if the folder is not writable."""
    record = {"command": STUDY, "settings": dict(identity), "rounds": [asdict(one) for one in done]}
    _write(folder / STATE, json.dumps(record, indent=2) + "\n")


def write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Writes a JSON Lines file atomically; raises UserError if the folder is not writable."""
    _write(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            write_durably(temporary, text.encode("utf-8", "surrogatepass"))
    except OSError as error:
        raise unwritable(path.parent, error) from error
