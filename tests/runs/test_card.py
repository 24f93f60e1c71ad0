"""The model card beside an adapter: complete, the same after a resume, and its commands are commands."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import yaml
from dpoeng_testing import pair_rows, write_jsonl

from dpoeng.cli.train import train as command
from dpoeng.engine.config.fields import PrecomputeConfig, TrainConfig
from dpoeng.engine.recipes.precompute import precompute_reference
from dpoeng.engine.recipes.train import train


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("card")
    pairs = write_jsonl(folder / "pairs.jsonl", pair_rows(16))
    precompute_reference(PrecomputeConfig(pairs=(pairs,), model=str(tiny_model), cache=folder / "cache"))
    return folder / "cache"


def test_a_card_tells_data_reference_loss_and_held_out_figures(cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(TrainConfig(cache=cache, output_dir=out, max_steps=2, eval_share=0.3, beta=0.2, loss_type=("ipo",)))
    text = (out / "adapter" / "README.md").read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert (head["library_name"], "base_model" in head) == ("peft", False)  # a folder here is nobody else's
    run = json.loads((out / "run.json").read_text())
    last = json.loads((out / "evaluations.jsonl").read_text().splitlines()[-1])
    low, high = last["intervals"]["rewards/accuracies"]
    assert f"{last['metrics']['rewards/accuracies']:.3f} | {low:.3f} to {high:.3f}" in text
    assert f"n = {last['pairs']} pairs of {last['prompts']} prompts" in text
    assert "every margin is 0" in text
    for words in (run["reference"]["spec"], "`pairs.jsonl`", "ipo, beta 0.2", "torch 2"):
        assert words in text
    assert str(out) not in text
    line = next(line for line in text.splitlines() if line.startswith("dpoeng train"))
    parsed = command.make_context("train", shlex.split(line)[2:]).params
    assert (parsed["beta"], parsed["max_steps"], parsed["loss_type"]) == (0.2, 2, ("ipo",))


def test_without_held_out_pairs_the_card_says_so(cache: Path, tmp_path: Path) -> None:
    train(TrainConfig(cache=cache, output_dir=tmp_path, max_steps=1, eval_share=0.0))
    assert "No pair was held out" in (tmp_path / "adapter" / "README.md").read_text()
