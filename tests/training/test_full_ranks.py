"""All weights trained in parts: by several processes under FSDP2, and each only moves its rows of the layers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dpoeng_testing import pair_rows, save_tiny_model, tree, write_jsonl
from rank_processes import ends, run_alone, start, train_command
from safetensors.torch import load_file

from dpoeng.engine.config.fields import PrecomputeConfig
from dpoeng.engine.recipes import policy as policy_module
from dpoeng.engine.recipes.precompute import precompute_reference
from dpoeng.engine.training import loop as loop_module

# Three forwards a step, of which two processes do two and one; a last step of an epoch that is smaller; gradients that
# are clipped in every step; an epsilon that the rounding of sums does not reach; and the worst evaluation, which is not
# the last one, decides what is saved.
SETTINGS = (
    "--no-use-peft --max-steps 4 --save-steps 1 --save-total-limit 4 --parity-pairs 2 --per-device-train-batch-size 2 "
    "--gradient-accumulation-steps 3 --learning-rate 1e-3 --adam-epsilon 1e-4 --max-grad-norm 0.3 --eval-share 0.2 "
    "--eval-steps 2 --per-device-eval-batch-size 2 --load-best-model-at-end --metric-for-best-model loss "
    "--greater-is-better"
).split()


def make_cache(folder: Path, model: Path, **fields: Any) -> Path:
    pairs = write_jsonl(folder / "pairs.jsonl", pair_rows(20))
    precompute_reference(PrecomputeConfig(pairs=(pairs,), model=str(model), cache=folder / "cache", **fields))
    return folder / "cache"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """Layers whose rows two processes cannot share evenly everywhere."""
    return save_tiny_model(tmp_path_factory.mktemp("parts-model") / "model", tokenizer)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    return make_cache(tmp_path_factory.mktemp("parts"), model)


def command(cache: Path, out: Path, *more: str) -> list[str]:
    return train_command(cache, out, *SETTINGS, *more)


def alone(cache: Path, out: Path, *more: str) -> Path:
    run_alone(command(cache, out, *more))
    return out


def together(cache: Path, out: Path, *more: str, size: int = 2, last: Callable[[], None] | None = None) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    found = ends(start([command(cache, out, "--fsdp", *more)] * size, out, last=last))
    assert [status for status, _, _ in found] == [0] * size, "\n".join(err for _, _, err in found)
    return out


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """The run of one process."""
    return alone(cache, tmp_path_factory.mktemp("parts-one") / "out")


def held_by_the_last() -> None:
    """Leaves in `held.json` how many bytes of the layers' weights, gradients and moments this process has."""
    real = loop_module.train_step

    def step(run: Any, number: int) -> Any:
        update = run.optimizer.step
        held: dict[str, int] = {}

        def count(*arguments: Any) -> Any:
            held["gradients"] = sum(p.grad.nbytes for p in run.lm.parts.values())
            return update(*arguments)

        run.optimizer.step = count
        done = real(run, number)
        run.optimizer.step = update
        layers = list(run.lm.parts.items())
        held["trained"] = sum(part.nbytes for _, part in layers)
        held["moments"] = sum(
            value.nbytes for _, part in layers for value in run.optimizer.state[part].values() if value.dim()
        )
        held["weights"] = sum(weight.to_local().untyped_storage().nbytes() for weight, _ in layers)
        held["whole"] = sum(4 * weight.numel() for weight, _ in layers)
        Path(run.config.output_dir, "held.json").write_text(json.dumps(held))
        return done

    loop_module.train_step = step  # type: ignore[assignment]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """The same in two processes, each with its part."""
    return together(cache, tmp_path_factory.mktemp("parts-two") / "out", last=held_by_the_last)


def lines(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def check_same(out: Path, expected: Path, atol: float = 1e-5) -> None:
    """The same weights, masters and moments, and the same figures."""
    for file in ("model/model", "checkpoint-00000004/parameters", "checkpoint-00000004/optimizer"):
        found, wanted = (load_file(folder / f"{file}.safetensors") for folder in (out, expected))
        assert found.keys() == wanted.keys()
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name], atol=atol, rtol=0)
    for line, other in zip(lines(out), lines(expected), strict=True):
        assert line == pytest.approx(other, rel=1e-4, abs=1e-5)


def cut_off(out: Path, to: Path, step: int = 1) -> Path:
    """A run as it was after some steps."""
    shutil.copytree(out, to)
    for folder in to.glob("checkpoint-*"):
        if int(folder.name.split("-")[1]) > step:
            shutil.rmtree(folder)
    shutil.rmtree(to / "model")
    return to


def outcome(out: Path) -> dict[str, str]:
    return tree(out, "model", "checkpoint-00000004") | {"metrics": (out / "metrics.jsonl").read_text()}


def test_parts_train_what_one_process_trains(model: Path, one: Path, two: Path) -> None:
    begin, end = load_file(model / "model.safetensors"), load_file(one / "checkpoint-00000004/parameters.safetensors")
    assert min(float((end[name] - begin[name]).abs().max()) for name in end) > 1e-4
    assert all(line["grad_norm"] > 0.3 for line in lines(one) if "grad_norm" in line)
    check_same(two, one)
    # The best evaluation's model, gathered from its checkpoint's parts.
    best = load_file(two / "checkpoint-00000002/parameters.safetensors")
    saved = load_file(two / "model/model.safetensors")
    assert all(torch.equal(saved[name], best[name]) for name in saved)
    written = {path.relative_to(one).as_posix() for path in one.rglob("*") if path.is_file()}
    extra = {path.relative_to(two).as_posix() for path in two.rglob("*") if path.is_file()} - written
    assert extra == {"held.json", *(f"rank{rank}.{end}" for rank in range(2) for end in ("out", "err"))}


def test_a_process_holds_its_part_of_weights_gradients_and_moments(two: Path) -> None:
    held = json.loads((two / "held.json").read_text())
    assert held["trained"] == held["whole"] / 2  # every tensor of the layers has an even number of rows
    assert held["weights"] == held["trained"]
    assert held["gradients"] == held["trained"]
    assert held["moments"] == 2 * held["trained"]


def loads_whole() -> None:
    policy_module.loads_whole_because = lambda *_: "a test says so"  # type: ignore[attr-defined]


def test_sharded_runs_continue_to_the_same_bytes(tmp_path: Path, cache: Path, two: Path) -> None:
    """From the first step's checkpoint; one process then reads its rows, the other one everything before it divides."""
    out = cut_off(two, tmp_path / "out")
    together(cache, out, last=loads_whole)
    assert "resuming from step 1" in (out / "rank0.err").read_text()
    assert outcome(out) == outcome(two)


def test_sharded_and_whole_runs_continue_each_other(tmp_path: Path, cache: Path, one: Path, two: Path) -> None:
    """Three processes, which cannot share the rows evenly, continue one process's run, and one process that of two."""
    check_same(together(cache, cut_off(one, tmp_path / "three"), size=3), one)
    check_same(alone(cache, cut_off(two, tmp_path / "alone")), one)


@pytest.mark.slow
def test_parts_of_a_model_in_bfloat16(tmp_path: Path, tokenizer: Any, model: Path) -> None:
    """Forwards in bfloat16 whose gradients add up in float32 masters; the head is the embedding.

    The first step's gradient is the same but for the order of its sum. Later on a weight that lies between two numbers
    of bfloat16 may be rounded to the other one.
    """
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "tied"
    shutil.copytree(model, folder)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "tie_word_embeddings": True}))
    tied = AutoModelForCausalLM.from_pretrained(folder)
    tied.tie_weights()
    tied.to(torch.bfloat16).save_pretrained(folder)
    cache = make_cache(tmp_path, folder, dtype="bfloat16")
    more = ["--max-steps", "2", "--eval-steps", "1"]
    one, two = alone(cache, tmp_path / "one", *more), together(cache, tmp_path / "two", *more)
    for step, atol in ((1, 1e-7), (2, 1e-5)):
        found, wanted = (load_file(out / f"checkpoint-0000000{step}/parameters.safetensors") for out in (two, one))
        assert found.keys() == wanted.keys()
        for name in wanted:
            assert found[name].dtype == torch.float32
            torch.testing.assert_close(found[name], wanted[name], atol=atol, rtol=0)
    best = load_file(two / "checkpoint-00000001/parameters.safetensors")
    saved = load_file(two / "model/model.safetensors")
    assert saved.keys() == load_file(one / "model/model.safetensors").keys() == best.keys()
    assert all(torch.equal(saved[name], best[name].to(torch.bfloat16)) for name in saved)
    assert tree(two, "model").keys() == tree(one, "model").keys()


@pytest.mark.slow
def test_a_loss_of_a_whole_step_over_parts(tmp_path: Path, cache: Path) -> None:
    """Each forward is run twice; of four processes one has nothing to do; layers are run again in the backward."""
    more = ["--loss-type", "aot", "--gradient-checkpointing"]
    check_same(together(cache, tmp_path / "four", *more, size=4), alone(cache, tmp_path / "one", *more))
