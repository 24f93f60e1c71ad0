"""What a GPU must show, in one command: `make test-gpu`. Kernels, attention, both phases, memory, speed's counters.

Every test takes the device. On a CPU a small case of it belongs to the ordinary suite, so that what runs on a card is
known to run; `gpu` marks the cases of a card, which fail, and are not skipped, where there is none.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from dpoeng_testing import pair_rows, save_tiny_model, tree, write_jsonl
from families import SHARED_FAMILIES, make, own_logps, some_groups
from head_problems import MAPS, check_no_further_than_eager, problem, worst

from dpoeng.bench.measuring.workload import save_small_model
from dpoeng.bench.memory import MemorySettings, bench_memory
from dpoeng.bench.phases import PhaseSettings, bench_phases
from dpoeng.cli.main import main
from dpoeng.engine.config.fields import Attention, PrecomputeConfig, Quantization, TrainConfig
from dpoeng.engine.models.model import CausalLM, device_name
from dpoeng.engine.models.offload import HostInputs
from dpoeng.engine.recipes.precompute import precompute_reference
from dpoeng.engine.recipes.train import train
from dpoeng.engine.scoring.attention import use_layout
from dpoeng.engine.scoring.choose_layout import choose_layout
from dpoeng.engine.scoring.forward import score_groups
from dpoeng.kernels.token_logps import token_logps

CARD = pytest.param("cuda", marks=pytest.mark.gpu)
everywhere = pytest.mark.parametrize("device", ["cpu", CARD], indirect=True)
on_a_card = pytest.mark.parametrize("device", [CARD], indirect=True)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda":
        assert torch.cuda.is_available(), "these tests are for a machine with a GPU that PyTorch can use"
    return torch.device(request.param)


def on(device: torch.device, *things: Any) -> Any:
    return [thing.to(device) if torch.is_tensor(thing) else thing for thing in things]


@everywhere
# N rows, V words, H wide: Qwen2.5's vocabulary at a prime number of rows; one that no tile divides.
@pytest.mark.parametrize("options", MAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "v", "h"), [(1031, 151936, 128), (37, 1023, 72)])
def test_log_probs_and_gradients(
    device: torch.device, n: int, v: int, h: int, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    if device.type == "cpu":
        n, v = min(n, 64), min(v, 1500)  # the ordinary suite has the rest in test_kernels_cpu
    *tensors, options = problem(n, v, h, dtype, options)
    hidden, weight, targets = on(device, *tensors)
    options = dict(zip(options, on(device, *options.values()), strict=True))
    true_logps, most = check_no_further_than_eager((hidden, weight, targets, options), units=4)
    with torch.no_grad():  # the fused kernel of scoring
        scored = token_logps(hidden, weight, targets, **options)
    assert worst(scored, true_logps) <= most
    assert bool((scored <= 0).all())


@on_a_card
def test_logits_are_never_whole(device: torch.device) -> None:
    """Scoring 4,096 positions over 152k words: their logits would be 2.3 GiB in float32."""
    hidden = torch.randn(4096, 256, device=device, dtype=torch.bfloat16)
    weight = torch.randn(151936, 256, device=device, dtype=torch.bfloat16)
    targets = torch.randint(0, 151936, (4096,), device=device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        token_logps(hidden, weight, targets)
    assert torch.cuda.max_memory_allocated() - before < 64 * 2**20
    token_logps(hidden.requires_grad_(), weight, targets).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 2**30


def moved(name: str, device: torch.device, dtype: torch.dtype) -> CausalLM:
    lm = make(name, SHARED_FAMILIES[name], dtype)
    lm.base.to(device)
    lm.device = device
    return lm


@pytest.mark.parametrize(
    ("device", "way", "dtype", "tolerance"),
    [
        ("cpu", "segments", torch.float32, 1e-4),
        ("cpu", "segments", torch.bfloat16, 0.15),
        *(
            pytest.param("cuda", way, dtype, tolerance, marks=pytest.mark.gpu)
            for way, dtype, tolerance in (
                ("segments", torch.float32, 1e-4),
                ("segments", torch.bfloat16, 0.15),
                ("varlen", torch.bfloat16, 0.15),
            )
        ),
    ],
    indirect=["device"],
)
@pytest.mark.parametrize("name", ["Qwen2Config", "LlamaConfig", "MistralConfig"])
def test_attention_over_shared_prompts(
    device: torch.device, name: str, way: Attention, dtype: torch.dtype, tolerance: float
) -> None:
    """Each way against the same weights in float64 on the CPU, text by text; gradients against segments in float32."""
    real = moved(name, torch.device("cpu"), torch.float32)
    real.base.to(dtype).double()  # the weights as they are rounded
    expected = own_logps(real, some_groups())

    lm = moved(name, device, dtype)
    weights = [p.requires_grad_() for n, p in lm.base.named_parameters() if "_proj" in n]
    use_layout(lm, "shared")
    lm.attention = way
    scored, _ = score_groups(lm, some_groups())
    assert float((scored.detach().double().cpu() - expected).abs().max()) <= tolerance
    scored.sum().backward()

    exact = moved(name, torch.device("cpu"), torch.float32)
    exact.base.to(dtype).float()
    exact_weights = [p.requires_grad_() for n, p in exact.base.named_parameters() if "_proj" in n]
    use_layout(exact, "shared")
    score_groups(exact, some_groups())[0].sum().backward()
    for ours, theirs in zip(weights, exact_weights, strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        gap = (ours.grad.float().cpu() - theirs.grad).norm() / theirs.grad.norm()
        assert float(gap) <= (1e-3 if dtype == torch.float32 else 0.1)


@on_a_card
@pytest.mark.parametrize("name", ["Qwen2Config", "MistralConfig"])
def test_the_last_layer_over_scored_positions(device: torch.device, name: str) -> None:
    """What a run does on a card: varlen is chosen, and behind the last attention only scored positions are computed."""
    real = moved(name, torch.device("cpu"), torch.float32)
    real.base.to(torch.bfloat16).double()
    expected = own_logps(real, some_groups())
    lm = moved(name, device, torch.bfloat16)
    weights = [p.requires_grad_() for n, p in lm.base.named_parameters() if "_proj" in n]
    choose_layout(lm)
    assert (lm.layout, lm.attention, lm.scored_end) == ("shared", "varlen", True), lm.layout_reason
    gradients = []
    for narrow in (True, False):
        lm.scored_end = narrow
        scored, _ = score_groups(lm, some_groups())
        assert float((scored.detach().double().cpu() - expected).abs().max()) <= 0.15
        gradients.append(torch.autograd.grad(scored.sum(), weights))
    for ours, theirs in zip(*gradients, strict=True):
        assert float((ours - theirs).float().norm() / theirs.float().norm()) <= 0.05


@on_a_card
def test_inputs_of_layers_wait_on_the_host(device: torch.device) -> None:
    """Copies in a separate stream change no bit, in steps that follow each other without a pause."""
    layers = [torch.nn.Linear(2048, 2048, device=device, dtype=torch.bfloat16) for _ in range(6)]
    x = torch.randn(4096, 2048, device=device, dtype=torch.bfloat16, requires_grad=True)
    found: list[list[torch.Tensor]] = []
    for checkpoint in (partial(torch.utils.checkpoint.checkpoint, use_reentrant=False), HostInputs().checkpoint):
        found.append([])
        for _ in range(20):
            out = x
            for layer in layers:
                out = checkpoint(layer, out)
            found[-1].append(torch.autograd.grad(out.square().sum(), x)[0])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


class StoppedError(Exception):
    """What ends a run in the middle."""


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """Wide enough that bitsandbytes quantises it, with heads of 64."""
    return save_tiny_model(tmp_path_factory.mktemp("model") / "wide", tokenizer, hidden=256, dtype="bfloat16")


@pytest.mark.parametrize(
    ("device", "quantization", "dtype"),
    [
        ("cpu", "none", "float32"),
        ("cpu", "4bit", "float32"),
        *(
            pytest.param("cuda", quantization, dtype, marks=pytest.mark.gpu)
            for quantization, dtype in (
                ("none", "float32"),
                ("none", "bfloat16"),
                ("8bit", "bfloat16"),
                ("4bit", "bfloat16"),
            )
        ),
    ],
    indirect=["device"],
)
def test_both_phases_and_a_resume(
    device: torch.device,
    tmp_path: Path,
    wide_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    quantization: Quantization,
    dtype: str,
) -> None:
    """The policy starts at its reference; loss and margins move; a run that was stopped leaves the bytes of one that
    was not, which on a GPU is what `full_determinism` is for."""
    pairs = write_jsonl(tmp_path / "pairs.jsonl", pair_rows(16))
    fields = {"quantization": quantization, "dtype": dtype, "device": str(device)}
    precompute_reference(PrecomputeConfig(pairs=(pairs,), model=str(wide_model), cache=tmp_path / "cache", **fields))

    def config(out: str) -> TrainConfig:
        return TrainConfig(
            cache=tmp_path / "cache",
            output_dir=tmp_path / out,
            device=str(device),
            full_determinism=True,
            max_steps=6,
            save_steps=3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=2e-3,
            lora_r=8,
            lora_dropout=0.1,
            eval_share=0.0,
        )

    summary = train(config("whole"))
    assert summary.parity is not None
    # In 16 bits on a card a row's last bits depend on how many others a product has; the mean has another limit.
    assert summary.parity.max_diff <= (1e-4 if dtype == "float32" else 0.2)
    assert summary.first["loss"] == pytest.approx(0.6931, abs=0.02)
    assert summary.last["loss"] < summary.first["loss"]
    assert summary.device == device_name(device)
    assert not torch.are_deterministic_algorithms_enabled()

    def stop(values: dict[str, Any]) -> None:
        assert torch.are_deterministic_algorithms_enabled()
        if values["step"] == 4:
            raise StoppedError

    with pytest.raises(StoppedError):
        train(config("again"), on_metrics=stop)
    resumed = train(config("again"))
    assert resumed.resumed_from == 3
    assert tree(tmp_path / "again", "adapter") == tree(tmp_path / "whole", "adapter")


@on_a_card
def test_the_plan_is_what_is_measured(device: torch.device, tmp_path: Path) -> None:
    """Predicted and measured peaks of tensors, with each kind of reference."""
    model = save_small_model(tmp_path / "model")
    record = bench_memory(MemorySettings(model=str(model), device=str(device), batch_size=1))
    json.dumps(record, allow_nan=False)
    for case in record["results"]:
        if case["case"] != "two models, whole logits":
            assert abs(case["difference"]) < 0.05, case


@on_a_card
def test_the_counters_of_a_benchmark(device: torch.device, tmp_path: Path) -> None:
    """CUDA events, the pool, the card's limits: every figure of `bench phases` is there and possible."""
    model = save_small_model(tmp_path / "model")
    record = bench_phases(PhaseSettings(model=str(model), device=str(device), steps=2, repeats=2, batch_size=2))
    json.dumps(record, allow_nan=False)
    assert record["device_kind"] == "GPU"
    for result in record["results"]:
        assert result["pairs_per_s"] > 0
        assert 0 < result["of_gemm"] < 1.2
        assert result["peak_bytes"] > 0
        total = sum(result["wall_s"]) / len(result["wall_s"])
        assert sum(part["wall_s"] for part in result["split"].values()) <= 1.2 * total
        assert result["pool"]["reserved_bytes"] > 0


@on_a_card
def test_doctor_finds_the_libraries_at_work(device: torch.device, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["doctor"])
    assert not ended.value.code, capsys.readouterr().out
