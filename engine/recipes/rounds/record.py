"""What rounds have done, on disk: rounds.json, and the files of each round, written whole."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dpoeng.cache.errors import UserError
from dpoeng.cache.files import replacing
from dpoeng.engine.runtime.folders import unwritable, write_durably

STUDY = "dpoeng round"
STATE = "rounds.json"


@dataclass(slots=True)
class RoundSummary:
    """What one round did.

    Attributes:
        number: from 1.
        sampled: the policy that answered.
        reference: digest of the round's reference.
        prompts, answers, cut, empty: of the sampling; see `Chosen`.
        mean_score: of the answers, by a judge that scores: the round before shows in it.
        pairs: new ones; `left_out` counts prompts without one by why.
        train_pairs, computed, rejected: rows of the round's view, those that phase one had to compute, and those that
            it could not use.
        asked, kept: questions to the judge that were new, and that had been answered before.
        evaluation: held-out metrics after the round.
        result: the folder of the policy that it trained.
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
    """The rounds that are done.

    Raises:
        UserError: they were done with other settings, or the file is damaged.
    """
    file = folder / STATE
    if not file.is_file():
        write_state(folder, identity, [])
        return []
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
        before, done = held["settings"], [RoundSummary(**one) for one in held["rounds"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            "the record of these rounds is damaged",
            code="round-damaged",
            where=str(file),
            found=str(error),
            remedy="name another folder with --output-dir",
            exit_status=3,
        ) from error
    now = json.loads(json.dumps(identity))
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if changed:
        raise UserError(
            "this folder holds rounds with other settings",
            code="round-changed",
            where=str(folder),
            expected="; ".join(f"{name} = {_short(before.get(name), now.get(name))}" for name in changed),
            found="; ".join(f"{name} = {_short(now.get(name), before.get(name))}" for name in changed),
            remedy="use the same values to continue, or another --output-dir",
        )
    return done


def _short(one: Any, other: Any) -> str:
    """A setting; of several together those that differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        one = {name: value for name, value in one.items() if other.get(name) != value}
    return json.dumps(one)[:200]


def write_state(folder: Path, identity: Mapping[str, Any], done: Sequence[RoundSummary]) -> None:
    """Write rounds.json; raises UserError where the folder cannot be written."""
    record = {"command": STUDY, "settings": dict(identity), "rounds": [asdict(one) for one in done]}
    _write(folder / STATE, json.dumps(record, indent=2) + "\n")


def write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write JSON lines, whole; raises UserError where the folder cannot be written."""
    _write(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            write_durably(temporary, text.encode("utf-8", "surrogatepass"))
    except OSError as error:
        raise unwritable(path.parent, error) from error
