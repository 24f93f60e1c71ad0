"""`dpoeng sweep`: each run is that of `dpoeng train` alone, kills and failures cost one run, the ranking is right."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from dpoeng_testing import pair_rows, save_tiny_model, tree, write_jsonl

from dpoeng.cache.errors import UserError
from dpoeng.cache.reader import View
from dpoeng.cli.main import main
from dpoeng.engine.config.fields import PrecomputeConfig, SweepConfig, TrainConfig
from dpoeng.engine.config.files import load_config
from dpoeng.engine.memory import fit
from dpoeng.engine.models.sources import find_model
from dpoeng.engine.recipes.precompute import precompute_reference
from dpoeng.engine.recipes.sweeps import run as sweep_module
from dpoeng.engine.recipes.sweeps.plan import SweepPlan, folder_name, plan_sweep
from dpoeng.engine.recipes.sweeps.ranking import compare_runs, verdict
from dpoeng.engine.recipes.sweeps.run import run_sweep
from dpoeng.engine.recipes.train import train
from dpoeng.engine.reference import loading as kept_base
from dpoeng.engine.reference.loading import KeptBase, over_same_weights
from dpoeng.engine.runtime.progress import QUIET
from dpoeng.engine.training import step as step_module

QUICK: dict[str, Any] = {
    "max_steps": 3,
    "save_steps": 1,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-3,
    "lora_dropout": 0.1,
    "lora_r": 4,
    "eval_share": 0.3,
    "eval_steps": 2,
}
# What a run leaves that may depend on when and where it was run.
LOGS = ("timings.jsonl", "run.json")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    root = tmp_path_factory.mktemp("sweep")
    for name, rows in (("pairs", pair_rows(24)), ("test", pair_rows(40)[26:])):
        file = write_jsonl(root / f"{name}.jsonl", rows)
        precompute_reference(PrecomputeConfig(pairs=(file,), model=str(tiny_model), cache=root / "cache"))
    return root / "cache"


def planned(cache: Path, out: Path, vary: dict[str, Any], **options: Any) -> SweepPlan:
    given = {"cache": cache, "view": "pairs", "output_dir": out, **QUICK, **options}
    return plan_sweep(SweepConfig.model_validate({"vary": vary}), given)


def left_by(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in tree(folder).items() if name not in LOGS}


# --------------------------------------------------------------------------- each run alone


@pytest.mark.parametrize(
    ("reference", "vary", "options"),
    [
        # What one run could leave in the modules for the next: adapters of another rank, DoRA's and others' layers,
        # checkpointing, the layout of attention, hooks.
        ({}, {"loss_type": ["sigmoid", "ipo"]}, {}),
        ({}, {"use_dora": [True, False], "layout": ["separate", "shared"]}, {"gradient_checkpointing": True}),
        ({"adapter": True}, {"adapter_mode": ["stack", "continue"], "beta": [0.2]}, {}),
        # bitsandbytes' layers keep their own state besides the weights.
        pytest.param(
            {"quantization": "8bit", "hidden": 64},
            {"beta": [0.1, 0.3]},
            {"gradient_checkpointing": True},
            marks=pytest.mark.slow,
        ),
        pytest.param({"quantization": "4bit", "hidden": 64}, {"beta": [0.1, 0.3]}, {}, marks=pytest.mark.slow),
    ],
    ids=["losses", "modules", "sft adapter", "8bit", "4bit"],
)
def test_each_run_leaves_the_bytes_of_a_run_alone(
    tmp_path: Path, tokenizer: Any, sft_adapter: Path, tiny_model: Path, reference: dict[str, Any],
    vary: dict[str, Any], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    made = dict(reference)
    model = save_tiny_model(tmp_path / "m", tokenizer, hidden=made.pop("hidden")) if "hidden" in made else tiny_model
    if made.pop("adapter", False):
        made["adapter"], options = str(sft_adapter), {**options, "lora_dropout": 0.0}
        options["lora_r"] = None
    file = write_jsonl(tmp_path / "pairs.jsonl", pair_rows(12))
    cache = tmp_path / "cache"
    precompute_reference(PrecomputeConfig(pairs=(file,), model=str(model), cache=cache, **made))
    given = {"cache": cache, "output_dir": tmp_path / "sweep", **QUICK, **options}
    given = {name: value for name, value in given.items() if value is not None}
    loads = []
    real = kept_base.load_policy_base
    monkeypatch.setattr(kept_base, "load_policy_base", lambda *a, **k: loads.append(1) or real(*a, **k))
    plan = plan_sweep(SweepConfig.model_validate({"vary": vary}), given)
    results = run_sweep(plan)
    assert [result.state for result in results] == ["complete"] * len(plan.points)
    assert len(loads) == 1
    for point in plan.points:
        alone = tmp_path / "alone" / point.name
        train(point.config.model_copy(update={"output_dir": alone}))
        assert left_by(point.config.output_dir) == left_by(alone), point.name
    adapters = {tree(point.config.output_dir, "adapter")["adapter/adapter_model.safetensors"] for point in plan.points}
    assert len(adapters) == len(plan.points), "the settings make no difference, so nothing was shown"


def test_losses_of_the_users_are_looked_at_before_the_first_run(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def mine(x):\n    return -(x.chosen_logps - x.rejected_logps)\n\n\ndef wrong(x):\n    return mine(x).mean()\n"
    )
    vary = {"loss_type": ["sigmoid", f"{tmp_path}/mine.py:mine"]}
    results = run_sweep(planned(cache, tmp_path / "sweep", vary))
    assert [result.state for result in results] == ["complete"] * 2
    vary["loss_type"][1] = f"{tmp_path}/mine.py:wrong"
    with pytest.raises(UserError, match="one loss per pair"):
        planned(cache, tmp_path / "other", vary)
    assert not (tmp_path / "other").exists()


def test_another_base_is_loaded_and_the_old_one_released(cache: Path, tmp_path: Path) -> None:
    plan = planned(cache, tmp_path, {"dtype": ["float32", "bfloat16"]}, parity_tolerance=1.0)
    kept = KeptBase()
    for point in plan.points:
        train(point.config, kept_base=kept)
        alone = tmp_path / "alone" / point.name
        train(point.config.model_copy(update={"output_dir": alone}))
        assert left_by(point.config.output_dir) == left_by(alone)
        weights = sum(p.numel() for p in kept._lm.base.parameters())  # type: ignore[union-attr]
        assert kept.n_bytes == weights * (4 if point.values["dtype"] == "float32" else 2)
    kept.release()
    assert kept.n_bytes == 0


def test_ties_stay_ties_and_weights_are_shared() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    base = LlamaForCausalLM(config)
    copied: Any = over_same_weights(base)
    assert copied.lm_head.weight is copied.model.embed_tokens.weight
    assert copied.lm_head.weight is not base.lm_head.weight
    for (name, own), (_, other) in zip(copied.named_parameters(), base.named_parameters(), strict=True):
        assert own.data_ptr() == other.data_ptr(), name
    copied.model.layers[0].register_forward_hook(lambda *_: None)
    copied.config.use_cache = False
    assert not base.model.layers[0]._forward_hooks
    assert base.config.use_cache


def test_a_base_that_is_held_counts_as_room(
    cache: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = planned(cache, tmp_path, {"beta": [0.1]}).points[0]
    pairs = View.open(cache, "pairs")
    rows = [pairs[i].ids for i in range(4)]
    monkeypatch.setattr(fit, "_is_small", lambda *_: False)
    for room, held, fits in ((10_000, 0, False), (10_000, 10**9, True)):
        monkeypatch.setattr(fit, "available_bytes", lambda _, room=room: room)
        settings: dict[str, Any] = {"quantization": "none", "dtype": "float32", "held_bytes": held}
        source = find_model(str(tiny_model))
        if fits:
            assert fit.check_step(point.config, source, rows, torch.device("cpu"), **settings)
        else:
            with pytest.raises(UserError, match="memory-short"):
                fit.check_step(point.config, source, rows, torch.device("cpu"), **settings)


# --------------------------------------------------------------------------- kills and failures


class Killed(BaseException):
    """As SIGTERM or Ctrl-C: nothing in the engine may catch it."""


def test_killed_and_started_again(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vary = {"beta": [0.1, 0.2, 0.3]}
    whole = planned(cache, tmp_path / "whole", vary)
    run_sweep(whole)
    plan = planned(cache, tmp_path / "cut", vary)
    steps = []
    real = step_module.train_step

    def stops(run: Any, step: int) -> Any:
        steps.append((run.config.beta, step))
        if steps == [*((0.1, s) for s in range(3)), (0.2, 0), (0.2, 1)]:
            raise Killed
        return real(run, step)

    monkeypatch.setattr("dpoeng.engine.training.loop.train_step", stops)
    with pytest.raises(Killed):
        run_sweep(plan)
    states = {run["name"]: run["state"] for run in json.loads((plan.root / "sweep.json").read_text())["runs"]}
    assert states == {"beta=0.1": "complete", "beta=0.2": "stopped", "beta=0.3": "stopped"}
    run_sweep(plan)
    # The second run continues from the checkpoint after its first step; the first is not started again.
    assert steps[5:] == [(0.2, 1), (0.2, 2), (0.3, 0), (0.3, 1), (0.3, 2)]
    for point, other in zip(plan.points, whole.points, strict=True):
        assert left_by(point.config.output_dir) == left_by(other.config.output_dir)
    assert (plan.root / "sweep.json").read_bytes() == (whole.root / "sweep.json").read_bytes()


def test_a_run_that_fails_does_not_end_the_others(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = step_module.train_step
    broken = True

    def fails(run: Any, step: int) -> Any:
        if broken and run.config.beta == 0.2 and step == 1:
            raise RuntimeError("a kernel that was not expected")
        return real(run, step)

    monkeypatch.setattr("dpoeng.engine.training.loop.train_step", fails)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    options = [f"--{name.replace('_', '-')}={value}" for name, value in QUICK.items()]
    command = ["sweep", "--cache", str(cache), "--view", "pairs", "--vary", "beta=0.1,0.2,0.3", *options]
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 5
    said = capsys.readouterr()
    assert "[sweep-failed]" in said.err
    assert "beta=0.2: RuntimeError: a kernel that was not expected" in said.err
    assert "2 of 3" not in said.out
    record = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert sorted(run["state"] for run in record["runs"]) == ["complete", "complete", "failed"]
    assert "Traceback" in (tmp_path / "sweep" / "beta=0.2" / "error.txt").read_text()
    assert "a kernel that was not expected" in (tmp_path / "sweep" / "sweep.html").read_text()
    broken = False
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 0
    assert not (tmp_path / "sweep" / "beta=0.2" / "error.txt").exists()
    record = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [run["state"] for run in record["runs"]] == ["complete"] * 3
    assert record["runs"][0]["name"] in record["verdict"]
    assert "pairs are too few" in record["verdict"]


def test_other_settings_over_finished_runs_end_it(cache: Path, tmp_path: Path) -> None:
    run_sweep(planned(cache, tmp_path, {"beta": [0.1, 0.2]}))
    with pytest.raises(UserError, match="resume-changed"):
        run_sweep(planned(cache, tmp_path, {"beta": [0.1, 0.2]}, learning_rate=5e-4))


def test_how_long_the_others_will_take(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clock and training are stood in for: 4 pairs a step in 10 s a step; the second run has twice the steps."""
    now = [0.0]
    monkeypatch.setattr(sweep_module.time, "perf_counter", lambda: now[0])

    def trains(config: TrainConfig, *_: Any, **__: Any) -> Any:
        now[0] += 10.0 * config.max_steps
        return SimpleNamespace(
            already_complete=False, steps=config.max_steps, resumed_from=0, planned_steps=config.max_steps
        )

    monkeypatch.setattr(sweep_module, "train", trains)
    notes: list[str] = []
    progress = SimpleNamespace(note=notes.append, task=QUIET.task)
    run_sweep(planned(cache, tmp_path, {"max_steps": [3, 6, 12]}), progress)
    assert "2 runs left, about 3 min at this speed" in notes
    assert "1 run left, about 2 min at this speed" in notes


# --------------------------------------------------------------------------- the ranking


def fabricate(folder: Path, right: Sequence[float], margins: Sequence[float], prompts: Sequence[str]) -> Path:
    """The records of a complete run."""
    (folder / "adapter").mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    means = {"rewards/accuracies": float(np.mean(right)), "rewards/margins": float(np.mean(margins))}
    evaluation = {"step": 4, "metrics": means, "intervals": {"rewards/accuracies": [0.1, 0.9]}}
    (folder / "evaluations.jsonl").write_text(
        json.dumps(evaluation) + "\n" + json.dumps({"step": 6, "metrics": {}, "intervals": {}}) + "\n"
    )
    lines = [
        {"step": 4, "source": f"row {i}", "prompt": prompt, "rewards/accuracies": a, "rewards/margins": m,
         "chosen_tokens": 5 + i % 2, "rejected_tokens": 5}
        for i, (a, m, prompt) in enumerate(zip(right, margins, prompts, strict=True))
    ]  # fmt: skip
    (folder / "held_out.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_differences_are_taken_pair_by_pair(tmp_path: Path) -> None:
    """Pairs of very different difficulty and runs that differ by a little on each: only pair by pair can it be seen."""
    random = np.random.default_rng(3)
    n = 400
    difficulty = random.normal(0, 10, n)
    prompts = [str(i) for i in range(n)]
    noise = random.normal(0, 0.5, (3, n))
    margins = [difficulty + shift + noise[k] for k, shift in enumerate((0.0, 0.3, 0.28))]
    runs = []
    for k, values in enumerate(margins):
        folder = fabricate(tmp_path / str(k), [float(v > 0) for v in values], list(values), prompts)
        runs.append((f"lr={k}", {"learning_rate": str(k)}, folder))
    runs.append(("lr=9", {"learning_rate": "9"}, tmp_path / "nowhere"))
    ranked = compare_runs(runs, "rewards/margins", {"lr=9": "it broke"})
    assert [result.name for result in ranked] == ["lr=1", "lr=2", "lr=0", "lr=9"]
    assert ranked[0].difference is None
    worst = ranked[2]
    off = margins[0] - margins[1]
    assert worst.difference == pytest.approx(off.mean())
    # The interval of a mean of n independent numbers, by the normal distribution.
    half = 1.96 * off.std() / math.sqrt(n)
    assert worst.difference_interval == pytest.approx((off.mean() - half, off.mean() + half), abs=0.1 * half)
    assert worst.differs
    assert not ranked[1].differs
    assert abs(off.mean()) < 1.96 * difficulty.std() / math.sqrt(n), "two intervals side by side would overlap"
    assert (ranked[3].state, ranked[3].error) == ("failed", "it broke")
    said = verdict(ranked)
    assert said.startswith("lr=1 has the best value and differs from 1 of 2 others by more than the noise of 400")
    assert said.endswith("No difference found from lr=2.")
    same = verdict([ranked[0], ranked[1]])
    assert same == "No difference found: no run differs from lr=1 by more than the noise of 400 held-out pairs."


def test_pairs_of_one_prompt_are_drawn_together(tmp_path: Path) -> None:
    """Ten copies of a pair tell no more than one."""
    random = np.random.default_rng(4)
    shift = random.normal(0.3, 1, 40)
    widths = []
    for copies in (1, 10):
        prompts = [str(i) for i in range(40)] * copies
        zero = fabricate(tmp_path / f"a{copies}", [1.0] * 40 * copies, [0.0] * 40 * copies, prompts)
        other = fabricate(tmp_path / f"b{copies}", [1.0] * 40 * copies, list(shift) * copies, prompts)
        ranked = compare_runs([("a", {}, zero), ("b", {}, other)], "rewards/margins", {})
        assert ranked[0].name == "b"
        low, high = ranked[1].difference_interval or (0, 0)
        widths.append(high - low)
    assert widths[1] == pytest.approx(widths[0])


def test_less_of_a_loss_is_better_and_length_can_be_taken_out(tmp_path: Path) -> None:
    # Pairs 0, 2, ... are of equal length here, 1, 3, ... longer: there is nothing shorter, so no controlled accuracy.
    one = fabricate(tmp_path / "a", [1.0, 0.0], [1.0, -1.0], ["p", "q"])
    ranked = compare_runs([("a", {}, one)], "rewards/accuracies_length_controlled", {})
    assert ranked[0].value is None
    assert verdict(ranked) == "No complete run has this metric."
    assert verdict([]) == "No run is complete."
    for name, loss in (("low", 0.1), ("high", 0.5)):
        folder = fabricate(tmp_path / name, [1.0, 0.0], [1.0, -1.0], ["p", "q"])
        text = (folder / "evaluations.jsonl").read_text().replace('"metrics": {', f'"metrics": {{"loss": {loss}, ', 1)
        (folder / "evaluations.jsonl").write_text(text)
    runs: list[Any] = [("high", {}, tmp_path / "high"), ("low", {}, tmp_path / "low")]
    assert [result.name for result in compare_runs(runs, "loss", {})] == ["low", "high"]


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("held_out.jsonl", lambda lines: []),
        ("held_out.jsonl", lambda lines: [{}]),
        ("held_out.jsonl", lambda lines: [lines[0] | {"rewards/margins": "x"}, lines[1]]),
        ("held_out.jsonl", lambda lines: [lines[0] | {"prompt": "other"}, lines[1]]),
        ("held_out.jsonl", lambda lines: [line | {"step": 5} for line in lines]),
        ("evaluations.jsonl", lambda lines: [{"step": 4}]),
        ("evaluations.jsonl", lambda lines: [lines[0] | {"metrics": [1]}]),
        ("evaluations.jsonl", lambda lines: [lines[0] | {"metrics": {"rewards/margins": "x"}}]),
        ("evaluations.jsonl", lambda lines: [lines[0] | {"intervals": {"rewards/margins": 3}}]),
        ("evaluations.jsonl", lambda lines: [lines[0] | {"groups": {"topic": 3}}]),
        ("evaluations.jsonl", lambda lines: [lines[0] | {"pairs": "3"}]),
    ],
)
def test_edited_records_are_named(name: str, edit: Any, tmp_path: Path) -> None:
    runs: list[Any] = [
        (run, {}, fabricate(tmp_path / run, [1.0, 0.0], [at, -1.0], ["p", "q"])) for run, at in (("a", 1.0), ("b", 0.5))
    ]
    assert [result.name for result in compare_runs(runs, "rewards/margins", {})] == ["a", "b"]
    file = tmp_path / "b" / name
    lines = edit([json.loads(line) for line in file.read_text().splitlines()])
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match="run-damaged") as caught:
        compare_runs(runs, "rewards/margins", {})
    assert str(tmp_path / "b") in str(caught.value.where)


def test_the_values_of_each_pair_are_those_of_the_saved_adapter(cache: Path, tmp_path: Path) -> None:
    """`held_out.jsonl` against the evaluation, and with the best model against the best evaluation."""
    for best in (False, True):
        out = tmp_path / str(best)
        extra = {"load_best_model_at_end": True, "greater_is_better": True} if best else {}
        summary = train(TrainConfig(cache=cache, view="pairs", output_dir=out, **{**QUICK, "eval_steps": 1, **extra}))
        lines = [json.loads(line) for line in (out / "held_out.jsonl").read_text().splitlines()]
        step = summary.best.step if best else 3
        found = {line["step"]: line for line in map(json.loads, (out / "evaluations.jsonl").read_text().splitlines())}
        assert {line["step"] for line in lines} == {step}
        assert len(lines) == summary.eval_pairs
        for name, mean in found[step]["metrics"].items():
            if "length" not in name:
                assert np.mean([line[name] for line in lines]) == pytest.approx(mean, rel=1e-12), name
        assert all("pairs.jsonl, row " in line["source"] for line in lines)
    assert step < 3, "the loss falls, so that the one of the highest is an early one"


# --------------------------------------------------------------------------- the plan


def test_a_file_and_options_say_the_same(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("dpoeng.yaml").write_text(
        f"cache: {cache}\nview: pairs\nlearning_rate: 3e-5\nld_alpha: 0.5\nlora_r: 8\n"
        "vary:\n  beta: [0.05, 1e-1]\n  loss_type: [sigmoid, [sigmoid, sft]]\n  ld_alpha: [null, 0.25]\n"
    )
    in_file = plan_sweep(load_config(SweepConfig, {}), {})
    words = {"beta": "0.05,0.10", "loss_type": "sigmoid,sigmoid+sft", "ld-alpha": "none,0.25"}
    given = {"cache": cache, "view": "pairs", "learning_rate": 3e-5, "lora_r": 8}
    Path("dpoeng.yaml").unlink()
    by_option = plan_sweep(load_config(SweepConfig, {"vary": words}), given)
    assert in_file.points == by_option.points
    assert [point.name for point in in_file.points][:3] == [
        "beta=0.05,loss_type=sigmoid,ld_alpha=none",
        "beta=0.05,loss_type=sigmoid,ld_alpha=0.25",
        "beta=0.05,loss_type=sigmoid+sft,ld_alpha=none",
    ]
    assert {point.config.loss_type for point in in_file.points} == {("sigmoid",), ("sigmoid", "sft")}
    assert {point.config.ld_alpha for point in in_file.points} == {None, 0.25}
    assert all(point.config.lora_r == 8 and point.config.learning_rate == 3e-5 for point in in_file.points)
    assert {point.config.output_dir.parent for point in in_file.points} == {Path("sweep")}


def test_all_mistakes_of_all_combinations_in_one_message(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        planned(cache, tmp_path, {"beta": [0.1, -1], "lora_r": [8, 0], "optim": ["adamw_torch", "adamw_torch_fused"]})
    error, mend = caught.value, "correct the value; --help explains each field"
    assert error.code == "sweep-combinations"
    assert error.message == "6 of 8 combinations cannot be trained"
    assert [line.strip() for line in (error.found or "").splitlines()] == [
        f"--lora-r lora_r: must be at least 1; {mend}; in beta=0.1,lora_r=0,optim=adamw_torch and 3 more",
        f"--beta beta: must be greater than 0.0; {mend}; in beta=-1,lora_r=8,optim=adamw_torch and 3 more",
    ]
    assert not tmp_path.joinpath("sweep.json").exists()
    with pytest.raises(UserError) as caught:  # an error in all of them is reported as by train
        planned(cache, tmp_path, {"beta": [0.1, 0.2]}, view="nowhere")
    assert caught.value.code == "cache-no-view"


@pytest.mark.parametrize(
    ("vary", "options", "code", "said"),
    [
        ({"seed": [1, 2]}, {}, "sweep-held-out", "seed=2"),
        ({"eval_share": [0.2, 0.3]}, {}, "sweep-held-out", "eval_share=0.3"),
        ({"beta": [0.1, 0.2]}, {"eval_share": 0.0}, "sweep-held-out", "eval_share 0"),
        ({"beta": [0.1, 0.1]}, {}, "config-value", "2 different values"),
        ({"beta": []}, {}, "config-value", "at least one value"),
        ({"output_dir": ["a", "b"]}, {}, "config-value", "a field that changes the training"),
        ({"bta": [1]}, {}, "config-unknown", "beta"),
        ({"max_length": [1]}, {}, "config-unknown", "precompute-ref"),
        ({"beta": [0.1]}, {"resume": True}, "config-value", "--no-resume"),
        ({}, {}, "config-missing", "--vary beta="),
        ({"beta": [i / 100 for i in range(1, 14)], "lora_r": [1, 2, 3, 4, 5]}, {}, "sweep-runs", "--max-runs 65"),
        ({"ld_alpha": [0.5, 0.7], "adapter_mode": ["stack"]}, {}, "adapter-mode", "no SFT adapter"),
    ],
)
def test_what_cannot_be_swept(
    cache: Path, tmp_path: Path, vary: dict[str, Any], options: dict[str, Any], code: str, said: str
) -> None:
    with pytest.raises(UserError) as caught:
        planned(cache, tmp_path, vary, **options)
    assert caught.value.code == code
    assert said in caught.value.text()


def test_seeds_can_be_swept_over_pairs_that_all_hold_out(cache: Path, tmp_path: Path) -> None:
    plan = planned(cache, tmp_path, {"seed": [1, 2]}, eval_view="test")
    assert [point.config.seed for point in plan.points] == [1, 2]


@pytest.mark.parametrize(
    ("rank_by", "vary", "fits"),
    [
        ("rewards/accuracies", {"beta": [0.1, 0.2]}, True),
        ("eval_rewards/accuracies_length_controlled", {"loss_type": ["ipo", "sigmoid"]}, True),
        ("loss", {"learning_rate": [1e-4, 1e-3]}, True),
        ("rewards/margins", {"beta": [0.1, 0.2]}, False),
        ("loss", {"loss_type": ["ipo", "sigmoid"]}, False),
        ("grad_norm", {"beta": [0.1, 0.2]}, False),
    ],
)
def test_a_metric_that_means_the_same_in_all_runs(
    cache: Path, tmp_path: Path, rank_by: str, vary: dict[str, Any], fits: bool
) -> None:
    sweep = SweepConfig.model_validate({"vary": vary, "rank_by": rank_by})
    given = {"cache": cache, "view": "pairs", "output_dir": tmp_path}
    if fits:
        assert plan_sweep(sweep, given).points
    else:
        with pytest.raises(UserError, match="rank_by"):
            plan_sweep(sweep, given)


def test_names_that_a_file_system_takes() -> None:
    assert folder_name({"beta": "0.1", "loss_type": "sigmoid+sft"}) == "beta=0.1,loss_type=sigmoid+sft"
    odd = [folder_name({"model": model}) for model in ("../a/b", "..-a/b", "x" * 400)]
    assert len(set(odd)) == 3
    assert all("/" not in name and len(name) < 120 for name in odd)


def test_torchrun_is_refused(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="sweep-ranks"):
        run_sweep(planned(cache, tmp_path, {"beta": [0.1]}))


# --------------------------------------------------------------------------- what is shown


def test_table_and_page(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    options = [f"--{name.replace('_', '-')}={value}" for name, value in QUICK.items() if name != "learning_rate"]
    vary = ["--vary", "beta=0.1,0.3", "--vary", "learning_rate=1e-9,1e-2"]
    with pytest.raises(SystemExit) as stop:
        main(["sweep", "--cache", str(cache), "--view", "pairs", *vary, *options, "--rank-by", "logps/chosen"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    record = json.loads(Path("sweep/sweep.json").read_text())
    values = [run["value"] for run in record["runs"]]
    assert values == sorted(values, reverse=True)
    for run in record["runs"]:
        # Each value is that of a run's own last evaluation.
        last = json.loads(Path("sweep", run["folder"], "metrics.jsonl").read_text().splitlines()[-1])
        assert last["eval_logps/chosen"] == run["value"]
        assert f"{run['value']:.4g}" in said
    assert record["runs"][0]["name"] in said
    assert record["verdict"] in said
    page = Path("sweep/sweep.html").read_text()
    assert "http" not in page.replace("http://www.w3.org", "")
    for words in ("Ranking", "logps/chosen, from", "by beta", "by learning_rate", record["runs"][0]["name"]):
        assert words in page
    shutil.rmtree("sweep/beta=0.1,learning_rate=1e-09")
