"""Many runs of phase two over one cache: every combination of some fields, each an ordinary run in its own folder.

What can be known to be wrong with any combination is said before the first run. The base is loaded once. Started again,
a sweep skips the runs that are complete, goes on with the one that was stopped, and tries failed ones again.
"""

from __future__ import annotations

import functools
import itertools
import re
import time
import traceback
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import xxhash

from dpoeng.cache.errors import UserError
from dpoeng.cache.reader import View
from dpoeng.cache.words import counted
from dpoeng.engine.config.fields import LOSS_FIELDS, SweepConfig, TrainConfig, bare_type, unknown
from dpoeng.engine.config.files import load_config
from dpoeng.engine.config.problems import as_error
from dpoeng.engine.losses.own_check import check_own_losses
from dpoeng.engine.models.full_finetuning import check_full
from dpoeng.engine.recipes.inputs import Split, open_inputs, open_split
from dpoeng.engine.recipes.phase_two.mode import resolve_mode
from dpoeng.engine.recipes.sweep_ranking import PER_PAIR, RunResult, compare_runs, write_sweep
from dpoeng.engine.recipes.train import train
from dpoeng.engine.reference.loading import KeptBase
from dpoeng.engine.runs.folder import has_result
from dpoeng.engine.runtime.host import group_size
from dpoeng.engine.runtime.out_of_memory import release_memory
from dpoeng.engine.runtime.progress import QUIET, Progress

DEFAULT_FOLDER = Path("sweep")
ERROR_FILE = "error.txt"

# What belongs to a run's place and not to what it does.
_NOT_VARIED = frozenset({"output_dir", "resume", "run_name"})
# Held-out metrics whose scale the loss decides.
_OF_THE_LOSS = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins")


@dataclass(frozen=True, slots=True)
class Point:
    """One combination.

    Attributes:
        name: of the run and its folder: the values that differ.
        values: field -> its value as text.
        config: of the run.
        pairs: that training will see, each as often as it does.
    """

    name: str
    values: Mapping[str, str]
    config: TrainConfig
    pairs: int = 0


@dataclass(frozen=True, slots=True)
class SweepPlan:
    """Every run in the order in which they are done.

    Attributes:
        root: the folder of the sweep.
        vary: field -> its values as text.
        rank_by: held-out metric.
    """

    root: Path
    vary: Mapping[str, Sequence[str]]
    rank_by: str
    points: Sequence[Point]


OnResults = Callable[[Sequence[RunResult]], None]


# --------------------------------------------------------------------------- before the first run


def plan_sweep(sweep: SweepConfig, options: Mapping[str, Any], file: Path | None = None) -> SweepPlan:
    """Every combination as a run, looked through for mistakes.

    Args:
        sweep: what is varied.
        options: fields of TrainConfig for all runs; a varied field wins over them.
        file: as in `load_config`; its fields of TrainConfig are for all runs too.

    Raises:
        UserError: a field cannot be varied, some combination cannot be trained, there are too many of them, or the runs
            would not be compared on the same held-out pairs.
    """
    _check_fields(sweep)
    count = 1
    for values in sweep.vary.values():
        count *= len(values)
    if count > sweep.max_runs:
        raise UserError(
            f"these are {count} runs",
            code="sweep-runs",
            where="--vary " + " --vary ".join(f"{name} ({len(values)})" for name, values in sweep.vary.items()),
            expected=f"at most {sweep.max_runs}",
            found=f"{' x '.join(str(len(values)) for values in sweep.vary.values())} = {count} combinations",
            remedy=f"vary fewer values, or add --max-runs {count}; timings.jsonl of a run shows its time",
        )
    built, wrong = _attempt(_combinations(sweep.vary), lambda values: _point(values, options, file))
    looked, unfit = _attempt(((point.name, point) for point in built), _Looker()) if not wrong else ([], wrong)
    if unfit:
        raise _wrong_combinations(unfit, count)
    points = [point for point, _ in looked]
    _check_held_out(points, [digest for _, digest in looked])
    _check_metric(sweep)
    vary = {name: list(dict.fromkeys(point.values[name] for point in points)) for name in sweep.vary}
    for name, distinct in vary.items():
        if len(distinct) < len(sweep.vary[name]):
            raise _unfit_field(name, f"{len(sweep.vary[name])} different values", in_words(sweep.vary[name]))
    return SweepPlan(points[0].config.output_dir.parent, vary, sweep.rank_by, points)


def _check_fields(sweep: SweepConfig) -> None:
    wrong = [name for name in sweep.vary if name not in TrainConfig.model_fields]
    if wrong:
        raise as_error([unknown(TrainConfig, name, where=f"--vary {name}") for name in wrong])
    if not sweep.vary:
        raise UserError(
            "you varied no field",
            code="config-missing",
            where="--vary",
            expected="--vary with a field of dpoeng train and its values, once or more",
            remedy="for example: dpoeng sweep --vary beta=0.05,0.1,0.3 --vary learning_rate=5e-6,2e-5",
        )
    for name, values in sweep.vary.items():
        if name in _NOT_VARIED:
            raise _unfit_field(name, "a field that changes the training", name)
        if not values:
            raise _unfit_field(name, "one value or more", "none")


def _unfit_field(name: str, expected: str, found: str) -> UserError:
    return UserError(
        f"{name} cannot take these values",
        code="config-value",
        where=f"--vary {name}",
        expected=expected,
        found=found,
        remedy="correct the values, or leave the field out; each run gets a folder and a name by its values",
    )


def _combinations(vary: Mapping[str, Sequence[Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each combination's name and its config values; the last field changes fastest."""
    for values in itertools.product(*vary.values()):
        named = dict(zip(vary, values, strict=True))
        title = ",".join(f"{name}={in_words(value)}" for name, value in named.items())
        yield title, {name: _as_given(name, value) for name, value in named.items()}


def _as_given(name: str, value: Any) -> Any:
    """A word of the command line as the field takes it: a list joined by +, none where the field may have none."""
    annotation = TrainConfig.model_fields[name].annotation
    if isinstance(value, str):
        if typing.get_origin(bare_type(annotation)) is tuple:
            return tuple(value.split("+"))
        optional = isinstance(annotation, types.UnionType) and type(None) in typing.get_args(annotation)
        if value == "none" and optional and "none" not in typing.get_args(bare_type(annotation)):
            return None
    return value


def in_words(value: Any) -> str:
    """A value as it is written behind --vary."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return "+".join(map(in_words, value))
    return "none" if value is None else str(value)


def _point(values: Mapping[str, Any], options: Mapping[str, Any], file: Path | None) -> Point:
    config = load_config(TrainConfig, {**options, **values}, file)
    if config.resume:
        raise UserError(
            "not every run of a sweep has a checkpoint to resume",
            code="config-value",
            where="--resume",
            expected="nothing, or --no-resume",
            found="true",
            remedy="leave it out: a sweep resumes by default",
        )
    texts = {name: in_words(getattr(config, name)) for name in values}
    name = folder_name(texts)
    root = config.output_dir if "output_dir" in config.model_fields_set else DEFAULT_FOLDER
    return Point(name, texts, config.model_copy(update={"output_dir": root / name}))


def folder_name(values: Mapping[str, str]) -> str:
    """`beta=0.1,loss_type=ipo`; what a file system might not take, or what is too long, is replaced by a hash."""
    whole = ",".join(f"{name}={value}" for name, value in values.items())
    plain = re.sub(r"[^\w.,=+-]", "-", whole)[:100]
    return plain if plain == whole else f"{plain[:80]}-{xxhash.xxh3_64_hexdigest(whole.encode())}"


class _Looker:
    """Looks at the cache for each point: what its training and its held-out pairs are.

    Views are hashed when they are opened, and splits read every row, so each is opened or made once for all points.
    """

    def __init__(self) -> None:
        self._open_view = functools.cache(View.open)
        self._splits: dict[tuple[Any, ...], tuple[Split, str]] = {}

    def __call__(self, point: Point) -> tuple[Point, str]:
        """The point with its number of pairs, and a hash over its held-out pairs; empty where there are none."""
        config = point.config
        inputs = open_inputs(config, lambda config: self._split(config)[0])
        check_own_losses(config.loss_type, config.beta, per_token=not inputs.view.spec.holds_sums)
        reference = inputs.reference
        check_full(config, reference, quantization=config.quantization or reference["quantization"])
        resolve_mode(config, has_adapter=bool(config.adapter or reference.get("adapter")))
        return replace(point, pairs=inputs.pairs_seen), self._split(config)[1]

    def _split(self, config: TrainConfig) -> tuple[Split, str]:
        """The split of a run, and the hash over its held-out pairs."""
        key = (config.cache, config.view, config.mix_with, config.eval_view, config.eval_share, config.seed)
        if key not in self._splits:
            split = open_split(config, self._open_view)
            held_out = split.held_out
            keys = b"".join(held_out.view.key(row) for row in held_out.indices)
            self._splits[key] = split, xxhash.xxh3_128_hexdigest(keys) if held_out else ""
        return self._splits[key]


Wrong = Sequence[tuple[str, UserError]]


def _attempt(items: Any, work: Callable[[Any], Any]) -> tuple[list[Any], list[tuple[str, UserError]]]:
    """Run work for each named item -> results, and errors of the items that failed."""
    done, wrong = [], []
    for name, item in items:
        try:
            done.append(work(item))
        except UserError as error:
            wrong.append((name, error))
    return done, wrong


def _wrong_combinations(wrong: Wrong, count: int) -> UserError:
    """Return one error for the mistakes of all combinations; a mistake that all share is reported as a run would."""
    if len(wrong) == count and len({str(error) for _, error in wrong}) == 1:
        return wrong[0][1]
    names: dict[str, list[str]] = {}
    for name, error in wrong:
        for mistake in _mistakes(error):
            names.setdefault(mistake, []).append(name)
    lines = [
        f"{mistake}; in {which[0]}" + (f" and {len(which) - 1} more" if which[1:] else "")
        for mistake, which in names.items()
    ]
    return UserError(
        f"{len(wrong)} of {count} combinations cannot be trained",
        code="sweep-combinations",
        where="--vary",
        found=("\n" + " " * 12).join(lines),
        remedy="remove these values, or put them into a separate sweep; no run was started",
    )


def _mistakes(error: UserError) -> list[str]:
    """Each of the mistakes that an error tells, in a line."""
    if error.code == "config-several":
        return [" ".join(line.split()) for line in (error.found or "").splitlines()]
    return [" ".join(f"{error.where or ''} {error.message}; {error.remedy}".split())]


def _check_held_out(points: Sequence[Point], digests: Sequence[str]) -> None:
    """Raise UserError unless all runs are evaluated on the same held-out pairs, in the same order."""
    if not digests[0]:
        raise UserError(
            "no held-out pairs to compare the runs on",
            code="sweep-held-out",
            where="--eval-share, --eval-view",
            expected="pairs that no run trains on",
            found=f"eval_share {points[0].config.eval_share:g}, and no eval_view",
            remedy="leave --eval-share out, or score a file of held-out pairs and name it with --eval-view",
        )
    for point, digest in zip(points, digests, strict=True):
        if digest != digests[0]:
            raise UserError(
                "the runs would be evaluated on different held-out pairs",
                code="sweep-held-out",
                where="--vary",
                expected=f"the same pairs for all, as for {points[0].name}",
                found=f"others for {point.name}: without eval_view, seed, view and eval_share choose them",
                remedy="run precompute-ref on a file of held-out pairs, and name its view with --eval-view",
            )


def _check_metric(sweep: SweepConfig) -> None:
    """Raises UserError for a metric that has no value a pair, or that means something else in each run."""
    varied = sorted(set(LOSS_FIELDS) & set(sweep.vary))
    if sweep.rank_by not in PER_PAIR:
        expected = ", ".join(PER_PAIR)
    elif sweep.rank_by in _OF_THE_LOSS and varied:
        expected = f"one that does not depend on {' and '.join(varied)}: rewards/accuracies, logps/... or kl/..."
    else:
        return
    raise UserError(
        f"the runs cannot be ranked by {sweep.rank_by}",
        code="config-value",
        where="--rank-by",
        expected=expected,
        found=sweep.rank_by,
        remedy="rank by rewards/accuracies",
    )


# --------------------------------------------------------------------------- the runs


def run_sweep(plan: SweepPlan, progress: Progress = QUIET, on_results: OnResults = lambda _: None) -> list[RunResult]:
    """Does every run of the plan that is not complete, one after the other, and compares them.

    Args:
        plan: from `plan_sweep`.
        progress: where bars and notes go.
        on_results: called after each run with what all have shown so far, best first.

    Returns:
        a result for each run, best first, those that failed at the end.

    Raises:
        UserError: it was started by torchrun; or a folder holds a run of other settings.
    """
    _refuse_ranks()
    kept = KeptBase()
    failed: dict[str, str] = {}
    results: list[RunResult] = []
    seconds, pairs = 0.0, 0
    for number, point in enumerate(plan.points, 1):
        progress.note(f"run {number} of {len(plan.points)}: {point.name}")
        began = time.perf_counter()
        try:
            summary = train(point.config, progress, kept_base=kept, may_extend=False)
        except Exception as error:
            if isinstance(error, UserError) and error.code == "resume-changed":
                raise
            failed[point.name] = error.text() if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            if not (isinstance(error, UserError) and error.code == "output-in-use"):  # that folder is another's
                _keep_error(point, failed[point.name])
            progress.note(f"{point.name} failed; the other runs go on: {failed[point.name].splitlines()[0]}")
        else:
            (point.config.output_dir / ERROR_FILE).unlink(missing_ok=True)
            if not summary.already_complete:
                seconds += time.perf_counter() - began
                pairs += round(point.pairs * (summary.steps - summary.resumed_from) / max(1, summary.planned_steps))
        release_memory()  # a run's modules hold each other in cycles, and the next run is promised the memory
        results = compare_runs([(p.name, p.values, p.config.output_dir) for p in plan.points], plan.rank_by, failed)
        write_sweep(plan.root, plan.vary, plan.rank_by, results)
        on_results(results)
        left = [later for later in plan.points[number:] if not has_result(later.config.output_dir)]
        if left and pairs:
            about = in_time(sum(later.pairs for later in left) * seconds / pairs)
            progress.note(f"{counted(len(left), 'run')} left, about {about} at this speed")
    return results


def in_time(seconds: float) -> str:
    """`40 s`, `12 min` or `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _refuse_ranks() -> None:
    size = group_size()
    if size > 1:
        raise UserError(
            "a sweep is one process and runs its trainings one after another",
            code="sweep-ranks",
            where="torchrun",
            expected="dpoeng sweep, started as it is",
            found=f"WORLD_SIZE {size}",
            remedy="start it without torchrun; on several GPUs, start a sweep with other values on each (--device "
            "cuda:1): sweeps over the same fields may share a folder",
        )


def _keep_error(point: Point, message: str) -> None:
    """Leaves what ended a run in its folder, with the traceback; the folder may be what cannot be written."""
    try:
        point.config.output_dir.mkdir(parents=True, exist_ok=True)
        (point.config.output_dir / ERROR_FILE).write_text(f"{message}\n\n{traceback.format_exc()}", encoding="utf-8")
    except OSError:
        return
