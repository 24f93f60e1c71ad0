"""The LoRA product of a GPU, emulated: float32 factors in two bfloat16 parts, against float64 and against chunks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dpoeng.engine.models.lora_product import LoraLinear, LoraProduct
from dpoeng.kernels import low_rank
from dpoeng.kernels.int8_linear import widened

ROWS, IN, OUT, RANK = 96, 256, 192, 16
SCALE = 2.0


@pytest.fixture
def as_on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank, "multiplies_as_cpu", lambda _: False)


def problem() -> tuple[torch.Tensor, ...]:
    rng = torch.Generator().manual_seed(0)

    def draw(*shape: int, std: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, generator=rng) * std

    weight, bias = draw(OUT, IN, std=IN**-0.5).bfloat16(), draw(OUT).bfloat16()
    x, pull = draw(2, ROWS // 2, IN).bfloat16(), draw(2, ROWS // 2, OUT)
    return x, weight, bias, draw(RANK, IN, std=IN**-0.5), draw(OUT, RANK, std=0.3), pull


def results(apply: Any, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, pull: torch.Tensor) -> list[torch.Tensor]:
    """The output, and the gradients of x, A and B."""
    leaves = [tensor.clone().requires_grad_() for tensor in (x, a, b)]
    out = apply(*leaves)
    out.backward(pull.to(out.dtype))
    grads = [leaf.grad for leaf in leaves]
    assert all(grad is not None and grad.dtype == leaf.dtype for grad, leaf in zip(grads, leaves, strict=True))
    return [out.detach(), *[grad for grad in grads if grad is not None]]


def errors(found: list[torch.Tensor], true: list[torch.Tensor]) -> list[float]:
    return [float((one.double() - other).norm() / other.norm()) for one, other in zip(found, true, strict=True)]


def true_results(weight: torch.Tensor, bias: torch.Tensor) -> list[torch.Tensor]:
    x, _, _, a, b, pull = problem()

    def exact(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return x @ weight.double().T + bias.double() + SCALE * (x @ a.T) @ b.T

    return results(exact, x.double(), a.double(), b.double(), pull.bfloat16())


def test_two_parts_hold_16_bits() -> None:
    factor = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)) * 1e-3
    high, rest = low_rank._parts(factor)
    assert torch.equal(high, factor.bfloat16().float())
    assert ((high.double() + rest.double() - factor.double()).abs() <= 2**-17 * factor.abs()).all()


@pytest.mark.parametrize("int8", [False, True])
def test_no_further_from_float64_than_in_chunks(request: pytest.FixtureRequest, int8: bool) -> None:
    x, weight, bias, a, b, pull = problem()
    scales = None
    if int8:
        scales = torch.rand(OUT, generator=torch.Generator().manual_seed(1)) + 0.5
        weight = (weight.float() * 127).clamp(-127, 127).to(torch.int8)
    dense = weight if scales is None else widened(weight, scales, torch.bfloat16)

    def linear(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> Any:
        return LoraLinear.apply(x, weight, bias, a, b, SCALE, scales)

    true = true_results(dense, bias)
    chunks = errors(results(linear, x, a, b, pull), true)
    request.getfixturevalue("as_on_gpu")
    split = errors(results(linear, x, a, b, pull), true)
    assert split[0] <= chunks[0]
    assert split[1] <= chunks[1]
    assert max(split[2:]) < 1e-5  # a plain bfloat16 product: 2e-3
    # The base is rounded to bfloat16, and its sum with the update once more.
    assert split[0] < 2.5e-3


@pytest.mark.usefixtures("as_on_gpu")
@pytest.mark.parametrize("in_place", [False, True])
def test_the_update_of_a_base_of_its_own_function(in_place: bool) -> None:
    x, weight, bias, a, b, pull = problem()

    def product(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> Any:
        return LoraProduct.apply(torch.nn.functional.linear(x, weight, bias) * 1, x, a, b, SCALE, in_place)

    found = errors(results(product, x, a, b, pull), true_results(weight, bias))
    assert max(found[:2]) < 4e-3
    assert max(found[2:]) < 1e-5


def test_on_the_meta_device_products_are_whole() -> None:
    """What `dpoeng plan` and the counts of a step see of a GPU; on a CPU there are chunks, with the bytes they had."""
    x, weight, bias, a, b, pull = (tensor.to("meta") for tensor in problem())
    found = results(lambda x, a, b: LoraLinear.apply(x, weight, bias, a, b, SCALE), x, a, b, pull)
    assert [tuple(one.shape) for one in found] == [(2, ROWS // 2, OUT), (2, ROWS // 2, IN), (RANK, IN), (OUT, RANK)]
