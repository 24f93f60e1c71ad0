"""Evaluation and what follows: figures by hand, the best model, early stopping, remarks, `eval` and `compare`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dpoeng_testing import pair_rows, save_tiny_model, write_jsonl

from dpoeng import evaluate
from dpoeng.bench.cache import SPEC, synthetic_rows
from dpoeng.cache.errors import UserError
from dpoeng.cache.reader import View
from dpoeng.cache.schema import pair_key
from dpoeng.cache.store import Store
from dpoeng.cache.table import ViewEntry
from dpoeng.cli.main import main
from dpoeng.engine.config.fields import PrecomputeConfig, TrainConfig
from dpoeng.engine.losses.batch import PreferenceBatch, pair_sums, preference_loss
from dpoeng.engine.losses.names import LossSettings
from dpoeng.engine.recipes.phase_two.summary import TrainSummary
from dpoeng.engine.recipes.precompute import precompute_reference
from dpoeng.engine.recipes.train import train
from dpoeng.engine.training import loop as loop_module
from dpoeng.engine.training.advice import advise
from dpoeng.engine.training.early_stopping import Best, more_is_better, updated, watched
from dpoeng.engine.training.evaluation import summarise
from dpoeng.engine.training.intervals import (
    ACCURACY,
    CONTROLLED,
    bootstrap,
    effective_pairs,
    intervals,
    length_controlled_accuracy,
    wilson,
)
from dpoeng.engine.training.rows import Rows, labels_of

# --------------------------------------------------------------------------- figures


def test_an_evaluation_by_hand() -> None:
    """Margins 2, 1, -1, 3 at beta 1; chosen is longer, longer, shorter, equal: 100 % and 0 %, together 50 %."""
    branch = torch.tensor([0, 0, 1, 2, 2, 3, 4, 5, 5, 6, 7])
    policy = torch.full((11,), -1.0)
    reference = policy - torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 3.0, 0.0])
    settings = LossSettings(beta=1.0)
    found = preference_loss(pair_sums(PreferenceBatch(policy, reference, branch, 4), settings), settings)
    result = summarise(found, [b"a", b"b", b"c", b"d"], {"kind": ["x", "y", "x", "x"]})
    assert result.metrics["rewards/margins"] == pytest.approx(5 / 4)
    assert result.metrics["rewards/accuracies"] == pytest.approx(3 / 4)
    assert result.metrics["rewards/accuracies_length_controlled"] == pytest.approx(1 / 2)
    assert result.metrics["loss"] == pytest.approx(np.mean([math.log1p(math.exp(-m)) for m in (2, 1, -1, 3)]))
    lengths = [1, 1, -1, 0]
    assert result.metrics["rewards/margins_length_correlation"] == pytest.approx(
        np.corrcoef([2, 1, -1, 3], lengths)[0, 1]
    )
    # x = ref/pi of the chosen tokens is e^-1 twice, e^-1 and 1, 1, e^-3; averaged within a response first.
    k3 = [math.exp(-r) - 1 + r for r in (1.0, 0.5, 0.0, 3.0)]
    k3[1] = (math.exp(-1) - 1 + 1) / 2
    assert result.metrics["kl/chosen"] == pytest.approx(np.mean(k3))
    assert {label: group.pairs for label, group in result.groups["kind"].items()} == {"x": 3, "y": 1}
    assert result.groups["kind"]["x"].metrics["rewards/accuracies"] == pytest.approx(2 / 3)
    assert result.groups["kind"]["y"].intervals == {}  # one prompt alone has no interval
    low, high = result.intervals["rewards/margins"]
    assert low < 5 / 4 < high
    half = 3.182 * np.std([2, 1, -1, 3], ddof=1) / 2  # Student's t of 4 prompts
    assert (low, high) == pytest.approx((5 / 4 - half, 5 / 4 + half))
    assert (result.prompts, result.ties) == (4, 0)
    sorted_pairs = summarise(found, [b"a", b"b", b"c", b"d"], {"kind": ["x"] * 4}, per_pair_loss=False)
    assert "loss" not in sorted_pairs.groups["kind"]["x"].metrics
    assert json.loads(json.dumps(result.record()))["confidence"] == 0.95


def test_a_taste_for_length_is_worth_one_half() -> None:
    longer = np.array([5.0, 3.0, 1.0, -2.0, 0.0])
    assert length_controlled_accuracy((longer > 0).astype(float), longer) == 0.5
    assert length_controlled_accuracy(np.ones(5), longer) == 1.0
    assert length_controlled_accuracy(np.ones(3), longer[:3]) is None


def test_intervals_are_as_wide_as_theory_has_them() -> None:
    """400 pairs, 70 % right: 1.96 standard errors on each side. Four copies of each under its prompt tell no more."""
    right = (np.arange(400) % 10 < 7).astype(float)
    prompts = [str(i).encode() for i in range(400)]
    low, high = bootstrap({"rewards/accuracies": right}, np.ones(400), prompts, seed=0)["rewards/accuracies"]
    theory = 2 * 1.96 * math.sqrt(0.7 * 0.3 / 400)
    assert high - low == pytest.approx(theory, rel=0.1)
    assert (low + high) / 2 == pytest.approx(0.7, abs=0.005)
    again = bootstrap({"rewards/accuracies": np.tile(right, 4)}, np.ones(1600), prompts * 4, seed=0)
    found = again["rewards/accuracies"]
    assert found[1] - found[0] == pytest.approx(theory, rel=0.1)
    assert bootstrap({"a": right}, np.ones(400), prompts, seed=1) == bootstrap(
        {"a": right}, np.ones(400), prompts, seed=1
    )


def of(values: list[float], longer: list[float], prompts: list[int], **options: Any) -> dict[str, tuple[float, float]]:
    named = {ACCURACY: np.array(values), "rewards/margins": np.array(values) - 0.5}
    return intervals(named, np.array(longer), [str(i).encode() for i in prompts], seed=0, **options)


def test_shares_at_their_ends_have_a_width() -> None:
    """Wilson's figures for 0 of 10, 10 of 10 and 7 of 10, by hand; a bootstrap says 0 to 0 and 1 to 1."""
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(0.7, 10) == pytest.approx((0.3968, 0.8922), abs=1e-4)
    ten = list(range(10))
    assert of([1.0] * 10, [1.0] * 10, ten)[ACCURACY] == pytest.approx((0.7225, 1.0), abs=1e-4)
    # Two pairs are next to nothing, and so are eight of two prompts: here the pairs cannot tell how alike they are.
    assert of([1.0, 1.0], [1.0, 1.0], [0, 1])[ACCURACY] == pytest.approx((0.3424, 1.0), abs=1e-4)
    assert of([1.0] * 8, [1.0] * 8, [0, 1] * 4)[ACCURACY] == pytest.approx((0.3424, 1.0), abs=1e-4)
    low, high = of([1.0] * 10, [1.0, -1.0] * 5, ten)[CONTROLLED]
    assert low < 0.8
    assert high == 1.0


def test_pairs_of_one_prompt_count_by_how_alike_they_are() -> None:
    """Copies count once; pairs that have nothing to do with each other count each."""
    random = np.random.default_rng(0)
    cluster = np.repeat(np.arange(200), 4)
    copies = np.repeat((random.random(200) < 0.6).astype(float), 4)
    assert effective_pairs(copies, cluster) == pytest.approx(200, rel=0.02)
    assert effective_pairs((random.random(800) < 0.6).astype(float), cluster) == pytest.approx(800, rel=0.25)
    assert effective_pairs(copies, np.arange(800)) == 800


def test_a_policy_that_equals_its_reference_has_no_accuracy() -> None:
    found = intervals(
        {ACCURACY: np.zeros(40), "rewards/margins": np.zeros(40)}, np.ones(40), [bytes([i]) for i in range(40)], seed=0
    )
    assert found == {"rewards/margins": (0.0, 0.0)}


def test_paired_differences_of_few_pairs_are_not_certain() -> None:
    """Agresti and Min by hand: of 3 pairs all better, b = 3.5, c = 0.5, n = 5, difference 0.6."""
    low, high = of([1.0, 1.0, 1.0], [1.0] * 3, [0, 1, 2], paired=True)[ACCURACY]
    half = 1.96 * math.sqrt(4 - 9 / 5) / 5
    assert (low, high) == pytest.approx((0.6 - half, 1.0), abs=1e-3)
    low, high = of([1.0, 1.0], [1.0] * 2, [0, 1], paired=True)[ACCURACY]
    assert low < 0 < high
    low, high = of([0.0] * 50, [1.0] * 50, list(range(50)), paired=True)[ACCURACY]
    assert low < 0 < high


def test_parts_of_rows_count_as_parts() -> None:
    """40 ranked rows: of half of them a third more pairs is right, of a tenth a third fewer. Worked as above."""
    differences = [1 / 3] * 20 + [-1 / 3] * 4 + [0.0] * 16
    low, high = of(differences, [0.0] * 40, list(range(40)), paired=True)[ACCURACY]
    better, worse = 20 / 3 + 0.5, 4 / 3 + 0.5
    half = 1.96 * math.sqrt(better + worse - (better - worse) ** 2 / 42) / 42
    assert (low, high) == pytest.approx(((better - worse) / 42 - half, (better - worse) / 42 + half), abs=1e-4)
    top = "rewards/top_accuracies"
    found = intervals({top: np.array([1.0] * 7 + [0.0] * 3)}, np.zeros(10), [bytes([i]) for i in range(10)], seed=0)
    assert found[top] == pytest.approx(wilson(0.7, 10))


@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_intervals_cover_what_they_promise(share: float) -> None:
    """In 300 data sets of 24 pairs, two a prompt and equal with probability 1/2, near 95 % hold the true share."""
    random = np.random.default_rng(1)
    held = 0
    for _ in range(300):
        first = random.random(12) < share
        second = np.where(random.random(12) < 0.5, first, random.random(12) < share)
        right = np.stack([first, second], axis=1).ravel().astype(float)
        cluster = np.repeat(np.arange(12), 2)
        low, high = wilson(float(right.mean()), effective_pairs(right, cluster))
        held += low <= share <= high
    assert held / 300 > 0.9


def test_columns_that_are_categories_are_found() -> None:
    extras = [
        {"kind": "ab"[i % 2], "sure": i % 3 == 0, "text": str(i), "margin": 0.1 * i, "one": "x"} for i in range(20)
    ]
    labels = labels_of(extras, None)
    assert sorted(labels) == ["kind", "sure"]
    assert labels["sure"][:2] == ["yes", "no"]
    assert set(labels_of([*extras, {}], ("kind", "margin"))["kind"]) == {"a", "b", "(none)"}
    with pytest.raises(KeyError):
        labels_of(extras, ("knd",))


# --------------------------------------------------------------------------- best and early stopping


def test_the_best_and_how_long_it_was_waited_for() -> None:
    best = Best()
    for step, value in ((1, 0.6), (2, 0.5), (3, 0.5), (4, 0.49), (5, 0.55)):
        best = updated(best, step, value, greater=False, threshold=0.02)
    assert best == Best(step=2, value=0.5, earlier=1, waited=3)
    assert best.kept == {1, 2}
    assert updated(best, 6, 0.9, greater=True, threshold=0.0) == Best(step=6, value=0.9, earlier=2, waited=0)
    assert updated(best, 6, math.nan, greater=True, threshold=0.0).waited == 4
    assert (more_is_better(None, None), more_is_better("eval_loss", None)) == (False, False)
    assert (more_is_better("rewards/accuracies", None), more_is_better("kl/chosen", None)) == (True, False)
    assert more_is_better("loss", True)
    assert watched({"eval_loss": 1.0, "eval_rewards/margins": 2.0}, "rewards/margins") == 2.0
    with pytest.raises(UserError, match="unknown metric margins"):
        watched({"eval_loss": 1.0}, "margins")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    pairs = write_jsonl(folder / "pairs.jsonl", pair_rows(24))
    precompute_reference(PrecomputeConfig(pairs=(pairs,), model=str(tiny_model), cache=folder / "cache"))
    return folder / "cache"


def run(cache: Path, out: Path, **fields: Any) -> TrainSummary:
    values = {"max_steps": 6, "learning_rate": 3e-3, "lora_r": 4, "save_steps": 2, "eval_share": 0.3, **fields}
    return train(TrainConfig(cache=cache, output_dir=out, **values))


class Killed(BaseException):
    """Stands for SIGKILL."""


# The loss falls at every evaluation; as something of which more is better, its best is therefore the first.
FIRST_IS_BEST: dict[str, Any] = {
    "eval_steps": 1,
    "greater_is_better": True,
    "load_best_model_at_end": True,
    "early_stopping_patience": 4,
    "save_total_limit": 1,
    "lora_dropout": 0.1,
}


# Before the first step, and in step 4, of which a checkpoint lies behind and an evaluation ahead; slow: the others.
@pytest.mark.parametrize("call", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 5)), 4])
def test_early_stopping_and_the_best_model_survive_a_kill(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    whole = run(cache, tmp_path / "whole", max_steps=20, **FIRST_IS_BEST)
    assert (whole.steps, whole.best.step, whole.best.waited, whole.planned_steps) == (5, 1, 4, 20)
    real, calls = loop_module.train_step, 0

    def dying(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise Killed
        return real(*args)

    monkeypatch.setattr(loop_module, "train_step", dying)
    with pytest.raises(Killed):
        run(cache, tmp_path / "cut", max_steps=20, **FIRST_IS_BEST)
    monkeypatch.undo()
    again = run(cache, tmp_path / "cut", max_steps=20, **FIRST_IS_BEST)
    assert (again.steps, again.resumed_from, again.best) == (5, {1: 0, 3: 2, 4: 2, 5: 4}[call], whole.best)
    for name in ("metrics.jsonl", "evaluations.jsonl", "advice.json", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    names = [{path.name for path in (tmp_path / out).glob("checkpoint-*")} for out in ("cut", "whole")]
    assert names[0] == names[1] == {"checkpoint-00000001", "checkpoint-00000005"}
    done = run(cache, tmp_path / "cut", max_steps=20, **FIRST_IS_BEST)
    assert done.already_complete
    assert done.best == whole.best


def test_the_adapter_is_that_of_the_best_evaluation(tmp_path: Path, cache: Path) -> None:
    from safetensors.torch import load_file

    run(cache, tmp_path / "out", max_steps=20, **FIRST_IS_BEST)
    adapter = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    at = {step: load_file(tmp_path / "out" / f"checkpoint-{step:08d}" / "parameters.safetensors") for step in (1, 5)}
    for step, parameters in at.items():
        same = [torch.equal(adapter[name.replace(".default.", ".")], value) for name, value in parameters.items()]
        assert all(same) == (step == 1)


def test_a_damaged_best_checkpoint_is_a_message(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = loop_module.save_run

    def damage(*args: Any, **kwargs: Any) -> None:
        real(*args, **kwargs)
        if (tmp_path / "out" / "checkpoint-00000004").is_dir():
            (tmp_path / "out" / "checkpoint-00000001" / "parameters.safetensors").write_bytes(b"")

    monkeypatch.setattr(loop_module, "save_run", damage)
    with pytest.raises(UserError) as caught:
        run(cache, tmp_path / "out", max_steps=20, **FIRST_IS_BEST)
    assert caught.value.code == "checkpoint-damaged"
    assert not (tmp_path / "out" / "adapter").exists()


def test_a_metric_that_is_not_there_stops_before_the_first_step(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(UserError) as caught:
        run(cache, tmp_path / "out", metric_for_best_model="accuracy", load_best_model_at_end=True)
    assert "rewards/accuracies" in str(caught.value.expected)
    with pytest.raises(UserError) as caught:
        run(cache, tmp_path / "out", eval_group_by=("kind",))
    assert "negative_type" in str(caught.value.expected)


def test_metrics_are_handed_on_as_they_are_written(tmp_path: Path, cache: Path) -> None:
    seen: list[Mapping[str, float]] = []
    train(TrainConfig(cache=cache, output_dir=tmp_path / "out", max_steps=2, lora_r=4), on_metrics=seen.append)
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [{k: v for k, v in line.items() if k != "epoch"} for line in lines] == seen
    assert [line["step"] for line in lines] == [0, 1, 2, 2]


# --------------------------------------------------------------------------- remarks

PLAIN = {
    "loss": 0.5,
    "rewards/accuracies": 0.8,
    "rewards/margins": 0.5,
    "rewards/chosen": 0.3,
    "rewards/rejected": -0.2,
}
EVAL = {"step": 0, "eval_loss": 0.69, "eval_logps/chosen": -100.0, "eval_logps/rejected": -100.0}
EVAL |= {"eval_rewards/accuracies": 0.8, "eval_rewards/accuracies_length_controlled": 0.75}
EVAL |= {"eval_rewards/margins_length_correlation": 0.2}


def codes(steps: list[dict[str, float]], evals: list[dict[str, float]], **more: Any) -> list[str]:
    settings: dict[str, Any] = {"loss_type": ("sigmoid",), "beta": 0.1, "held_out_pairs": 100, **more}
    return [remark.code for remark in advise(steps, evals, **settings)]


def course(**last: float) -> list[dict[str, float]]:
    """Sixteen steps from ln 2 on; `last` from the middle."""
    return [{**PLAIN, "loss": math.log(2)}, *[dict(PLAIN)] * 7, *[{**PLAIN, **last}] * 8]


def evals(**last: float) -> list[dict[str, float]]:
    return [EVAL, {**EVAL, "step": 5, "eval_loss": 0.4}, {**EVAL, "step": 9, "eval_loss": 0.39, **last}]


def test_a_healthy_run_gets_no_remark() -> None:
    assert codes(course(), evals(**{"eval_logps/chosen": -99.0, "eval_logps/rejected": -120.0})) == []
    assert codes([], []) == []


@pytest.mark.parametrize(
    ("steps", "evaluations", "code"),
    [
        (course(), evals(**{"eval_logps/chosen": -112.0, "eval_logps/rejected": -140.0}), "likelihood-displacement"),
        (course(**{"rewards/chosen": -0.5, "rewards/rejected": -2.0}), [], "likelihood-displacement"),
        (
            course(),
            evals(
                **{
                    "eval_rewards/accuracies_length_controlled": 0.55,
                    "eval_rewards/margins_length_correlation": -0.8,
                }
            ),
            "length-explains-margins",
        ),
        ([{**PLAIN, "loss": 0.6931, "rewards/chosen": 1e-4, "rewards/rejected": 0.0}] * 10, [], "loss-does-not-move"),
        (course(**{"rewards/accuracies": 1.0}), [], "accuracy-saturated"),
        (course(**{"rewards/accuracies": 1.0}), evals(), "accuracy-saturated"),
        (course(), evals(eval_loss=0.5), "held-out-loss-rises"),
    ],
)
def test_each_remark_and_nothing_else(
    steps: list[dict[str, float]], evaluations: list[dict[str, float]], code: str
) -> None:
    assert codes(steps, evaluations) == [code]


def test_remarks_need_enough_to_go_by() -> None:
    displaced = evals(**{"eval_logps/chosen": -112.0, "eval_logps/rejected": -140.0})
    assert codes(course(), displaced, held_out_pairs=5) == ["few-held-out-pairs"]
    assert codes(course(), displaced, loss_type=("simpo",)) == []  # without a reference there is nothing to fall from
    assert codes([{**PLAIN, "loss": 0.6931, "rewards/chosen": 0.0, "rewards/rejected": 0.0}] * 4, []) == []
    (remark,) = advise(course(), displaced, loss_type=("sigmoid",), beta=0.1, held_out_pairs=50)
    assert "12.0 nats" in remark.seen
    assert "40.0" in remark.seen
    assert "rpo_alpha" in remark.remedy


# --------------------------------------------------------------------------- the commands


@pytest.fixture(scope="module")
def sft_cache(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, sft_adapter: Path) -> Path:
    folder = tmp_path_factory.mktemp("evaluation-sft")
    pairs = write_jsonl(folder / "pairs.jsonl", pair_rows(24))
    precompute_reference(
        PrecomputeConfig(pairs=(pairs,), model=str(tiny_model), adapter=str(sft_adapter), cache=folder / "cache")
    )
    return folder / "cache"


def command(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    shown = capsys.readouterr()
    assert isinstance(stop.value.code, int)
    return stop.value.code, shown.out, shown.err


def test_eval_on_the_view_that_the_run_was_evaluated_on(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By its own name, for all of its pairs: the same figures as the run's, and no complaint about two equal views."""
    for name, rows in (("train", pair_rows(12)), ("test", pair_rows(20)[12:])):
        pairs = write_jsonl(tmp_path / f"{name}.jsonl", rows)
        precompute_reference(PrecomputeConfig(pairs=(pairs,), model=str(tiny_model), cache=tmp_path / "cache"))
    out = tmp_path / "out"
    train(TrainConfig(cache=tmp_path / "cache", output_dir=out, view="train", eval_view="test", max_steps=2))
    last = json.loads((out / "evaluations.jsonl").read_text().splitlines()[-1])
    line = ("eval", "--cache", tmp_path / "cache", "--adapter", out, "--json")
    for more in (("--view", "test"), ()):
        status, said, _ = command(capsys, *line, *more)
        assert status == 0
        assert json.loads(said)["metrics"] == pytest.approx(last["metrics"], rel=1e-4, abs=1e-5)
    assert evaluate(out, view="test").evaluation.pairs == 8


@pytest.mark.parametrize("mode", ["new", "stack", "continue"])
def test_eval_alone_gives_what_training_gave(
    tmp_path: Path, cache: Path, sft_cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any, mode: Any
) -> None:
    """And before training is the reference, also where an SFT adapter was trained further."""
    monkeypatch.setenv("COLUMNS", "160")
    used = cache if mode == "new" else sft_cache
    shape = {} if mode == "continue" else {"lora_r": 4}
    values = {"max_steps": 4, "learning_rate": 3e-3, "eval_share": 0.3, "loss_type": ("sigmoid", "sft"), "beta": 0.2}
    train(TrainConfig(cache=used, output_dir=tmp_path / "out", adapter_mode=mode, **values, **shape))
    last = json.loads((tmp_path / "out" / "evaluations.jsonl").read_text().splitlines()[-1])
    assert list(last["groups"]) == ["negative_type"]

    status, out, _ = command(capsys, "eval", "--cache", used, "--adapter", tmp_path / "out", "--json")
    assert status == 0
    found = json.loads(out)
    assert (found["which"], found["pairs"], found["beta"], found["loss_type"]) == (
        "held-out",
        last["pairs"],
        0.2,
        ["sigmoid", "sft"],
    )
    assert found["metrics"] == pytest.approx(last["metrics"], rel=1e-4, abs=1e-5)
    assert abs(found["metrics"]["rewards/margins"]) > 1e-3
    wrong, theirs = found["groups"]["negative_type"]["wrong"], last["groups"]["negative_type"]["wrong"]
    assert wrong["metrics"] == pytest.approx(theirs["metrics"], rel=1e-4, abs=1e-5)

    by_layer = ("--layer-offloading", "on", "--offload-folder", tmp_path / "scratch")
    status, out, _ = command(capsys, "eval", "--cache", used, "--adapter", tmp_path / "out", "--json", *by_layer)
    assert status == 0
    assert json.loads(out) == found

    status, out, _ = command(
        capsys, "eval", "--cache", used, "--adapter", tmp_path / "out" / "adapter", "--pairs", "all"
    )
    assert status == 0
    assert "24 of view 'pairs' (all)" in out
    assert "by negative_type" in out
    assert "95 % interval" in out

    status, out, _ = command(capsys, "compare", tmp_path / "out", "--cache", used, "--count", "2", "--json")
    assert status == 0
    answers = json.loads(out)
    assert len({answer["prompt"] for answer in answers}) == 2
    assert any(answer["before"] != answer["after"] for answer in answers)
    if mode == "new":
        given = ("--prompt", "Say something.", "--text", "--max-new-tokens", "4")
        status, out, _ = command(capsys, "compare", tmp_path / "out", "--cache", used, *given)
        assert status == 0
        assert "Say something." in out
        assert "before" in out


def test_an_adapter_of_another_model_is_refused(
    tmp_path: Path, cache: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run(cache, tmp_path / "out", max_steps=1)
    other = save_tiny_model(tmp_path / "other", tokenizer, seed=1)
    line = ("eval", "--cache", cache, "--adapter", tmp_path / "out", "--model", other)
    status, _, shown = command(capsys, *line)
    assert status == 4
    assert "parity-failed" in shown
    status, _, shown = command(capsys, "eval", "--cache", cache, "--adapter", tmp_path / "nothing")
    assert status == 2
    assert "adapter-not-found" in shown


def test_reported_metrics_are_those_of_the_saved_best_model(tmp_path: Path, cache: Path) -> None:
    """The last evaluation is of another adapter."""
    summary = run(cache, tmp_path / "out", **FIRST_IS_BEST)
    evaluations = [json.loads(line) for line in (tmp_path / "out" / "evaluations.jsonl").read_text().splitlines()]
    assert summary.best.step == 1 < evaluations[-1]["step"]
    assert summary.evaluation["step"] == summary.eval_after["step"] == 1


def test_other_weights_are_another_run(tmp_path: Path, tiny_model: Path) -> None:
    """The column's name is the same, its numbers are not."""

    def trained(weight: float) -> TrainSummary:
        rows = [{**row, "weight": 1.0 + weight * (number % 2)} for number, row in enumerate(pair_rows(8))]
        pairs = write_jsonl(tmp_path / "pairs.jsonl", rows)
        precompute_reference(PrecomputeConfig(pairs=(pairs,), model=str(tiny_model), cache=tmp_path / "cache"))
        return run(tmp_path / "cache", tmp_path / "out", max_steps=1, pair_weight_column="weight")

    assert not trained(1.0).already_complete
    assert trained(1.0).already_complete
    with pytest.raises(UserError) as caught:
        trained(2.0)
    assert caught.value.code == "resume-changed"


def test_what_needs_held_out_pairs_is_refused_where_there_are_none(tmp_path: Path, tiny_model: Path) -> None:
    rows = [{**row, "prompt": "Instruction: one\nResponse:"} for row in pair_rows(6)]
    pairs = write_jsonl(tmp_path / "pairs.jsonl", rows)
    precompute_reference(PrecomputeConfig(pairs=(pairs,), model=str(tiny_model), cache=tmp_path / "cache"))
    with pytest.raises(UserError) as caught:
        run(tmp_path / "cache", tmp_path / "out", load_best_model_at_end=True, eval_steps=1)
    assert caught.value.code == "eval-empty"


def test_a_weight_that_no_float_holds_is_refused_by_its_row(tmp_path: Path) -> None:
    row = synthetic_rows(2)
    store = Store.open(tmp_path, create=True)
    digest = store.put_spec(SPEC)
    store.commit_shard(digest, row, {})
    held = [{"weight": 1.5}, {"weight": 10**400}]
    entries = [ViewEntry("p.jsonl", i + 1, pair_key(one.ids), held[i]) for i, one in enumerate(row)]
    store.write_view(digest, "v", entries, {})
    view = View.open(tmp_path)
    assert Rows(view, [0]).weights("weight").tolist() == [1.5]  # type: ignore[union-attr]
    with pytest.raises(UserError) as caught:
        Rows(view, [0, 1]).weights("weight")
    assert (caught.value.code, caught.value.where) == ("data-weight", "p.jsonl, row 2")
    assert len(str(caught.value.found)) <= 200
