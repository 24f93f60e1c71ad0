"""Successive halving: who trains on, by hand; a run that does is that of `dpoeng train`; kills change nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from dpoeng_testing import pair_rows, tree, write_jsonl

from dpoeng.cache.errors import UserError
from dpoeng.cli.main import main
from dpoeng.engine.config.fields import PrecomputeConfig, SweepConfig, TrainConfig
from dpoeng.engine.recipes.precompute import precompute_reference
from dpoeng.engine.recipes.sweeps.halving import (
    Promotion,
    Standing,
    ended_early,
    next_job,
    promote,
    read_promotions,
    rung_count,
    rung_steps,
    write_promotions,
)
from dpoeng.engine.recipes.sweeps.plan import SweepPlan, plan_sweep
from dpoeng.engine.recipes.sweeps.ranking import scores_at
from dpoeng.engine.recipes.sweeps.run import run_sweep
from dpoeng.engine.recipes.train import train
from dpoeng.engine.training import step as step_module

RANKED = "logps/chosen"


def at(*scores: Sequence[float], **more: Any) -> list[Standing]:
    """Runs a, b, c, ... with their scores at the rungs that they have reached."""
    return [Standing(chr(97 + i), [(score,) for score in own], **more) for i, own in enumerate(scores)]


# --------------------------------------------------------------------------- by hand


def test_ten_runs_for_the_price_of_three() -> None:
    """10 at 1/9, 3 from there to 1/3, 1 to the end: 10/9 + 3 * 2/9 + 2/3 = 2.44 whole runs."""
    assert rung_count(10, 3) == 3
    assert rung_steps(90, 3, 3) == [10, 30, 90]
    assert rung_steps(91, 3, 3) == [11, 31, 91]
    assert rung_steps(90, 3, 3, every=25) == [25, 50, 90]
    assert [rung_count(runs, 2) for runs in (2, 3, 4, 7, 8)] == [2, 2, 3, 3, 4]
    with pytest.raises(UserError, match="at least 3 runs"):
        rung_count(2, 3)
    names = [chr(97 + i) for i in range(10)]
    value = {name: float(i * 7 % 10) for i, name in enumerate(names)}
    reached = dict.fromkeys(names, -1)
    promotions: list[Promotion] = []
    done: list[tuple[str, int]] = []
    while True:
        standings = [Standing(name, [(value[name],)] * (reached[name] + 1)) for name in names]
        job = next_job(standings, promotions, 3, done)
        if job is None:
            new = promote(standings, promotions, 3, 3)
            if not new:
                break
            promotions += new
            continue
        reached[job[0]] = job[1]
        done.append(job)
    best = sorted(names, key=lambda name: -value[name])
    assert [promotion.run for promotion in promotions] == [*best[:3], best[0]]
    assert [len([d for d in done if d[1] == rung]) for rung in range(3)] == [10, 3, 1]
    assert ended_early(standings, promotions, 3) == {**dict.fromkeys(best[3:], 0), best[1]: 1, best[2]: 1}


def test_equal_scores_keep_their_order_and_the_second_number_decides() -> None:
    assert [p.run for p in promote(at([1.0], [1.0], [0.0], [1.0]), [], 2, 2)] == ["a", "b"]
    standings = [Standing("a", [(1.0, 0.1)]), Standing("b", [(1.0, 0.3)])]
    assert [p.run for p in promote(standings, [], 2, 2)] == ["b"]


def test_a_process_that_would_wait_promotes_from_those_that_are_there() -> None:
    """4 of 6 are there and two are busy: one in two of the 4 continues, and no more; the rest when all are there."""
    busy = [Standing("e", [], busy=True), Standing("f", [], busy=True)]
    there = at([3.0], [1.0], [2.0], [0.0])
    first = promote([*there, *busy], [], 2, 2)
    assert [(p.run, p.among) for p in first] == [("a", 4), ("c", 4)]
    promoted = [*there[:1], *there[1:], *busy]
    assert promote(promoted, first, 2, 2) == []
    late = [*there, Standing("e", [(9.0,)]), Standing("f", [(-1.0,)])]
    assert [p.run for p in promote(late, first, 2, 2)] == ["e"]  # the best 3 are e, a, c
    assert promote(at([1.0]), [], 2, 2)[0].run == "a"  # never none
    assert promote([*at([1.0]), *busy], [], 2, 2) == []


def test_failed_runs_have_no_place_and_busy_ones_are_not_taken() -> None:
    standings = [Standing("a", [(1.0,)]), Standing("b", [], failed=True), Standing("c", [], busy=True)]
    assert next_job(standings, [], 2, [("a", 0)]) is None
    assert next_job(standings, [], 2, []) == ("a", 0)  # opened once, even if its score exists
    assert promote([*at([1.0], [2.0]), Standing("c", [], failed=True)], [], 2, 2)[0] == Promotion("b", 1, (2.0,), 2)


def test_what_a_run_is_compared_by(tmp_path: Path) -> None:
    """The first evaluation at a rung or after it; the last one of a run that ended before; the margin breaks ties."""
    lines = [
        {"step": step, "metrics": {"rewards/accuracies": value, "rewards/margins": 0.6, "loss": 1 - value},
         "intervals": {"rewards/margins": [0.5, 0.8]}}
        for step, value in ((0, 0.0), (2, 0.5), (4, 0.7))
    ]  # fmt: skip
    (tmp_path / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tie = pytest.approx(2.0)
    assert scores_at(tmp_path, [1, 3, 6], "rewards/accuracies") == [(0.5, tie), (0.7, tie)]
    assert scores_at(tmp_path, [1, 6, 9], "rewards/accuracies", ended=True) == [(0.5, tie), (0.7, tie), (0.7, tie)]
    assert scores_at(tmp_path, [1], "loss") == [(-0.5, tie)]  # less of it is better
    assert scores_at(tmp_path, [1], "rewards/accuracies_length_controlled")[0] < (-1e300, 0.0)  # without it: the worst
    assert scores_at(tmp_path / "nowhere", [1], "loss", ended=True) == []


def test_decisions_of_another_ladder_are_refused(tmp_path: Path) -> None:
    ladder: dict[str, object] = {"runs": ["a", "b"], "halving_factor": 2, "rank_by": "x"}
    assert read_promotions(tmp_path, ladder) == []
    decided = [Promotion("a", 1, (0.5, 0.25), 2)]
    write_promotions(tmp_path, ladder, decided)
    assert read_promotions(tmp_path, ladder) == decided
    with pytest.raises(UserError, match="halving_factor = 2"):
        read_promotions(tmp_path, {**ladder, "halving_factor": 3})
    right = {"run": "a", "rung": 1, "score": [0.5], "among": 2}
    edits: list[dict[str, Any]] = [{"run": "../x"}, {"run": 1}, {"rung": "x"}, {"rung": 0}, {"score": 7}, {"among": []}]
    for edit in edits:
        (tmp_path / "promotions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (ladder, right | edit)))
        with pytest.raises(UserError, match=r"promotions.jsonl:2"):
            read_promotions(tmp_path, ladder)


# --------------------------------------------------------------------------- with training


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    root = tmp_path_factory.mktemp("halving")
    file = write_jsonl(root / "pairs.jsonl", pair_rows(16))
    precompute_reference(PrecomputeConfig(pairs=(file,), model=str(tiny_model), cache=root / "cache"))
    return root / "cache"


def planned(cache: Path, out: Path, rates: Sequence[float] = (1e-5, 1e-3, 1e-4, 3e-3), **options: Any) -> SweepPlan:
    given = {
        "cache": cache, "output_dir": out, "max_steps": 4, "save_steps": 1, "eval_share": 0.3, "lora_r": 4,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "lora_dropout": 0.1, "parity_pairs": 2,
        **options,
    }  # fmt: skip
    sweep = {"vary": {"learning_rate": list(rates)}, "halving_factor": 2, "rank_by": RANKED}
    return plan_sweep(SweepConfig.model_validate(sweep), given)


def test_the_best_run_continues_equals_a_run_alone_and_kills_change_nothing(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(cache, tmp_path / "whole")
    assert list(plan.points[0].rungs) == [1, 2, 4]
    steps: list[tuple[float, int]] = []
    real = step_module.train_step
    stop_after: list[int] = []

    def counted(run: Any, step: int) -> Any:
        if len(steps) in stop_after:
            stop_after.clear()
            raise KeyboardInterrupt
        steps.append((run.config.learning_rate, step))
        return real(run, step)

    monkeypatch.setattr("dpoeng.engine.training.loop.train_step", counted)
    results = run_sweep(plan)
    assert len(steps) == 4 + 2 + 2  # of 16
    assert [result.state for result in results] == ["complete", "ended early", "ended early", "ended early"]
    assert [result.step for result in results] == [4, 2, 1, 1]
    first = {point.name: json.loads((point.config.output_dir / "evaluations.jsonl").read_text().splitlines()[1])
             for point in plan.points}  # fmt: skip
    by_hand = sorted(first, key=lambda name: -first[name]["metrics"][RANKED])
    assert {result.name for result in results[:2]} == set(by_hand[:2])
    best = next(point for point in plan.points if point.name == results[0].name)
    alone = tmp_path / "alone"
    train(best.config.model_copy(update={"output_dir": alone}))
    assert tree(best.config.output_dir, "adapter") == tree(alone, "adapter")
    record = json.loads((plan.root / "sweep.json").read_text())
    assert record["halving_factor"] == 2
    assert "3 runs ended early" in record["verdict"]

    for kill in (2, 6):
        cut = planned(cache, tmp_path / f"cut {kill}")
        steps.clear()
        stop_after[:] = [kill]
        with pytest.raises(KeyboardInterrupt):
            run_sweep(cut)
        run_sweep(cut)
        assert (cut.root / "promotions.jsonl").read_bytes() == (plan.root / "promotions.jsonl").read_bytes()
        assert tree(cut.root / best.name, "adapter") == tree(alone, "adapter")
    steps.clear()
    again = run_sweep(plan)
    assert not steps
    assert [result.name for result in again] == [result.name for result in results]
    with pytest.raises(UserError, match="resume-changed"):  # even a run that ended early is not taken for another
        run_sweep(planned(cache, tmp_path / "whole", lora_dropout=0.2))


def test_the_command_says_who_ended_early(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    command = (
        f"sweep --cache {cache} --output-dir {tmp_path / 'out'} --max-steps 2 --eval-share 0.3 --lora-r 4 "
        "--per-device-train-batch-size 2 --parity-pairs 2 --vary learning_rate=1e-4,1e-3 --halving-factor 2"
    )
    with pytest.raises(SystemExit) as stop:
        main(command.split())
    said = capsys.readouterr()
    assert stop.value.code == 0, said.err
    assert "ended early, after step 1" in said.out
    assert "1 run ended early" in said.out
    assert "to step 1 of 2" in said.err
    assert "ended early" in (tmp_path / "out" / "sweep.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("more", ["", " --halving-factor 2"])
def test_two_processes_share_a_sweep(cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], more: str) -> None:
    """Each takes runs that the other one does not train; what they leave is what one process leaves."""
    command = (
        f"sweep --cache {cache} --output-dir {tmp_path / 'out'} --max-steps 2 --eval-share 0.3 --lora-r 4 "
        "--per-device-train-batch-size 2 --parity-pairs 2 --vary learning_rate=1e-5,1e-4,1e-3 --devices cpu,cpu"
    )
    with pytest.raises(SystemExit) as stop:
        main((command + more).split())
    assert stop.value.code == 0
    # Where both take the same run at once, both say so, and one of them trains it.
    begun = {line for line in capfd.readouterr().err.splitlines() if line.startswith("cpu: run ")}
    assert len(begun) == (4 if more else 3), begun
    for log in (tmp_path / "out").glob("*/timings.jsonl"):
        steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
        assert steps == sorted(set(steps)), f"{log.parent.name} was trained twice"
    record = json.loads((tmp_path / "out" / "sweep.json").read_text())
    complete = [run for run in record["runs"] if run["state"] == "complete"]
    assert len(complete) == (1 if more else 3)
    config = json.loads((tmp_path / "out" / complete[0]["folder"] / "run.json").read_text())["config"]
    config["output_dir"] = str(tmp_path / "alone")
    train(TrainConfig.model_validate(config))
    assert tree(tmp_path / "alone", "adapter") == tree(tmp_path / "out" / complete[0]["folder"], "adapter")
