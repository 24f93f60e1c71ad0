"""Both phases end to end on a tiny model: numbers, reuse, resume bit for bit, adapters, precisions, refusals."""

from __future__ import annotations

import io
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from dpoeng_testing import pair_rows, save_tiny_model, tree, write_jsonl
from rich.console import Console

from dpoeng.bench.studies.tiny_models import save_tiny
from dpoeng.cache.errors import UserError
from dpoeng.cache.reader import View
from dpoeng.cache.store import Store
from dpoeng.cli.progress import TerminalProgress
from dpoeng.engine.config.fields import PrecomputeConfig, SweepConfig, TrainConfig
from dpoeng.engine.models.adapters import add_policy_adapter
from dpoeng.engine.models.loading import load_model, resolve_dtype
from dpoeng.engine.models.model import POLICY_ADAPTER
from dpoeng.engine.models.sources import adapter_config, find_adapter, find_model
from dpoeng.engine.recipes import policy as policy_module
from dpoeng.engine.recipes import precompute as precompute_module
from dpoeng.engine.recipes.inputs import check_apart, split
from dpoeng.engine.recipes.policy import parity_text
from dpoeng.engine.recipes.precompute import PrecomputeSummary, precompute_reference
from dpoeng.engine.recipes.sweeps.plan import plan_sweep
from dpoeng.engine.recipes.train import train
from dpoeng.engine.reference import parity
from dpoeng.engine.runtime.progress import QUIET
from dpoeng.engine.training import loop as loop_module
from dpoeng.engine.training import step as step_module
from dpoeng.engine.training.order import plan_schedule


def precompute(pairs: Path, model: Path, cache: Path, **fields: Any) -> PrecomputeSummary:
    values: dict[str, Any] = {"shard_tokens": 300, "batch_tokens": 200, **fields}
    return precompute_reference(PrecomputeConfig(pairs=(pairs,), model=str(model), cache=cache, **values))


def quick(cache: Path, out: Path, **fields: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "max_steps": 6,
        "save_steps": 1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "lora_dropout": 0.1,
        **fields,
    }
    return TrainConfig(cache=cache, output_dir=out, **values)


def plain_sums(model: Path, view: View) -> list[tuple[float, float]]:
    """transformers alone: prompt + response, full logits, float64 log-softmax."""
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(model).eval()
    sums = []
    for i in range(len(view)):
        ids = view[i].ids
        pair = []
        for response, start in ((ids.chosen_ids, ids.chosen_start), (ids.rejected_ids, ids.rejected_start)):
            tokens = torch.from_numpy(np.concatenate([ids.prompt_ids, response]).astype(np.int64))
            with torch.inference_mode():
                logps = lm(tokens[None]).logits[0].double().log_softmax(-1)
            first = len(ids.prompt_ids) + start
            pair.append(float(logps[first - 1 : -1].gather(1, tokens[first:, None]).sum()))
        sums.append((pair[0], pair[1]))
    return sums


def test_cached_sums_equal_a_plain_forward(tmp_path: Path, tiny_model: Path, pairs_file: Path) -> None:
    summary = precompute(pairs_file, tiny_model, tmp_path / "cache")
    assert (summary.pairs, summary.computed, summary.reused, summary.layout) == (24, 24, 0, "shared")
    view = View.open(tmp_path / "cache")
    expected = plain_sums(tiny_model, view)
    found = [(view[i].chosen_sum, view[i].rejected_sum) for i in range(len(view))]
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
    assert summary.reference_accuracy == np.mean([c > r for c, r in expected])
    assert view.extra(1)["negative_type"] == "evasive"


def test_only_what_is_new_is_computed(tmp_path: Path, tiny_model: Path) -> None:
    cache = tmp_path / "cache"
    rows = pair_rows(24)
    file = write_jsonl(tmp_path / "pairs.jsonl", rows[:20])
    precompute(file, tiny_model, cache)
    before = tree(cache, "objects")

    again = precompute(file, tiny_model, cache)
    assert (again.computed, again.reused, again.layout) == (0, 20, "")
    write_jsonl(file, [*reversed(rows), rows[3]])
    more = precompute(file, tiny_model, cache, shard_tokens=2000)
    assert (more.pairs, more.computed, more.reused) == (25, 4, 20)
    after = tree(cache, "objects")
    assert before.items() <= after.items()
    assert len(after) == len(before) + 1  # what is new is stored together, not scattered
    view = View.open(cache)
    assert view.key(24) == view.key(20)
    assert view.source(24)[1] == 25

    # What the user changes for phase two, or where things lie, moves nothing; what moves a number misses.
    moved = shutil.copytree(tiny_model, tmp_path / "elsewhere")
    assert precompute(file, moved, cache).computed == 0
    assert precompute(file, moved, cache, dtype="bfloat16").computed == 24
    other = save_tiny_model(tmp_path / "other", _tokenizer(tiny_model), seed=1)
    assert precompute(file, other, cache).computed == 24
    lengths = [max(len(p.chosen_ids), len(p.rejected_ids)) + len(p.prompt_ids) for p in (v.ids for v in view)]
    shorter = precompute(file, moved, cache, max_length=sorted(lengths)[12])
    assert shorter.computed == len({view.key(i) for i in range(25) if lengths[i] > sorted(lengths)[12]}) > 0


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_a_complete_cache_needs_no_model(
    tmp_path: Path, tiny_model: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    precompute(pairs_file, tiny_model, tmp_path / "cache")

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("the model was loaded although nothing is missing")

    monkeypatch.setattr(precompute_module, "load_reference", never)
    assert precompute(pairs_file, tiny_model, tmp_path / "cache").reused == 24


def test_recomputing_finds_what_hashes_cannot(tmp_path: Path, tiny_model: Path, pairs_file: Path) -> None:
    """Values that were stored whole and are wrong all the same: only scoring them again can show it."""
    precompute(pairs_file, tiny_model, tmp_path / "cache")
    view = View.open(tmp_path / "cache")
    report = parity.recompute(view, 8)
    assert (report.pairs, report.ok) == (8, True)
    assert report.mean_diff < 1e-5
    other = save_tiny_model(tmp_path / "other", _tokenizer(tiny_model), seed=1)
    assert not parity.recompute(view, 8, model=str(other)).ok


class Killed(BaseException):
    """Stands for SIGKILL where a real one would cost a process."""


def test_a_prompt_that_may_not_be_the_intended_one_is_reported(tmp_path: Path, tiny_model: Path) -> None:
    rows = [{("promt" if name == "prompt" else name): value for name, value in row.items()} for row in pair_rows(4)]
    notes: list[str] = []
    config = PrecomputeConfig(
        pairs=(write_jsonl(tmp_path / "pairs.jsonl", rows),), model=str(tiny_model), cache=tmp_path / "cache"
    )
    precompute_reference(config, SimpleNamespace(note=notes.append, task=QUIET.task))
    assert notes == [
        "prompt taken from `instruction` in 4 pairs; unused column `promt`: did you mean `prompt`? (--columns "
        "prompt=promt)"
    ]


def test_a_disk_without_room_is_noticed_before_the_model_is_loaded(
    tmp_path: Path, tiny_model: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("the model was loaded although its log-probs cannot be stored")

    monkeypatch.setattr(precompute_module, "load_reference", never)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=5000))
    with pytest.raises(UserError) as caught:
        precompute(pairs_file, tiny_model, tmp_path / "cache")
    assert caught.value.code == "cache-disk-small"


def test_a_model_that_gives_no_number_is_a_message_in_both_phases(
    tmp_path: Path, tiny_model: Path, cache: Path, tokenizer: Any
) -> None:
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(tiny_model, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = math.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    pairs = write_jsonl(tmp_path / "pairs.jsonl", pair_rows(4))
    with pytest.raises(UserError) as first:
        precompute(pairs, broken, tmp_path / "cache")
    with pytest.raises(UserError) as second:
        train(quick(cache, tmp_path / "out", model=str(broken)))
    assert first.value.exit_status == second.value.exit_status
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("start", ["pissa", "olora", "gaussian"])
def test_adapters_that_change_the_base_when_loaded_are_another_reference(
    sft_adapter: Path, tmp_path: Path, start: str
) -> None:
    """PiSSA and OLoRA subtract their start from the base at every load; a Gaussian start leaves no trace."""
    edited = shutil.copytree(sft_adapter, tmp_path / "edited")
    config = json.loads((edited / "adapter_config.json").read_text())
    (edited / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": start}))
    same = adapter_config(find_adapter(str(edited))) == adapter_config(find_adapter(str(sft_adapter)))
    assert same == (start == "gaussian")


@pytest.mark.parametrize("survivors", [0, 1, 3])
def test_phase_one_killed_between_shards_ends_the_same(
    tmp_path: Path, tiny_model: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch, survivors: int
) -> None:
    precompute(pairs_file, tiny_model, tmp_path / "whole")
    real, calls = Store.commit_shard, 0

    def commit(self: Store, *args: Any) -> str:
        nonlocal calls
        if calls == survivors:
            raise Killed
        calls += 1
        return real(self, *args)

    monkeypatch.setattr(Store, "commit_shard", commit)
    with pytest.raises(Killed):
        precompute(pairs_file, tiny_model, tmp_path / "cut")
    monkeypatch.undo()
    resumed = precompute(pairs_file, tiny_model, tmp_path / "cut")
    assert (resumed.reused > 0) == (survivors > 0)
    parts = ("objects", "runs", "specs")
    assert tree(tmp_path / "cut", *parts) == tree(tmp_path / "whole", *parts)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A cache of 24 pairs that the training tests share and do not change."""
    folder = tmp_path_factory.mktemp("shared")
    file = write_jsonl(folder / "pairs.jsonl", pair_rows(24))
    precompute(file, tiny_model, folder / "cache")
    return folder / "cache"


def test_the_first_step_is_ln_2_and_training_learns(tmp_path: Path, cache: Path) -> None:
    summary = train(quick(cache, tmp_path / "out", max_steps=30, learning_rate=3e-3, save_steps=10))
    assert summary.parity is not None
    assert summary.parity.mean_diff < 1e-5
    assert summary.first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert summary.eval_before["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert summary.last["loss"] < 0.3
    assert summary.eval_after["eval_rewards/accuracies"] > 0.9
    assert summary.eval_after["eval_rewards/margins"] > summary.eval_before["eval_rewards/margins"] + 0.5
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["config"]["beta"] == 0.1
    assert run["reference"]["spec"] == View.open(cache).spec.digest
    assert run["versions"]["torch"] == torch.__version__


def test_long_work_is_announced(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In lines, as in a log file; and the policy's agreement with the cache before the first step."""
    output = io.StringIO()
    progress = TerminalProgress(Console(file=output, width=80))
    seen: dict[str, list[str]] = {}

    def looking(name: str, real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen.setdefault(name, output.getvalue().splitlines())
            return real(*args, **kwargs)

        return call

    for owner, name in (
        (policy_module, "load_policy_base"),
        (policy_module, "check_parity"),
        (loop_module, "evaluate"),
        (loop_module, "train_step"),
    ):
        monkeypatch.setattr(owner, name, looking(name, getattr(owner, name)))
    summary = train(quick(cache, tmp_path / "out", max_steps=1), progress)
    assert seen["load_policy_base"][-1] == "loading the base ..."
    assert seen["check_parity"][-1] == "comparing the policy with the cache ..."
    assert seen["evaluate"][-1] == "evaluating before training ..."
    assert summary.parity is not None
    assert f"note: {parity_text(summary.parity)}" in seen["train_step"]
    assert seen["train_step"][-1] == "training ..."


def test_the_adapter_loads_with_peft_alone(tmp_path: Path, cache: Path, tiny_model: Path) -> None:
    """The saved adapter, loaded by the lines in run.json, gives the rewards that training reported."""
    summary = train(quick(cache, tmp_path / "out", lora_dropout=0.0, eval_share=0.2))
    view = View.open(cache)
    _, held = split(view, None, TrainConfig(eval_share=0.2))
    scope: dict[str, Any] = {}
    recipe = json.loads((tmp_path / "out" / "run.json").read_text())["load"]
    source = "\n".join(recipe).replace("'adapter'", repr(str(tmp_path / "out" / "adapter")))
    exec(source, scope)
    model = scope["model"].eval()
    margins = []
    for i in held:
        pair = view[i]
        ratios = []
        for response, reference in ((pair.ids.chosen_ids, pair.chosen_sum), (pair.ids.rejected_ids, pair.rejected_sum)):
            tokens = torch.from_numpy(np.concatenate([pair.ids.prompt_ids, response]).astype(np.int64))
            with torch.inference_mode():
                logps = model(tokens[None]).logits[0].double().log_softmax(-1)
            begin = len(pair.ids.prompt_ids)
            ratios.append(float(logps[begin - 1 : -1].gather(1, tokens[begin:, None]).sum()) - reference)
        margins.append(0.1 * (ratios[0] - ratios[1]))
    assert summary.eval_after["eval_rewards/margins"] == pytest.approx(np.mean(margins), abs=1e-5)


def outcome(out: Path) -> dict[str, str]:
    """What two equal runs must have in common, byte for byte."""
    return {**tree(out, "adapter", "checkpoint-00000006"), "metrics": (out / "metrics.jsonl").read_text()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> dict[str, str]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    train(quick(cache, out))
    return outcome(out)


# The first step, one amid the run, and the last, where an epoch ends; slow: the others.
@pytest.mark.parametrize("step", [0, 2, 5, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3, 4))])
def test_phase_two_killed_at_any_step_ends_the_same(
    tmp_path: Path, cache: Path, undisturbed: dict[str, str], monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Killed between the two forwards of a step, or before the only one of step 6, where the epoch ends on 2 pairs."""
    real, forwards = step_module.batch_loss, 0

    def dying(*args: Any, **kwargs: Any) -> Any:
        nonlocal forwards
        if torch.is_grad_enabled():
            forwards += 1
            if forwards == min(2 * step + 2, 11):
                raise Killed
        return real(*args, **kwargs)

    monkeypatch.setattr(step_module, "batch_loss", dying)
    with pytest.raises(Killed):
        train(quick(cache, tmp_path / "out"))
    monkeypatch.undo()
    torch.manual_seed(12345)
    summary = train(quick(cache, tmp_path / "out"))
    assert summary.resumed_from == step
    assert outcome(tmp_path / "out") == undisturbed
    assert train(quick(cache, tmp_path / "out")).already_complete
    assert outcome(tmp_path / "out") == undisturbed


def test_a_folder_with_another_run_is_refused_with_the_difference(tmp_path: Path, cache: Path) -> None:
    out = tmp_path / "out"
    train(quick(cache, out, max_steps=2))
    with pytest.raises(UserError) as caught:
        train(quick(cache, out, max_steps=2, beta=0.2))
    assert caught.value.code == "resume-changed"
    assert "beta = 0.1" in str(caught.value.expected)
    assert "beta = 0.2" in str(caught.value.found)
    anew = train(quick(cache, out, max_steps=2, beta=0.2, resume=False))
    assert anew.resumed_from == 0
    with pytest.raises(UserError, match="no checkpoint"):
        train(quick(cache, tmp_path / "empty", resume=True))


def test_a_fresh_start_that_is_refused_leaves_the_old_run_as_it_is(tmp_path: Path, cache: Path, tokenizer: Any) -> None:
    out, other = tmp_path / "out", save_tiny_model(tmp_path / "other", tokenizer, seed=5)
    train(quick(cache, out, max_steps=2))
    before = tree(out)
    with pytest.raises(UserError) as caught:
        train(quick(cache, out, max_steps=2, model=str(other), resume=False))
    assert caught.value.code == "parity-failed"
    assert tree(out) == before


# --------------------------------------------------------------------------- adapters


@pytest.fixture(scope="module")
def sft_cache(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, sft_adapter: Path) -> Path:
    folder = tmp_path_factory.mktemp("sft-cache")
    file = write_jsonl(folder / "pairs.jsonl", pair_rows(24))
    precompute(file, tiny_model, folder / "cache", adapter=str(sft_adapter))
    return folder / "cache"


def test_the_reference_is_base_plus_adapter(sft_cache: Path, cache: Path, tiny_model: Path, sft_adapter: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    view, base = View.open(sft_cache), View.open(cache)
    assert view.spec.digest != base.spec.digest
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), sft_adapter).eval()
    pair = view[0]
    tokens = torch.from_numpy(np.concatenate([pair.ids.prompt_ids, pair.ids.chosen_ids]).astype(np.int64))
    with torch.inference_mode():
        logps = model(tokens[None]).logits[0].double().log_softmax(-1)
    begin = len(pair.ids.prompt_ids)
    truth = float(logps[begin - 1 : -1].gather(1, tokens[begin:, None]).sum())
    assert pair.chosen_sum == pytest.approx(truth, abs=1e-4)
    assert abs(pair.chosen_sum - base[0].chosen_sum) > 0.5


@pytest.mark.parametrize("mode", ["continue", "stack"])
def test_dpo_from_an_sft_adapter(tmp_path: Path, sft_cache: Path, sft_adapter: Path, mode: Any) -> None:
    summary = train(quick(sft_cache, tmp_path / "out", adapter_mode=mode, lora_dropout=0.0, max_steps=12))
    assert summary.parity is not None
    assert summary.parity.mean_diff < 1e-5
    assert summary.first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert summary.last["loss"] < 0.6
    saved = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert saved["r"] == (4 if mode == "continue" else 16)
    # The lines in run.json load the trained policy, and it is no longer the reference.
    scope: dict[str, Any] = {}
    recipe = json.loads((tmp_path / "out" / "run.json").read_text())["load"]
    exec("\n".join(recipe).replace("'adapter'", repr(str(tmp_path / "out" / "adapter"))), scope)
    view = View.open(sft_cache)
    step_one = plan_schedule(24, batch=4, epochs=1, max_steps=-1, seed=42)
    assert step_one.rows == len(view)
    pair = view[0]
    tokens = torch.from_numpy(np.concatenate([pair.ids.prompt_ids, pair.ids.rejected_ids]).astype(np.int64))
    with torch.inference_mode():
        logps = scope["model"].eval()(tokens[None]).logits[0].double().log_softmax(-1)
    begin = len(pair.ids.prompt_ids)
    live = float(logps[begin - 1 : -1].gather(1, tokens[begin:, None]).sum())
    assert live < pair.rejected_sum - 0.5


def test_stack_leaves_the_sft_adapter_as_it_was(tmp_path: Path, sft_cache: Path, sft_adapter: Path) -> None:
    from safetensors.torch import load_file

    train(quick(sft_cache, tmp_path / "out", adapter_mode="stack", max_steps=2))
    names = set(load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors"))
    assert any("gate_proj" in name for name in names)  # the new LoRA, on all linear layers
    assert not any("reference" in name for name in names)


@pytest.mark.parametrize("mode", ["continue", "stack"])
def test_resume_from_an_sft_adapter(
    tmp_path: Path, sft_cache: Path, monkeypatch: pytest.MonkeyPatch, mode: Any
) -> None:
    config = quick(sft_cache, tmp_path / "out", adapter_mode=mode)
    train(config.model_copy(update={"output_dir": tmp_path / "whole"}))
    real, calls = loop_module.train_step, 0

    def dying(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise Killed
        return real(*args)

    monkeypatch.setattr(loop_module, "train_step", dying)
    with pytest.raises(Killed):
        train(config)
    monkeypatch.undo()
    assert train(config).resumed_from == 3
    assert outcome(tmp_path / "out") == outcome(tmp_path / "whole")


def test_modes_that_do_not_fit_are_refused(tmp_path: Path, cache: Path, sft_cache: Path) -> None:
    for config, found in (
        (quick(cache, tmp_path / "a", adapter_mode="stack"), "no SFT adapter"),
        (quick(sft_cache, tmp_path / "b", adapter_mode="new"), "has an SFT adapter"),
        (quick(sft_cache, tmp_path / "c", lora_r=8), "ambiguous LoRA settings"),
    ):
        with pytest.raises(UserError) as caught:
            train(config)
        assert caught.value.code == "adapter-mode"
        assert found in str(caught.value)
        assert not config.output_dir.exists()


# --------------------------------------------------------------------------- the wrong reference


def test_parity_refuses_another_model(tmp_path: Path, cache: Path, tiny_model: Path) -> None:
    other = save_tiny_model(tmp_path / "other", _tokenizer(tiny_model), seed=1)
    with pytest.raises(UserError) as caught:
        train(quick(cache, tmp_path / "out", model=str(other)))
    assert caught.value.code == "parity-failed"
    assert not (tmp_path / "out").exists()


def test_parity_refuses_an_sft_adapter_of_another_scale(tmp_path: Path, sft_cache: Path, sft_adapter: Path) -> None:
    """lora_alpha alone, edited after phase one: the weights are the same, the reference is not."""
    edited = shutil.copytree(sft_adapter, tmp_path / "edited")
    config = json.loads((edited / "adapter_config.json").read_text())
    config["lora_alpha"] = 9
    (edited / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="does not match the cached reference"):
        train(quick(sft_cache, tmp_path / "out", adapter=str(edited)))


def test_parity_refuses_a_policy_scored_with_its_adapter_on(
    tmp_path: Path, sft_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 60 from the other side: were the SFT adapter switched off while comparing, it would be noticed."""
    import contextlib

    @contextlib.contextmanager
    def all_off(lm: Any, mode: Any) -> Any:
        with lm.model.disable_adapter():
            yield

    monkeypatch.setattr(policy_module, "as_reference", all_off)
    with pytest.raises(UserError, match="does not match the cached reference"):
        train(quick(sft_cache, tmp_path / "out"))


# --------------------------------------------------------------------------- precisions


@pytest.mark.parametrize(("quantization", "dtype"), [("8bit", "float32"), ("8bit", "bfloat16"), ("4bit", "float32")])
def test_quantised_reference_and_policy_agree(tmp_path: Path, tokenizer: Any, quantization: Any, dtype: Any) -> None:
    model = save_tiny_model(tmp_path / "model", tokenizer, hidden=64)
    file = write_jsonl(tmp_path / "pairs.jsonl", pair_rows(8))
    precompute(file, model, tmp_path / "cache", quantization=quantization, dtype=dtype)
    config = quick(tmp_path / "cache", tmp_path / "out", max_steps=3, eval_share=0)
    summary = train(config)
    assert summary.parity is not None
    assert summary.parity.mean_diff <= (1e-5 if dtype == "float32" else 3e-2)
    assert summary.first["loss"] == pytest.approx(math.log(2), abs=1e-4 if dtype == "float32" else 0.05)
    assert summary.last["loss"] < summary.first["loss"]
    assert list((tmp_path / "out" / "adapter").iterdir())
    twice = train(config.model_copy(update={"output_dir": tmp_path / "twice"}))
    assert twice.last == summary.last  # repeats to the last bit


def test_a_bf16_reference_for_an_8bit_policy(tmp_path: Path, tokenizer: Any) -> None:
    model = save_tiny_model(tmp_path / "model", tokenizer, hidden=64)
    file = write_jsonl(tmp_path / "pairs.jsonl", pair_rows(8))
    precompute(file, model, tmp_path / "cache", dtype="bfloat16")
    summary = train(quick(tmp_path / "cache", tmp_path / "out", quantization="8bit", max_steps=1, eval_share=0))
    assert summary.parity is not None
    assert 1e-4 < summary.parity.mean_diff < summary.parity.tolerance  # the gap is measured, not hidden


@pytest.mark.parametrize(
    "shape", [{"use_dora": True}, {"use_rslora": True}, {"init_lora_weights": "orthogonal"}, {"lora_alpha": 64.0}]
)
def test_every_shape_of_lora_starts_at_the_reference_and_learns(
    tmp_path: Path, cache: Path, shape: dict[str, Any]
) -> None:
    config = quick(cache, tmp_path / "out", lora_dropout=0.0, lora_target_modules=("q_proj", "down_proj"), **shape)
    summary = train(config)
    assert summary.parity is not None
    assert summary.parity.mean_diff < 1e-5
    assert summary.first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert summary.last["loss"] < summary.first["loss"]
    saved = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert sorted(saved["target_modules"]) == ["down_proj", "q_proj"]
    for name, value in shape.items():
        if name != "init_lora_weights":  # a saved adapter is not initialised again
            assert saved[name] == value


@pytest.mark.parametrize("quantization", ["none", "8bit"])
def test_gradient_checkpointing_changes_no_number(tmp_path: Path, tokenizer: Any, quantization: Any) -> None:
    """Both kinds of checkpointing: the re-entrant one is used with 8bit (see `enable_gradient_checkpointing`)."""
    model = save_tiny_model(tmp_path / "model", tokenizer, hidden=64)
    file = write_jsonl(tmp_path / "pairs.jsonl", pair_rows(8))
    precompute(file, model, tmp_path / "cache", quantization=quantization)
    config = quick(tmp_path / "cache", tmp_path / "plain", max_steps=3, eval_share=0)
    plain = train(config)
    saved = train(config.model_copy(update={"output_dir": tmp_path / "saved", "gradient_checkpointing": True}))
    assert saved.last == pytest.approx(plain.last, rel=1e-5)
    assert saved.last["loss"] < saved.first["loss"]


def test_separate_rows_train_the_same(tmp_path: Path, tiny_model: Path, cache: Path) -> None:
    shared = train(quick(cache, tmp_path / "shared", lora_dropout=0.0))
    apart = train(quick(cache, tmp_path / "apart", lora_dropout=0.0, layout="separate"))
    assert (shared.layout, apart.layout) == ("shared", "separate")
    assert apart.last == pytest.approx(shared.last, rel=1e-3, abs=1e-5)


def test_a_held_out_view(tmp_path: Path, tiny_model: Path) -> None:
    rows = pair_rows(24)
    write_jsonl(tmp_path / "a.jsonl", rows[:16])
    write_jsonl(tmp_path / "b.jsonl", rows[16:])
    for name in ("a", "b"):
        precompute(tmp_path / f"{name}.jsonl", tiny_model, tmp_path / "cache")
    summary = train(quick(tmp_path / "cache", tmp_path / "out", view="a", eval_view="b", max_steps=2))
    assert (summary.train_pairs, summary.eval_pairs) == (16, 8)
    precompute(tmp_path / "b.jsonl", tiny_model, tmp_path / "cache", name="c", dtype="bfloat16")
    with pytest.raises(UserError, match="different references"):
        train(quick(tmp_path / "cache", tmp_path / "out2", view="a", eval_view="c"))


def test_pairs_that_are_both_trained_and_evaluated_on(tmp_path: Path, tiny_model: Path) -> None:
    """Of six pairs that are evaluated on two are trained on, one of them the other way round; two share a prompt."""
    rows, cache = pair_rows(24), tmp_path / "cache"
    turned = {**rows[1], "chosen": rows[1]["rejected"], "rejected": rows[1]["chosen"]}
    other = [{**rows[k], "chosen": " another answer\nEND"} for k in (2, 3)]
    for name, held in (("a", rows[:16]), ("mixed", [rows[0], turned, *other, *rows[20:22]]), ("b", rows[16:])):
        write_jsonl(tmp_path / f"{name}.jsonl", held)
        precompute(tmp_path / f"{name}.jsonl", tiny_model, cache)
    said = check_apart(View.open(cache, "a"), View.open(cache, "mixed"))
    assert "2 pairs and 2 more by prompt alone of 6 evaluation pairs in mixed are also trained on (in a)" in said
    assert check_apart(View.open(cache, "a"), View.open(cache, "b")) == ""
    notes: list[str] = []
    progress = SimpleNamespace(note=notes.append, task=QUIET.task)
    train(quick(cache, tmp_path / "out", view="a", eval_view="mixed", max_steps=1), progress)
    assert said in notes
    for view, eval_view in (("a", "half"), ("mixed", "mixed2")):
        write_jsonl(tmp_path / "half.jsonl", [turned, *rows[4:8]])
        precompute(tmp_path / "half.jsonl", tiny_model, cache)
        precompute(tmp_path / "mixed.jsonl", tiny_model, cache, name="mixed2")
        with pytest.raises(UserError) as caught:
            train(quick(cache, tmp_path / "no", view=view, eval_view=eval_view))
        assert caught.value.code == "eval-trained-on"
        options = {"cache": cache, "view": view, "eval_view": eval_view, "output_dir": tmp_path / "sweep"}
        with pytest.raises(UserError) as caught:
            plan_sweep(SweepConfig(vary={"beta": [0.1, 0.2]}), options)
        assert caught.value.code == "eval-trained-on"


def test_the_other_of_two_views_is_trained_on(tmp_path: Path, tiny_model: Path) -> None:
    rows = pair_rows(24)
    for name, held in (("a", rows[:16]), ("b", rows[16:])):
        write_jsonl(tmp_path / f"{name}.jsonl", held)
        precompute(tmp_path / f"{name}.jsonl", tiny_model, tmp_path / "cache")
    summary = train(quick(tmp_path / "cache", tmp_path / "out", eval_view="a", max_steps=1))
    assert (summary.train_pairs, summary.eval_pairs) == (8, 16)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["reference"]["view"] == "b"


def test_a_loss_that_is_not_a_number_stops_before_saving(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = step_module.batch_loss, 0

    def poisoned(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        part = real(*args, **kwargs)
        return step_module.PreferenceLoss(part.losses * (math.nan if calls == 4 else 1), *_rest(part))

    monkeypatch.setattr(step_module, "batch_loss", poisoned)
    with pytest.raises(UserError) as caught:
        train(quick(cache, tmp_path / "out", eval_share=0))
    assert caught.value.code == "training-not-finite"
    assert caught.value.where is not None
    # The second forward of step 2: the third and fourth of its pairs, by their lines.
    rows = plan_schedule(24, batch=4, epochs=1, max_steps=6, seed=42).rows_of_step(1)[2:]
    named = "; ".join(f"{cache.parent / 'pairs.jsonl'}, row {row + 1}" for row in rows)
    assert caught.value.where == f"step 2, at {named}"
    assert [p.name for p in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-00000001"]


def _rest(part: Any) -> tuple[Any, ...]:
    return part.chosen_logps, part.rejected_logps, part.chosen_rewards, part.rejected_rewards, part.sums


@pytest.mark.parametrize("fields", [{"dtype": "bfloat16"}, {"torch_dtype": "bfloat16"}, {"text_config": "bfloat16"}])
def test_the_dtype_of_a_checkpoint_may_stand_in_its_text_part(tmp_path: Path, fields: dict[str, str]) -> None:
    """Qwen3.5's config.json names none at its top; float32 would take twice the memory without a word."""
    model = save_tiny("gemma3", tmp_path / "model")
    file = model / "config.json"
    config = json.loads(file.read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        part.pop("dtype", None)
    if "text_config" in fields:
        config["text_config"]["dtype"] = fields["text_config"]
    else:
        config.update(fields)
    file.write_text(json.dumps(config))
    cuda = torch.device("cuda", 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
        assert resolve_dtype(find_model(str(model)), "auto", cuda) == torch.bfloat16
    config["text_config"].pop("dtype", None)
    file.write_text(json.dumps({name: value for name, value in config.items() if name not in ("dtype", "torch_dtype")}))
    assert resolve_dtype(find_model(str(model)), "auto", cuda) == torch.float32


@pytest.mark.parametrize(
    ("asked", "device", "units", "expected"),
    [
        ("auto", "cpu", False, "float32"),
        ("auto", "cpu", True, "bfloat16"),
        ("auto", "cuda", True, "bfloat16"),
        ("bfloat16", "cpu", False, "bfloat16"),  # what is asked for is what is computed
    ],
)
def test_auto_avoids_emulated_bfloat16(
    tmp_path: Path,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    asked: str,
    device: str,
    units: bool,
    expected: str,
) -> None:
    source = find_model(str(save_tiny_model(tmp_path / "bf16", tokenizer, dtype="bfloat16")))
    monkeypatch.setattr("dpoeng.engine.models.loading.native_bf16", lambda: units)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0) if units else (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    assert str(resolve_dtype(source, asked, torch.device(device))) == f"torch.{expected}"
    if not units:  # a GPU before Ampere: torch would emulate bfloat16, and float16 may overflow, so the user chooses
        for dtype in ("auto", "bfloat16"):
            with pytest.raises(UserError, match="no units for bfloat16"):
                resolve_dtype(source, dtype, torch.device("cuda", 0))
        assert resolve_dtype(source, "float16", torch.device("cuda", 0)) == torch.float16


@pytest.mark.parametrize("lora", [{"bias": "all"}, {"target_modules": ["q_proj", "embed_tokens"]}])
def test_stack_trains_nothing_but_its_own_adapter(tmp_path: Path, tiny_model: Path, lora: dict[str, Any]) -> None:
    """What SFT trained beside plain LoRA, its biases and embeddings, is part of the reference."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    settings: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"], **lora}
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), LoraConfig(**settings)).save_pretrained(
        tmp_path / "sft"
    )
    lm = load_model(find_model(str(tiny_model)), quantization="none", dtype="auto", device=torch.device("cpu"))
    lm = add_policy_adapter(lm, "stack", find_adapter(str(tmp_path / "sft")), {"target_modules": ["q_proj"], "r": 4})
    names = [name for name, _ in lm.trainable_parameters()]
    assert len(names) == 4
    assert all(f".{POLICY_ADAPTER}." in name for name in names)
