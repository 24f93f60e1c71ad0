"""Installs the fused kernels in a model's layers, after trying them on the GPU."""

from __future__ import annotations

import functools
import sys
import types
from typing import Any

import torch
from torch import nn

from dpoeng.engine.models.fused.recognize import gate_of, norm_of, rotates_halves
from dpoeng.kernels.cpu_linear import multiplies_as_cpu
from dpoeng.kernels.fused.gated import gated, plain_gated
from dpoeng.kernels.fused.rms_norm import plain_rms_norm, rms_norm
from dpoeng.kernels.fused.rotary import plain_rotary, rotary

ROTARY = "apply_rotary_pos_emb"
"""transformers' name for the function in every model file."""


def use_fused_kernels(base: nn.Module, device: torch.device) -> tuple[str, ...]:
    """Replaces RMSNorm, rotary positions and gated activations of a model by fused kernels, if they compute the same.

    For a model on a GPU, or on the meta device, which stands for one. A norm with a trained weight is left unchanged.

    Returns:
        remarks for the user: none, or why the kernels are not used.
    """
    if device.type == "cuda":
        problem = what_disagrees(device)
        if problem is not None:
            return (f"fused kernels for norms, rotary positions and gates are off: {problem}",)
    for module in base.modules():
        if "forward" in module.__dict__:
            continue
        norm, gate = norm_of(module), gate_of(module)
        if norm is not None:
            module.forward = types.MethodType(functools.partial(_norm_forward, *norm), module)
        elif gate is not None:
            module.forward = types.MethodType(functools.partial(_gated_forward, gate), module)
    for name in {type(module).__module__ for module in base.modules()}:
        file: Any = sys.modules.get(name)
        function = getattr(file, ROTARY, None)
        if callable(function) and not hasattr(function, "of_transformers") and rotates_halves(function):
            setattr(file, ROTARY, _rotary_or(function))
    return ()


def what_disagrees(device: torch.device) -> str | None:
    """Compares each kernel on a GPU with plain PyTorch, including gradients; None if all agree."""
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random).to(device).requires_grad_()

    x, weight, gate, up = draw(3, 96), draw(96).detach(), draw(3, 40), draw(3, 40)
    q, k, angles = draw(1, 5, 3, 16), draw(1, 2, 3, 16), draw(2, 1, 3, 16).detach()

    def flat(parts: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return torch.cat([part.transpose(1, 2).flatten() for part in parts])

    turned = tuple(part.transpose(1, 2) for part in (q, k))
    trials: dict[str, tuple[Any, Any, tuple[torch.Tensor, ...]]] = {
        "RMSNorm": (lambda: rms_norm(x, weight, 1e-6), lambda: plain_rms_norm(x, weight, 1e-6), (x,)),
        "a gated activation": (lambda: gated(gate, up), lambda: plain_gated(gate, up), (gate, up)),
        "rotary positions": (
            lambda: flat(rotary(q, k, *angles)),
            lambda: torch.cat([part.flatten() for part in plain_rotary(*turned, *angles)]),
            (q, k),
        ),
    }
    for name, (ours, plain, leaves) in trials.items():
        try:
            result, expected = ours(), plain()
            pull = torch.linspace(-1, 1, result.numel(), device=device).view_as(result)
            pairs = [(result, expected)]
            grads = (torch.autograd.grad(out, leaves, pull.view_as(out)) for out in (result, expected))
            pairs += list(zip(*grads, strict=True))
        except Exception as error:  # any error of a compiler or driver
            return f"{name} fails ({type(error).__name__}: {str(error).strip().splitlines()[:1]})"
        if not all(torch.allclose(one, other, rtol=1e-4, atol=1e-5) for one, other in pairs):
            return f"{name} differs from PyTorch's on this GPU"
    return None


def _norm_forward(eps: float, offset: float, self: Any, x: torch.Tensor, *more: Any, **named: Any) -> torch.Tensor:
    if multiplies_as_cpu(x) or self.weight.requires_grad or more or named:  # Mamba 2's norm may receive a gate
        out: torch.Tensor = type(self).forward(self, x, *more, **named)
        return out
    return rms_norm(x, self.weight, eps, offset)


def _gated_forward(tanh: bool, self: Any, x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor
    if multiplies_as_cpu(x):
        out = type(self).forward(self, x)
    else:
        out = self.down_proj(gated(self.gate_proj(x), self.up_proj(x), tanh=tanh))
    return out


def _rotary_or(original: Any) -> Any:
    """Uses the kernel for inputs that it supports, and the file's own function for all others."""

    @functools.wraps(original)
    def apply(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *more: Any, **named: Any) -> Any:
        whole = cos.ndim == 3 and cos.shape[-1] == q.shape[-1] == k.shape[-1] and q.ndim == 4
        if more or named or multiplies_as_cpu(q) or not whole or q.shape[0] != k.shape[0] or cos.requires_grad:
            return original(q, k, cos, sin, *more, **named)
        return rotary(q, k, cos, sin)

    apply.of_transformers = original  # type: ignore[attr-defined]
    return apply
