"""Successive halving: decides which run of a sweep to train next, and how far. Works on names and scores only.

All runs train to the first rung. The best one in `factor` of them are promoted to the next rung, and so on: Jamieson
and Talwalkar 2016, https://arxiv.org/abs/1502.07943. If several processes share a sweep and one of them would have to
wait, the best run of a rung is promoted as soon as it is among the best one in `factor` of those that reached it: Li et
al. 2020, https://arxiv.org/abs/1810.05934. One process never waits, so its promotions are those of the first paper.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from dpoeng.cache.errors import UserError
from dpoeng.cache.files import replacing
from dpoeng.engine.runs.metrics import damaged_line, read_lines
from dpoeng.engine.runtime.folders import write_durably

PROMOTIONS_FILE = "promotions.jsonl"

Score = tuple[float, ...]
"""Compared like tuples; larger is better."""


@dataclass(frozen=True, slots=True)
class Standing:
    """The progress of one run.

    Attributes:
        scores: its scores at the rungs reached, the first rung first.
        busy: whether a process is training it.
        failed: whether an error ended it.
    """

    name: str
    scores: Sequence[Score]
    busy: bool = False
    failed: bool = False


@dataclass(frozen=True, slots=True)
class Promotion:
    """A decision: `run` is promoted to `rung` for its `score` at the rung below, which `among` runs had reached."""

    run: str
    rung: int
    score: Score
    among: int


def rung_count(runs: int, factor: int) -> int:
    """Number of rungs of a sweep with the end of training: one more for each division of `runs` by `factor`.

    Raises:
        UserError: there are fewer runs than `factor`, so none could end early.
    """
    if runs < factor:
        raise UserError(
            "too few runs for successive halving",
            code="config-value",
            where="--halving-factor",
            expected=f"at least {factor} runs: one in {factor} continues",
            found=f"{runs}",
            remedy="vary more values, or remove --halving-factor to train every run to its end",
        )
    count = 1
    while runs >= factor:
        runs //= factor
        count += 1
    return count


def rung_steps(total: int, factor: int, rungs: int, every: int = 1) -> list[int]:
    """Optimizer steps at each rung; the last is `total`, each other one is the next divided by `factor`.

    Args:
        total: steps of the whole run.
        factor: see `rung_count`.
        rungs: number of rungs.
        every: rungs below `total` are multiples of it.
    """
    shares = [total / factor ** (rungs - 1 - rung) for rung in range(rungs)]
    return [min(total, every * math.ceil(share / every)) for share in shares]


def next_job(
    standings: Sequence[Standing], promotions: Sequence[Promotion], rungs: int, done: Iterable[tuple[str, int]]
) -> tuple[str, int] | None:
    """The run to train next and its target rung; the highest rung first.

    Args:
        standings: the progress of all runs, in starting order.
        promotions: all of them so far.
        rungs: number of rungs; with 1, every run is trained to its end.
        done: jobs of this process so far; each run is opened once, even if its scores exist.
    """
    done = set(done)
    looked_at = {name for name, _ in done}
    for rung in reversed(range(rungs)):
        for standing in _members(standings, promotions, rung):
            missing = len(standing.scores) <= rung or standing.name not in looked_at
            if missing and not standing.busy and (standing.name, rung) not in done:
                return standing.name, rung
    return None


def promote(standings: Sequence[Standing], promotions: Sequence[Promotion], rungs: int, factor: int) -> list[Promotion]:
    """Decides which runs to promote when no run is left to train: those of the highest rung that has some."""
    for rung in reversed(range(rungs - 1)):
        members = _members(standings, promotions, rung)
        there = [standing for standing in members if len(standing.scores) > rung]
        everyone = len(there) == len(members)
        places = max(1, len(there) // factor) if everyone else len(there) // factor
        best = sorted(there, key=lambda standing: standing.scores[rung], reverse=True)[:places]
        gone_on = {promotion.run for promotion in promotions if promotion.rung == rung + 1}
        new = [standing for standing in best if standing.name not in gone_on]
        if new:
            return [Promotion(one.name, rung + 1, one.scores[rung], len(there)) for one in new]
    return []


def ended_early(standings: Sequence[Standing], promotions: Sequence[Promotion], rungs: int) -> dict[str, int]:
    """Name -> the rung where it ended, for runs that were not promoted although others of their rung were."""
    ended = {}
    for rung in range(rungs - 1):
        gone_on = {promotion.run for promotion in promotions if promotion.rung == rung + 1}
        for standing in _members(standings, promotions, rung):
            if gone_on and standing.name not in gone_on and len(standing.scores) > rung:
                ended[standing.name] = rung
    return ended


def _members(standings: Sequence[Standing], promotions: Sequence[Promotion], rung: int) -> list[Standing]:
    """The runs that should reach a rung, without failed ones."""
    names = {promotion.run for promotion in promotions if promotion.rung == rung}
    return [standing for standing in standings if not standing.failed and (rung == 0 or standing.name in names)]


# --------------------------------------------------------------------------- the record of the decisions


def read_promotions(root: Path, ladder: dict[str, object]) -> list[Promotion]:
    """Reads the decisions of this sweep so far.

    Args:
        root: the folder of the sweep.
        ladder: the settings that decisions depend on: runs, factor, metric.

    Raises:
        UserError: the decisions were made for another ladder, or the file is damaged.
    """
    lines = read_lines(root / PROMOTIONS_FILE)
    if lines and lines[0] != ladder:
        changed = [name for name in ladder if lines[0].get(name) != ladder[name]]
        raise UserError(
            "this sweep ended runs early with other settings",
            code="resume-changed",
            where=str(root / PROMOTIONS_FILE),
            expected="; ".join(f"{name} = {lines[0].get(name)}" for name in changed),
            found="; ".join(f"{name} = {ladder[name]}" for name in changed),
            remedy=f"use the same values to continue, or another --output-dir; or delete {PROMOTIONS_FILE}: runs keep "
            "their checkpoints, and promotions are decided again",
        )
    found = []
    for number, line in enumerate(lines[1:], 2):
        try:
            found.append(_PROMOTION.validate_python(line))
        except ValidationError as error:
            raise damaged_line(root / PROMOTIONS_FILE, number, f"{len(error.errors())} wrong fields") from error
        if found[-1].run not in ladder["runs"] or found[-1].rung < 1:  # type: ignore[operator]
            raise damaged_line(root / PROMOTIONS_FILE, number, f"{found[-1].run!r:.80} at rung {found[-1].rung}")
    return found


_PROMOTION = TypeAdapter(Promotion)


def write_promotions(root: Path, ladder: dict[str, object], promotions: Sequence[Promotion]) -> None:
    """Writes all decisions atomically."""
    lines = [ladder, *map(asdict, promotions)]
    with replacing(root / PROMOTIONS_FILE) as temporary:
        write_durably(temporary, "".join(json.dumps(line) + "\n" for line in lines).encode())
