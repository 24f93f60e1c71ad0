"""token_logps on a CPU: against float64 truth, row by row, at the edges, and what it refuses."""

from typing import Any

import pytest
import torch
from head_problems import MAPS, check_no_further_than_eager, draws, problem, run, truth, worst
from torch import Tensor

from dpoeng.kernels import cpu_linear
from dpoeng.kernels.collision import log_collision
from dpoeng.kernels.head import Head
from dpoeng.kernels.token_logps import plain_token_logps, token_logps

# V: below one tile, one tile exactly, one more, ragged over several. N: one row, a ragged block, more than a block.
SHAPES = ((1, 7, 5), (37, 1024, 48), (16, 1025, 33), (1030, 2500, 24))


@pytest.mark.parametrize("options", MAPS)
@pytest.mark.parametrize(("n", "v", "h"), SHAPES)
def test_float64_equals_the_plain_formula(n: int, v: int, h: int, options: dict[str, Any]) -> None:
    args = problem(n, v, h, torch.float64, options)
    logps, grad = run(token_logps, *args)
    true_logps, true_grad = truth(*args)
    assert worst(logps, true_logps) <= 1e-12
    assert worst(grad, true_grad) <= 1e-12


@pytest.mark.parametrize(
    ("dtype", "native"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, False)],
)
@pytest.mark.parametrize("options", MAPS)
@pytest.mark.parametrize(("n", "v", "h"), SHAPES)
def test_no_further_from_truth_than_eager(
    monkeypatch: pytest.MonkeyPatch, n: int, v: int, h: int, options: dict[str, Any], dtype: torch.dtype, native: bool
) -> None:
    """Products widened to float32, and bfloat16 ones as a CPU with units for them has: on whatever CPU this is."""
    monkeypatch.setattr(cpu_linear, "native_bf16", lambda: native)
    problems = draws(n, v, h, dtype, options)
    # Two units in the last place of float32 at the size of the sums: both are right to rounding, and either may win.
    true_logps, _ = check_no_further_than_eager(*problems, units=2)
    if not native:  # widened, products and sums are float32 whatever the inputs are
        found = torch.cat([run(token_logps, *args)[0] for args in problems])
        assert worst(found, true_logps) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_its_neighbours(dtype: torch.dtype) -> None:
    hidden, weight, targets, _ = problem(1100, 3001, 64, dtype, {})
    leaf = hidden.requires_grad_()
    logps = token_logps(leaf, weight, targets)
    logps.sum().backward()
    assert leaf.grad is not None
    # 1 to 17: where BLAS switches code; 1024 and 1025: around a block; a shuffle: place in the block.
    for rows in (*(torch.arange(k) for k in (1, 2, 3, 5, 8, 16, 17, 64, 300, 1024, 1025)), torch.randperm(1100)):
        part = hidden.detach()[rows].requires_grad_()
        some = token_logps(part, weight, targets[rows])
        some.sum().backward()
        assert part.grad is not None
        assert torch.equal(some, logps[rows])
        assert torch.equal(part.grad, leaf.grad[rows])
    with torch.no_grad():
        assert torch.equal(token_logps(hidden, weight, targets), logps)


def test_extreme_logits() -> None:
    weight = torch.eye(4).repeat(300, 1)  # 1200 entries: two tiles
    hidden = torch.tensor([[1e4, -1e4, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [-1e4, -1e4, -1e4, -1e4]])
    args = (hidden, weight, torch.tensor([0, 1199, 7]), {})
    logps, grad = run(token_logps, *args)
    true_logps, true_grad = truth(*args)
    torch.testing.assert_close(logps.double(), true_logps, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad.double(), true_grad, rtol=1e-6, atol=1e-6)


def test_closed_and_broken_vocabulary_entries() -> None:
    """-inf closes an entry (also a whole tile, also the target); NaN and +inf poison their row, as in log_softmax."""
    hidden, weight, targets, _ = problem(40, 2100, 16, torch.float32, {})
    bias = torch.zeros(2100)
    bias[:1500] = -torch.inf  # the whole first tile
    for options in (
        {"bias": bias},
        {"bias": torch.full((2100,), -torch.inf)},
        {"bias": bias.nan_to_num(neginf=torch.inf)},
    ):
        logps, grad = run(token_logps, hidden, weight, targets, options)
        expected, expected_grad = run(plain_token_logps, hidden, weight, targets, options)
        torch.testing.assert_close(logps, expected, equal_nan=True, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grad, expected_grad, equal_nan=True, rtol=1e-4, atol=1e-4)

    clean = token_logps(hidden, weight, targets)
    hidden[5, 3] = torch.nan
    logps = token_logps(hidden, weight, targets)
    assert bool(logps[5].isnan())
    rest = torch.arange(40) != 5
    assert torch.equal(logps[rest], clean[rest])


def test_a_certain_target_keeps_the_digits_of_its_gradient() -> None:
    """p(y) = 1 - 7e-10: in float32 `p - 1` and log p are 0, while log-prob and gradient are still representable."""
    weight = torch.eye(8)
    hidden = torch.tensor([[23.0, 0, 0, 0, 0, 0, 0, 0]])
    args = (hidden, weight, torch.tensor([0]), {})
    logps, grad = run(token_logps, *args)
    true_logps, true_grad = truth(*args)
    torch.testing.assert_close(logps.double(), true_logps, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad.double(), true_grad, rtol=1e-5, atol=0)


def test_ignored_rows_are_zero_whatever_they_hold() -> None:
    hidden, weight, targets, _ = problem(9, 50, 8, torch.float32, {})
    expected, expected_grad = run(token_logps, hidden, weight, targets, {})
    hidden[2] = torch.nan
    targets[2] = -100
    logps, grad = run(token_logps, hidden, weight, targets, {})
    assert logps[2] == 0
    assert bool((grad[2] == 0).all())
    rest = torch.arange(9) != 2
    assert torch.equal(logps[rest], expected[rest])
    assert torch.equal(grad[rest], expected_grad[rest])
    assert token_logps(hidden, weight, torch.full((9,), -100)).tolist() == [0.0] * 9


def test_no_rows() -> None:
    hidden = torch.zeros(0, 8, requires_grad=True)
    logps = token_logps(hidden, torch.zeros(50, 8), torch.zeros(0, dtype=torch.int64))
    logps.sum().backward()
    assert logps.shape == (0,)
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, 8)


def test_strided_inputs() -> None:
    hidden, weight, targets, _ = problem(20, 90, 16, torch.float32, {})
    expected, expected_grad = run(token_logps, hidden, weight, targets, {})
    wide = torch.zeros(40, 33)
    wide[::2, 1:17] = hidden
    leaf = wide.requires_grad_()
    logps = token_logps(leaf[::2, 1:17], weight.T.contiguous().T, targets.repeat_interleave(2)[::2])
    logps.backward(torch.linspace(-1.0, 2.0, 20))
    torch.testing.assert_close(logps, expected, rtol=1e-6, atol=1e-6)
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad[::2, 1:17], expected_grad, rtol=1e-5, atol=1e-6)


# --- what is refused, by name ---


def test_an_outside_target_is_named() -> None:
    hidden, weight, targets, _ = problem(4, 50, 8, torch.float32, {})
    for bad in (50, -1, 2**40):
        targets[2] = bad
        with pytest.raises(IndexError, match=f"target {bad} in row 2 is outside the vocabulary of 50"):
            token_logps(hidden, weight, targets)


def trained(
    fn: Any, hidden: Tensor, weight: Tensor, targets: Tensor, options: dict[str, Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs and the gradients by all that a head can train, under an upstream that differs from row to row."""
    leaves = {"hidden": hidden, "weight": weight} | ({"bias": options["bias"]} if "bias" in options else {})
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
    rest = {name: value for name, value in options.items() if name != "bias"} | (
        {"bias": leaves["bias"]} if "bias" in leaves else {}
    )
    logps = fn(leaves["hidden"], leaves["weight"], targets, **rest)
    logps.backward(torch.linspace(-1.0, 2.0, len(targets), dtype=logps.dtype))
    return logps.detach(), {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def in_float64(args: tuple[Any, ...]) -> tuple[Any, ...]:
    hidden, weight, targets, options = args
    wide = {k: v.double() if torch.is_tensor(v) else v for k, v in options.items()}
    return hidden.double(), weight.double(), targets, wide


@pytest.mark.parametrize("options", MAPS)
@pytest.mark.parametrize(("n", "v", "h"), SHAPES)
def test_a_trained_heads_gradients_in_float64(n: int, v: int, h: int, options: dict[str, Any]) -> None:
    args = problem(n, v, h, torch.float64, options)
    args[2][n // 2 :: 7] = -100 if n > 1 else args[2][0]  # ignored rows in the middle
    logps, grads = trained(token_logps, *args)
    true_logps, true_grads = trained(plain_token_logps, *args)
    assert worst(logps, true_logps) <= 1e-12
    assert grads.keys() == true_grads.keys() == {"hidden", "weight", *(["bias"] if "bias" in options else [])}
    for name, grad in grads.items():
        assert float(true_grads[name].abs().max()) > 1e-2
        assert worst(grad, true_grads[name]) <= 1e-12 * n, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", MAPS)
@pytest.mark.parametrize(("n", "v", "h"), SHAPES)
def test_a_trained_heads_gradients_are_no_further_from_truth_than_eagers(
    n: int, v: int, h: int, options: dict[str, Any], dtype: torch.dtype
) -> None:
    args = problem(n, v, h, dtype, options)
    _, true = trained(plain_token_logps, *in_float64(args))
    _, eager = trained(plain_token_logps, *args)
    _, found = trained(token_logps, *args)
    for name, grad in found.items():
        # Sums of thousands of terms in another order: either may be the luckier one by a little.
        rounding = torch.finfo(dtype).eps * float(true[name].abs().max())
        assert worst(grad, true[name]) <= 1.5 * worst(eager[name], true[name]) + rounding, name


def test_a_tied_head_gets_both_gradients() -> None:
    """The embedding that is also the head: autograd adds what comes through the body and what comes from the head."""
    _, weight, targets, _ = problem(40, 1100, 24, torch.float64, {})
    body = torch.randn(24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ids = torch.randint(0, 1100, (40,), generator=torch.Generator().manual_seed(2))
    found = []
    for logps_of in (token_logps, plain_token_logps):
        table = weight.clone().requires_grad_()
        logps_of((table[ids] @ body).tanh(), table, targets).square().sum().backward()
        assert table.grad is not None
        found.append(table.grad)
    assert worst(found[0], found[1]) <= 1e-11
    assert float(found[1][ids].abs().min()) > 0


def test_a_trained_head_alone_and_without_gradients() -> None:
    """Only the bias, only the head; and the bits of the other two ways where nothing is trained."""
    hidden, weight, targets, options = problem(40, 1100, 24, torch.float32, {"bias": True})
    plain = token_logps(hidden, weight, targets, **options)
    bias = options["bias"].clone().requires_grad_()
    logps = token_logps(hidden, weight, targets, bias=bias)
    assert torch.equal(logps, plain)
    logps.sum().backward()
    expected = options["bias"].clone().requires_grad_()
    plain_token_logps(hidden, weight, targets, bias=expected).sum().backward()
    assert bias.grad is not None
    assert expected.grad is not None
    torch.testing.assert_close(bias.grad, expected.grad, rtol=1e-5, atol=1e-5)
    weight.requires_grad_()
    assert torch.equal(token_logps(hidden, weight, targets, **options), plain)
    with torch.no_grad():
        assert torch.equal(token_logps(hidden, weight, targets, **options), plain)


def test_a_double_backward_is_refused() -> None:
    hidden, weight, targets, _ = problem(4, 50, 8, torch.float32, {})
    hidden.requires_grad_()
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(token_logps(hidden, weight, targets).sum(), hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(token_logps(hidden, weight.requires_grad_(), targets).sum(), weight, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_a_quantised_head_is_refused(dtype: torch.dtype) -> None:
    hidden, weight, targets, _ = problem(4, 50, 8, torch.float32, {})
    with pytest.raises(NotImplementedError, match="the head is quantised"):
        token_logps(hidden, weight.to(dtype), targets)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(2, 2, 8)}, "hidden must be"),
        ({"weight": torch.zeros(50, 9)}, "hidden must be"),
        ({"weight": torch.zeros(50, 8, dtype=torch.bfloat16)}, "convert one of them"),
        ({"weight": torch.zeros(0, 8)}, "the head is empty"),
        ({"targets": torch.zeros(4, dtype=torch.int32)}, "targets must be int64"),
        ({"targets": torch.zeros(5, dtype=torch.int64)}, "targets must be int64"),
        ({"bias": torch.zeros(49)}, "bias must be"),
        ({"softcap": 0.0}, "softcap must be positive"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"targets": torch.zeros(4, dtype=torch.int64, device="meta")}, "must share a device"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    fitting = {"hidden": torch.zeros(4, 8), "weight": torch.zeros(50, 8), "targets": torch.zeros(4, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        token_logps(**(fitting | change))


@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 5), (7, 4096), (1030, 4099)])  # below, at and beyond a tile
def test_the_collision_probability_equals_full_logits(rows: int, vocabulary: int) -> None:
    draw = torch.Generator().manual_seed(rows)
    hidden, weight = torch.randn(rows, 16, generator=draw), torch.randn(vocabulary, 16, generator=draw)
    bias = torch.randn(vocabulary, generator=draw)
    for head in (Head(weight), Head(10 * weight, bias), Head(weight, softcap=3.0, scale=0.5)):
        raw = hidden.double() @ head.weight.double().T + (0 if head.bias is None else head.bias.double())
        z = raw if head.softcap is None else head.outer * torch.tanh(head.inner * raw)
        expected = (2 * z.log_softmax(-1)).logsumexp(-1)
        torch.testing.assert_close(log_collision(hidden, head).double(), expected, rtol=0, atol=2e-4)
    assert log_collision(hidden[:0], Head(weight)).shape == (0,)


def test_the_collision_probability_of_a_bfloat16_head_is_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the CPU has no units for bfloat16: as exact as in float32; rounded logits are off by 2e-3 and more."""
    monkeypatch.setattr(cpu_linear, "native_bf16", lambda: False)
    hidden, weight, _, _ = problem(64, 4099, 16, torch.bfloat16, {})
    expected = (2 * (hidden.double() @ weight.double().T).log_softmax(-1)).logsumexp(-1)
    assert worst(log_collision(hidden, Head(weight)), expected) < 1e-5
