"""dpoeng against TRL: the same model, token ids, LoRA, order and batches, in processes of their own, in turn.

Every repeat runs each program once, one after the other, so that a machine that grows slower does so for all of them.
Ratios are taken within a repeat and then summarised. A comparison counts only if the losses agree.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from dpoeng.bench.measure import Spent
from dpoeng.bench.peers import Figures, Job, Program
from dpoeng.bench.records import commit, stamp
from dpoeng.cache.errors import UserError
from dpoeng.engine.config import Dtype
from dpoeng.engine.model import pick_device
from dpoeng.engine.progress import QUIET, Progress
from dpoeng.engine.sources import find_model

PEERS: tuple[Program, ...] = ("trl precomputed", "trl adapter off", "trl second model")

# Largest relative difference of a step's loss. In bfloat16 the two programs' batches have other shapes, and so other
# rounding: log-probs of a response differ by tenths of a nat, losses by beta times that.
LOSS_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 2e-2}


@dataclass(frozen=True, slots=True)
class CompareSettings:
    """What is compared. `peer_python` None is this interpreter.

    Attributes:
        pairs_count: the first so many pairs of the files are scored in the reference pass.
        steps: optimizer steps; the first one is not counted, since it meets cold caches.
        repeats: how often every program is run.
        work: a folder that keeps every finished run, so that a comparison that was stopped goes on; None keeps nothing.
    """

    model: str
    pairs: tuple[Path, ...]
    peer_python: Path | None = None
    peers: tuple[Program, ...] = PEERS
    dtype: Dtype = "float32"
    device: str = "auto"
    batch_size: int = 4
    steps: int = 6
    repeats: int = 3
    pairs_count: int = 64
    max_length: int = 512
    lora_r: int = 16
    learning_rate: float = 1e-4
    seed: int = 3
    work: Path | None = None


@dataclass(frozen=True, slots=True)
class Ratio:
    """Peer over dpoeng: above 1, dpoeng needs less. Median, least and greatest over the repeats."""

    median: float
    low: float
    high: float


def bench_compare(settings: CompareSettings, progress: Progress = QUIET) -> dict[str, Any]:
    """Runs all programs in turn and returns the record. Compare `record["equality"]["ok"]` before any ratio is told.

    Raises:
        UserError: model, pairs or peer are missing, or a program failed.
    """
    device = pick_device(settings.device)
    source = find_model(settings.model)
    python = str(settings.peer_python or sys.executable)
    check_peer(python)
    with _folder(settings.work) as folder:
        job = Job(
            program="dpoeng",
            model=str(source.folder.resolve()),
            pairs=(str(first_pairs(settings.pairs, settings.pairs_count, folder / "pairs.jsonl")),),
            cache="",
            scratch="",
            batch_size=settings.batch_size,
            steps=settings.steps,
            dtype=settings.dtype,
            max_length=settings.max_length,
            lora_r=settings.lora_r,
            learning_rate=settings.learning_rate,
            seed=settings.seed,
            threads=torch.get_num_threads(),
            device=str(device),
        )
        settings_told = {**asdict(settings), "model": Path(settings.model).name, "peer_python": None, "work": None}
        settings_told["pairs"] = [path.name for path in settings.pairs]
        record = stamp("compare", device, settings_told)
        programs: tuple[Program, ...] = ("dpoeng reference", "dpoeng", *settings.peers)
        rounds: list[dict[Program, Figures]] = []
        with progress.task("comparing", settings.repeats * len(programs), "runs") as advance:
            for number in range(settings.repeats):
                cache = folder / f"cache{number}"
                done: dict[Program, Figures] = {}
                for program in programs:
                    own = folder / f"{number}-{program.replace(' ', '-')}"
                    own.mkdir(exist_ok=True)
                    interpreter = python if program in settings.peers else sys.executable
                    done[program] = run_process(
                        interpreter, replace(job, program=program, cache=str(cache), scratch=str(own))
                    )
                    advance(1, program)
                rounds.append(done)
    return {
        **record,
        "peer_versions": rounds[0][settings.peers[0]].versions,
        "equality": check_equal(rounds, settings.peers, LOSS_TOLERANCE[settings.dtype]),
        "ratios": {peer: _plain(ratios(rounds, peer)) for peer in settings.peers},
        "medians": {program: medians([done[program] for done in rounds]) for program in programs},
        "runs": [{program: asdict(figures) for program, figures in done.items()} for done in rounds],
    }


def check_peer(python: str) -> None:
    """Raises UserError where the interpreter lacks TRL, or dpoeng's own peer process."""
    code = "import importlib.metadata as m, dpoeng.bench; print(m.version('trl'))"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60, check=False)
        answer, mistake = done.stdout.strip(), done.stderr.strip()
    except OSError as error:
        answer, mistake = "", str(error)
    if not answer:
        raise UserError(
            "there is nothing to compare with: TRL is missing",
            code="bench-no-peer",
            where=f"--peer-python {python}",
            expected="a Python that has trl==1.16.0 and dpoeng",
            found=mistake.splitlines()[-1] if mistake else "nothing",
            remedy="python -m venv peer && peer/bin/pip install trl==1.16.0 . && "
            "dpoeng bench compare --peer-python peer/bin/python ...",
            exit_status=5,
        )


def first_pairs(files: Sequence[Path], count: int, target: Path) -> Path:
    """Copies the first `count` lines of some .jsonl or .jsonl.gz files."""
    import gzip

    def lines() -> Any:
        for path in files:
            with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as f:
                yield from f

    try:
        kept = list(islice(lines(), count))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            "the pairs cannot be read",
            code="data-unreadable",
            where=", ".join(map(str, files)),
            expected="JSON Lines, plain or .gz",
            found=str(error),
            remedy="name a file of preference pairs with --pairs",
            exit_status=3,
        ) from error
    target.write_text("".join(line.rstrip("\n") + "\n" for line in kept), encoding="utf-8")
    return target


@contextlib.contextmanager
def _folder(work: Path | None) -> Iterator[Path]:
    if work is not None:
        work.mkdir(parents=True, exist_ok=True)
        yield work.resolve()
    else:
        with tempfile.TemporaryDirectory(prefix="dpoeng-bench-") as scratch:
            yield Path(scratch)


def run_process(python: str, job: Job) -> Figures:
    """Runs one job in a process of its own; or reads what it found, if it was run there before by the same code.

    Raises:
        UserError: the process failed; the message holds the end of what it said.
    """
    raw = run_module(
        python,
        "dpoeng.bench.peers",
        asdict(job),
        Path(job.scratch),
        name=job.program,
        remedy="if it was killed, the machine has too little memory: lower --batch-size",
    )
    return _figures(raw)


def run_module(
    python: str,
    module: str,
    job: dict[str, Any],
    folder: Path,
    *,
    name: str,
    remedy: str = "run the same command again: what is done is kept",
) -> dict[str, Any]:
    """Runs `python -m module JOB.json`, which prints what it found as its last line, and keeps that in `folder`.

    The same job of the same code is not run again.

    Raises:
        UserError: the process failed; the message holds the end of what it said.
    """
    file, kept = folder / "job.json", folder / "figures.json"
    asked = json.loads(json.dumps({"job": job, "python": python, "commit": commit()}))
    if kept.is_file():
        before: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        if before["asked"] == asked:
            figures: dict[str, Any] = before["figures"]
            return figures
    file.write_text(json.dumps(job), encoding="utf-8")
    done = subprocess.run(
        [python, "-m", module, str(file)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"},
    )
    if done.returncode != 0:
        raise UserError(
            f"{name} failed",
            code="bench-peer-failed",
            where=f"{python} -m {module}, exit status {done.returncode}",
            found="\n".join((done.stderr or done.stdout).strip().splitlines()[-8:]),
            remedy=remedy,
            exit_status=5,
        )
    raw: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    kept.write_text(json.dumps({"asked": asked, "figures": raw}), encoding="utf-8")
    return raw


def _figures(raw: dict[str, Any]) -> Figures:
    steps = [Spent(**step) for step in raw["steps"]]
    return Figures(**{**raw, "steps": steps, "reference": Spent(**raw["reference"]) if raw["reference"] else None})


def check_equal(
    rounds: Sequence[Mapping[Program, Figures]], peers: Sequence[Program], tolerance: float
) -> dict[str, Any]:
    """Largest relative difference of a step's loss and gradient norm between dpoeng and each peer."""
    losses, norms = {}, {}
    for peer in peers:
        losses[peer] = max(relative(done["dpoeng"].losses, done[peer].losses) for done in rounds)
        norms[peer] = max(relative(done["dpoeng"].grad_norms, done[peer].grad_norms) for done in rounds)
    return {
        "ok": all(difference <= tolerance for difference in losses.values()),
        "tolerance": tolerance,
        "loss": losses,
        "grad_norm": norms,
    }


def relative(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Largest |difference| over the peer's value; infinite if the lengths differ, there is none, or a NaN."""
    if len(ours) != len(theirs) or not ours:
        return sys.float_info.max
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        difference = abs(a - b) / max(abs(b), 1e-12)
        if not difference <= worst:
            worst = difference if difference == difference else sys.float_info.max
    return worst


def ratios(rounds: Sequence[Mapping[Program, Figures]], peer: Program) -> dict[str, Ratio]:
    """Peer over dpoeng in everything that both have. A step is a mean over all steps but the first."""
    found: dict[str, list[float]] = {}
    for done in rounds:
        ours, theirs, our_pass = done["dpoeng"], done[peer], done["dpoeng reference"]
        a, b = step_time(ours.steps), step_time(theirs.steps)
        found.setdefault("step_cpu_s", []).append(b.cpu_s / a.cpu_s)
        found.setdefault("step_wall_s", []).append(b.wall_s / a.wall_s)
        found.setdefault("train_peak_bytes", []).append(theirs.train_peak_bytes / max(ours.train_peak_bytes, 1))
        if theirs.reference is not None and our_pass.reference is not None:
            share = our_pass.reference_pairs / theirs.reference_pairs
            found.setdefault("reference_cpu_s", []).append(theirs.reference.cpu_s / our_pass.reference.cpu_s * share)
            found.setdefault("reference_wall_s", []).append(theirs.reference.wall_s / our_pass.reference.wall_s * share)
            found.setdefault("reference_peak_bytes", []).append(
                theirs.reference_peak_bytes / max(our_pass.reference_peak_bytes, 1)
            )
    return {name: Ratio(statistics.median(values), min(values), max(values)) for name, values in found.items()}


def step_time(steps: Sequence[Spent]) -> Spent:
    """Mean time of a step, the first one left out."""
    counted = steps[1:] or steps
    return Spent(statistics.fmean(step.wall_s for step in counted), statistics.fmean(step.cpu_s for step in counted))


def medians(runs: Sequence[Figures]) -> dict[str, float | None]:
    """The figures of one program: medians over the repeats."""
    values: dict[str, list[float]] = {}
    for run in runs:
        if run.steps:
            step = step_time(run.steps)
            values.setdefault("step_cpu_s", []).append(step.cpu_s)
            values.setdefault("step_wall_s", []).append(step.wall_s)
            values.setdefault("train_peak_bytes", []).append(run.train_peak_bytes)
        if run.reference is not None:
            values.setdefault("reference_cpu_s_per_pair", []).append(run.reference.cpu_s / run.reference_pairs)
            values.setdefault("reference_pairs_per_s", []).append(run.reference_pairs / run.reference.wall_s)
            values.setdefault("reference_peak_bytes", []).append(run.reference_peak_bytes)
    return {name: statistics.median(numbers) for name, numbers in values.items()}


def _plain(found: Mapping[str, Ratio]) -> dict[str, dict[str, float]]:
    return {name: asdict(ratio) for name, ratio in found.items()}
