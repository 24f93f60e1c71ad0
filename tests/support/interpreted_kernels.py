"""The Triton kernels against float64 truth, run by triton's interpreter on CPU tensors.

Needs TRITON_INTERPRET=1 before triton is imported, so tests/kernels/test_triton.py runs this file in a process of its
own; the name keeps it out of the default collection. By hand:
`TRITON_INTERPRET=1 pytest tests/support/interpreted_kernels.py`.

What the interpreter cannot show: races between warps, and rounding of the GPU's own exp and log. It truncates where
hardware rounds to bfloat16, so 16-bit results may be off by one unit in the last place.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpoeng.kernels import head_gradient, row_kernels, tiles, unit_gradient
from dpoeng.kernels.head import Head
from dpoeng.kernels.int8_linear import widened
from dpoeng.kernels.linear_logps import fused_logps
from dpoeng.kernels.row_logps import plain_token_logps_from_logits
from dpoeng.kernels.tiles import LinearTile, RowTile
from dpoeng.kernels.token_logps import plain_token_logps
from dpoeng.kernels.try_triton import try_triton
from dpoeng.kernels.widen_kernel import widen

# The interpreter computes with numpy, which warns of what IEEE defines: exp of -inf, inf - inf.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

CASES = int(os.environ.get("DPOENG_CASES", "102"))  # property cases per kernel
BLOCK = 32  # several blocks a row at V = 100
IGNORE = -100
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True, scope="module")
def small_tiles() -> Iterator[None]:
    """Tiles that small problems fill raggedly; chunks of two rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_kernels, "row_tile", lambda: RowTile(BLOCK, 4))
        patch.setattr(unit_gradient, "row_tile", lambda: RowTile(BLOCK, 4))
        patch.setattr(tiles, "chunk_rows", lambda vocabulary: 2)
        yield


@dataclass(frozen=True)
class Case:
    """Everything that makes one problem; the tensors follow from it."""

    n: int
    v: int
    h: int
    dtype: torch.dtype
    spread: float  # standard deviation of the logits, nats
    options: dict[str, Any]
    closed: bool  # some entries -inf
    broken: bool  # a NaN in the first row
    special: tuple[int, ...]  # targets of the first rows: ignored, outside, the last entry, one beyond
    shift: int  # elements by which rows start off the aligned address
    seed: int

    def targets(self) -> Tensor:
        out = torch.randint(0, self.v, (self.n,), generator=torch.Generator().manual_seed(self.seed))
        for row, kind in enumerate(self.special[: self.n]):
            if kind:
                out[row] = (IGNORE, self.v, self.v - 1, 10 * self.v, -1)[kind - 1]
        return out

    def tensors(self) -> tuple[Tensor, Tensor, dict[str, Any]]:
        rng = torch.Generator().manual_seed(self.seed)
        hidden = self.off(torch.randn(self.n, self.h, generator=rng).to(self.dtype))
        weight = self.off((torch.randn(self.v, self.h, generator=rng) * self.spread / self.h**0.5).to(self.dtype))
        options = dict(self.options)
        if self.closed or options.pop("bias", False):
            bias = torch.randn(self.v, generator=rng)
            if self.closed:
                bias[torch.rand(self.v, generator=rng) < 0.5] = -torch.inf
            options["bias"] = bias.to(self.dtype)
        if self.broken:
            hidden[0, 0] = torch.nan
        return hidden, weight, options

    def logits(self) -> Tensor:
        rng = torch.Generator().manual_seed(self.seed)
        out = torch.randn(self.n, self.v, generator=rng) * self.spread
        if self.closed:
            out[torch.rand(out.shape, generator=rng) < 0.5] = -torch.inf
        if self.broken:
            out[0, -1] = torch.nan
        return self.off(out.to(self.dtype))

    def off(self, x: Tensor) -> Tensor:
        """The same values in rows of another stride that start `shift` elements in."""
        wide = x.new_full((x.shape[0], x.shape[1] + 3 * self.shift), 7.0)
        view = wide[:, self.shift : self.shift + x.shape[1]]
        view.copy_(x)
        return view


# V around one block, two blocks and the fused kernel's tile of 32; H around its depth of 16. Spread 1e4 is where
# exp must be anchored; 0.01 is where all entries are alike.
MAPS: tuple[dict[str, Any], ...] = (
    {},
    {"bias": True},
    {"scale": 0.25, "temperature": 0.7},
    {"softcap": 5.0, "scale": 1.5, "bias": True},
)
CASE = st.builds(
    Case,
    n=st.integers(1, 3),
    v=st.one_of(st.integers(1, 100), st.sampled_from([31, 32, 33, 64, 65, 96])),
    h=st.sampled_from([1, 3, 15, 16, 17, 40]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    spread=st.sampled_from([0.01, 3.0, 3.0, 1e4]),
    options=st.sampled_from(MAPS),
    closed=st.booleans(),
    broken=st.sampled_from([False, False, False, True]),
    special=st.tuples(*[st.sampled_from([0, 0, 0, 1, 2, 3, 4, 5])] * 3),
    shift=st.integers(0, 2),
    seed=st.integers(0, 2**31),
)
properties = settings(
    max_examples=CASES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.generate, Phase.shrink),  # explaining a failure costs minutes under the interpreter
)


def truth(found: Tensor, targets: Tensor, size: int) -> Tensor:
    """What is asked for where the plain formula has no answer: NaN for a target outside, 0 for an ignored row."""
    outside = (targets != IGNORE) & ((targets < 0) | (targets >= size))
    return torch.where(outside, torch.nan, torch.where(targets == IGNORE, 0.0, found))


def inside(targets: Tensor, size: int) -> Tensor:
    return torch.where((targets != IGNORE) & ((targets < 0) | (targets >= size)), 0, targets)


def compare(found: Tensor, true: Tensor, eager: Tensor, floor: float) -> None:
    """The same NaN and infinities; elsewhere no further from the truth than eager's worst, up to `floor`."""
    found, true, eager = (x.detach().double() for x in (found, true, eager))
    assert torch.equal(found.isnan(), true.isnan())
    finite = true.isfinite()
    assert torch.equal(found[~finite & ~true.isnan()], true[~finite & ~true.isnan()])
    if finite.any():
        allowed = float((eager - true)[finite].abs().nan_to_num(posinf=0.0).max()) + floor
        assert float((found - true)[finite].abs().max()) <= allowed


def log_prob_floor(true: Tensor) -> float:
    """Rounding of a float32 log-prob of this size: a handful of units in the last place."""
    return 8 * EPS * (1 + float(true.detach().nan_to_num(neginf=0.0, posinf=0.0).abs().max()))


@pytest.mark.usefixtures("small_tiles")
class TestProperties:
    @properties
    @given(CASE)
    def test_rows_from_logits(self, case: Case) -> None:
        logits, targets = case.logits(), case.targets()
        upstream = torch.linspace(0.5, -2.0, case.n)
        safe = inside(targets, case.v)
        leaf = logits.double().requires_grad_()
        true = plain_token_logps_from_logits(leaf, safe, ignore_index=IGNORE)
        (true_grad,) = torch.autograd.grad(true, leaf, upstream.double())
        true_grad[targets == IGNORE] = 0.0  # 0 x NaN in a row that is ignored and broken
        eager_leaf = logits.detach().clone().requires_grad_()
        eager = plain_token_logps_from_logits(eager_leaf, safe, ignore_index=IGNORE)
        (eager_grad,) = torch.autograd.grad(eager, eager_leaf, upstream)
        eager_grad[targets == IGNORE] = 0.0
        expected = truth(true, targets, case.v)

        logps, peaks, rests = row_kernels.forward(logits, targets, IGNORE)
        compare(logps, expected, eager, log_prob_floor(expected))
        assert not (logps > 0).any()
        again = row_kernels.forward(logits, targets, IGNORE)
        assert torch.equal(logps.nan_to_num(9.0), again[0].nan_to_num(9.0))

        grad = torch.empty_like(logits)
        row_kernels.backward(logits, targets, upstream, (peaks, rests), grad, IGNORE)
        sound = ~expected.isnan() & expected.isfinite()
        # The interpreter truncates to bfloat16: one unit in the last place, 2^-7 of the value.
        floor = 2 * (2**-7 if case.dtype == torch.bfloat16 else torch.finfo(case.dtype).eps)
        compare(grad[sound], true_grad[sound], eager_grad[sound], floor)
        row_kernels.backward(logits, targets, upstream, (peaks, rests), logits, IGNORE)
        assert torch.equal(logits.nan_to_num(9.0), grad.nan_to_num(9.0))

    @properties
    @given(CASE)
    def test_training_chunks(self, case: Case) -> None:
        hidden, weight, options = case.tensors()
        targets, safe = case.targets(), inside(case.targets(), case.v)
        true, true_grad = autograd(hidden.double(), weight.double(), safe, options)
        eager, eager_grad = autograd(hidden, weight, safe, options)
        expected = truth(true, targets, case.v)

        grad = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        logps = unit_gradient.chunked_logps(hidden, Head(weight, **options), targets, IGNORE, grad)
        size = float(weight.detach().float().abs().max()) + 1
        compare(logps, expected, eager, log_prob_floor(expected) + 8 * EPS * size * case.h**0.5 * 4)
        assert not (logps > 0).any()
        alone = unit_gradient.chunked_logps(hidden, Head(weight, **options), targets, IGNORE, None)
        assert torch.equal(alone.nan_to_num(9.0), logps.nan_to_num(9.0))
        sound = ~expected.isnan()
        step = 2**-7 if case.dtype == torch.bfloat16 else torch.finfo(case.dtype).eps
        # Probabilities are rounded to the dtype before the product: an error of `step` per entry, times the head.
        compare(grad[sound], true_grad[sound], eager_grad[sound], 3 * step * size + wobble(case, size))

    @properties
    @given(CASE)
    def test_fused_scoring(self, case: Case) -> None:
        hidden, weight, options = case.tensors()
        targets, safe = case.targets(), inside(case.targets(), case.v)
        with torch.no_grad():
            true = plain(hidden.double(), weight.double(), safe, options)
            eager = plain(hidden, weight, safe, options)
        expected = truth(true, targets, case.v)
        logps = fused_logps(hidden, Head(weight, **options), targets, IGNORE)
        size = float(weight.float().abs().max()) + 1
        compare(logps, expected, eager, log_prob_floor(expected) + 8 * EPS * size * case.h**0.5 * 4)
        assert not (logps > 0).any()
        again = fused_logps(hidden, Head(weight, **options), targets, IGNORE)
        assert torch.equal(logps.nan_to_num(9.0), again.nan_to_num(9.0))


def test_gradients_of_a_trained_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of rows and slices of the vocabulary, neither of which divides; an ignored row, a bias, a softcap."""
    monkeypatch.setattr(tiles, "chunk_rows", lambda vocabulary: 4)
    monkeypatch.setattr(head_gradient, "SLICE", 30)
    for dtype, options in ((torch.float32, {}), (torch.bfloat16, {}), (torch.float32, {"softcap": 5.0, "scale": 1.5})):
        hidden, head, targets = problem(11, 70, 24, dtype)
        bias = torch.randn(70, generator=torch.Generator().manual_seed(1)).to(dtype) if options else None
        head = Head(head.weight, bias, **options)
        targets[3] = IGNORE
        upstream = torch.linspace(-1, 2, 11)
        leaves = [x.double().requires_grad_() for x in (hidden, head.weight, *([bias] if bias is not None else []))]
        given = {"bias": leaves[2], **options} if bias is not None else options
        plain_token_logps(leaves[0], leaves[1], targets, **given).backward(upstream.double())
        found = head_gradient.chunked_gradients(hidden, head, targets, IGNORE, upstream)
        assert found[2].shape == ((70,) if bias is not None else (0,))
        for grad, leaf in zip(found, leaves, strict=False):
            assert leaf.grad is not None
            assert grad.dtype == dtype
            floor = (3 * 2**-7 if dtype == torch.bfloat16 else 1e-5) * float(leaf.grad.abs().max())
            assert float((grad.double() - leaf.grad).abs().max()) <= floor


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, options: dict[str, Any]) -> Tensor:
    wide = {k: v.to(hidden.dtype) if torch.is_tensor(v) else v for k, v in options.items()}
    return plain_token_logps(hidden, weight, targets, **wide)


def autograd(hidden: Tensor, weight: Tensor, targets: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    leaf = hidden.detach().clone().requires_grad_()
    logps = plain(leaf, weight, targets, options)
    logps.sum().backward()
    assert leaf.grad is not None
    # An ignored row that is all -inf has 0 x NaN here; what is ignored must be 0.
    return logps.detach(), torch.where((targets == IGNORE).unsqueeze(1), 0.0, leaf.grad)


def wobble(case: Case, size: float) -> float:
    """Gradient error from the error of the logits themselves: d p <= |d z|, times the head's largest entry."""
    return 8 * EPS * size * size * case.h**0.5 * 4


def problem(n: int, v: int, h: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Head, Tensor]:
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, h, generator=rng).to(dtype)
    weight = (torch.randn(v, h, generator=rng) * 3 / h**0.5).to(dtype)
    return hidden, Head(weight), torch.randint(0, v, (n,), generator=rng)


def test_scoring_does_not_depend_on_the_batch() -> None:
    """Place in the tile, number of rows, neighbours' values: none may move a bit. 37 rows are 2.3 tiles of 16.

    On a GPU every element of a tile is summed in the same order; the interpreter's product is numpy's, whose order may
    differ by place. Eighths sum exactly in any order and leave all the rest to be tested.
    """
    hidden, head, targets = problem(37, 70, 24)
    hidden, head = (hidden * 4).round() / 4, head._replace(weight=(head.weight * 2).round() / 2)
    whole = fused_logps(hidden, head, targets, IGNORE)
    for rows in (torch.arange(1), torch.arange(17), torch.arange(20, 37), torch.randperm(37)):
        assert torch.equal(fused_logps(hidden[rows], head, targets[rows], IGNORE), whole[rows])
    others = hidden.clone()
    others[1:] = 1e4
    others[2] = torch.nan
    assert fused_logps(others, head, targets, IGNORE)[0] == whole[0]


@pytest.mark.parametrize("group", [1, 2, 3, 8])
def test_scoring_visits_every_tile_whatever_the_grouping(group: int) -> None:
    """5 row tiles x 3 column tiles: groups that divide 5, that do not, that exceed it."""
    hidden, head, targets = problem(70, 70, 8, torch.float32)
    tile = LinearTile(16, 32, 16, 1, 1, group)
    expected = plain_token_logps(hidden.double(), head.weight.double(), targets)
    found = fused_logps(hidden, head, targets, IGNORE, tile=tile)
    assert float((found - expected).abs().max()) < 1e-5


def test_narrow_logits_are_worse_and_bounded() -> None:
    """16-bit logits: the documented price. Worse than float32 ones by far, no worse than eager's rounding."""
    hidden, head, targets = problem(6, 300, 48)
    grad = torch.empty_like(hidden)
    expected = plain_token_logps(hidden.double(), head.weight.double(), targets)
    wide = unit_gradient.chunked_logps(hidden, head, targets, IGNORE, grad)
    narrow = unit_gradient.chunked_logps(hidden, head, targets, IGNORE, grad, narrow=True)
    wide_error, narrow_error = (float((x - expected).abs().max()) for x in (wide, narrow))
    assert wide_error < 1e-5
    assert 10 * wide_error < narrow_error < 2**-7 * 16  # half a unit of the largest logit, about 12


def test_the_gradient_over_the_logits_equals_the_gradient_beside_them() -> None:
    """bfloat16 entries written over float32 logits, in a row of four blocks and a rest."""
    _, head, targets = problem(3, 4 * BLOCK + 5, 8)
    raw = torch.randn(3, 4 * BLOCK + 16)[:, : 4 * BLOCK + 5] * 3
    beside, logps = torch.empty(3, 4 * BLOCK + 5, dtype=torch.bfloat16), torch.empty(3)
    unit_gradient.fused_pass(raw, head, targets, IGNORE, logps, beside)
    buffer = torch.empty(3, 4 * BLOCK + 16)
    buffer[:, : 4 * BLOCK + 5] = raw
    over, again = buffer.view(torch.bfloat16)[:, : 4 * BLOCK + 5], torch.empty(3)
    unit_gradient.fused_pass(buffer[:, : 4 * BLOCK + 5], head, targets, IGNORE, again, over)
    assert torch.equal(over, beside)
    assert torch.equal(again, logps)


def test_no_rows() -> None:
    hidden, head, targets = problem(0, 70, 8)
    assert fused_logps(hidden, head, targets, IGNORE).shape == (0,)
    assert unit_gradient.chunked_logps(hidden, head, targets, IGNORE, torch.empty_like(hidden)).shape == (0,)
    assert row_kernels.forward(torch.empty(0, 70), targets, IGNORE)[0].shape == (0,)


def test_a_certain_target_keeps_its_digits() -> None:
    """p(y) = 1 - 2e-8: in float32 log p would round to 0 and 1 - p to nothing."""
    logits = torch.full((1, 50), -20.0)
    logits[0, 7] = 1.7
    logps, _, _ = row_kernels.forward(logits, torch.tensor([7]), IGNORE)
    true = plain_token_logps_from_logits(logits.double(), torch.tensor([7]))
    assert float(((logps - true) / true).abs()) < 1e-5


def test_the_kernel_that_tries_triton() -> None:
    try_triton(torch.device("cpu"))


def test_widened_codes_are_those_of_two_passes() -> None:
    """Every code in every row, over several blocks and a ragged last one. The interpreter cuts bfloat16 off."""
    rng = torch.Generator().manual_seed(0)
    codes = torch.arange(-128, 128, dtype=torch.int8).repeat(5, 9)[:, :2100]
    scales = torch.rand(5, generator=rng) * 10.0 ** torch.arange(-3, 2)
    wide = widen(codes, scales, torch.float32)
    assert torch.equal(wide, widened(codes, scales, torch.float32))
    assert torch.equal(widen(codes, scales, torch.float16), widened(codes, scales, torch.float16))
    assert torch.equal(wide.bfloat16(), widened(codes, scales, torch.bfloat16))
    cut = (wide.view(torch.int32) >> 16 << 16).view(torch.float32).bfloat16()
    assert torch.equal(widen(codes, scales, torch.bfloat16), cut)
    assert widen(codes[:, :0], scales, torch.float16).shape == (5, 0)
