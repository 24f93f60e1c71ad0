"""Plans a sweep: every combination of some fields is a run; mistakes in any are reported before the first run."""

from __future__ import annotations

import functools
import itertools
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import xxhash

from dpoeng.cache.errors import UserError
from dpoeng.cache.exchange.responses import row_key
from dpoeng.cache.reader import View
from dpoeng.engine.config.fields import LOSS_FIELDS, SweepConfig, TrainConfig, bare_type, unknown
from dpoeng.engine.config.files import load_config
from dpoeng.engine.config.problems import as_error
from dpoeng.engine.losses.own_check import check_own_losses
from dpoeng.engine.models.full_finetuning import check_full
from dpoeng.engine.recipes.inputs import Inputs, Split, open_inputs, open_split
from dpoeng.engine.recipes.phase_two.mode import resolve_mode
from dpoeng.engine.recipes.sweeps.halving import rung_count, rung_steps
from dpoeng.engine.recipes.sweeps.ranking import rankable

DEFAULT_FOLDER = Path("sweep")

# Fields that concern a run's place, not its work.
_NOT_VARIED = frozenset({"output_dir", "resume", "run_name"})
# Held-out metrics whose scale depends on the loss.
_OF_THE_LOSS = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins")


@dataclass(frozen=True, slots=True)
class Point:
    """One combination.

    Attributes:
        name: name of the run and its folder: the values that differ.
        values: field -> its value as text.
        config: config of the run.
        pairs: number of training pairs, counted each time they are used.
        rungs: optimizer steps after which the run is compared with the others; the last is the end of training.
    """

    name: str
    values: Mapping[str, str]
    config: TrainConfig
    pairs: int = 0
    rungs: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class SweepPlan:
    """All runs in order.

    Attributes:
        root: the folder of the sweep.
        vary: field -> its values as text.
        rank_by: held-out metric.
        halving_factor: one run in so many continues at each rung; None trains all to the end.
    """

    root: Path
    vary: Mapping[str, Sequence[str]]
    rank_by: str
    points: Sequence[Point]
    halving_factor: int | None = None


# --------------------------------------------------------------------------- before the first run


def plan_sweep(sweep: SweepConfig, options: Mapping[str, Any], file: Path | None = None) -> SweepPlan:
    """Makes a run of every combination, and checks each for mistakes.

    Args:
        sweep: the varied fields.
        options: fields of TrainConfig for all runs; varied fields take precedence.
        file: as in `load_config`; its fields of TrainConfig are for all runs, too.

    Raises:
        UserError: a field cannot be varied, a combination cannot be trained, there are too many of them, or the runs
            would not be compared on the same held-out pairs.
    """
    _check_fields(sweep)
    count = 1
    for values in sweep.vary.values():
        count *= len(values)
    if count > sweep.max_runs:
        raise UserError(
            f"this sweep has {count} runs",
            code="sweep-runs",
            where="--vary " + " --vary ".join(f"{name} ({len(values)})" for name, values in sweep.vary.items()),
            expected=f"at most {sweep.max_runs}",
            found=f"{' x '.join(str(len(values)) for values in sweep.vary.values())} = {count} combinations",
            remedy=f"vary fewer values, or add --max-runs {count}; timings.jsonl of a run shows its time",
        )
    built, wrong = _attempt(_combinations(sweep.vary), lambda values: _point(values, options, file))
    factor = sweep.halving_factor
    rungs = rung_count(count, factor) if factor is not None else 1
    looker = _Looker(factor or 1, rungs)
    looked, unfit = _attempt(((point.name, point) for point in built), looker) if not wrong else ([], wrong)
    if unfit:
        raise _wrong_combinations(unfit, count)
    points = [point for point, _ in looked]
    _check_held_out(points, [digest for _, digest in looked])
    _check_metric(sweep, looker.rows)
    vary = {name: list(dict.fromkeys(point.values[name] for point in points)) for name in sweep.vary}
    for name, distinct in vary.items():
        if len(distinct) < len(sweep.vary[name]):
            raise _unfit_field(name, f"{len(sweep.vary[name])} different values", in_words(sweep.vary[name]))
    return SweepPlan(points[0].config.output_dir.parent, vary, sweep.rank_by, points, factor)


def _check_fields(sweep: SweepConfig) -> None:
    wrong = [name for name in sweep.vary if name not in TrainConfig.model_fields]
    if wrong:
        raise as_error([unknown(TrainConfig, name, where=f"--vary {name}") for name in wrong])
    if not sweep.vary:
        raise UserError(
            "no field to vary",
            code="config-missing",
            where="--vary",
            expected="--vary with a field of dpoeng train and its values, at least once",
            remedy="for example: dpoeng sweep --vary beta=0.05,0.1,0.3 --vary learning_rate=5e-6,2e-5",
        )
    for name, values in sweep.vary.items():
        if name in _NOT_VARIED:
            raise _unfit_field(name, "a field that changes the training", name)
        if not values:
            raise _unfit_field(name, "at least one value", "none")


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
    """Each combination's name and its config values; the last field changes fastest."""
    for values in itertools.product(*vary.values()):
        named = dict(zip(vary, values, strict=True))
        title = ",".join(f"{name}={in_words(value)}" for name, value in named.items())
        yield title, {name: _as_given(name, value) for name, value in named.items()}


def _as_given(name: str, value: Any) -> Any:
    """A word from the command line as the field takes it: a list joined by +, `none` if the field may be None."""
    annotation = TrainConfig.model_fields[name].annotation
    if isinstance(value, str):
        if typing.get_origin(bare_type(annotation)) is tuple:
            return tuple(value.split("+"))
        optional = isinstance(annotation, types.UnionType) and type(None) in typing.get_args(annotation)
        if value == "none" and optional and "none" not in typing.get_args(bare_type(annotation)):
            return None
    return value


def in_words(value: Any) -> str:
    """A value in the notation of --vary."""
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
    """`beta=0.1,loss_type=ipo`; names that a file system might refuse, or too long ones, become a hash."""
    whole = ",".join(f"{name}={value}" for name, value in values.items())
    plain = re.sub(r"[^\w.,=+-]", "-", whole)[:100]
    return plain if plain == whole else f"{plain[:80]}-{xxhash.xxh3_64_hexdigest(whole.encode())}"


class _Looker:
    """Looks up the training pairs and held-out pairs of each point in the cache.

    Opening a view hashes it and a split reads every row, so each is done once for all points.

    Attributes:
        rows: the kind of rows of the held-out pairs.
    """

    def __init__(self, factor: int, rungs: int) -> None:
        self._factor, self._rungs = factor, rungs
        self._open_view = functools.cache(View.open)
        self._splits: dict[tuple[Any, ...], tuple[Split, str]] = {}
        self.rows = "pairs"

    def __call__(self, point: Point) -> tuple[Point, str]:
        """The point with its pairs and rungs, and a hash over its held-out pairs (empty without any)."""
        config = point.config
        inputs = open_inputs(config, lambda config: self._split(config)[0])
        check_own_losses(config.loss_type, config.beta, per_token=not inputs.view.spec.holds_sums)
        reference = inputs.reference
        check_full(config, reference, quantization=config.quantization or reference["quantization"])
        resolve_mode(config, has_adapter=bool(config.adapter or reference.get("adapter")))
        return replace(point, pairs=inputs.pairs_seen, rungs=self._steps(config, inputs)), self._split(config)[1]

    def _steps(self, config: TrainConfig, inputs: Inputs) -> list[int]:
        """The steps of each rung: evaluations that a run has anyway, where it looks for its best one."""
        schedule = inputs.schedule
        every = (config.eval_steps or schedule.steps_per_epoch) if config.watches_a_metric else 1
        return rung_steps(schedule.total_steps, self._factor, self._rungs, every)

    def _split(self, config: TrainConfig) -> tuple[Split, str]:
        """The split of a run, and the hash over its held-out pairs."""
        key = (config.cache, config.view, config.mix_with, config.eval_view, config.eval_share, config.seed)
        if key not in self._splits:
            split = open_split(config, self._open_view)
            held_out = split.held_out
            self.rows = held_out.view.rows
            keys = [row_key(held_out.view, row) for row in held_out.indices]
            self._splits[key] = split, xxhash.xxh3_128_hexdigest(repr(keys).encode()) if keys else ""
        return self._splits[key]


Wrong = Sequence[tuple[str, UserError]]


def _attempt(items: Any, work: Callable[[Any], Any]) -> tuple[list[Any], list[tuple[str, UserError]]]:
    """Runs `work` for each named item; returns the results, and the errors of items that failed."""
    done, wrong = [], []
    for name, item in items:
        try:
            done.append(work(item))
        except UserError as error:
            wrong.append((name, error))
    return done, wrong


def _wrong_combinations(wrong: Wrong, count: int) -> UserError:
    """Combines the mistakes of all combinations in one error; a mistake that all share is reported as for one run."""
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
    """Each mistake in an error, one per line."""
    if error.code == "config-several":
        return [" ".join(line.split()) for line in (error.found or "").splitlines()]
    return [" ".join(f"{error.where or ''} {error.message}; {error.remedy}".split())]


def _check_held_out(points: Sequence[Point], digests: Sequence[str]) -> None:
    """Raises UserError unless all runs are evaluated on the same held-out pairs in the same order."""
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


def _check_metric(sweep: SweepConfig, rows: str) -> None:
    """Raises UserError for a metric without a value per row of this kind, or with a different meaning in each run."""
    varied = sorted(set(LOSS_FIELDS) & set(sweep.vary))
    if sweep.rank_by not in rankable(rows):
        expected = f"for {rows if rows == 'pairs' else rows + ' rows'} one of {', '.join(rankable(rows))}"
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
