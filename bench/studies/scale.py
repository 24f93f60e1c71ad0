"""How cost grows: with the number of pairs, the length of a pair, the vocabulary, and how it falls with the number of
processes; and the exponent of each.

An exponent is the slope of a straight line through log(cost) over log(size), by least squares, with its standard error:
1 is cost in proportion. A constant part that is large at the smallest sizes pulls it down, so the slope between the two
largest sizes stands beside it. Times are CPU seconds, medians of repeats; those of several processes are by the clock.
Memory by length is simulated, as `dpoeng plan` does it, and marked so.
"""

from __future__ import annotations

import itertools
import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from dpoeng.bench.cache import measure_size
from dpoeng.bench.kernels import Shape, head_problem, head_step
from dpoeng.bench.measuring.allocator import trace_allocator
from dpoeng.bench.measuring.measure import Stopwatch
from dpoeng.bench.measuring.records import named_settings, stamp
from dpoeng.bench.measuring.workload import save_small_model
from dpoeng.bench.memory import training_run
from dpoeng.bench.studies.ranks import (
    RankRound,
    default_ranks,
    largest_difference,
    measure_ranks,
    pairs_for,
    usable_ranks,
)
from dpoeng.cache.schema import PairIds, as_ids
from dpoeng.engine.config.fields import Dtype, TrainConfig
from dpoeng.engine.memory.any_depth import step_memory
from dpoeng.engine.memory.overhead import model_fields
from dpoeng.engine.memory.simulate import Pair, Setup
from dpoeng.engine.models.loading import load_model, pick_device
from dpoeng.engine.models.model import set_mode
from dpoeng.engine.models.sources import find_model
from dpoeng.engine.runtime.progress import QUIET, Progress
from dpoeng.engine.scoring.choose_layout import choose_layout
from dpoeng.engine.scoring.pairs import score_pairs
from dpoeng.engine.training.step import train_step
from dpoeng.kernels.token_logps import token_logps

PAIRS, LENGTH, VOCABULARY, RANKS = "pairs in the cache", "tokens of a pair", "vocabulary", "processes"


@dataclass(frozen=True, slots=True)
class ScaleSettings:
    """Settings. Each list has three sizes or more (`ranks` two), or is empty to skip the curve.

    Attributes:
        pairs: sizes of caches.
        lengths: tokens of a pair, half of them the prompt; two pairs are a batch.
        simulated_lengths: the same for the simulation of memory.
        vocabularies: rows of the head.
        ranks: numbers of processes, the first of them 1; None: 1, 2, 4, ... as far as there are cores or GPUs.
        repeats: counted repeats of each size; the cache of a size is made once.
    """

    model: str | None = None
    dtype: Dtype = "auto"
    device: str = "auto"
    pairs: tuple[int, ...] = (100, 1_000, 10_000, 100_000)
    lengths: tuple[int, ...] = (128, 256, 512, 1024)
    simulated_lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
    vocabularies: tuple[int, ...] = (8192, 16384, 32768, 65536, 131072)
    ranks: tuple[int, ...] | None = None
    repeats: int = 3


@dataclass(frozen=True, slots=True)
class Exponent:
    """cost = factor * size ** value.

    Attributes:
        standard_error: of `value`; None for two sizes, which fit exactly.
        last: the same between the two largest sizes alone.
    """

    value: float
    standard_error: float | None
    factor: float
    last: float


def power_law(sizes: Sequence[float], costs: Sequence[float]) -> Exponent:
    """Least squares of log(cost) over log(size), at two sizes or more.

    The standard error is the usual one of a slope, sqrt(sum of squared residuals / (n - 2) / sum of squared deviations
    of log(size)).
    """
    x, y = np.log(np.asarray(sizes, dtype=np.float64)), np.log(np.asarray(costs, dtype=np.float64))
    deviations = x - x.mean()
    spread = float(deviations @ deviations)
    slope = float(deviations @ y) / spread
    residuals = y - y.mean() - slope * deviations
    error = math.sqrt(float(residuals @ residuals) / (len(x) - 2) / spread) if len(x) > 2 else None
    last = float((y[-1] - y[-2]) / (x[-1] - x[-2]))
    return Exponent(slope, error, float(np.exp(y.mean() - slope * x.mean())), last)


@dataclass(frozen=True, slots=True)
class Curve:
    """One cost against one size; `values` are the repeats of each size."""

    name: str
    over: str
    unit: str
    sizes: list[int]
    values: list[list[float]]
    simulated: bool = False

    def record(self) -> dict[str, Any]:
        """With the medians and the fit."""
        medians = [statistics.median(found) for found in self.values]
        return {**asdict(self), "medians": medians, "exponent": asdict(power_law(self.sizes, medians))}


@dataclass(frozen=True, slots=True)
class RankCurve:
    """The seconds that the same work takes in 1 (the first size) and more processes.

    Attributes:
        pairs: pairs of each round.
        busy: mean over the processes of their CPU seconds, over the most of one; a value a size. What is left to 1 is
            work that could not be divided evenly.
        sharing: sizes with fewer cores than processes, which say nothing about processes and are not in the fit.
    """

    name: str
    sizes: list[int]
    values: list[list[float]]
    pairs: int
    busy: list[float]
    sharing: list[int]

    def record(self) -> dict[str, Any]:
        """With the medians and, where two sizes have their own cores, the fit; the rest is arithmetic on these."""
        medians = [statistics.median(found) for found in self.values]
        own = [(size, cost) for size, cost in zip(self.sizes, medians, strict=True) if size not in self.sharing]
        speedup = [medians[0] / cost for cost in medians]
        return {
            **asdict(self),
            "over": RANKS,
            "unit": "s",
            "simulated": False,
            "medians": medians,
            "pairs_per_s": [self.pairs / cost for cost in medians],
            "speedup": speedup,
            "efficiency": [times / size for times, size in zip(speedup, self.sizes, strict=True)],
            "exponent": asdict(power_law(*zip(*own, strict=True))) if len(own) > 1 else None,
        }


def bench_scale(settings: ScaleSettings, progress: Progress = QUIET) -> dict[str, Any]:
    """Measures every curve and returns the record.

    Raises:
        UserError: the model cannot be used.
    """
    device = pick_device(settings.device)
    ranks = default_ranks(device) if settings.ranks is None else settings.ranks
    record = stamp("scale", device, {**named_settings(settings), "ranks": ranks})
    curves: list[Curve | RankCurve] = []
    with tempfile.TemporaryDirectory(prefix="dpoeng-bench-") as scratch:
        folder = Path(scratch)
        if settings.pairs:
            curves += over_pairs(settings, folder, progress)
        if settings.lengths:
            curves += over_lengths(settings, folder, device, progress)
        if settings.simulated_lengths:
            curves += over_simulated_lengths(settings, folder, device, progress)
        if settings.vocabularies:
            curves += over_vocabularies(settings, device, progress)
        if ranks:
            found, record["loss_difference"] = over_ranks(settings, ranks, folder, device, progress)
            curves += found
    return {**record, "curves": [curve.record() for curve in curves]}


def over_pairs(settings: ScaleSettings, folder: Path, progress: Progress = QUIET) -> list[Curve]:
    """The reference cache with made-up numbers: what phase one and two pay for storing, without the model's part."""
    found: list[dict[str, Any]] = []
    with progress.task("caches", sum(settings.pairs), "pairs") as advance:
        for count in settings.pairs:
            found.append(measure_size(folder / f"cache{count}", count))
            advance(count, "")
    sizes = list(settings.pairs)
    parts = (
        ("commit to the cache", "commit_us", "s"),
        ("look up", "lookup_us", "s"),
        ("write the view", "write_view_us", "s"),
        ("size on disk", "bytes_a_pair", "bytes"),
    )
    curves = []
    for name, key, unit in parts:
        scale = 1e-6 if unit == "s" else 1.0
        curves.append(Curve(name, PAIRS, unit, sizes, [[size[key] * size["pairs"] * scale] for size in found]))
    return [*curves, Curve("open the view", PAIRS, "s", sizes, [[size["open_ms"] / 1e3] for size in found])]


def over_lengths(
    settings: ScaleSettings, folder: Path, device: torch.device, progress: Progress = QUIET
) -> list[Curve]:
    """A pass of phase one and a step of phase two over two pairs of each length."""
    lm = load_model(
        find_model(_model(settings, folder)), quantization="none", dtype=settings.dtype, device=device, tokenizer=False
    )
    set_mode(lm, training=False)
    choose_layout(lm, "auto")
    batches = [_pairs_of(length, lm.vocab_size) for length in settings.lengths]
    scored = [score_pairs(lm, batch) for batch in batches]

    def score(place: int) -> None:
        score_pairs(lm, batches[place])

    reference = _rounds(score, len(batches), settings.repeats, device, "reference by length", progress)
    config = TrainConfig.model_validate({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1})
    with training_run(lm, scored[0], config) as run:

        def step(place: int) -> None:
            run.train_rows = scored[place]
            train_step(run, 0)

        training = _rounds(step, len(batches), settings.repeats, device, "training by length", progress)
    sizes = list(settings.lengths)
    return [
        Curve("reference pass", LENGTH, "CPU-s", sizes, reference),
        Curve("training step", LENGTH, "CPU-s", sizes, training),
    ]


def over_simulated_lengths(
    settings: ScaleSettings, folder: Path, device: torch.device, progress: Progress = QUIET
) -> list[Curve]:
    """Peak memory of a step above the weights, with and without recomputing layers: simulated."""
    fields = model_fields(_model(settings, folder))
    kernels: Literal["cuda", "cpu"] = "cuda" if device.type == "cuda" else "cpu"
    curves = []
    for name, checkpointing in (("peak of a step", False), ("peak of a step, layers recomputed", True)):
        config = TrainConfig.model_validate({"gradient_checkpointing": checkpointing})
        setup = Setup(fields, torch.bfloat16 if kernels == "cuda" else torch.float32, "none", config, kernels=kernels)
        values = []
        with progress.task(f"simulated {name}", len(settings.simulated_lengths), "lengths") as advance:
            for length in settings.simulated_lengths:
                pair = Pair(length // 2, length // 4, length // 4)
                peak = step_memory(setup, [pair, pair]).peak
                values.append([float(peak.n_bytes - peak.by_kind["weights"])])
                advance(1, "")
        curves.append(Curve(name, LENGTH, "bytes", list(settings.simulated_lengths), values, simulated=True))
    return curves


def over_vocabularies(settings: ScaleSettings, device: torch.device, progress: Progress = QUIET) -> list[Curve]:
    """The fused head, forward and backward, over 256 tokens of width 576."""
    dtype = "bfloat16" if device.type == "cuda" else "float32"

    def problem(place: int) -> Any:
        return head_problem(Shape(settings.vocabularies[place], 576, 256), getattr(torch, dtype), device)

    problems = [problem(place) for place in range(len(settings.vocabularies))]
    seconds = _rounds(
        lambda place: head_step(token_logps, problems[place], "train"),
        len(problems),
        settings.repeats,
        device,
        "head by vocabulary",
        progress,
    )
    peaks = [
        [float(trace_allocator(lambda some=some: head_step(token_logps, some, "train"), device).peak_bytes)]  # type: ignore[misc]
        for some in problems
    ]
    sizes = list(settings.vocabularies)
    return [
        Curve("head, forward and backward", VOCABULARY, "CPU-s", sizes, seconds),
        Curve("peak of the head", VOCABULARY, "bytes", sizes, peaks),
    ]


def over_ranks(
    settings: ScaleSettings, sizes: Sequence[int], folder: Path, device: torch.device, progress: Progress = QUIET
) -> tuple[list[RankCurve], float]:
    """Phase one and a step of phase two in several processes; and how far the losses are from those of one."""
    found = measure_ranks(
        _model(settings, folder),
        sizes,
        folder,
        device=settings.device,
        dtype=settings.dtype,
        repeats=settings.repeats,
        progress=progress,
    )
    shared = [size for size in sizes if size > usable_ranks(device)]

    def busy(rounds: Sequence[RankRound]) -> float:
        return statistics.median(statistics.fmean(one.busy_s) / max(one.busy_s) for one in rounds)

    curves = [
        RankCurve(
            name,
            list(sizes),
            [[one.wall_s for one in found[size][phase]] for size in sizes],
            pairs_for(sizes),
            [busy(found[size][phase]) for size in sizes],
            shared,
        )
        for name, phase in (("reference pass", "reference"), ("training step", "training"))
    ]
    losses = {size: [one.loss for one in phases["training"] if one.loss is not None] for size, phases in found.items()}
    return curves, largest_difference(losses)


def _rounds(
    work: Callable[[int], object],
    places: int,
    repeats: int,
    device: torch.device,
    title: str,
    progress: Progress,
) -> list[list[float]]:
    """Seconds of each size in turn, in rounds, of which the first is not counted: CPU's, or a GPU's by the clock."""
    found: list[list[float]] = [[] for _ in range(places)]
    with progress.task(title, (1 + repeats) * places, "runs") as advance:
        for number, place in itertools.product(range(1 + repeats), range(places)):
            watch = Stopwatch(device)
            work(place)
            spent = watch.lap()
            if number:
                found[place].append(spent.wall_s if device.type == "cuda" else spent.cpu_s)
            advance(1, "")
    return found


def _pairs_of(length: int, vocabulary: int) -> list[PairIds]:
    random = np.random.default_rng(length)

    def draw(count: int) -> Any:
        return as_ids(random.integers(0, vocabulary, count))

    return [PairIds(draw(length // 2), draw(length // 4), draw(length // 4)) for _ in range(2)]


def _model(settings: ScaleSettings, folder: Path) -> str:
    if settings.model:
        return str(find_model(settings.model).folder)
    made = folder / "model"
    return str(made if made.is_dir() else save_small_model(made))
