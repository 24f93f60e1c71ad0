"""dpoeng against TRL: the same model, token ids, LoRA, order and batches, in separate processes.

In every repeat dpoeng runs beside each peer. On a CPU both processes live at once and take turns after each batch or
step: the speed of a shared machine changes within a minute, and this way it changes for both alike. On a GPU, whose
memory two programs would have to share, they run one after the other. Ratios are computed within a repeat and then
summarised. A comparison is valid only if the losses agree.

On a CPU a run's memory is the process's resident memory, which depends on what the allocator returns. So every
program runs once more on the longest pairs to count the bytes of its tensors, which are the same each time.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from dpoeng.bench.job import IN_TURNS, TURN, Figures, Job, Program
from dpoeng.bench.measuring.measure import Spent
from dpoeng.bench.measuring.records import commit, named_settings, stamp
from dpoeng.cache.errors import UserError
from dpoeng.cache.reader import View
from dpoeng.engine.config.fields import Dtype
from dpoeng.engine.models.loading import pick_device
from dpoeng.engine.models.sources import find_model
from dpoeng.engine.runtime.progress import QUIET, Advance, Progress

PEERS: tuple[Program, ...] = ("trl precomputed", "trl adapter off", "trl second model")

Round = dict[Program, dict[Program, Figures]]
"""Peer -> program -> its figures: the peer's own, and those of dpoeng beside it."""

OF_MEMORY = "if it was killed, the machine has too little memory: lower --batch-size"

# Largest relative difference of a step's loss. In 16 bits the two programs' batches have different shapes, so different
# rounding. In bfloat16, over a SmolLM2-135M, a pair's log-prob difference is 0.3 nat off float32's on average, with
# padded rows as with packed ones. For 4 pairs, beta 0.1 and four such sums (policy and reference of both programs) that
# makes a standard deviation of 3 % of ln 2. So 16 bits can show wrong mathematics, and float32 proves equality.
LOSS_TOLERANCE = {"float32": 1e-3, "bfloat16": 1e-1, "float16": 2e-2}


@dataclass(frozen=True, slots=True)
class CompareSettings:
    """Settings of a comparison. `peer_python` None is this interpreter.

    Attributes:
        pairs_count: the reference pass scores this many pairs, the first ones of the files.
        steps: optimizer steps; the first one is not counted, because caches are cold.
        repeats: how often dpoeng is run beside every peer.
        work: folder for finished runs, so that a stopped comparison can continue; None keeps nothing.
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
    max_prompt_length: int | None = None
    lora_r: int = 16
    learning_rate: float = 1e-4
    seed: int = 3
    work: Path | None = None


@dataclass(frozen=True, slots=True)
class Ratio:
    """Peer over dpoeng: above 1, dpoeng needs less. Median, minimum and maximum of the repeats."""

    median: float
    low: float
    high: float


def bench_compare(settings: CompareSettings, progress: Progress = QUIET) -> dict[str, Any]:
    """Runs all programs in turn and returns the record. Check `record["equality"]["ok"]` before you report a ratio.

    Raises:
        UserError: model, pairs or peer is missing, or a program failed.
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
            cache=str(folder / "cache"),
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
            max_prompt_length=settings.max_prompt_length,
        )
        record = stamp("compare", device, named_settings(settings))
        rounds: list[Round] = []
        on_cpu = device.type == "cpu"
        runs = 1 + settings.repeats * len(settings.peers) + (2 + len(settings.peers) if on_cpu else 0)
        with progress.task("comparing", runs, "runs") as advance:
            # Peers take their token ids from this cache. It is not counted: no peer runs beside it.
            first = run_process(sys.executable, in_folder(replace(job, program="dpoeng reference"), folder / "first"))
            advance(1, "token ids")
            for number in range(settings.repeats):
                rounds.append({})
                for peer in settings.peers:
                    rounds[-1][peer] = _beside(job, peer, python, folder / f"{number}-{peer.replace(' ', '-')}")
                    advance(1, peer)
            tensors = _tensors(job, settings.peers, python, folder / "tensors", advance) if on_cpu else {}
    done = [beside[peer] for beside in rounds for peer in settings.peers]
    if "trl precomputed" not in settings.peers:
        done.append({"dpoeng reference": first})
    return {
        **record,
        "peer_versions": rounds[0][settings.peers[0]][settings.peers[0]].versions,
        "equality": check_equal(rounds, settings.peers, LOSS_TOLERANCE[settings.dtype]),
        "ratios": {peer: _plain({**ratios(rounds, peer), **tensor_ratios(tensors, peer)}) for peer in settings.peers},
        "medians": {
            program: medians([runs[program] for runs in done if program in runs]) | tensor_bytes(tensors, program)
            for program in ("dpoeng reference", "dpoeng", *settings.peers)
        },
        "runs": [
            {peer: {program: asdict(figures) for program, figures in runs.items()} for peer, runs in beside.items()}
            for beside in rounds
        ],
    }


def in_folder(job: Job, folder: Path) -> Job:
    """The job with a new folder."""
    folder.mkdir(parents=True, exist_ok=True)
    return replace(job, scratch=str(folder))


def _beside(job: Job, peer: Program, python: str, folder: Path) -> dict[Program, Figures]:
    """dpoeng beside one peer: phase one if the peer has one too, then phase two; or the stored figures."""
    phases: tuple[Program, ...] = ("dpoeng reference", "dpoeng") if peer == "trl precomputed" else ("dpoeng",)
    jobs = [in_folder(replace(job, program=phase), folder / phase.replace(" ", "-")) for phase in phases]
    if len(jobs) > 1:
        jobs[0] = replace(jobs[0], cache=str(folder / "cache"))
    theirs = in_folder(replace(job, program=peer), folder / "peer")

    def find() -> dict[str, Any]:
        return {program: asdict(figures) for program, figures in in_turns(jobs, theirs, python).items()}

    found = kept(folder, {"jobs": [asdict(each) for each in (*jobs, theirs)], "python": python}, find)
    return {each.program: _figures(found[each.program]) for each in (*jobs, theirs)}


def _tensors(job: Job, peers: Sequence[Program], python: str, folder: Path, advance: Advance) -> dict[Program, Figures]:
    """Runs every program once on the longest pairs, two batches, with the bytes of tensors as its memory."""
    folder.mkdir(parents=True, exist_ok=True)
    longest = longest_pairs(job.cache, Path(job.pairs[0]), 2 * job.batch_size, folder / "pairs.jsonl")
    job = replace(job, pairs=(str(longest),), cache=str(folder / "cache"), steps=2, tensors=True)
    runs: dict[Program, Figures] = {}
    for program in ("dpoeng reference", "dpoeng", *peers):
        own_job = in_folder(replace(job, program=program), folder / program.replace(" ", "-"))
        runs[program] = run_process(python if program in peers else sys.executable, own_job)
        advance(1, f"{program}, tensors")
    return runs


class _Process:
    """A job in a separate process that waits at every turn for a signal to continue.

    Attributes:
        turn: the phase and the pairs done in it, while it waits; None after it has ended.
        figures: its figures, after it has ended.
    """

    def __init__(self, python: str, job: Job, *, turns: bool) -> None:
        self.job, self._command = job, [python, "-m", "dpoeng.bench.peers", str(Path(job.scratch) / "job.json")]
        Path(self._command[-1]).write_text(json.dumps(asdict(job)), encoding="utf-8")
        self._errors = (Path(job.scratch) / "errors").open("w+", encoding="utf-8")
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**_quiet(), IN_TURNS: "1" if turns else ""},
        )
        self.figures: Figures | None = None
        self.turn = self._listen()

    def go(self) -> None:
        """Lets it work until its next turn, or its end."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        self.turn = self._listen()

    def end(self) -> None:
        """Ends the process if it still runs."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _listen(self) -> tuple[int, int] | None:
        assert self._process.stdout is not None
        last = ""
        for line in self._process.stdout:
            word, *rest = line.split()[:3] or [""]
            if word == TURN and len(rest) == 2:
                return int(rest[0]), int(rest[1])
            last = line.strip() or last
        if self._process.wait() != 0:
            self._errors.seek(0)
            raise _failed(self.job.program, self._command, self._process.returncode, self._errors.read() or last)
        self.figures = _figures(json.loads(last))
        return None


def in_turns(ours: Sequence[Job], theirs: Job, python: str) -> dict[Program, Figures]:
    """Runs dpoeng's jobs one after the other beside the peer's job: the one with fewer pairs done goes next.

    Raises:
        UserError: a process failed; all are ended.
    """
    turns = theirs.device == "cpu"
    started: list[_Process] = []
    try:
        peer = _Process(python, theirs, turns=turns)
        started.append(peer)
        for job in ours:
            process = _Process(sys.executable, job, turns=turns)
            started.append(process)
            while process.turn is not None:
                first = process if peer.turn is None or process.turn <= peer.turn else peer
                first.go()
        while peer.turn is not None:
            peer.go()
        return {each.job.program: each.figures for each in started if each.figures is not None}
    finally:
        for each in started:
            each.end()


def check_peer(python: str) -> None:
    """Raises UserError if the interpreter lacks TRL or dpoeng."""
    code = "import importlib.metadata as m, dpoeng.bench; print(m.version('trl'))"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60, check=False)
        answer, mistake = done.stdout.strip(), done.stderr.strip()
    except OSError as error:
        answer, mistake = "", str(error)
    if not answer:
        raise UserError(
            "TRL is not installed in this Python",
            code="bench-no-peer",
            where=f"--peer-python {python}",
            expected="a Python with trl==1.16.0 and dpoeng",
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
        first = list(islice(lines(), count))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            "cannot read the pairs",
            code="data-unreadable",
            where=", ".join(map(str, files)),
            expected="JSON Lines, plain or .gz",
            found=str(error),
            remedy="name a file of preference pairs with --pairs",
            exit_status=3,
        ) from error
    target.write_text("".join(line.rstrip("\n") + "\n" for line in first), encoding="utf-8")
    return target


def longest_pairs(cache: str, file: Path, count: int, target: Path) -> Path:
    """Copies the lines of the view's `count` longest pairs, which set the peak of memory."""
    view = View.open(cache)
    by_length = sorted(range(len(view)), key=lambda i: (-view[i].ids.total_tokens, i))
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    target.write_text("".join(lines[view.source(i)[1] - 1] for i in by_length[:count]), encoding="utf-8")
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
    """Runs one job in a separate process, or reads its figures if the same code ran it there before.

    Raises:
        UserError: the process failed; the message contains the end of its output.
    """
    raw = run_module(
        python,
        "dpoeng.bench.peers",
        asdict(job),
        Path(job.scratch),
        name=job.program,
        remedy=OF_MEMORY,
    )
    return _figures(raw)


def run_module(
    python: str,
    module: str,
    job: dict[str, Any],
    folder: Path,
    *,
    name: str,
    remedy: str = "run the same command again: finished work is kept",
    processes: int | None = None,
) -> dict[str, Any]:
    """Runs `python -m module JOB.json`, which prints its result as the last line; stores that in `folder`.

    The same job of the same code is not run again. With `processes`, torchrun starts that many, and the first one
    prints.

    Raises:
        UserError: the process failed; the message contains the end of its output.
    """
    file = folder / "job.json"
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"] if processes else []
    command = [python, "-m", *torchrun, module, str(file)]

    def find() -> dict[str, Any]:
        file.write_text(json.dumps(job), encoding="utf-8")
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=_quiet())
        if done.returncode != 0:
            raise _failed(name, command, done.returncode, done.stderr or done.stdout, remedy)
        figures: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return figures

    return kept(folder, {"job": job, "python": python}, find)


def kept(folder: Path, asked: Mapping[str, Any], find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Returns the figures stored in `folder` for this job and commit; otherwise calls `find` and stores its result."""
    file, now = folder / "figures.json", json.loads(json.dumps({**asked, "commit": commit()}))
    if file.is_file():
        before: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if before["asked"] == now:
            figures: dict[str, Any] = before["figures"]
            return figures
    found = find()
    file.write_text(json.dumps({"asked": now, "figures": found}), encoding="utf-8")
    return found


def _quiet() -> dict[str, str]:
    """The environment of a measured process."""
    return {**os.environ, "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}


def _failed(name: str, command: Sequence[str], status: int, said: str, remedy: str = OF_MEMORY) -> UserError:
    return UserError(
        f"{name} failed",
        code="bench-peer-failed",
        where=f"{' '.join(command[:-1])}, exit status {status}",
        found="\n".join(said.strip().splitlines()[-8:]),
        remedy=remedy,
        exit_status=5,
    )


def _figures(raw: dict[str, Any]) -> Figures:
    steps = [Spent(**step) for step in raw["steps"]]
    return Figures(**{**raw, "steps": steps, "reference": Spent(**raw["reference"]) if raw["reference"] else None})


def check_equal(rounds: Sequence[Round], peers: Sequence[Program], tolerance: float) -> dict[str, Any]:
    """Largest relative difference of a step's loss and gradient norm between dpoeng and each peer."""
    losses, norms = {}, {}
    for peer in peers:
        pairs = [(done[peer]["dpoeng"], done[peer][peer]) for done in rounds]
        losses[peer] = max(relative(ours.losses, theirs.losses) for ours, theirs in pairs)
        norms[peer] = max(relative(ours.grad_norms, theirs.grad_norms) for ours, theirs in pairs)
    return {
        "ok": all(difference <= tolerance for difference in losses.values()),
        "tolerance": tolerance,
        "loss": losses,
        "grad_norm": norms,
    }


def relative(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Largest |difference| over the peer's value; infinite if lengths differ, there are no values, or one is NaN."""
    if len(ours) != len(theirs) or not ours:
        return sys.float_info.max
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        difference = abs(a - b) / max(abs(b), 1e-12)
        if not difference <= worst:
            worst = difference if difference == difference else sys.float_info.max
    return worst


def ratios(rounds: Sequence[Round], peer: Program) -> dict[str, Ratio]:
    """Ratios peer / dpoeng of all figures that both have. A step's time is the mean over all steps but the first."""
    found: dict[str, list[float]] = {}
    for beside in rounds:
        done = beside[peer]
        ours, theirs, our_pass = done["dpoeng"], done[peer], done.get("dpoeng reference", Figures())
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


def tensor_bytes(runs: Mapping[Program, Figures], program: Program) -> dict[str, float]:
    """Peaks of a program's tensors; empty if they were not counted."""
    run = runs.get(program, Figures())
    peaks = {"train_tensor_bytes": run.train_peak_bytes, "reference_tensor_bytes": run.reference_peak_bytes}
    return {name: float(peak) for name, peak in peaks.items() if peak}


def tensor_ratios(runs: Mapping[Program, Figures], peer: Program) -> dict[str, Ratio]:
    """Ratios peer / dpoeng of the bytes of tensors, which are the same each time."""
    ours = tensor_bytes(runs, "dpoeng") | tensor_bytes(runs, "dpoeng reference")
    shares = {name: peak / ours[name] for name, peak in tensor_bytes(runs, peer).items()}
    return {name: Ratio(share, share, share) for name, share in shares.items()}


def step_time(steps: Sequence[Spent]) -> Spent:
    """Mean time of a step, without the first one."""
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


def _plain(ratios_of: Mapping[str, Ratio]) -> dict[str, dict[str, float]]:
    return {name: asdict(ratio) for name, ratio in ratios_of.items()}
