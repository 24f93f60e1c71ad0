"""Mixtures of experts: stacks in 8 and 4 bits, their products and gradients, LoRA on them, what is told."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dpoeng.bench.studies.tiny_models import save_tiny, tiny_config, tiny_model
from dpoeng.cache.errors import UserError
from dpoeng.engine.config.fields import Quantization, TrainConfig
from dpoeng.engine.models.adapters import add_policy_adapter, lora_arguments
from dpoeng.engine.models.experts.forward import experts_forward
from dpoeng.engine.models.experts.stacks import experts_modules, held_tensors, stack_names, stack_of
from dpoeng.engine.models.loading import load_model
from dpoeng.engine.models.lora_product import use_peft_product
from dpoeng.engine.models.model import CausalLM, set_mode
from dpoeng.engine.models.sources import find_model

CPU = torch.device("cpu")

# Gates set side by side, and every second column with a bias and transposed weights; a shared expert; no gate.
FAMILIES = ("qwen3_moe", "gpt_oss", "qwen3_5_moe_text", "nemotron_h")


def load(folder: Path, quantization: Quantization, dtype: str = "float32") -> CausalLM:
    lm = load_model(find_model(str(folder)), quantization=quantization, dtype=dtype, device=CPU, tokenizer=False)
    set_mode(lm, training=False)
    return lm


def widened(lm: CausalLM) -> Any:
    """A copy of a quantised model with the experts' weights as plain parameters, and transformers' own forward."""
    dense = copy.deepcopy(lm.base)
    for (_, module), (_, held) in zip(experts_modules(dense), experts_modules(lm.base), strict=True):
        for name in stack_names(module):
            weight = stack_of(held, name).widened(0, len(getattr(held, name)), lm.dtype)
            setattr(module, name, nn.Parameter(weight.transpose(1, 2) if held.is_transposed else weight))
        del module.__dict__["forward"]
    return dense


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_quantized_experts_are_the_model_of_their_widened_weights(
    model_type: str, quantization: Quantization, tmp_path: Path
) -> None:
    lm = load(save_tiny(model_type, tmp_path / "model"), quantization)
    assert held_tensors(lm.base)
    dense = widened(lm)
    ids = torch.randint(0, 320, (2, 11), generator=torch.Generator().manual_seed(0))
    results = []
    for model in (lm.base, dense):
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_(True)
        model(inputs_embeds=embedded, use_cache=False).logits.log_softmax(-1)[..., 7].sum().backward()
        results.append((model(input_ids=ids, use_cache=False).logits.detach(), embedded.grad))
    (ours, our_gradient), (plain, plain_gradient) = results
    torch.testing.assert_close(ours, plain, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(our_gradient, plain_gradient, atol=2e-5, rtol=1e-4)


def test_experts_are_small_in_memory_and_near_the_originals(tmp_path: Path) -> None:
    folder = save_tiny("qwen3_moe", tmp_path / "model")
    exact = load(folder, "none")
    sizes = {name: p.numel() for n, m in experts_modules(exact.base) for name, p in m.named_parameters()}
    weights = sum(p.numel() for _, m in experts_modules(exact.base) for p in m.parameters())
    assert set(sizes) == {"gate_up_proj", "down_proj"}
    for quantization, bits, far in (("8bit", 8, 0.01), ("4bit", 4, 0.12)):
        lm = load(folder, quantization)  # type: ignore[arg-type]
        codes = [t for t in held_tensors(lm.base) if t.dtype in (torch.int8, torch.uint8) and t.numel() > 300]
        assert sum(t.nbytes for t in codes if t.dim() > 1) == weights * bits // 8
        parameters = [p for _, m in experts_modules(lm.base) for p in m.parameters()]
        assert sum(p.untyped_storage().nbytes() for p in parameters) == 4 * len(parameters)  # placeholders of one NaN
        assert all(bool(p[0, 0, 0].isnan()) for p in parameters)
        for (_, module), (_, held) in zip(experts_modules(exact.base), experts_modules(lm.base), strict=True):
            for name in stack_names(module):
                weight = getattr(module, name)
                found = stack_of(held, name).widened(0, len(weight), torch.float32)
                assert (found - weight).norm() < far * weight.norm()


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_lora_on_stacks_is_pefts(model_type: str) -> None:
    """What peft forms as one weight and we as two products differs by rounding alone."""
    model = tiny_model(tiny_config(model_type))
    lm = CausalLM(model, model, None, CPU, torch.float32, "none", model.config._attn_implementation)
    config = TrainConfig(cache="x", lora_r=3, lora_target_parameters=("gate_up_proj", "down_proj"))
    lm = add_policy_adapter(lm, "new", None, lora_arguments(config))
    trainable = lm.trainable_parameters()
    assert {name.split(".")[-4] for name, _ in trainable if "experts" in name} == {"experts", "base_layer"}
    with torch.no_grad():
        for i, (_, parameter) in enumerate(trainable):
            parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(i))
    ids = torch.randint(0, 320, (2, 11), generator=torch.Generator().manual_seed(0))
    results = []
    for own in (True, False):
        if not own:
            use_peft_product(lm.model)
        set_mode(lm, training=True)
        logits = lm.model(input_ids=ids, use_cache=False).logits
        logits.log_softmax(-1)[..., 7].sum().backward()
        results.append((logits.detach(), [p.grad for _, p in trainable]))
        lm.model.zero_grad()
    torch.testing.assert_close(results[0][0], results[1][0], atol=2e-5, rtol=1e-5)
    for (name, _), ours, pefts in zip(trainable, results[0][1], results[1][1], strict=True):
        assert ours is not None, name
        assert (ours - pefts).norm() <= 1e-4 * pefts.norm() + 1e-6, name


def test_adapters_can_be_switched_off_and_stacks_stay_frozen(tmp_path: Path) -> None:
    lm = load(save_tiny("qwen3_moe", tmp_path / "model"), "4bit")
    ids = torch.arange(9)[None]
    before = lm.base(input_ids=ids, use_cache=False).logits
    config = TrainConfig(cache="x", lora_r=2, lora_target_parameters=("gate_up_proj",))
    lm = add_policy_adapter(lm, "new", None, lora_arguments(config))
    assert all("lora_" in name for name, _ in lm.trainable_parameters())
    torch.testing.assert_close(lm.model(input_ids=ids, use_cache=False).logits, before, atol=0, rtol=0)
    with torch.no_grad():
        for _, parameter in lm.trainable_parameters():
            parameter.add_(0.1)
    assert not torch.allclose(lm.model(input_ids=ids, use_cache=False).logits, before)
    with lm.model.disable_adapter():
        torch.testing.assert_close(lm.model(input_ids=ids, use_cache=False).logits, before, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("model_type", "adapted"),
    [
        ("qwen3_moe", {"k_proj", "o_proj", "q_proj", "v_proj"}),
        ("deepseek_v3", {"kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "q_a_proj", "q_b_proj"}),
        ("gpt_oss", {"k_proj", "o_proj", "q_proj", "v_proj"}),
        ("llama4_text", {"down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"}),
    ],
)
def test_all_linear_leaves_routers_and_routed_experts_alone(model_type: str, adapted: set[str]) -> None:
    model = tiny_model(tiny_config(model_type))
    lm = CausalLM(model, model, None, CPU, torch.float32, "none", model.config._attn_implementation)
    lm = add_policy_adapter(lm, "new", None, lora_arguments(TrainConfig(cache="x", lora_r=2)))
    assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name, _ in lm.trainable_parameters()} == adapted
    assert not [name for name, _ in lm.trainable_parameters() if ".experts." in name]
    assert any("routers and routed experts stay as they are" in remark for remark in lm.remarks)


def test_a_token_meets_its_own_experts_only() -> None:
    """By hand: one token, one expert of three, a gate of SiLU."""
    experts = next(module for _, module in experts_modules(tiny_model(tiny_config("qwen3_moe"))))
    x = torch.linspace(-1, 1, 32)[None]
    found = experts_forward(experts, x, torch.tensor([[2]]), torch.tensor([[0.5]]))
    gate, up = (experts.gate_up_proj[2] @ x[0]).chunk(2)
    expected = 0.5 * (experts.down_proj[2] @ (torch.nn.functional.silu(gate) * up))
    torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=1e-5)


def test_all_linear_on_a_mixture_of_experts_without_experts() -> None:
    """peft adds stacks of experts to `all-linear` by the model's type; a checkpoint may have dense layers alone."""

    def dense() -> CausalLM:
        config = tiny_config("beam")
        config.mlp_layer_types = ["dense"] * config.num_hidden_layers
        model = tiny_model(config)
        return CausalLM(model, model, None, CPU, torch.float32, "none", model.config._attn_implementation)

    lm = add_policy_adapter(dense(), "new", None, {"r": 2, "target_modules": "all-linear"})
    adapted = {name.split(".lora_")[0].rsplit(".", 1)[1] for name, _ in lm.trainable_parameters()}
    assert adapted == {"k_proj", "o_proj", "q_proj", "v_proj"}
    assert any("all-linear leaves out down_proj, gate.weight, gate_up_proj" in remark for remark in lm.remarks)
    named = {"r": 2, "target_modules": ["q_proj"], "target_parameters": ["gate_up_proj"]}
    with pytest.raises(UserError, match="targets are missing"):
        add_policy_adapter(dense(), "new", None, named)
