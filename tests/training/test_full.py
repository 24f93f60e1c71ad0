"""Full fine-tuning: gradients and a run against plain PyTorch, masters, resume, what it leaves, its memory."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dpoeng_testing import pair_rows, save_tiny_model, tree, write_jsonl
from model_fields import fields
from safetensors.torch import load_file

from dpoeng.bench.measuring.allocator import trace_allocator
from dpoeng.bench.memory import tensor_bytes, training_run
from dpoeng.cache.errors import UserError
from dpoeng.cache.reader import View
from dpoeng.cli.main import main
from dpoeng.engine.config.fields import PrecomputeConfig, TrainConfig
from dpoeng.engine.losses.names import LossSettings
from dpoeng.engine.memory.any_depth import step_memory
from dpoeng.engine.memory.simulate import Pair, Setup, trace_step
from dpoeng.engine.models.full_finetuning import train_all
from dpoeng.engine.models.loading import load_model
from dpoeng.engine.models.model import CausalLM, enable_gradient_checkpointing, set_mode
from dpoeng.engine.models.sources import find_model
from dpoeng.engine.recipes.phase_two.summary import TrainSummary
from dpoeng.engine.recipes.precompute import precompute_reference
from dpoeng.engine.recipes.train import train
from dpoeng.engine.scoring.attention import use_layout
from dpoeng.engine.training import loop as loop_module
from dpoeng.engine.training.batch_loss import batch_loss
from dpoeng.engine.training.step import train_step
from dpoeng.kernels import cpu_linear


def settings(**changes: Any) -> dict[str, Any]:
    """Six steps of two forwards, the last of an epoch smaller."""
    return {
        "use_peft": False,
        "max_steps": 6,
        "save_steps": 1,
        "save_total_limit": 6,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "parity_pairs": 2,
        "eval_share": 0.2,
        "eval_steps": 3,
        **changes,
    }


def run(cache: Path, out: Path, **changes: Any) -> TrainSummary:
    return train(TrainConfig(cache=cache, output_dir=out, **settings(**changes)))


def make_cache(folder: Path, model: Path, count: int = 14, **fields: Any) -> Path:
    folder.mkdir(exist_ok=True)
    pairs = write_jsonl(folder / "pairs.jsonl", pair_rows(count))
    precompute_reference(PrecomputeConfig(pairs=(pairs,), model=str(model), cache=folder / "cache", **fields))
    return folder / "cache"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    return make_cache(tmp_path_factory.mktemp("full"), tiny_model)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A model whose head is its embedding, in bfloat16."""
    from transformers import AutoModelForCausalLM

    folder = save_tiny_model(tmp_path_factory.mktemp("tied") / "model", tokenizer, seed=3)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "tie_word_embeddings": True}))
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(folder)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def tied_cache(tmp_path_factory: pytest.TempPathFactory, tied: Path) -> Path:
    return make_cache(tmp_path_factory.mktemp("tied-cache"), tied, dtype="bfloat16")


def loaded(folder: Path, dtype: str = "float32") -> CausalLM:
    lm = load_model(
        find_model(str(folder)), quantization="none", dtype=dtype, device=torch.device("cpu"), tokenizer=False
    )
    lm = train_all(lm)
    set_mode(lm, training=True)
    use_layout(lm, "shared")
    return lm


def plain_loss(model: Any, pairs: Any, beta: float = 0.1) -> torch.Tensor:
    """DPO as its paper has it (eq. 7), response by response, full logits."""
    losses = []
    for pair in pairs:
        ratios = []
        for ids, reference in (
            (pair.ids.chosen_ids, pair.chosen_logps),
            (pair.ids.rejected_ids, pair.rejected_logps),
        ):
            tokens = torch.from_numpy(np.concatenate([pair.ids.prompt_ids, ids]).astype(np.int64))
            begin = len(pair.ids.prompt_ids)
            logps = model(tokens[None], use_cache=False).logits[0, begin - 1 : -1].log_softmax(-1)
            ratios.append(logps.gather(1, tokens[begin:, None]).sum() - float(reference.astype(np.float64).sum()))
        losses.append(-torch.nn.functional.logsigmoid(beta * (ratios[0] - ratios[1])))
    return torch.stack(losses).mean()


# --------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("which", ["untied", "tied"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_weights_gradient_is_autograds_in_float64(
    tiny_model: Path, cache: Path, tied: Path, tied_cache: Path, which: str, checkpointing: bool
) -> None:
    """Shared prompts and the head in tiles, against full logits of each response, both in float64."""
    from transformers import AutoModelForCausalLM

    folder, view = (tiny_model, View.open(cache)) if which == "untied" else (tied, View.open(tied_cache))
    pairs = [view[row] for row in range(3)]
    lm = loaded(folder)
    lm.model.double()
    if checkpointing:
        enable_gradient_checkpointing(lm)
        set_mode(lm, training=True)
    batch_loss(lm, pairs, LossSettings.of(TrainConfig())).losses.mean().backward()
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).double()
    plain_loss(plain, pairs).backward()
    expected = dict(plain.named_parameters())
    found = dict(lm.trainable_parameters())
    assert found.keys() == expected.keys()
    assert ("lm_head.weight" in found) == (which == "untied")
    for name, parameter in found.items():
        assert parameter.grad is not None
        truth = expected[name].grad
        assert truth is not None
        assert float(truth.norm()) > 1e-5
        # The losses are formed in float32 from the log-probs, so their derivative has its digits.
        assert float((parameter.grad - truth).norm() / truth.norm()) < 1e-6, name


def test_a_bfloat16_models_gradients_add_up_in_float32(tied: Path, tied_cache: Path) -> None:
    """Forwards of a step are summed in the masters; the weights themselves keep no gradient."""
    view = View.open(tied_cache)
    lm = loaded(tied, "bfloat16")
    single = []
    for row in range(4):
        batch_loss(lm, [view[row]], LossSettings.of(TrainConfig())).losses.mean().backward()
        single.append({name: master.grad.clone() for name, master in lm.trainable_parameters()})  # type: ignore[union-attr]
        for _, master in lm.trainable_parameters():
            master.grad = None
    for row in range(4):
        batch_loss(lm, [view[row]], LossSettings.of(TrainConfig())).losses.mean().backward()
    for name, master in lm.trainable_parameters():
        assert master.dtype == torch.float32
        assert master.grad is not None
        assert torch.equal(master.grad, single[0][name] + single[1][name] + single[2][name] + single[3][name])
    assert all(weight.dtype == torch.bfloat16 and weight.grad is None for weight in lm.base.parameters())


# --------------------------------------------------------------------------- runs


def test_a_run_is_plain_pytorchs(tmp_path: Path, cache: Path, tiny_model: Path) -> None:
    """Against a hand-written loop: AdamW, linear schedule, clipping, full logits. And it starts at ln 2, and learns."""
    from transformers import AutoModelForCausalLM

    from dpoeng.engine.recipes.inputs import split
    from dpoeng.engine.training.order import plan_schedule

    steps = 5
    # An epsilon that noise of 1e-7 does not reach: AdamW's first step would turn its sign into a whole step.
    summary = run(
        cache, tmp_path / "out", max_steps=steps, warmup_ratio=0.0, weight_decay=0.1, learning_rate=2e-3,
        adam_epsilon=1e-4,
    )  # fmt: skip
    assert summary.mode == "full"
    assert summary.first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert summary.last["loss"] < 0.5

    view = View.open(cache)
    config = TrainConfig(**settings())
    rows, _ = split(view, None, config)
    schedule = plan_schedule(len(rows), batch=4, epochs=3, max_steps=steps, seed=config.seed)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=2e-3, eps=1e-4)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - step / steps)
        loss = plain_loss(model, [view[rows[i]] for i in schedule.rows_of_step(step)])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if "loss" in line] == pytest.approx(losses, rel=1e-4)
    found = load_file(tmp_path / "out" / "model" / "model.safetensors")
    start = load_file(tiny_model / "model.safetensors")
    for name, parameter in model.named_parameters():
        assert float((found[name] - start[name]).abs().max()) > 1e-4
        torch.testing.assert_close(found[name], parameter.detach(), atol=2e-5, rtol=0)


def test_small_updates_are_not_lost_in_bfloat16(tmp_path: Path, tied: Path, tied_cache: Path) -> None:
    """At 1e-6 no weight of bfloat16 would move by a rounding step; their masters do, and the checkpoint holds these."""
    run(tied_cache, tmp_path / "out", learning_rate=1e-6, max_steps=3, warmup_ratio=0.0)
    start = load_file(tied / "model.safetensors")
    held = load_file(tmp_path / "out" / "checkpoint-00000003" / "parameters.safetensors")
    moved = {name: (value - start[name].float()).abs() for name, value in held.items()}
    assert all(value.dtype == torch.float32 for value in held.values())
    name = "model.layers.0.mlp.down_proj.weight"
    assert 1e-6 < float(moved[name].max()) < 4e-6
    assert float((moved[name] > 1e-7).float().mean()) > 0.9
    saved = load_file(tmp_path / "out" / "model" / "model.safetensors")
    assert torch.equal(saved[name], held[name].to(torch.bfloat16))
    assert float((saved[name] != start[name]).float().mean()) < 0.05


def outcome(out: Path) -> dict[str, str]:
    return tree(out, "model", "checkpoint-00000006") | {"metrics": (out / "metrics.jsonl").read_text()}


class Killed(BaseException):
    """Stands for SIGKILL."""


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit"])
def test_resume_leaves_the_same_bytes(
    tmp_path: Path, tied_cache: Path, monkeypatch: pytest.MonkeyPatch, optim: str
) -> None:
    changes = {"optim": optim, "load_best_model_at_end": True, "eval_steps": 2}
    run(tied_cache, tmp_path / "whole", **changes)
    real = loop_module.train_step
    for stop in (1, 4):
        out = tmp_path / f"out{stop}"

        def dying(a_run: Any, step: int, stop: int = stop) -> Any:
            if step == stop:
                raise Killed
            return real(a_run, step)

        monkeypatch.setattr(loop_module, "train_step", dying)
        with pytest.raises(Killed):
            run(tied_cache, out, **changes)
        monkeypatch.undo()
        assert not (out / "model").exists()
        assert run(tied_cache, out, **changes).resumed_from == stop
        assert outcome(out) == outcome(tmp_path / "whole")
        assert run(tied_cache, out, **changes).already_complete


# --------------------------------------------------------------------------- what comes of it


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tied_cache: Path) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    run(tied_cache, out, learning_rate=5e-3)
    return out


def command(*line: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(list(line))
    assert stop.value.code == 0


def test_the_checkpoint_is_plain_transformers(tied: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the lines of run.json: the head still tied, the tokenizer beside it, config.json but for nothing as it was."""
    from transformers import AutoTokenizer

    monkeypatch.chdir(finished)
    scope: dict[str, Any] = {}
    exec("\n".join(json.loads((finished / "run.json").read_text())["load"]), scope)
    model = scope["model"]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.dtype == torch.bfloat16
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (tied, finished / "model"))
    assert {**before, "dtype": None, "torch_dtype": None} == {**after, "dtype": None, "torch_dtype": None}
    assert AutoTokenizer.from_pretrained(finished / "model").chat_template
    assert not list(finished.glob(".*"))


def test_eval_compare_and_report_of_it(
    finished: Path, tied_cache: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """`eval` finds what the run's last evaluation found, from the saved files; `compare` keeps its answers."""
    last = [json.loads(line) for line in (finished / "evaluations.jsonl").read_text().splitlines()][-1]
    for path in (finished, finished / "model"):
        capsys.readouterr()
        command("eval", "--adapter", str(path), "--json")
        found = json.loads(capsys.readouterr().out)
        assert found["metrics"] == pytest.approx(last["metrics"], rel=1e-5, abs=1e-6)
    command("compare", str(finished), "--count", "2", "--json")
    samples = [json.loads(line) for line in (finished / "samples.jsonl").read_text().splitlines()]
    assert json.loads(capsys.readouterr().out) == samples
    assert any(sample["before"] != sample["after"] for sample in samples)
    command("report", str(finished), "--html", str(tmp_path / "report.html"))
    assert ", complete" in (tmp_path / "report.html").read_text()
    # A checkpoint of which nothing else is known.
    elsewhere = tmp_path / "mine"
    elsewhere.symlink_to(finished / "model")
    capsys.readouterr()
    command("eval", "--adapter", str(elsewhere), "--cache", str(tied_cache), "--json")
    assert json.loads(capsys.readouterr().out)["which"] == "all"


def test_it_is_a_base_for_the_next_run(tmp_path: Path, finished: Path) -> None:
    """Scored and trained again as any other model."""
    again = make_cache(tmp_path, finished / "model", count=4)
    assert run(again, tmp_path / "out", max_steps=1, eval_share=0.0).first["loss"] == pytest.approx(
        math.log(2), abs=1e-6
    )


# --------------------------------------------------------------------------- what does not go


def test_a_reference_with_an_adapter_or_in_eight_bits_is_refused(
    tmp_path: Path, tiny_model: Path, sft_adapter: Path
) -> None:
    with_adapter = make_cache(tmp_path / "a", tiny_model, count=4, adapter=str(sft_adapter))
    in_8_bits = make_cache(tmp_path / "b", tiny_model, count=4, quantization="8bit")
    for folder, said in ((with_adapter, "merge the adapter"), (in_8_bits, "--quantization none")):
        with pytest.raises(UserError) as caught:
            run(folder, tmp_path / "out")
        assert caught.value.code == "full-finetuning"
        assert said in str(caught.value.remedy)
        assert not (tmp_path / "out").exists()
    # What the message says works: the unquantised policy against the quantised reference.
    summary = run(in_8_bits, tmp_path / "out", quantization="none", max_steps=1, eval_share=0.0)
    assert summary.parity is not None
    assert 0 < summary.parity.mean_diff < 0.3


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"lora_r": 8, "lora_dropout": 0.1}, "lora_dropout, lora_r cannot be set"),
        ({"adapter_mode": "stack"}, "adapter_mode cannot be set"),
        ({"adapter": "sft"}, "adapter cannot be set"),
        ({"quantization": "4bit"}, "quantised weights cannot be trained"),
        ({"dtype": "float16"}, "float16 cannot represent"),
    ],
)
def test_settings_of_an_adapter_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TrainConfig(use_peft=False, **values)


# --------------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    ("dtype", "checkpointing", "is_tied", "native"),
    [
        (torch.float32, False, False, False),
        (torch.bfloat16, True, True, True),
        (torch.bfloat16, False, False, True),
        (torch.bfloat16, False, False, False),
    ],
)
def test_the_predicted_peak_is_the_allocators(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    dtype: torch.dtype,
    checkpointing: bool,
    is_tied: bool,
    native: bool,
) -> None:
    """Weights, masters, gradients and moments: the real step's peak by the allocator, within 2 % of the simulated.

    In bfloat16 with its own products and with widened ones, whichever this CPU would take.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    monkeypatch.setattr(cpu_linear, "native_bf16", lambda: native)
    config = TrainConfig(
        use_peft=False,
        gradient_checkpointing=checkpointing,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=1,
    )
    model = fields("qwen2", vocab_size=3000, tie_word_embeddings=is_tied)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**model), dtype=dtype).save_pretrained(tmp_path)
    pairs = [Pair(64, 96, 96)] * 2
    setup = Setup(
        model=json.loads((tmp_path / "config.json").read_text()),
        dtype=dtype,
        quantization="none",
        config=config,
        kernels="cpu",
        accumulates=False,
    )
    predicted = trace_step(setup, pairs).peak()
    weights = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert predicted.by_kind["weights"] == pytest.approx(weights, rel=0.01)
    masters = predicted.by_kind.get("master weights", 0)
    assert masters == (0 if dtype == torch.float32 else pytest.approx(2 * weights, rel=0.01))
    assert predicted.by_kind["optimizer"] == pytest.approx(2 * (masters or predicted.by_kind["weights"]), rel=0.01)

    lm = load_model(
        find_model(str(tmp_path)),
        quantization="none",
        dtype=str(dtype).removeprefix("torch."),
        device=torch.device("cpu"),
        tokenizer=False,
    )
    use_layout(lm, "shared")
    with training_run(lm, [pair.scored() for pair in pairs], config) as a_run:
        train_step(a_run, 0)
        held = tensor_bytes(lm, a_run.optimizer)
        measured = held + trace_allocator(lambda: train_step(a_run, 1), lm.device).peak_bytes
    assert predicted.n_bytes == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("accumulates", [pytest.param(False, marks=pytest.mark.slow), True])
def test_depth_is_extended_exactly(accumulates: bool) -> None:
    setup = Setup(
        model=fields("qwen2", vocab_size=3000, num_hidden_layers=7),
        dtype=torch.bfloat16,
        quantization="none",
        config=TrainConfig(use_peft=False, gradient_checkpointing=True),
        accumulates=accumulates,
    )
    extended, whole = (step_memory(setup, [Pair(40, 60, 50)], whole=way) for way in (False, True))
    assert whole.timeline
    assert not extended.timeline
    assert extended.stretches == whole.stretches
    assert extended.peak == whole.peak


def test_the_plan_of_all_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(fields("qwen2", vocab_size=3000)))
    line = ["plan", "--model", str(tmp_path), "--no-use-peft", "--gpu", "a100-80gb", "--max-length", "128"]
    command(*line, "--json")
    found = json.loads(capsys.readouterr().out)
    parts = found["phase2"]["breakdown_gib"]
    assert {"weights", "master weights", "gradients", "optimizer"} <= parts.keys()
    assert found["phase2"]["suggested"]["use_peft"] is False
    assert found["phase2"]["options_gib"]["a LoRA"] < found["phase2"]["peak_gib"]
    assert not any(name.startswith("quantization") for name in found["phase2"]["options_gib"])
    command(*line, "--no-compare")
    assert "all weights trained" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*line, "--quantization", "8bit"])
    assert "quantised weights cannot be trained" in capsys.readouterr().err


# --------------------------------------------------------------------------- runs one after the other


def test_a_sweep_never_trains_the_weights_of_the_run_before(tmp_path: Path, cache: Path) -> None:
    """Runs share a base in memory where it is frozen; here each starts at the reference, with the bytes of it alone."""
    common = "--max-steps 2 --parity-pairs 2 --eval-share 0.2 --learning-rate 1e-3".split()
    line = ["--cache", str(cache), *common, "--output-dir"]
    command("sweep", "--vary", "use_peft=false,true", "--vary", "beta=0.1,0.3", *line, str(tmp_path / "sweep"))
    command("train", *line, str(tmp_path / "alone"), "--no-use-peft", "--beta", "0.3")
    found = tmp_path / "sweep" / "use_peft=false,beta=0.3"
    assert tree(found, "model") == tree(tmp_path / "alone", "model")
    assert (found / "metrics.jsonl").read_text() == (tmp_path / "alone" / "metrics.jsonl").read_text()
