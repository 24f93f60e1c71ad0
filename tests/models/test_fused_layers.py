"""Fused kernels in a model's layers: found by trial, with the same numbers; other layers stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from dpoeng.engine.models.fused import install, recognize
from dpoeng.engine.models.fused.install import ROTARY, use_fused_kernels, what_disagrees
from dpoeng.engine.models.fused.recognize import gate_of, norm_of, rotates_halves
from dpoeng.engine.models.loading import empty_model
from dpoeng.engine.models.model_config import auto_class, config_of
from dpoeng.kernels.fused import gated as gated_module
from dpoeng.kernels.fused import rms_norm as norm_module

COMMON = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip
# Norms and gated MLPs of two layers. Qwen3 and Gemma 3 norm their heads too; Gemma's norms add 1 to the weight and its
# gate is GELU's; Phi 3 has gate and up in one matrix; GPT-2 has neither.
FAMILIES = {
    "llama": (5, 2), "qwen2": (5, 2), "qwen3": (9, 2), "mistral": (5, 2), "gemma": (5, 2), "gemma2": (9, 2),
    "gemma3_text": (13, 2), "phi3": (5, 0), "olmo2": (9, 2), "gpt2": (0, 0),
}  # fmt: skip


def tiny(family: str) -> Any:
    torch.manual_seed(0)
    fields = {"model_type": family, **COMMON}
    if family == "gpt2":
        fields |= {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
    config = config_of(fields)
    model = auto_class(config).from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    model.requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():  # norms whose weights are all alike would hide a wrong formula
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The ways that a GPU takes, on CPU tensors; files of models get their own functions back."""
    import sys

    monkeypatch.setattr(install, "multiplies_as_cpu", lambda _: False)
    yield
    for file in list(sys.modules.values()):
        original = getattr(vars(file).get(ROTARY), "of_transformers", None)
        if original is not None:
            setattr(file, ROTARY, original)


def results(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and the gradient of the embeddings."""
    ids = torch.arange(14).view(2, 7)
    inputs = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=inputs, use_cache=False).logits
    pull = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    (grad,) = torch.autograd.grad(logits, inputs, pull)
    return logits.detach(), grad


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_models_numbers_are_its_own(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    model = tiny(family)
    plain = results(model)
    assert use_fused_kernels(model, torch.device("cpu")) == ()
    calls = {"norm": 0, "gate": 0, "rotary": 0}

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    for name, kernel in (("norm", "rms_norm"), ("gate", "gated"), ("rotary", "rotary")):
        monkeypatch.setattr(install, kernel, counting(name, getattr(install, kernel)))
    fused = results(model)
    norms, gates = FAMILIES[family]
    assert calls == {"norm": norms, "gate": gates, "rotary": 0 if family == "gpt2" else 2}
    for found, expected in zip(fused, plain, strict=True):
        assert float((found - expected).norm() / expected.norm()) < 2e-6


def test_on_a_cpu_the_models_own_forward_runs() -> None:
    model = tiny("qwen2")
    plain = results(model)
    use_fused_kernels(model, torch.device("meta"))
    assert all(torch.equal(*both) for both in zip(results(model), plain, strict=True))


class Centered(nn.Module):
    """LayerNorm without a bias: an RMSNorm but for the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class Gate(nn.Module):
    def __init__(self, act: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
        self.act_fn = act

    def forward(self, x: torch.Tensor) -> Any:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def test_what_is_something_else_is_left_alone() -> None:
    assert norm_of(Centered()) is None
    assert norm_of(nn.LayerNorm(8)) is None
    assert gate_of(Gate(nn.functional.silu)) is False
    assert gate_of(Gate(lambda x: nn.functional.gelu(x, approximate="tanh"))) is True
    for act in (nn.functional.gelu, torch.relu, lambda x: nn.functional.silu(x).clamp(max=7)):
        assert gate_of(Gate(act)) is None

    def interleaved(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        def turn(x: torch.Tensor) -> torch.Tensor:
            half = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
            return x * cos.unsqueeze(1) + half * sin.unsqueeze(1)

        return turn(q), turn(k)

    assert not rotates_halves(interleaved)


@pytest.mark.usefixtures("on_gpu")
def test_a_norm_that_is_trained_keeps_its_gradient() -> None:
    model = tiny("llama")
    use_fused_kernels(model, torch.device("cpu"))
    weight = model.model.norm.weight.requires_grad_()
    model(input_ids=torch.arange(6)[None]).logits.sum().backward()
    assert float(weight.grad.abs().sum()) > 0


def test_a_kernel_that_is_wrong_here_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert what_disagrees(torch.device("cpu")) is None
    monkeypatch.setattr(install, "gated", lambda gate, up: gated_module.gated(gate, up) * 1.001)
    assert what_disagrees(torch.device("cpu")) == "a gated activation differs from PyTorch's on this GPU"

    def fails(*_: Any) -> torch.Tensor:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(norm_module, "_normalize", fails)
    assert "RMSNorm fails (RuntimeError: " in str(what_disagrees(torch.device("cpu")))


def test_an_empty_model_has_them() -> None:
    """So the forecast of memory and the counts of a step see what a GPU runs."""
    lm = empty_model({"model_type": "qwen2", **COMMON}, quantization="none", dtype=torch.bfloat16)
    patched = [module for module in lm.base.modules() if "forward" in module.__dict__]
    patched = [module for module in patched if type(module) is not nn.Linear]  # on CPUs without units for bfloat16
    assert len(patched) == 7


def test_trials_leave_the_model_as_it_was() -> None:
    model = tiny("qwen3")
    before = dict(model.named_parameters())
    for module in model.modules():
        norm_of(module)
        gate_of(module)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert recognize.norm_of(model.model.norm) == (pytest.approx(1e-6), 0.0)
