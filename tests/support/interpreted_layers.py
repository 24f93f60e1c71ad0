"""The kernels of a layer's own operations and of LoRA against float64, run by triton's interpreter on CPU tensors.

As `interpreted_kernels.py`, whose words on what the interpreter cannot show hold here too. It cuts bfloat16 off where
hardware rounds, so the kernels' parts of a factor are cut off as well; hi + lo still hold 15 bits.
"""

import pytest
import torch
from torch import Tensor

from dpoeng.kernels import low_rank, low_rank_kernels
from dpoeng.kernels.fused import kernels
from dpoeng.kernels.fused.gated import plain_gated
from dpoeng.kernels.fused.rms_norm import plain_rms_norm
from dpoeng.kernels.fused.rotary import _plain_turn, plain_rotary
from dpoeng.kernels.tiles import LowRankTile

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# A result is rounded once, or cut off by the interpreter; what comes before is float32's.
STEP = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def near(found: Tensor, true: Tensor, step: float) -> None:
    """Within `step` of each value, and of the float32 rounding of what was added up, which is of the size of 1."""
    error = (found.double() - true).abs()
    assert bool((error <= step * true.abs() + 4e-6 * (1 + true.abs().max())).all()), float((error / true.abs()).max())


# Widths around a block; rows that a program shares, and that do not fill the last one; a row of 1.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (5, 37), (67, 64), (3, 130)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rows: int, width: int, offset: float) -> None:
    monkeypatch.setattr(kernels, "ELEMENTS", 512)
    x, weight, pull = draw(rows, width, dtype=dtype), draw(width, seed=1, dtype=dtype), draw(rows, width, seed=2)
    leaf = x.double().requires_grad_()
    true = plain_rms_norm(leaf, weight.double(), 1e-5, offset)
    near(kernels.normalize(x, weight, 1e-5, offset), true.detach(), STEP[dtype])
    true.backward(pull.to(dtype).double())
    assert leaf.grad is not None
    near(kernels.normalize(x, weight, 1e-5, offset, pull.to(dtype)), leaf.grad, STEP[dtype])


def test_a_rows_norm_does_not_depend_on_the_others() -> None:
    x, weight = draw(9, 40), draw(40, seed=1)
    whole = kernels.normalize(x, weight, 1e-6, 0.0)
    assert torch.equal(kernels.normalize(x[3:5], weight, 1e-6, 0.0), whole[3:5])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("q_heads", "k_heads", "size"), [(4, 2, 16), (5, 1, 12), (3, 3, 2)])
@pytest.mark.parametrize("angles_of_each", [False, True])
def test_rotary(dtype: torch.dtype, q_heads: int, k_heads: int, size: int, angles_of_each: bool) -> None:
    """Halves with angles of their own, which no model has; heads that fill no power of two; angles for all texts."""
    q, k = draw(2, 7, q_heads, size, dtype=dtype), draw(2, 7, k_heads, size, seed=1, dtype=dtype)
    cos, sin = (draw(2 if angles_of_each else 1, 7, size, seed=seed, dtype=dtype) for seed in (2, 3))
    wide = [x.double() for x in (q, k, cos, sin)]
    for found, true in zip(kernels.turn(q, k, cos, sin, inverse=False), plain_rotary(*wide), strict=True):
        near(found, true, STEP[dtype])
    leaf = wide[0].requires_grad_()
    pull = draw(2, 7, q_heads, size, seed=4, dtype=dtype)
    _plain_turn(leaf, *wide[2:], 1.0).backward(pull.double())
    assert leaf.grad is not None
    near(kernels.turn(pull, k, cos, sin, inverse=True)[0], leaf.grad, STEP[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tanh", [False, True])
@pytest.mark.parametrize("size", [1, 1000, 2051])
def test_gated(dtype: torch.dtype, tanh: bool, size: int) -> None:
    gate, up, pull = (draw(size, seed=seed, dtype=dtype) * 4 for seed in range(3))
    leaves = [x.double().requires_grad_() for x in (gate, up)]
    true = plain_gated(*leaves, tanh=tanh)
    near(kernels.open_gate(gate, up, tanh=tanh), true.detach(), STEP[dtype])
    true.backward(pull.double())
    for found, leaf in zip(kernels.gate_gradients(pull, gate, up, tanh=tanh), leaves, strict=True):
        assert leaf.grad is not None
        near(found, leaf.grad, STEP[dtype])


@pytest.fixture
def small_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several spans, tiles and ranks at a time in small problems, the last of each ragged."""
    monkeypatch.setattr(low_rank_kernels, "SPAN", 64)
    monkeypatch.setattr(low_rank_kernels, "low_rank_tile", lambda kernel, rank: (LowRankTile(16, 32, 1, 1), 16))


@pytest.mark.usefixtures("small_spans")
@pytest.mark.parametrize(("rows", "width", "out", "rank"), [(1, 3, 5, 1), (37, 150, 70, 4), (20, 64, 33, 24)])
def test_low_rank_products(rows: int, width: int, out: int, rank: int) -> None:
    """Each product against float64, from factors of which bfloat16 alone would keep 8 bits."""
    x, a, b = draw(rows, width).bfloat16(), draw(rank, width, seed=1), draw(out, rank, seed=2)
    grads = draw(rows, out, seed=3).bfloat16()
    sums = low_rank_kernels.rows_times_factor(x, a, 1.0, by_rank=True)
    assert sums.shape == (-(-width // 64), rows, rank)
    true_low = x.double() @ a.double().T
    base = draw(rows, out, seed=4).bfloat16()
    for add in (True, False):
        result = base.clone()
        low = low_rank_kernels.add_product(result, sums, b, 0.5, by_rank=False, add=add)
        close(low, true_low, 1e-4)
        true = 0.5 * true_low @ b.double().T + (base.double() if add else 0)
        error = (result.double() - true).abs()
        assert bool((error <= 2**-7 * true.abs() + 1e-4 * true.abs().max()).all())
    close(low_rank_kernels.factor_gradient(low, grads, 0.5, by_rank=False), 0.5 * grads.double().T @ true_low, 1e-4)
    true_grad = 0.5 * grads.double() @ b.double()
    low_grad = low_rank_kernels.rows_times_factor(grads, b, 0.5, by_rank=False).sum(0)
    close(low_grad, true_grad, 1e-4)
    close(low_rank_kernels.factor_gradient(low_grad, x, 1.0, by_rank=True), true_grad.T @ x.double(), 1e-4)


def close(found: Tensor, true: Tensor, share: float) -> None:
    """A product with a factor of 15 bits or more; with one of bfloat16's 8 the error would be 3e-3."""
    assert float((found.double() - true).norm()) <= share * float(true.norm())


@pytest.mark.usefixtures("small_spans")
def test_the_kernels_are_their_plain_twins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that bfloat16 holds exactly: then both sum the same numbers."""
    monkeypatch.setattr(low_rank, "SPAN", 64)
    x, a = (draw(19, 130) * 4).round().bfloat16(), (draw(6, 130, seed=1) * 4).round()
    sums = low_rank._rows_op(x, a, 0.5, True)
    assert torch.equal(low_rank_kernels.rows_times_factor(x, a, 0.5, by_rank=True), sums)
    b, out, other = (draw(40, 6, seed=2) * 4).round(), torch.zeros(19, 40).bfloat16(), torch.zeros(19, 40).bfloat16()
    low = low_rank._add_op(out, sums, b, 1.0, False, True)
    assert torch.equal(low_rank_kernels.add_product(other, sums, b, 1.0, by_rank=False, add=True), low)
    torch.testing.assert_close(other, out, rtol=2**-7, atol=0)
    twin = low_rank._gradient_op(low, out, 1.0, False)
    torch.testing.assert_close(low_rank_kernels.factor_gradient(low, out, 1.0, by_rank=False), twin)


@pytest.mark.usefixtures("small_spans")
def test_a_rows_update_does_not_depend_on_the_others() -> None:
    x, a = (draw(37, 150) * 4).round().bfloat16(), (draw(4, 150, seed=1) * 4).round()
    whole = low_rank_kernels.rows_times_factor(x, a, 1.0, by_rank=True)
    assert torch.equal(low_rank_kernels.rows_times_factor(x[20:23], a, 1.0, by_rank=True), whole[:, 20:23])


def test_an_output_that_would_be_copied_is_refused() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        low_rank_kernels.add_product(
            torch.zeros(4, 4).bfloat16().T[:3], draw(1, 3, 2), draw(4, 2), 1.0, by_rank=False, add=True
        )
