"""`dpoeng bench compare`: ratios by hand, planted faults that must be noticed, and (with TRL) the whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dpoeng_testing import save_tiny_model, write_jsonl

from dpoeng.bench.compare import (
    CompareSettings,
    Ratio,
    bench_compare,
    check_equal,
    check_peer,
    first_pairs,
    in_turns,
    longest_pairs,
    ratios,
    relative,
    run_process,
    step_time,
    tensor_bytes,
    tensor_ratios,
)
from dpoeng.bench.job import Figures, Job
from dpoeng.bench.measuring.measure import Spent
from dpoeng.bench.peers import main, run_job
from dpoeng.cache.errors import UserError
from dpoeng.cli.bench.tables import compare_tables

MIB = 2**20
PEER = "trl precomputed"


def figures(step_s: float, *, peak: int = 100, losses: tuple[float, ...] = (0.69, 0.68, 0.67)) -> Figures:
    """A run whose first step took ten times as long as the others."""
    return Figures(
        steps=[Spent(10 * step_s, 20 * step_s), Spent(step_s, 2 * step_s), Spent(step_s, 2 * step_s)],
        losses=list(losses),
        grad_norms=[1.0, 1.0, 1.0],
        train_peak_bytes=peak,
    )


def reference(seconds: float, *, pairs: int = 10, peak: int = 50) -> Figures:
    return Figures(reference=Spent(seconds, 2 * seconds), reference_pairs=pairs, reference_peak_bytes=peak)


def test_ratios_are_taken_within_a_repeat() -> None:
    rounds = []
    for slowness in (1.0, 3.0, 2.0):  # a machine that others use too: its ratios stay
        theirs = figures(4.0 * slowness, peak=500)
        theirs.reference, theirs.reference_pairs, theirs.reference_peak_bytes = Spent(6 * slowness, 6.0), 20, 100
        rounds.append({PEER: {"dpoeng": figures(slowness), "dpoeng reference": reference(slowness), PEER: theirs}})
    found = ratios(rounds, PEER)
    for name, expected in {
        "step_cpu_s": 4.0,
        "step_wall_s": 4.0,
        "train_peak_bytes": 5.0,
        "reference_wall_s": 3.0,
    }.items():
        assert (found[name].median, found[name].low, found[name].high) == pytest.approx((expected,) * 3), name
    assert found["reference_peak_bytes"].median == 2.0


def test_the_first_step_is_not_counted() -> None:
    assert step_time(figures(1.5).steps) == Spent(1.5, 3.0)


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ([0.69, 0.5], [0.69, 0.4], 0.25),
        ([0.69], [0.69], 0.0),
        ([0.69], [0.69, 0.68], 1e300),  # a step is missing
        ([], [], 1e300),
        ([float("nan")], [0.69], 1e300),
        ([0.69], [float("nan")], 1e300),
    ],
)
def test_relative_differences(ours: list[float], theirs: list[float], expected: float) -> None:
    found = relative(ours, theirs)
    assert found >= expected if expected > 1 else found == pytest.approx(expected)


def test_ratios_of_tensors_stand_beside_those_of_processes() -> None:
    peer = figures(1.0, peak=450)
    peer.reference_peak_bytes = 300
    counted = {"dpoeng": figures(1.0, peak=100), "dpoeng reference": reference(1.0, peak=20), PEER: peer}
    counted["trl adapter off"] = figures(1.0, peak=220)
    found = tensor_ratios(counted, PEER)
    assert found == {"train_tensor_bytes": Ratio(4.5, 4.5, 4.5), "reference_tensor_bytes": Ratio(15.0, 15.0, 15.0)}
    assert tensor_ratios(counted, "trl adapter off") == {"train_tensor_bytes": Ratio(2.2, 2.2, 2.2)}
    assert tensor_ratios({}, PEER) == tensor_bytes({}, PEER) == {}  # a GPU, whose peaks are of tensors as it is


def test_different_losses_give_no_speed() -> None:
    ours = {"dpoeng": figures(1.0), "dpoeng reference": reference(1.0)}
    for loss, ok in ((0.6801, True), (0.66, False)):
        rounds = [{PEER: {**ours, PEER: figures(2.0, losses=(0.69, loss, 0.67))}}]
        equality = check_equal(rounds, [PEER], 1e-3)
        assert equality["ok"] == ok
        record = {
            "settings": {"model": "m", "dtype": "float32", "batch_size": 4, "repeats": 1},
            "equality": equality,
            "medians": {"dpoeng": {"step_cpu_s": 1.0}, "dpoeng reference": {}, PEER: {"step_cpu_s": 2.0}},
            "ratios": {PEER: {name: asdict(ratio) for name, ratio in ratios(rounds, PEER).items()}},
            "device_kind": "CPU",
            "device": "cpu",
            "machine": {"processor": "", "cores": 1, "threads": 1, "load": 0.0},
            "versions": {"dpoeng": "", "torch": "", "transformers": ""},
            "commit": None,
        }
        assert ("2.00x" in printed(record)) == ok


def printed(record: dict[str, Any]) -> str:
    from rich.console import Console

    console = Console(width=120)
    with console.capture() as capture:
        for table in compare_tables(record):
            console.print(table)
    return capture.get()


# --------------------------------------------------------------------------- planted faults


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Job:
    """A model and responses large enough for scoring to be nearly all of the work."""
    folder = tmp_path_factory.mktemp("compare")
    model = save_tiny_model(folder / "model", tokenizer, hidden=128)
    words = " ".join(["tides", "bread", "rivers", "leaves"] * 16)
    rows = [{"prompt": f"Point {i}:", "chosen": f" {words} {i}", "rejected": f" {i} {words}"} for i in range(24)]
    return Job(
        program="dpoeng reference",
        model=str(model),
        pairs=(str(write_jsonl(folder / "pairs.jsonl", rows)),),
        cache=str(folder / "cache"),
        scratch=str(folder),
        batch_size=4,
        steps=3,
        dtype="float32",
        max_length=512,
        lora_r=4,
        learning_rate=1e-4,
        seed=3,
        threads=1,
        device="cpu",
    )


@pytest.fixture(scope="module")
def clean(job: Job) -> dict[str, Figures]:
    """Both phases as they are; the first run of each is a warm-up."""
    run_job(replace(job, cache=job.cache + "-warm"))
    return {"dpoeng reference": run_job(job), "dpoeng": run_job(replace(job, program="dpoeng"))}


def run_with(job: Job, change: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Figures:
    """Phase one with another `score_groups`, into a separate cache."""
    import dpoeng.engine.scoring.pairs as engine

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "score_groups", change(engine.score_groups))
        return run_job(replace(job, cache=f"{job.cache}-{change.__name__}"))


def test_a_run_has_all_its_figures(clean: dict[str, Figures], job: Job) -> None:
    ours, scored = clean["dpoeng"], clean["dpoeng reference"]
    assert len(ours.steps) == len(ours.losses) == len(ours.grad_norms) == job.steps
    assert ours.losses[0] == pytest.approx(0.693147, abs=1e-4)
    assert ours.train_peak_bytes > MIB
    assert scored.reference is not None
    assert scored.reference.cpu_s > 0
    assert (scored.reference_pairs, scored.reference_peak_bytes > MIB) == (24, True)


def test_the_bytes_of_tensors_are_the_same_each_time(clean: dict[str, Figures], job: Job, tmp_path: Path) -> None:
    longest = longest_pairs(job.cache, Path(job.pairs[0]), 8, tmp_path / "pairs.jsonl")
    counted = replace(job, pairs=(str(longest),), cache=str(tmp_path / "cache"), steps=2, tensors=True)
    runs = [
        {
            name: run_job(replace(counted, program=name, scratch=str(tmp_path)))
            for name in ("dpoeng reference", "dpoeng")
        }
        for _ in range(2)
    ]
    assert tensor_bytes(runs[0], "dpoeng reference") == tensor_bytes(runs[1], "dpoeng reference")
    assert tensor_bytes(runs[0], "dpoeng") == tensor_bytes(runs[1], "dpoeng")
    assert runs[0]["dpoeng"].memory_method == "allocator events"
    # The whole process needs more than its tensors, but in a run of so little not many times as much.
    assert MIB < runs[0]["dpoeng"].train_peak_bytes < 3 * clean["dpoeng"].train_peak_bytes


def test_the_longest_pairs_are_found(tmp_path: Path, tiny_model: Path, job: Job) -> None:
    words = "tides and bread and rivers and leaves"
    lines = [3, 9, 5, 7, 1]
    rows = [{"prompt": f"Point {i}:", "chosen": f" {words * n}", "rejected": " no"} for i, n in enumerate(lines)]
    file = write_jsonl(tmp_path / "all.jsonl", rows)
    scored = replace(job, pairs=(str(file),), model=str(tiny_model), cache=str(tmp_path / "c"), scratch=str(tmp_path))
    run_job(scored)
    found = longest_pairs(scored.cache, file, 3, tmp_path / "longest.jsonl")
    assert [json.loads(line)["prompt"] for line in found.read_text().splitlines()] == [
        "Point 1:",
        "Point 3:",
        "Point 2:",
    ]


@pytest.mark.slow  # tests/bench/test_checks.py plants slow-downs of half this size
def test_a_planted_slow_down_is_noticed(clean: dict[str, Figures], job: Job) -> None:
    """Scoring that does its work four times costs about 4, and the same scoring about 1.

    What others do on the machine only adds, so each is the least of three runs, taken in turn.
    """

    def once(score: Callable[..., Any]) -> Callable[..., Any]:
        return score

    def again(score: Callable[..., Any]) -> Callable[..., Any]:
        return score

    def four_times(score: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            for _ in range(3):
                score(*arguments)
            return score(*arguments)

        return run

    def spent(figures: Figures) -> float:
        assert figures.reference is not None
        return figures.reference.cpu_s

    runs = [[run_with(job, change) for change in (once, again, four_times)] for _ in range(3)]
    ours, same, slow = (min(found, key=spent) for found in zip(*runs, strict=True))

    def ratio(theirs: Figures) -> float:
        peer = replace_reference(clean["dpoeng"], theirs)
        return ratios([{PEER: {**clean, "dpoeng reference": ours, PEER: peer}}], PEER)["reference_cpu_s"].median

    assert 0.6 < ratio(same) < 1.6
    assert ratio(slow) > 1.8


def replace_reference(steps: Figures, scored: Figures) -> Figures:
    return replace(
        steps,
        reference=scored.reference,
        reference_pairs=scored.reference_pairs,
        reference_peak_bytes=scored.reference_peak_bytes,
    )


def test_a_planted_leak_is_noticed(clean: dict[str, Figures], job: Job) -> None:
    kept: list[torch.Tensor] = []

    def leaking(score: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            kept.append(torch.ones(48 * MIB // 4))
            return score(*arguments)

        return run

    scored = run_with(job, leaking)
    assert kept
    grown = scored.reference_peak_bytes - clean["dpoeng reference"].reference_peak_bytes
    assert grown > 0.8 * len(kept) * 48 * MIB


# --------------------------------------------------------------------------- processes


def test_a_missing_peer_is_reported(tmp_path: Path) -> None:
    without_trl = tmp_path / "python"
    without_trl.write_text("#!/bin/sh\necho \"ModuleNotFoundError: No module named 'trl'\" >&2\nexit 1\n")
    without_trl.chmod(0o755)
    with pytest.raises(UserError, match=r"TRL is not installed [\s\S]*No module named 'trl'") as caught:
        check_peer(str(without_trl))
    assert caught.value.code == "bench-no-peer"
    with pytest.raises(UserError, match="TRL is not installed"):
        check_peer(str(tmp_path / "no-such-python"))


def test_figures_come_back_from_a_process(
    clean: dict[str, Figures],
    job: Job,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "job.json"
    file.write_text(json.dumps(asdict(job)))
    monkeypatch.setattr("sys.argv", ["peers", str(file)])
    monkeypatch.setattr("dpoeng.bench.peers.run_job", lambda given: clean["dpoeng"] if given == job else None)
    main()
    (tmp_path / "said").write_text("some noise\n" + capsys.readouterr().out)
    for script, status in (
        (f"printf . >> {tmp_path}/runs; cat {tmp_path}/said", 0),
        ("echo the last words >&2; exit 9", 9),
    ):
        python = tmp_path / f"python{status}"
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
    assert run_process(str(tmp_path / "python0"), replace(job, scratch=str(tmp_path))) == clean["dpoeng"]
    # What was found is kept, and belongs to this job alone.
    assert run_process(str(tmp_path / "python0"), replace(job, scratch=str(tmp_path))) == clean["dpoeng"]
    assert len((tmp_path / "runs").read_text()) == 1
    with pytest.raises(UserError, match=r"exit status 9[\s\S]*the last words"):
        run_process(str(tmp_path / "python9"), replace(job, scratch=str(tmp_path)))


WORKER = """#!/bin/sh
# A program of this many turns, of so many pairs each: PROGRAM TURNS PAIRS STATUS
job=$3; name=$(sed 's/.*"program": "\\([^"]*\\)".*/\\1/' "$job")
log={log}
work() {{
  i=0
  while [ $i -lt $2 ]; do echo "$name $1" >> $log; i=$((i+1)); echo "turn $1 $((i*$3))"; read go || exit 3; done
}}
echo noise
case "$name" in
  "dpoeng reference") echo "turn 0 0"; read go; work 0 2 4 ;;
  dpoeng) echo "turn 1 0"; read go; work 1 2 4 ;;
  *) echo "turn 0 0"; read go; work 0 4 2; echo "turn 1 0"; read go; work 1 2 4; {end} ;;
esac
cat {said}
"""


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[list[Job], Job, str, Path]]:
    """Jobs, and a Python that is a script: it works in turns, and writes down when it does."""

    def make(job: Job, end: str = "true") -> tuple[list[Job], Job, str, Path]:
        log, said, python = tmp_path / "log", tmp_path / "said", tmp_path / "python"
        said.write_text("\n" + json.dumps(asdict(figures(1.0))) + "\n")
        python.write_text(WORKER.format(log=log, said=said, end=end))
        python.chmod(0o755)
        monkeypatch.setattr("sys.executable", str(python))
        jobs = []
        for program in ("dpoeng reference", "dpoeng", PEER):
            folder = tmp_path / program.replace(" ", "-")
            folder.mkdir()
            jobs.append(replace(job, program=program, scratch=str(folder)))
        return jobs[:2], jobs[2], str(python), log

    return make


def test_programs_take_turns(worker: Callable[..., tuple[list[Job], Job, str, Path]], job: Job) -> None:
    """The one that has done fewer pairs continues; the peer waits with its second phase for dpoeng's."""
    ours, theirs, python, log = worker(job)
    found = in_turns(ours, theirs, python)
    assert found == dict.fromkeys(("dpoeng reference", "dpoeng", PEER), figures(1.0))
    peer, reference = f"{PEER} 0", "dpoeng reference 0"
    assert log.read_text().splitlines() == [
        *(reference, peer, peer, reference, peer, peer),
        *("dpoeng 1", f"{PEER} 1", "dpoeng 1", f"{PEER} 1"),
    ]


def test_a_program_that_fails_is_named_and_leaves_no_other_behind(
    worker: Callable[..., tuple[list[Job], Job, str, Path]], job: Job
) -> None:
    ours, theirs, python, _ = worker(job, end="echo no memory >&2; exit 7")
    with pytest.raises(UserError, match=r"trl precomputed failed[\s\S]*exit status 7[\s\S]*no memory"):
        in_turns(ours, theirs, python)
    left = [cmd.read_bytes() for cmd in Path("/proc").glob("[0-9]*/cmdline") if cmd.exists()]
    assert not any(theirs.scratch.encode() in cmd or ours[1].scratch.encode() in cmd for cmd in left)


def test_the_first_pairs_of_plain_and_packed_files(tmp_path: Path) -> None:
    import gzip

    (tmp_path / "a.jsonl").write_text("1\n2\n3")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write("4\n5\n")
    found = first_pairs([tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"], 4, tmp_path / "out")
    assert found.read_text() == "1\n2\n3\n4\n"
    with pytest.raises(UserError, match="cannot read"):
        first_pairs([tmp_path / "missing.jsonl"], 4, tmp_path / "out")


@pytest.mark.peers
@pytest.mark.timeout(1200)
def test_trl_computes_the_same_losses(tiny_model: Path, pairs_file: Path) -> None:
    record = bench_compare(
        CompareSettings(model=str(tiny_model), pairs=(pairs_file,), pairs_count=24, steps=4, repeats=1, device="cpu")
    )
    assert record["equality"]["ok"], record["equality"]
    assert max(record["equality"]["grad_norm"].values()) < 1e-3
    assert record["ratios"].keys() == {"trl precomputed", "trl adapter off", "trl second model"}
    assert record["peer_versions"]["trl"] == "1.16.0"
    for found in record["ratios"].values():  # on a tiny model whole logits and padding cost TRL the more
        assert found["train_tensor_bytes"]["median"] > 1.2
    both = record["ratios"]["trl second model"]["train_tensor_bytes"]["median"]
    assert both > record["ratios"]["trl precomputed"]["train_tensor_bytes"]["median"]
    json.dumps(record, allow_nan=False)
