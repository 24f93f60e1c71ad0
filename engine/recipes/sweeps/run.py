"""Trains the runs of a sweep, one after the other, and compares them.

The base is loaded once. Started again, a sweep skips the runs that are complete, continues the one that was stopped,
and tries failed ones again. Several processes may work on one sweep: each takes runs that no other one is training, and
all read the others' progress from the runs' folders.
"""

from __future__ import annotations

import contextlib
import os
import time
import traceback
from collections.abc import Callable, Sequence

from dpoeng.cache.errors import UserError
from dpoeng.cache.files import lock
from dpoeng.cache.words import counted
from dpoeng.engine.recipes.sweeps.halving import (
    Promotion,
    Standing,
    ended_early,
    next_job,
    promote,
    read_promotions,
    write_promotions,
)
from dpoeng.engine.recipes.sweeps.plan import Point, SweepPlan
from dpoeng.engine.recipes.sweeps.ranking import RunResult, compare_runs, scores_at, write_sweep
from dpoeng.engine.recipes.train import train
from dpoeng.engine.reference.loading import KeptBase
from dpoeng.engine.runs.folder import has_result
from dpoeng.engine.runs.lock import is_held
from dpoeng.engine.runtime.host import group_size
from dpoeng.engine.runtime.out_of_memory import release_memory
from dpoeng.engine.runtime.progress import QUIET, Progress

ERROR_FILE = "error.txt"
_POLL_S = 1.0

OnResults = Callable[[Sequence[RunResult]], None]


def run_sweep(
    plan: SweepPlan, progress: Progress = QUIET, on_results: OnResults = lambda _: None, *, alone: bool = True
) -> list[RunResult]:
    """Trains every incomplete run of the plan, as far as the plan says, and compares them.

    Args:
        plan: from `plan_sweep`.
        progress: receives bars and notes.
        on_results: called after each run that was trained with the results of all so far, best first.
        alone: whether no other process works on this sweep. Then runs that failed before are tried again, and one whose
            folder is in use counts as failed; otherwise it is left to the process that trains it.

    Returns:
        a result per run, best first; then those that ended early, then failed ones.

    Raises:
        UserError: torchrun started it, or a folder contains a run with other settings.
    """
    _refuse_ranks()
    if alone:
        forget_failures(plan)
    worker = _Worker(plan, progress, alone)
    results: list[RunResult] = []
    while worker.takes_a_run() or not results:
        results = worker.compare()
        on_results(results)
    return results


def forget_failures(plan: SweepPlan) -> None:
    """Removes the marks of failed runs, so that they are tried again."""
    for point in plan.points:
        if not is_held(point.config.output_dir):
            (point.config.output_dir / ERROR_FILE).unlink(missing_ok=True)


class _Worker:
    """One process of a sweep, which takes one run after the other."""

    def __init__(self, plan: SweepPlan, progress: Progress, alone: bool) -> None:
        self._plan, self._progress, self._alone = plan, progress, alone
        self._points = {point.name: point for point in plan.points}
        self._rungs = len(plan.points[0].rungs)
        self._kept = KeptBase()
        self._done: list[tuple[str, int]] = []
        self._failed: dict[str, str] = {}
        self._seconds, self._pairs = 0.0, 0
        self._waits = False

    def takes_a_run(self) -> bool:
        """Trains the next run to its next rung; False if none is left. Waits for runs that decide a promotion.

        On the way it opens runs that are there already, so that other settings are noticed.
        """
        while True:
            standings = [self._standing(point) for point in self._plan.points]
            job = next_job(standings, self._promotions(), self._rungs, self._done)
            if job is not None:
                if self._train(self._points[job[0]], job[1]):
                    return True
                continue
            if self._promotes(standings):
                continue
            busy = [standing.name for standing in standings if standing.busy]
            if not busy or self._plan.halving_factor is None:
                return False
            if not self._waits:
                self._progress.note(f"waiting for runs of other processes: {', '.join(busy)}")
                self._waits = True
            time.sleep(_POLL_S)

    def _standing(self, point: Point) -> Standing:
        folder = point.config.output_dir
        failed = point.name in self._failed or (folder / ERROR_FILE).is_file()
        complete, rungs = has_result(folder), point.rungs[:-1]
        scores = scores_at(folder, rungs, self._plan.rank_by, ended=complete) if rungs else []
        scores += [(0.0,)] if complete else []
        return Standing(point.name, scores, busy=not self._alone and is_held(folder), failed=failed)

    # ----------------------------------------------------------------------- decisions

    @property
    def _ladder(self) -> dict[str, object]:
        plan = self._plan
        return {"runs": list(self._points), "halving_factor": plan.halving_factor, "rank_by": plan.rank_by}

    def _promotions(self) -> list[Promotion]:
        return read_promotions(self._plan.root, self._ladder) if self._plan.halving_factor is not None else []

    def _promotes(self, standings: Sequence[Standing]) -> bool:
        """Whether runs are promoted. One process decides at a time, based on all earlier decisions."""
        if self._plan.halving_factor is None or not self._plan.root.is_dir():
            return False
        descriptor = os.open(self._plan.root, os.O_RDONLY)
        try:
            while lock(descriptor) is False:
                time.sleep(0.02)
            before = self._promotions()
            new = promote(standings, before, self._rungs, self._plan.halving_factor)
            if new:
                write_promotions(self._plan.root, self._ladder, [*before, *new])
        finally:
            os.close(descriptor)
        for promotion in new:
            step = self._points[promotion.run].rungs[promotion.rung]
            self._progress.note(
                f"{promotion.run} continues to step {step}: best of {promotion.among} by {self._plan.rank_by}"
            )
        return bool(new)

    # ----------------------------------------------------------------------- one run

    def _train(self, point: Point, rung: int) -> bool:
        """Trains a run to a rung; False if there was nothing to train."""
        plan, step = self._plan, point.rungs[rung]
        number = list(self._points).index(point.name) + 1
        until = f", to step {step} of {point.rungs[-1]}" if rung + 1 < self._rungs else ""
        if len(self._standing(point).scores) <= rung:
            self._progress.note(f"run {number} of {len(plan.points)}: {point.name}{until}")
        began = time.perf_counter()
        pause_at = step if rung + 1 < self._rungs else None
        try:
            summary = train(point.config, self._progress, kept_base=self._kept, may_extend=False, pause_at=pause_at)
        except Exception as error:
            code = error.code if isinstance(error, UserError) else ""
            if code == "resume-changed":
                raise
            if code == "output-in-use" and not self._alone:
                return False  # another process was faster
            self._fails(point, error)
            trained = True
        else:
            (point.config.output_dir / ERROR_FILE).unlink(missing_ok=True)
            trained = not summary.already_complete
            if trained:
                self._seconds += time.perf_counter() - began
                steps = summary.steps - summary.resumed_from
                self._pairs += round(point.pairs * steps / max(1, summary.planned_steps))
        self._done.append((point.name, rung))
        release_memory()  # a run's modules form reference cycles, and the next run's forecast needs the memory
        return trained

    def _fails(self, point: Point, error: Exception) -> None:
        """Writes the error to the run's folder, unless it is another process's; other runs continue."""
        message = error.text() if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        self._failed[point.name] = message
        if not (isinstance(error, UserError) and error.code == "output-in-use"):
            folder = point.config.output_dir
            with contextlib.suppress(OSError):  # an unwritable folder may be the reason for the error
                folder.mkdir(parents=True, exist_ok=True)
                (folder / ERROR_FILE).write_text(f"{message}\n\n{traceback.format_exc()}", encoding="utf-8")
        self._progress.note(f"{point.name} failed; the other runs continue: {message.splitlines()[0]}")

    # ----------------------------------------------------------------------- results

    def compare(self) -> list[RunResult]:
        """All runs, best first; also writes sweep.json and notes the remaining time."""
        plan = self._plan
        failed = {**{name: text for name in self._points if (text := self._error(name))}, **self._failed}
        standings = [self._standing(point) for point in plan.points]
        promotions = self._promotions()
        early = ended_early(standings, promotions, self._rungs)
        steps = {name: self._points[name].rungs[rung] for name, rung in early.items()}
        runs = [(point.name, point.values, point.config.output_dir) for point in plan.points]
        results = compare_runs(runs, plan.rank_by, failed, steps)
        write_sweep(plan.root, plan.vary, plan.rank_by, results, plan.halving_factor)
        self._tell_time_left()
        return results

    def _error(self, name: str) -> str:
        """The error of a run in another process; empty if there is none."""
        try:
            text = (self._points[name].config.output_dir / ERROR_FILE).read_text(encoding="utf-8")
        except OSError:
            return ""
        return text.split("\n\nTraceback")[0].strip()

    def _tell_time_left(self) -> None:
        if not self._pairs or not self._done:
            return
        seen = {name for name, _ in self._done}
        left = [p for p in self._plan.points if p.name not in seen and not has_result(p.config.output_dir)]
        if left:
            shares = [p.rungs[0] / p.rungs[-1] for p in left]
            seconds = sum(p.pairs * share for p, share in zip(left, shares, strict=True)) * self._seconds / self._pairs
            to = "" if self._rungs == 1 else " to the first rung"
            self._progress.note(f"{counted(len(left), 'run')} left{to}, about {in_time(seconds)} at this speed")


def in_time(seconds: float) -> str:
    """`40 s`, `12 min` or `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _refuse_ranks() -> None:
    size = group_size()
    if size > 1:
        raise UserError(
            "a sweep does not work under torchrun",
            code="sweep-ranks",
            where="torchrun",
            expected="dpoeng sweep without torchrun",
            found=f"WORLD_SIZE {size}",
            remedy="start it without torchrun; --devices cuda:0,cuda:1 trains one run on each GPU at a time",
        )
