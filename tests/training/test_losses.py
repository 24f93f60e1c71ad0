"""Losses in training: the same however a step is cut, the same after a kill, weighted and refused as they should be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dpoeng_testing import pair_rows, write_jsonl

from dpoeng.cache.errors import UserError
from dpoeng.cache.reader import View
from dpoeng.cli.main import main
from dpoeng.engine.config.fields import PrecomputeConfig, TrainConfig
from dpoeng.engine.losses.names import LossSettings
from dpoeng.engine.recipes.phase_two.summary import TrainSummary
from dpoeng.engine.recipes.precompute import precompute_reference
from dpoeng.engine.recipes.train import train
from dpoeng.engine.training import step as step_module


def precompute(pairs: Path, model: Path, cache: Path) -> Path:
    precompute_reference(PrecomputeConfig(pairs=(pairs,), model=str(model), cache=cache))
    return cache


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("losses")
    return precompute(write_jsonl(folder / "pairs.jsonl", pair_rows(12)), tiny_model, folder / "cache")


def run(cache: Path, out: Path, **fields: Any) -> TrainSummary:
    values: dict[str, Any] = {"max_steps": 3, "learning_rate": 3e-3, "lora_r": 4, "save_steps": 1, **fields}
    return train(TrainConfig(cache=cache, output_dir=out, **values))


def lines(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "fields",
    [
        {"loss_type": ("sigmoid", "sft")},  # a mean over the tokens of the step
        {"loss_type": ("aot",)},  # sorted over the step
        {"loss_type": ("beta_dpo", "orpo"), "beta_dpo_alpha": 2.0},  # a beta of the step, and state
        {"loss_type": ("beta_dpo",), "beta_dpo_keep": 0.5},  # and draws among the pairs of the step
        {"loss_type": ("bco_pair",), "bco_reward_shift": True},
    ],
    ids=lambda fields: "+".join((*fields["loss_type"], *list(fields)[1:])),
)
def test_a_step_is_the_same_however_it_is_cut(tmp_path: Path, cache: Path, fields: dict[str, Any]) -> None:
    """Four pairs at once, two by two, and one by one; and the held-out pairs likewise."""
    for size in (4, 2, 1):
        cut = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        run(cache, tmp_path / str(size), per_device_eval_batch_size=size, **cut, **fields)
    whole = lines(tmp_path / "4")
    assert len({line["loss"] for line in whole if "loss" in line}) >= 2
    for other in ("2", "1"):
        for line, expected in zip(lines(tmp_path / other), whole, strict=True):
            assert line == pytest.approx(expected, rel=2e-4, abs=1e-6)


def test_sorting_within_parts_would_be_another_loss(tmp_path: Path, cache: Path) -> None:
    """What the exact way costs a second forward for: without it, the losses of the cut step differ."""
    fields = {"loss_type": ("aot_unpaired",), "max_steps": 4}
    run(cache, tmp_path / "whole", per_device_train_batch_size=4, gradient_accumulation_steps=1, **fields)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(LossSettings, "whole_batch", False)
        run(cache, tmp_path / "parts", per_device_train_batch_size=1, gradient_accumulation_steps=4, **fields)
    whole, parts = (lines(tmp_path / name)[-2]["loss"] for name in ("whole", "parts"))
    assert abs(whole - parts) > 1e-4


class Killed(BaseException):
    """Stands for SIGKILL."""


@pytest.mark.parametrize("call", [7, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 12))])
def test_states_of_losses_survive_a_kill(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """Killed in either of the two passes of a step; with dropout, which must draw the same in both passes."""
    fields = {"loss_type": ("beta_dpo", "bco_pair"), "bco_reward_shift": True, "lora_dropout": 0.2, "eval_share": 0}
    fields |= {"beta_dpo_keep": 0.75}
    run(cache, tmp_path / "whole", **fields)
    real, calls = step_module.batch_sums, 0

    def dying(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise Killed
        return real(*args, **kwargs)

    monkeypatch.setattr(step_module, "batch_sums", dying)
    with pytest.raises(Killed):
        run(cache, tmp_path / "cut", **fields)
    monkeypatch.undo()
    run(cache, tmp_path / "cut", **fields)
    for name in ("metrics.jsonl", "adapter/adapter_model.safetensors", "checkpoint-00000003/state.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    record = json.loads(json.loads((tmp_path / "cut" / "checkpoint-00000003" / "state.json").read_text())["record"])
    assert record["state"]["losses"]["bco_rewards"] > 0
    assert record["state"]["losses"]["beta_dpo_margin"] != 0


def test_both_passes_see_the_same_dropout(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = step_module.batch_sums
    seen: dict[bool, list[float]] = {True: [], False: []}

    def watch(*args: Any, **kwargs: Any) -> Any:
        found = real(*args, **kwargs)
        seen[torch.is_grad_enabled()] += found.chosen_ratio.detach().tolist()
        return found

    monkeypatch.setattr(step_module, "batch_sums", watch)
    run(cache, tmp_path / "out", loss_type=("aot",), lora_dropout=0.5, eval_share=0, max_steps=4)
    assert seen[True] == seen[False]
    assert max(map(abs, seen[True])) > 1e-6


def test_weights_come_from_a_column(tmp_path: Path, cache: Path) -> None:
    view = View.open(cache)
    plain = run(cache, tmp_path / "plain", max_steps=1, per_device_train_batch_size=12, eval_share=0)
    weighted = run(
        cache,
        tmp_path / "margin",
        max_steps=1,
        per_device_train_batch_size=12,
        eval_share=0,
        pair_weight_column="margin",
    )
    mean = np.mean([view.extra(i)["margin"] for i in range(len(view))])
    assert weighted.first["loss"] == pytest.approx(plain.first["loss"] * mean, rel=1e-5)


@pytest.mark.parametrize(
    ("value", "column", "found"),
    [("high", "margin", "'high'"), (-1, "margin", "-1"), (True, "margin", "True"), (1, "margn", "no such column")],
)
def test_a_column_without_weights_is_refused(
    tmp_path: Path, tiny_model: Path, value: Any, column: str, found: str
) -> None:
    rows = pair_rows(4)
    rows[2]["margin"] = value
    used = precompute(write_jsonl(tmp_path / "pairs.jsonl", rows), tiny_model, tmp_path / "cache")
    with pytest.raises(UserError) as caught:
        run(used, tmp_path / "out", pair_weight_column=column, eval_share=0)
    assert caught.value.code == "data-weight"
    assert found in str(caught.value.found)
    assert caught.value.where is not None
    assert caught.value.where.endswith("row 1" if column == "margn" else "row 3")
    assert "margin" in str(caught.value.remedy)
    assert not (tmp_path / "out").exists()


def test_wpo_weighs_by_the_policys_own_probabilities(tmp_path: Path, cache: Path, tiny_model: Path) -> None:
    """At the first step all losses are ln 2, so the mean loss shows the weights; against full logits in float64."""
    from transformers import AutoModelForCausalLM

    view, model = View.open(cache), AutoModelForCausalLM.from_pretrained(tiny_model).double().eval()
    weights = []
    for pair in (view[i] for i in range(len(view))):
        aligned = 0.0
        for response in (pair.ids.chosen_ids, pair.ids.rejected_ids):
            tokens = torch.from_numpy(np.concatenate([pair.ids.prompt_ids, response]).astype(np.int64))
            with torch.inference_mode():
                logps = model(tokens[None]).logits[0, len(pair.ids.prompt_ids) - 1 : -1].log_softmax(-1)
            own = logps.gather(1, tokens[len(pair.ids.prompt_ids) :, None]).squeeze(1)
            aligned += float((own - (2 * logps).logsumexp(-1)).mean())
        weights.append(np.exp(aligned))
    found = run(cache, tmp_path / "out", use_weighting=True, per_device_train_batch_size=12, eval_share=0, max_steps=1)
    assert found.first["loss"] == pytest.approx(np.log(2) * np.mean(weights), rel=1e-5)


def test_losses_on_the_command_line(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    line = ["train", "--cache", str(cache), "--output-dir", str(tmp_path / "out"), "--max-steps", "2", "--lora-r", "4"]
    with pytest.raises(SystemExit) as stop:
        main([*line, "--loss-type", "sigmoid,sft", "--loss-weights", "1,0.5", "--eval-share", "0.5"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "95 % interval" in shown
    assert "by negative_type" in shown
    config = json.loads((tmp_path / "out" / "run.json").read_text())["config"]
    assert (config["loss_type"], config["loss_weights"]) == (["sigmoid", "sft"], [1.0, 0.5])
    with pytest.raises(SystemExit) as stop:
        main([*line, "--loss-type", "tdpo"])
    assert stop.value.code == 2
    assert "over the vocabulary" in capsys.readouterr().err
