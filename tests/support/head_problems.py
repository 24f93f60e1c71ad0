"""Problems for the log-prob kernels, and how far a result is from float64."""

from typing import Any

import torch
from torch import Tensor

from dpoeng.kernels.token_logps import plain_token_logps, token_logps

# A plain head; Gemma's softcap; Cohere's scale with a temperature; a bias with a softcap. Between them every branch.
MAPS: tuple[dict[str, Any], ...] = (
    {},
    {"softcap": 3.0},
    {"scale": 0.25, "temperature": 0.7},
    {"bias": True, "softcap": 5.0, "scale": 1.5, "temperature": 1.3},
)


def problem(n: int, v: int, h: int, dtype: torch.dtype, options: dict[str, Any], seed: int = 0) -> tuple[Tensor, ...]:
    """Hidden states, head, targets and options whose logits have a spread like a trained model's (a few nats)."""
    rng = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, h, generator=rng).to(dtype)
    weight = (torch.randn(v, h, generator=rng) * 3 / h**0.5).to(dtype)
    targets = torch.randint(0, v, (n,), generator=rng)
    options = dict(options)
    if options.pop("bias", False):
        options["bias"] = torch.randn(v, generator=rng).to(dtype)
    return hidden, weight, targets, options  # type: ignore[return-value]


def run(fn: Any, hidden: Tensor, weight: Tensor, targets: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Log-probs and the gradient under an upstream that differs from row to row."""
    leaf = hidden.detach().clone().requires_grad_()
    logps = fn(leaf, weight, targets, **options)
    upstream = torch.linspace(-1.0, 2.0, len(targets), dtype=logps.dtype)
    logps.backward(upstream)
    assert leaf.grad is not None
    return logps.detach(), leaf.grad


def truth(hidden: Tensor, weight: Tensor, targets: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    wide = {k: v.double() if torch.is_tensor(v) else v for k, v in options.items()}
    return run(plain_token_logps, hidden.double(), weight.double(), targets, wide)


def worst(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max())


def rms(found: Tensor, expected: Tensor) -> float:
    """Root of the mean square of the errors."""
    return float((found.double() - expected).square().mean().sqrt())


def draws(n: int, v: int, h: int, dtype: torch.dtype, options: dict[str, Any]) -> list[tuple[Tensor, ...]]:
    """As many problems of one kind as give at least 64 rows."""
    return [problem(n, v, h, dtype, options, seed) for seed in range(-(-64 // n))]


def check_no_further_than_eager(*problems: Any, units: int) -> tuple[Tensor, float]:
    """Log-probs and gradient of `token_logps` beside those of plain PyTorch, both against float64.

    Where both round logits to 16 bits, each has luck with single rows: over 80 sets of 64 rows and more, our worst
    log-prob was up to 1.15 times as far off as eager's worst, or much nearer. The root mean square over 64 rows has
    little luck left: at most 1.00 times eager's for log-probs. Gradients reached 1.13 times, since G is rounded to the
    dtype when it is stored and again when it is scaled by the upstream, eager's gradient once.

    Args:
        problems: one or more of one kind, with 37 rows or more together; see `draws`.
        units: so many in the last place of float32, at the size of the sums, are rounding on both sides.

    Returns:
        the true log-probs of all rows, and how far off one may be.
    """
    true_logps, true_grad = map(torch.cat, zip(*(truth(*args) for args in problems), strict=True))
    eager_logps, eager_grad = map(torch.cat, zip(*(run(plain_token_logps, *args) for args in problems), strict=True))
    logps, grad = map(torch.cat, zip(*(run(token_logps, *args) for args in problems), strict=True))
    dtype = grad.dtype
    floor = units * torch.finfo(torch.float32).eps * float(true_logps.abs().max() + 10)
    assert rms(logps, true_logps) <= 1.01 * rms(eager_logps, true_logps) + floor
    luck = 1.5 if dtype == torch.bfloat16 else 1.0
    most = luck * worst(eager_logps, true_logps) + floor
    assert worst(logps, true_logps) <= most
    rounding = torch.finfo(dtype).eps * float(true_grad.abs().max())
    assert rms(grad, true_grad) <= 1.2 * rms(eager_grad, true_grad) + floor
    assert worst(grad, true_grad) <= worst(eager_grad, true_grad) + rounding
    assert bool((logps <= 0).all())
    return true_logps, most
