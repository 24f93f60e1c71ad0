"""Linear layers in 16 bits on a CPU without units for them: against float64, and that models use them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from dpoeng_testing import save_tiny_model
from torch import nn

from dpoeng.engine.models.loading import load_model
from dpoeng.engine.models.lora_product import LoraLinear, LoraProduct
from dpoeng.engine.models.sources import find_model
from dpoeng.engine.scoring.attention import AttentionPlan, shared_prompt_attention
from dpoeng.engine.scoring.layout import GroupSpan
from dpoeng.kernels import cpu_linear
from dpoeng.kernels.cpu_linear import as_on_cpu, dtype_of_products, linear

SIXTEEN = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def no_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_linear, "native_bf16", lambda: False)


def _problem(dtype: torch.dtype, rows: int, n_in: int, n_out: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(rows)
    shapes = [(2, rows, n_in), (n_out, n_in), (n_out,), (2, rows, n_out)]
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize(("rows", "n_in", "n_out"), [(1, 1, 1), (700, 33, 517), (3, 1030, 7)])
@pytest.mark.parametrize("tile_bytes", [cpu_linear.TILE_BYTES, 1])
def test_numbers_and_gradients_are_rounded_once(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rows: int, n_in: int, n_out: int, tile_bytes: int
) -> None:
    """Of float64 they are half a unit in the last place away; so tiles that are cut change nothing but that."""
    monkeypatch.setattr(cpu_linear, "TILE_BYTES", tile_bytes)
    x, weight, bias, upstream = _problem(dtype, rows, n_in, n_out)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    truths = [t.double().requires_grad_() for t in (x, weight, bias)]
    out, truth = linear(*leaves), F.linear(*truths)
    assert out.dtype == dtype
    out.backward(upstream)
    truth.backward(upstream.double())
    for found, expected in [(out, truth), *((a.grad, b.grad) for a, b in zip(leaves[:2], truths[:2], strict=True))]:
        assert found is not None
        assert expected is not None
        assert found.shape == expected.shape
        unit = torch.finfo(dtype).eps * expected.abs() / 2
        summing = 1e-6 * n_in**0.5 * (expected.abs().amax() + 1)
        assert ((found.double() - expected).abs() <= unit + summing + torch.finfo(dtype).tiny).all()
    assert leaves[2].grad is not None
    assert truths[2].grad is not None
    torch.testing.assert_close(leaves[2].grad.double(), truths[2].grad, rtol=2e-2, atol=1.0)


def test_what_needs_no_gradient_gets_none_and_is_not_kept() -> None:
    x, weight, _, upstream = _problem(torch.bfloat16, 5, 8, 6)
    out = linear(x.requires_grad_(), weight)
    assert [saved is None for saved in out.grad_fn.saved_tensors] == [True, False]  # type: ignore[union-attr]
    out.backward(upstream)
    assert weight.grad is None
    assert x.grad is not None


def test_what_it_returns_can_be_added_to_in_place() -> None:
    """As LoRA with dropout does."""
    x, weight, _, upstream = _problem(torch.bfloat16, 5, 8, 6)
    a, b = torch.ones(2, 8, requires_grad=True), torch.ones(6, 2, requires_grad=True)
    base = linear(x.requires_grad_(), weight)
    expected = base.detach() + (x.float() @ a.T @ b.T).bfloat16()
    out = LoraProduct.apply(base, x, a, b, 1.0, True)  # type: ignore[no-untyped-call]
    out.backward(upstream)
    assert out.data_ptr() == base.data_ptr()
    assert torch.equal(out, expected)


def test_a_lora_layer_multiplies_in_float32_both_ways() -> None:
    x, weight, bias, upstream = _problem(torch.bfloat16, 5, 8, 6)
    a, b = torch.zeros(2, 8, requires_grad=True), torch.zeros(6, 2, requires_grad=True)
    x.requires_grad_()
    out = LoraLinear.apply(x, weight, bias, a, b, 1.0)  # type: ignore[no-untyped-call]
    out.backward(upstream)
    assert torch.equal(out, F.linear(x.float(), weight.float(), bias.float()).bfloat16())
    assert torch.equal(x.grad, (upstream.float() @ weight.float()).bfloat16())  # type: ignore[arg-type]


@pytest.mark.parametrize(("dtype", "wide"), [("bfloat16", True), ("float32", False)])
def test_a_models_layers_use_it_where_it_helps(tmp_path: Path, tokenizer: object, dtype: str, wide: bool) -> None:
    source = find_model(str(save_tiny_model(tmp_path / "m", tokenizer)))
    lm = load_model(source, quantization="none", dtype=dtype, device=torch.device("cpu"), tokenizer=False)
    layers = [module for module in lm.base.modules() if type(module) is nn.Linear]
    assert layers
    assert all(("forward" in vars(layer)) == wide for layer in layers)
    x = torch.randn(3, layers[0].in_features).to(lm.dtype)
    expected = F.linear(x.float(), layers[0].weight.float()).to(lm.dtype)
    assert torch.equal(layers[0](x), expected)


def test_only_cpus_multiply_in_another_dtype() -> None:
    x = torch.empty(2, 2, dtype=torch.bfloat16, device="meta")
    assert dtype_of_products(x) == torch.bfloat16
    with as_on_cpu():
        assert dtype_of_products(x) == torch.float32
    assert dtype_of_products(x) == torch.bfloat16


def test_attention_over_a_shared_prompt_is_that_of_float32_rounded_once() -> None:
    plan = AttentionPlan((GroupSpan(0, 3, ((3, 7), (7, 9))),))
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(1, heads, 9, 8, generator=generator).bfloat16() for heads in (4, 2, 2)]
    narrow, wide = (
        [s.to(dtype, copy=True).requires_grad_() for s in states] for dtype in (torch.bfloat16, torch.float32)
    )
    upstream = torch.randn(1, 9, 4, 8, generator=generator).bfloat16()
    found, _ = shared_prompt_attention(nn.Module(), *narrow, None, dpoeng_plan=plan)
    expected, _ = shared_prompt_attention(nn.Module(), *wide, None, dpoeng_plan=plan)
    found.backward(upstream)
    expected.backward(upstream.float())
    assert torch.equal(found, expected.bfloat16())
    for a, b in zip(narrow, wide, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad.bfloat16())
