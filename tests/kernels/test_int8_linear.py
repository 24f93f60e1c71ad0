"""8-bit layers with exact activations: against float64 and bitsandbytes, and that a pair's numbers are its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dpoeng_testing import save_tiny_model
from torch import nn

from dpoeng.cache.schema import PairIds
from dpoeng.engine.models.loading import load_model
from dpoeng.engine.models.lora_product import LoraProduct
from dpoeng.engine.models.model import CausalLM, set_mode
from dpoeng.engine.models.quantized import multiply_as_bitsandbytes, quantized_layers
from dpoeng.engine.models.sources import find_model
from dpoeng.engine.scoring.choose_layout import choose_layout
from dpoeng.engine.scoring.pairs import score_pairs
from dpoeng.kernels.int8_linear import int8_linear, widened

ROUNDING = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def _problem(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (37, 19), generator=generator, dtype=torch.int8)
    scales = torch.rand(37, generator=generator) + 0.1
    x, bias, pull = (torch.randn(shape, generator=generator).to(dtype) for shape in ((2, 11, 19), (37,), (2, 11, 37)))
    return x, codes, scales, bias, pull


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("biased", [True, False])
def test_numbers_and_gradient_are_the_formula(dtype: torch.dtype, biased: bool) -> None:
    x, codes, scales, bias, pull = _problem(dtype)
    weight = codes.double() * scales.double()[:, None] / 127
    leaf, truth = x.clone().requires_grad_(), x.double().requires_grad_()
    found = int8_linear(leaf, codes, scales, bias if biased else None)
    expected = truth @ weight.T + (bias.double() if biased else 0)
    found.backward(pull)
    expected.backward(pull.double())
    assert found.dtype == dtype
    for mine, wanted in ((found, expected), (leaf.grad, truth.grad)):
        assert mine is not None
        assert wanted is not None
        error = (mine.double() - wanted).norm() / wanted.norm()
        assert error <= (1e-7 if dtype == torch.float64 else ROUNDING[dtype])  # the scales are float32


@pytest.mark.parametrize("biased", [True, False])
def test_what_is_returned_can_be_added_to_in_place(biased: bool) -> None:
    x, codes, scales, bias, _ = _problem(torch.float32)
    out = int8_linear(x.requires_grad_(), codes, scales, bias if biased else None)
    assert not out._is_view()
    a, b = torch.randn(4, 19, requires_grad=True), torch.randn(37, 4, requires_grad=True)
    before = out.detach().clone()
    added = LoraProduct.apply(out, x, a, b, 0.5, True)
    assert added.data_ptr() == out.data_ptr()
    torch.testing.assert_close(added.detach(), before + 0.5 * (x @ a.T @ b.T).detach())


def test_the_weight_is_that_of_bitsandbytes() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    layer = bnb.nn.Linear8bitLt(19, 37, bias=True, has_fp16_weights=False)
    layer.load_state_dict(nn.Linear(19, 37).state_dict())
    layer = layer.to("cpu").train()
    codes, scales = layer.weight.data, layer.weight.SCB.clone()
    x = torch.randn(5, 19)
    assert torch.equal(int8_linear(x, codes, scales, layer.bias), layer(x))
    torch.testing.assert_close(x @ widened(codes, scales, torch.float32).T + layer.bias, layer(x))


def _outlier_layers(lm: CausalLM, threshold: float) -> None:
    """bitsandbytes' product as it is on a GPU: of activations in 8 bits."""
    multiply_as_bitsandbytes(lm.model)
    for module in quantized_layers(lm.model):
        layer: Any = module
        layer.eval().state.threshold = threshold


def test_a_pairs_numbers_do_not_depend_on_its_batch(tmp_path: Path, tokenizer: Any) -> None:
    """With bitsandbytes' product they do, which is why there is another one: a cached reference could not be met."""
    model = save_tiny_model(tmp_path / "model", tokenizer)
    random = np.random.default_rng(0)

    def ids(count: int) -> Any:
        return random.integers(0, len(tokenizer), count, dtype=np.int32)

    pairs = [PairIds(ids(9), ids(12), ids(7)) for _ in range(8)]

    def moved(threshold: float | None) -> float:
        lm = load_model(
            find_model(str(model)), quantization="8bit", dtype="float32", device=torch.device("cpu"), tokenizer=False
        )
        set_mode(lm, training=False)
        choose_layout(lm)
        if threshold is not None:
            _outlier_layers(lm, threshold)
        together, alone = score_pairs(lm, pairs), [score_pairs(lm, [pair])[0] for pair in pairs]
        return max(
            float(np.abs(one.chosen_logps - other.chosen_logps).max())
            for one, other in zip(together, alone, strict=True)
        )

    assert moved(None) <= 1e-5
    assert moved(1.0) > 1e-3
