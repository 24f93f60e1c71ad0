"""Unpaired rows through both phases: what is stored, the same however a step is cut, after a kill, and refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from dpoeng_testing import pair_rows, resumes_to_the_same_bytes, write_jsonl

from dpoeng.cache.errors import UserError
from dpoeng.cache.reader import View
from dpoeng.cache.records import ROW_KINDS
from dpoeng.cache.verify import verify
from dpoeng.cli.main import main
from dpoeng.engine.config.fields import PrecomputeConfig, TrainConfig
from dpoeng.engine.recipes.evaluate import evaluate_trained, find_trained
from dpoeng.engine.recipes.precompute import precompute_reference
from dpoeng.engine.recipes.train import TrainSummary, train
from dpoeng.engine.runtime.progress import QUIET


def unpaired_rows(count: int) -> list[dict[str, Any]]:
    """Responses of `pair_rows`, two of three of them desirable."""
    return [
        {"prompt": pair["prompt"], "completion": pair["rejected" if i % 3 == 2 else "chosen"], "label": i % 3 != 2}
        for i, pair in enumerate(pair_rows(count))
    ]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("unpaired")
    for name, rows in (("rows", unpaired_rows(12)), ("pairs", pair_rows(4))):
        file = write_jsonl(folder / f"{name}.jsonl", rows)
        precompute_reference(PrecomputeConfig(pairs=(file,), model=str(tiny_model), cache=folder / "cache"))
    return folder / "cache"


def run(cache: Path, out: Path, **fields: Any) -> TrainSummary:
    values: dict[str, Any] = {"max_steps": 3, "learning_rate": 3e-3, "lora_r": 4, "save_steps": 1, "view": "rows"}
    return train(TrainConfig(cache=cache, output_dir=out, **{**values, "loss_type": ("kto",), **fields}))


def lines(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_the_mismatched_response_is_scored_by_the_reference_too(cache: Path, tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model).double().eval()
    view = View.open(cache, "rows", rows=ROW_KINDS)
    row, earlier = view[5], view[4]
    assert row.scores == (0.0,)
    assert row.ids.rejected_ids.tolist() == earlier.ids.chosen_ids.tolist()
    text = torch.from_numpy(np.concatenate([row.ids.prompt_ids, row.ids.rejected_ids]).astype(np.int64))
    with torch.inference_mode():
        logps = model(text[None]).logits[0, len(row.ids.prompt_ids) - 1 : -1].log_softmax(-1)
    expected = logps.gather(1, text[len(row.ids.prompt_ids) :, None]).squeeze(1)
    assert row.rejected_logps.tolist() == pytest.approx(expected.tolist(), abs=1e-4)
    assert (cache / "FORMAT").read_bytes() == b"dpoeng-refcache 4\n"  # older readers would take them for pairs
    assert verify(cache, depth="all").ok


def test_eval_alone_compares_with_what_the_loss_remembers(tmp_path: Path, cache: Path) -> None:
    """BCO's threshold is the mean over the run's steps, which an adapter without its run does not have."""
    fields: dict[str, Any] = {"loss_type": ("bco",), "beta": 1.0, "eval_share": 0.4}
    run(cache, tmp_path / "out", max_steps=5, **fields)
    last = json.loads((tmp_path / "out" / "evaluations.jsonl").read_text().splitlines()[-1])
    notes: list[str] = []
    progress: Any = SimpleNamespace(note=notes.append, task=QUIET.task)
    config = TrainConfig(cache=cache, view="rows", **fields)
    found = evaluate_trained(find_trained(tmp_path / "out"), config, progress=progress).evaluation
    assert found.metrics == pytest.approx(last["metrics"], rel=1e-4, abs=1e-5)
    assert not any("no such run" in note for note in notes)
    shutil.copytree(tmp_path / "out" / "adapter", tmp_path / "moved")
    alone = evaluate_trained(find_trained(tmp_path / "moved"), config, "all", progress=progress).evaluation
    assert any("no such run" in note for note in notes)
    view = View.open(cache, "rows", rows=ROW_KINDS)
    share = float(np.mean([view.scores(row) for row in range(len(view))]))
    rewards = share * alone.metrics["rewards/chosen"] + (1 - share) * alone.metrics["rewards/rejected"]
    assert alone.metrics["rewards/threshold"] == pytest.approx(rewards, rel=1e-6)
    assert found.metrics["rewards/threshold"] != pytest.approx(alone.metrics["rewards/threshold"], rel=1e-2)


@pytest.mark.parametrize("name", ["kto", "bco"])
def test_a_step_is_the_same_however_it_is_cut(tmp_path: Path, cache: Path, name: str) -> None:
    for size in (4, 1):
        cut = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        run(cache, tmp_path / str(size), loss_type=(name,), per_device_eval_batch_size=size, **cut)
    whole = lines(tmp_path / "4")
    assert len({line["loss"] for line in whole if "loss" in line}) >= 2
    for line, expected in zip(lines(tmp_path / "1"), whole, strict=True):
        assert line == pytest.approx(expected, rel=2e-4, abs=1e-6)


def test_a_killed_run_continues_to_the_same_bytes(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields: dict[str, Any] = {"loss_type": ("bco", "kto"), "lora_dropout": 0.2, "eval_share": 0}
    # in the second pass of the second step
    resumes_to_the_same_bytes(lambda out: run(cache, out, **fields), tmp_path, monkeypatch, killed_at=11)


def test_learns_and_evaluates(tmp_path: Path, cache: Path) -> None:
    before_rows = unpaired_rows(12)
    summary = run(cache, tmp_path / "out", max_steps=12, eval_share=0, undesirable_weight=2.0)
    assert summary.last["rewards/margins"] > summary.first.get("rewards/margins", 0.0) + 0.05
    found = evaluate_trained(
        find_trained(tmp_path / "out"), TrainConfig(cache=cache, view="rows", loss_type=("kto",)), "all"
    )
    assert found.evaluation.pairs == len(before_rows)
    metrics = found.evaluation.metrics
    assert metrics["rewards/margins"] == pytest.approx(metrics["rewards/chosen"] - metrics["rewards/rejected"])
    assert 0.5 < metrics["rewards/accuracies"] <= 1
    assert found.evaluation.intervals["rewards/chosen"][0] <= metrics["rewards/chosen"]


@pytest.mark.parametrize(("view", "loss"), [("rows", "sigmoid"), ("pairs", "kto")])
def test_a_loss_of_other_rows_is_refused(tmp_path: Path, cache: Path, view: str, loss: str) -> None:
    with pytest.raises(UserError) as caught:
        run(cache, tmp_path / "out", view=view, loss_type=(loss,))
    assert caught.value.code == "loss-rows"
    assert not (tmp_path / "out").exists()


def test_other_labels_are_another_run(tmp_path: Path, tiny_model: Path) -> None:
    rows = unpaired_rows(6)
    for turned in (False, True):
        rows[0]["label"] = not turned
        file = write_jsonl(tmp_path / "rows.jsonl", rows)
        done = precompute_reference(PrecomputeConfig(pairs=(file,), model=str(tiny_model), cache=tmp_path / "cache"))
        assert done.computed == (0 if turned else 6)  # a label moves no number
        if not turned:
            run(tmp_path / "cache", tmp_path / "out", max_steps=1, eval_share=0)
    with pytest.raises(UserError) as caught:
        run(tmp_path / "cache", tmp_path / "out", max_steps=1, eval_share=0)
    assert "scores" in str(caught.value.found) + str(caught.value.where) + caught.value.message


def test_the_command_line_says_what_it_saw(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", unpaired_rows(9))
    with pytest.raises(SystemExit, match="0"):
        main(["precompute-ref", str(file), "--model", str(tiny_model), "--cache", str(tmp_path / "c")])
    said = capsys.readouterr().out
    assert "6 desirable, 3 not" in said
    assert "mismatched" in said
    train_words = f"train --cache {tmp_path / 'c'} --output-dir {tmp_path / 'o'} --loss-type kto --max-steps 2"
    with pytest.raises(SystemExit, match="0"):
        main(train_words.split())
    assert "rewards/threshold" in capsys.readouterr().out


def test_other_programs_read_labels(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import dpoeng

    rows = dpoeng.open_responses(cache, "rows")
    assert [row.scores for row in rows][:3] == [(1.0,), (1.0,), (0.0,)]
    for words in (["export", str(cache), str(tmp_path / "out.jsonl")], ["stats", str(cache)]):
        with pytest.raises(SystemExit, match="0"):
            main(["cache", *words, "--view", "rows"])
    line = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[2])
    assert line["scores"] == [0.0]
    assert line["response_ids"] == [part.tolist() for part in rows[2].responses]
    assert "8 desirable, 4 not" in capsys.readouterr().out
