"""A run of twenty steps, continued from each of them, and killed at random; samples of the results."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from dpoeng_testing import pair_rows, tree, write_jsonl
from rank_processes import start

from dpoeng.cli.main import main
from dpoeng.engine.config.fields import PrecomputeConfig, TrainConfig
from dpoeng.engine.losses.names import LossSettings
from dpoeng.engine.recipes.compare import Generation, keep_samples
from dpoeng.engine.recipes.evaluate import Trained
from dpoeng.engine.recipes.precompute import precompute_reference
from dpoeng.engine.recipes.train import train
from dpoeng.engine.runtime.progress import QUIET
from dpoeng.engine.training import loop as loop_module

STEPS = 20
LAST = f"checkpoint-{STEPS:08d}"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    pairs = write_jsonl(folder / "pairs.jsonl", pair_rows(14))
    precompute_reference(PrecomputeConfig(pairs=(pairs,), model=str(tiny_model), cache=folder / "cache"))
    return folder / "cache"


def config(cache: Path, out: Path, **fields: Any) -> TrainConfig:
    """Twenty steps over three epochs, with all that a resume could get wrong: dropout, a schedule, momentum, state of
    losses that comes from earlier steps, draws among pairs, a best evaluation."""
    values: dict[str, Any] = {
        "max_steps": STEPS,
        "save_steps": 1,
        "save_total_limit": STEPS,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "cosine",
        "lora_r": 2,
        "lora_dropout": 0.1,
        "loss_type": ("beta_dpo", "bco_pair"),
        "beta_dpo_keep": 0.5,
        "bco_reward_shift": True,
        "eval_share": 0.1,
        "eval_steps": 10,
        "load_best_model_at_end": True,
        "parity_pairs": 2,
        **fields,
    }
    return TrainConfig(cache=cache, output_dir=out, **values)


def outcome(out: Path) -> dict[str, str]:
    names = ("metrics.jsonl", "evaluations.jsonl", "advice.json")
    return tree(out, "adapter", LAST) | {name: (out / name).read_text() for name in names}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """The run that was left alone, with the checkpoint of every step."""
    out = tmp_path_factory.mktemp("whole") / "out"
    train(config(cache, out))
    assert len(list(out.glob("checkpoint-*"))) == STEPS
    return out


def cut_back(whole: Path, out: Path, step: int) -> Path:
    """The folder of a run that was killed after `step` steps; what was logged later is still there."""
    later = [f"checkpoint-{n:08d}" for n in range(step + 1, STEPS + 1)]
    return Path(shutil.copytree(whole, out, ignore=shutil.ignore_patterns("adapter", "advice.json", *later)))


class Killed(BaseException):
    """Stands for SIGKILL."""


@pytest.mark.parametrize("step", range(1, STEPS - 1))
def test_the_step_after_any_checkpoint_leaves_the_same_bytes(
    tmp_path: Path, cache: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """From each step to the next: the same checkpoint, byte for byte, and so on to the end."""
    out, real, calls = cut_back(whole, tmp_path / "out", step), loop_module.train_step, 0

    def dying(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise Killed
        return real(*arguments)

    monkeypatch.setattr(loop_module, "train_step", dying)
    with pytest.raises(Killed):
        train(config(cache, out))
    name = f"checkpoint-{step + 1:08d}"
    assert tree(out, name) == tree(whole, name)
    for file in ("metrics.jsonl", "evaluations.jsonl"):
        lines = (whole / file).read_text().splitlines(keepends=True)
        assert (out / file).read_text() == "".join(line for line in lines if json.loads(line)["step"] <= step + 1)


@pytest.mark.parametrize("step", [4, 13, 19])
def test_a_run_continues_to_the_same_end(tmp_path: Path, cache: Path, whole: Path, step: int) -> None:
    out = cut_back(whole, tmp_path / "out", step)
    assert train(config(cache, out)).resumed_from == step
    assert outcome(out) == outcome(whole)


# --------------------------------------------------------------------------- killed at random

LINE = (
    "--max-steps 20 --save-steps 2 --per-device-train-batch-size 1 --gradient-accumulation-steps 2 --lora-r 2 "
    "--learning-rate 2e-3 --lora-dropout 0.1 --eval-share 0.1 --eval-steps 6 --load-best-model-at-end"
).split()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fifty_random_kills(tmp_path: Path, cache: Path) -> None:
    """SIGKILL at a random moment, and the same command again, until the run is done; then another, to fifty kills."""

    def command(out: Path) -> list[str]:
        return ["train", "--cache", str(cache), "--output-dir", str(out), *LINE]

    began = time.monotonic()
    (process,) = start([command(tmp_path / "whole")], tmp_path)
    assert process.end()[0] == 0
    seconds = time.monotonic() - began
    chance, kills, runs = random.Random(0), 0, 0
    while kills < 50:
        out = tmp_path / f"out{runs}"
        runs += 1
        killed_here = 0
        while True:
            (process,) = start([command(out)], tmp_path)
            # Never from the fifth kill of a run on, so that it also ends; the first seconds only load.
            if killed_here < 5 and kills < 50:
                process.process.join(chance.uniform(0, seconds))
                if process.process.exitcode is None:
                    os.kill(process.process.pid, signal.SIGKILL)
            status, _, err = process.end()
            if status == -signal.SIGKILL:
                kills, killed_here = kills + 1, killed_here + 1
                continue
            assert status == 0, err
            break
        assert tree(out, "adapter", LAST) == tree(tmp_path / "whole", "adapter", LAST)
        assert (out / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


def test_the_settings_of_the_loss_are_built_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = LossSettings.of, []
    monkeypatch.setattr(LossSettings, "of", lambda config: calls.append(config) or real(config))
    train(config(cache, tmp_path / "out", max_steps=3, eval_steps=1))
    assert len(calls) == 1


# --------------------------------------------------------------------------- samples


def test_compare_keeps_its_answers_for_the_report(tmp_path: Path, cache: Path, capsys: Any) -> None:
    """In the run's folder, with a word; the adapter that was saved answers, not that of the last step."""
    out = tmp_path / "out"
    fields: dict[str, Any] = {"eval_share": 0.4, "eval_steps": 2, "learning_rate": 2e-2, "save_steps": 7}
    fields |= {"max_steps": 4, "metric_for_best_model": "rewards/margins", "greater_is_better": False}
    summary = train(config(cache, out, gradient_checkpointing=True, **fields))
    assert (summary.best.step, summary.steps) == (2, 4)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["compare", str(out), "--count", "3", "--json"])
    assert stop.value.code == 0
    shown = capsys.readouterr()
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert samples == json.loads(shown.out)
    assert "samples.jsonl contains these answers" in " ".join(shown.err.split())
    assert len(samples) == len({sample["prompt"] for sample in samples}) == 3
    assert any(sample["before"] != sample["after"] for sample in samples)
    with pytest.raises(SystemExit) as stop:
        main(["report", str(out)])
    assert stop.value.code == 0
    page = (out / "report.html").read_text()
    assert "Samples" in page
    assert samples[0]["prompt"].splitlines()[0] in page


def test_prompts_come_from_the_view_that_is_evaluated(tmp_path: Path, tiny_model: Path, capsys: Any) -> None:
    """And from another view where one is named; an adapter that lies in no run's folder leaves nothing beside it."""
    for name, rows in (("a", pair_rows(12)[:8]), ("b", pair_rows(12)[8:])):
        file = write_jsonl(tmp_path / f"{name}.jsonl", rows)
        precompute_reference(PrecomputeConfig(pairs=(file,), model=str(tiny_model), cache=tmp_path / "cache"))
    out = tmp_path / "out"
    train(config(tmp_path / "cache", out, view="a", eval_view="b", max_steps=2))
    shutil.copytree(out / "adapter", tmp_path / "elsewhere" / "mine")
    prompts = list(dict.fromkeys(row["prompt"] for row in pair_rows(12)[8:]))
    for path, options, asked in (
        (out, ["--count", "9"], prompts),
        (out, ["--view", "b"], prompts[1:2]),  # a tenth of that view, and at least one prompt
        (
            tmp_path / "elsewhere" / "mine",
            ["--cache", str(tmp_path / "cache"), "--view", "b", "--prompt", "Hi"],
            ["Hi"],
        ),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(["compare", str(path), *options, "--max-new-tokens", "2", "--json"])
        assert stop.value.code == 0
        answers = json.loads(capsys.readouterr().out)
        assert [answer["prompt"] for answer in answers] == asked
    assert [json.loads(line)["prompt"] for line in (out / "samples.jsonl").read_text().splitlines()] == prompts[1:2]
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["mine"]


def test_answers_that_cannot_be_kept_are_shown_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").mkdir()
    trained = Trained(tmp_path / "adapter", run={}, mode="new")
    notes: list[str] = []
    keep_samples(trained, [Generation("a", "b", "c")], SimpleNamespace(note=notes.append, task=QUIET.task))
    assert len(notes) == 1
    assert "will not show" in notes[0]
    assert [path.name for path in tmp_path.iterdir()] == ["samples.jsonl"]
