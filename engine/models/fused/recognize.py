"""Tests whether a module or function computes the same as a fused kernel, by trying it on a few numbers.

Each trial runs the class's own forward on a stand-in with small random weights, in float32 on the CPU, and compares.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from dpoeng.kernels.fused.gated import plain_gated
from dpoeng.kernels.fused.rms_norm import plain_rms_norm
from dpoeng.kernels.fused.rotary import plain_rotary

_GATED_PARTS = ("gate_proj", "up_proj", "down_proj")


def norm_of(module: nn.Module) -> tuple[float, float] | None:
    """(eps, offset of the weight) if the module is an RMSNorm over the last dimension, else None."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = getattr(module, "weight", None)
    if not isinstance(eps, float) or not isinstance(weight, nn.Parameter) or weight.ndim != 1:
        return None
    if len(module._parameters) != 1 or module._modules or module._buffers:
        return None
    random = torch.Generator().manual_seed(0)
    stand_in = _with_parts(module, parameters={"weight": nn.Parameter(torch.randn(64, generator=random))})
    # Means far from 0, to detect norms that subtract the mean; large and small rows.
    x = (torch.randn(4, 64, generator=random) + 3) * torch.tensor([[0.01], [1.0], [3.0], [100.0]])
    for offset in (0.0, 1.0):
        if _agree(partial(type(module).forward, stand_in, x), partial(plain_rms_norm, x, _w(stand_in), eps, offset)):
            return eps, offset
    return None


def gate_of(module: nn.Module) -> bool | None:
    """Whether an MLP is `down(act(gate(x)) * up(x))` with GELU's tanh form (True) or SiLU (False); None for others."""
    others = set(module._modules) - {*_GATED_PARTS, "act_fn"}
    if others or not all(isinstance(getattr(module, name, None), nn.Module) for name in _GATED_PARTS):
        return None
    if module._parameters or module._buffers or not callable(getattr(module, "act_fn", None)):
        return None
    random = torch.Generator().manual_seed(0)
    shapes = {"gate_proj": (16, 8), "up_proj": (16, 8), "down_proj": (8, 16)}
    parts: dict[str, nn.Module] = {name: _linear(*shape, random) for name, shape in shapes.items()}
    act = module._modules.get("act_fn")
    stand_in = _with_parts(module, modules={**parts, **({"act_fn": act} if act is not None else {})})
    # Include large values, to detect clamped activations.
    x = torch.randn(4, 8, generator=random) * torch.tensor([[0.1], [1.0], [10.0], [100.0]])

    def ours(tanh: bool) -> torch.Tensor:
        opened: torch.Tensor = parts["down_proj"](plain_gated(parts["gate_proj"](x), parts["up_proj"](x), tanh=tanh))
        return opened

    for tanh in (False, True):
        if _agree(partial(type(module).forward, stand_in, x), partial(ours, tanh)):
            return tanh
    return None


def rotates_halves(function: Callable[..., Any]) -> bool:
    """Whether `function(q, k, cos, sin)` is `x cos + rotate_half(x) sin` for q and k [B, H, T, D]."""
    random = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 4, 3, 8, generator=random), torch.randn(2, 2, 3, 8, generator=random)
    cos, sin = torch.randn(2, 3, 8, generator=random), torch.randn(2, 3, 8, generator=random)

    def ours() -> torch.Tensor:
        turned = plain_rotary(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        return torch.cat([part.transpose(1, 2).flatten() for part in turned])

    return _agree(lambda: torch.cat([part.flatten() for part in function(q, k, cos, sin)]), ours)


def _agree(theirs: Callable[[], Any], ours: Callable[[], torch.Tensor]) -> bool:
    """Whether both give the same numbers. A layer that cannot be tried does not count as the kernel's function."""
    try:
        with torch.no_grad():
            result, expected = theirs(), ours()
    except Exception:
        return False
    same_kind = isinstance(result, torch.Tensor) and result.shape == expected.shape and result.dtype == expected.dtype
    return same_kind and torch.allclose(result, expected, rtol=1e-5, atol=1e-6)


def _with_parts(
    module: nn.Module, *, parameters: dict[str, nn.Parameter] | None = None, modules: dict[str, nn.Module] | None = None
) -> nn.Module:
    """A copy of the module with other parameters or children; it shares everything else."""
    stand_in = copy.copy(module)
    # `copy` shares the dictionaries, so replace them instead of changing them.
    stand_in.__dict__["_parameters"] = parameters or {}
    stand_in.__dict__["_modules"] = modules or {}
    return stand_in


def _w(module: nn.Module) -> torch.Tensor:
    weight: torch.Tensor = module._parameters["weight"]  # type: ignore[assignment]
    return weight


def _linear(rows: int, columns: int, random: torch.Generator) -> nn.Linear:
    layer = nn.Linear(columns, rows, bias=False)
    layer.weight = nn.Parameter(torch.randn(rows, columns, generator=random))
    return layer
