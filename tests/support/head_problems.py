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


def check_no_further_than_eager(args: Any, *, units: int) -> tuple[Tensor, float]:
    """Log-probs and gradient of `token_logps` beside those of plain PyTorch, both against float64.

    Returns:
        the true log-probs, and how far off they may be: as eager's, and `units` in the last place of float32 more.
    """
    true_logps, true_grad = truth(*args)
    eager_logps, eager_grad = run(plain_token_logps, *args)
    logps, grad = run(token_logps, *args)
    floor = units * torch.finfo(torch.float32).eps * float(true_logps.abs().max() + 10)
    most = worst(eager_logps, true_logps) + floor
    assert worst(logps, true_logps) <= most
    # The gradient is rounded to the dtype twice (stored, then scaled by the upstream), eager's once at the end.
    rounding = torch.finfo(args[0].dtype).eps * float(true_grad.abs().max())
    assert worst(grad, true_grad) <= worst(eager_grad, true_grad) + rounding
    assert bool((logps <= 0).all())
    return true_logps, most
