"""Out of memory, injected where it can happen: the same bytes where that is promised, a message where nothing helps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dpoeng_testing import pair_rows, write_jsonl

from dpoeng.cache.errors import UserError
from dpoeng.cache.reader import View
from dpoeng.engine.config.fields import PrecomputeConfig, TrainConfig
from dpoeng.engine.recipes.precompute import precompute_reference
from dpoeng.engine.recipes.train import train
from dpoeng.engine.runtime.out_of_memory import attempt, is_out_of_memory
from dpoeng.engine.scoring import pairs as reference
from dpoeng.engine.training import batch_loss as batch
from dpoeng.engine.training import loop


class Notes:
    """Progress that remembers what it was told."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)

    def task(self, title: str, total: int, unit: str, done: int = 0) -> Any:
        from dpoeng.engine.runtime.progress import QUIET

        return QUIET.task(title, total, unit, done)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("oom")
    pairs = write_jsonl(folder / "pairs.jsonl", pair_rows(16))
    precompute_reference(PrecomputeConfig(pairs=(pairs,), model=str(tiny_model), cache=folder / "cache"))
    return folder / "cache"


def run(cache: Path, out: Path, progress: Any = None, **fields: Any) -> bytes:
    values: dict[str, Any] = {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": True,
        "lora_dropout": 0.1,
        "learning_rate": 1e-3,
        **fields,
    }
    summary = train(TrainConfig(cache=cache, output_dir=out, **values), progress or Notes())
    return (summary.result / "adapter_model.safetensors").read_bytes()


def failing(real: Callable[..., Any], when: Callable[[int, Any], bool], error: BaseException) -> Callable[..., Any]:
    """`real`, but raising at the calls for which `when(number of the call, arguments)`; before or after its work."""
    calls = 0

    def work(*arguments: Any, **settings: Any) -> Any:
        nonlocal calls
        calls += 1
        if when(calls, arguments):
            raise error
        return real(*arguments, **settings)

    return work


GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
CPU = RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried 123 bytes")
STAGES = {
    "forward": (batch, "predict_groups", GPU),
    "head": (batch, "head_logps", CPU),
    "loss": (batch, "preference_loss", MemoryError()),
    "backward": (torch.autograd, "backward", GPU),
    "clipping": (torch.nn.utils, "clip_grad_norm_", GPU),
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    run(cache, out, eval_share=0)
    return out


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("call", [1, pytest.param(2, marks=pytest.mark.slow), 3])  # in the first step and the last
def test_running_out_once_leaves_no_trace(
    tmp_path: Path, cache: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch, stage: str, call: int
) -> None:
    """Memory that was only fragmented: the step starts again, and the adapter is the same byte for byte."""
    place, name, error = STAGES[stage]
    monkeypatch.setattr(place, name, failing(getattr(place, name), lambda n, _: n == call, error))
    run(cache, tmp_path, eval_share=0)
    for name in ("adapter/adapter_model.safetensors", "metrics.jsonl"):
        assert (tmp_path / name).read_bytes() == (undisturbed / name).read_bytes(), name


def test_running_out_twice_continues_as_if_configured_with_fewer_pairs(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four pairs never fit, nor three; two do. From there on the run is that of two pairs a forward, to the byte."""
    expected = run(cache, tmp_path / "a", eval_share=0, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    too_many = failing(batch.predict_groups, lambda _, arguments: len(arguments[1]) > 2, GPU)
    monkeypatch.setattr(batch, "predict_groups", too_many)
    notes = Notes()
    assert run(cache, tmp_path / "b", notes, eval_share=0) == expected
    assert sum("2 pairs per forward" in text for text in notes.texts) == 1


def test_the_smaller_size_is_kept_through_a_resume(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out at the first step only; what follows still has two pairs a forward, resumed or not."""

    class Killed(BaseException):
        pass

    def first_step(n: int, arguments: Any) -> bool:
        return n <= 2 and len(arguments[1]) > 2

    real = batch.predict_groups
    monkeypatch.setattr(batch, "predict_groups", failing(real, first_step, GPU))
    whole = run(cache, tmp_path / "a", eval_share=0, save_steps=1)
    monkeypatch.setattr(batch, "predict_groups", failing(real, first_step, GPU))
    steps = loop.train_step
    monkeypatch.setattr(loop, "train_step", failing(steps, lambda n, _: n == 3, Killed()))
    with pytest.raises(Killed):
        run(cache, tmp_path / "b", eval_share=0, save_steps=1)
    monkeypatch.setattr(loop, "train_step", steps)
    monkeypatch.setattr(batch, "predict_groups", real)
    assert run(cache, tmp_path / "b", eval_share=0, save_steps=1) == whole


def test_one_pair_that_does_not_fit_is_named(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "predict_groups", failing(batch.predict_groups, lambda *_: True, GPU))
    with pytest.raises(UserError) as caught:
        run(cache, tmp_path / "out", eval_share=0)
    assert caught.value.code == "memory-full"
    longest = max(View.open(cache)[i].ids.total_tokens for i in range(16))
    assert "step 1" in str(caught.value.where)
    assert any(f"{tokens} tokens" in str(caught.value.where) for tokens in range(longest + 1))
    assert "max-length" in str(caught.value.remedy)


def test_the_optimizer_is_not_tried_twice(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half an update cannot be taken back: better a message than moments that do not fit the weights."""
    monkeypatch.setattr(torch.optim.AdamW, "step", failing(torch.optim.AdamW.step, lambda n, _: n == 2, GPU))
    with pytest.raises(UserError, match="optimizer step"):
        run(cache, tmp_path / "out", eval_share=0)


def test_the_evaluation_is_done_in_halves(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(cache, tmp_path / "a", eval_share=0.3, per_device_train_batch_size=1)
    monkeypatch.setattr(
        batch, "predict_groups", failing(batch.predict_groups, lambda _, arguments: len(arguments[1]) > 1, CPU)
    )
    assert run(cache, tmp_path / "b", eval_share=0.3, per_device_train_batch_size=1) == expected


def score_all(model: Path, pairs: Path, cache: Path, progress: Any = None, **fields: Any) -> list[float]:
    config = PrecomputeConfig(pairs=(pairs,), model=str(model), cache=cache, **fields)
    precompute_reference(config, progress or Notes())
    view = View.open(cache)
    return [value for i in range(len(view)) for value in (view[i].chosen_sum, view[i].rejected_sum)]


def test_phase_one_again_and_in_halves(
    tmp_path: Path, tiny_model: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = score_all(tiny_model, pairs_file, tmp_path / "a")
    real = reference.score_pairs
    monkeypatch.setattr(reference, "score_pairs", failing(real, lambda n, _: n == 1, GPU))
    assert score_all(tiny_model, pairs_file, tmp_path / "b") == undisturbed
    assert _objects(tmp_path / "a") == _objects(tmp_path / "b")

    monkeypatch.setattr(reference, "score_pairs", failing(real, lambda _, arguments: len(arguments[1]) > 3, CPU))
    notes = Notes()
    assert score_all(tiny_model, pairs_file, tmp_path / "c", notes) == pytest.approx(undisturbed, abs=1e-4)
    assert any("in halves" in text for text in notes.texts)

    monkeypatch.setattr(reference, "score_pairs", failing(real, lambda *_: True, CPU))
    with pytest.raises(UserError) as caught:
        score_all(tiny_model, pairs_file, tmp_path / "d")
    assert caught.value.code == "memory-full"


def _objects(cache: Path) -> set[str]:
    return {path.name for path in (cache / "objects").rglob("*.arrow")}


def test_other_errors_pass() -> None:
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    with pytest.raises(ValueError, match="wrong"):
        attempt(lambda: (_ for _ in ()).throw(ValueError("wrong")))
