"""Defines a language-model head for the kernels: a linear layer and the pointwise map after it.

    raw    = hidden @ weight.T + bias            # [N, V]
    capped = cap * tanh(scale * raw / cap)       # without a softcap: scale * raw
    z      = capped / temperature
    logp   = log_softmax(z)[target]

`softcap` is Gemma's `final_logit_softcapping`, `scale` is Cohere's `logit_scale` or one over Granite's
`logits_scaling`. A tied head is the embedding's own tensor and needs nothing special; autograd adds its two gradients.

Independent of devices, tiles and gradients; it contains the checks that every backend relies on.
"""

from typing import NamedTuple

import torch
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class Head(NamedTuple):
    """A head. The floats are plain numbers because custom ops take nothing else."""

    weight: Tensor  # [V, H]
    bias: Tensor | None = None  # [V]
    softcap: float | None = None
    scale: float = 1.0
    temperature: float = 1.0

    @property
    def vocabulary(self) -> int:
        return int(self.weight.shape[0])

    @property
    def inner(self) -> float:
        """Factor on the raw product before the tanh; 1 without a softcap."""
        return self.scale / self.softcap if self.softcap else 1.0

    @property
    def outer(self) -> float:
        """Last factor of the map: `z = outer * tanh(inner * raw)`, or `outer * raw` without a softcap."""
        return (self.softcap or self.scale) / self.temperature


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and log-probs: at least float32; float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check(hidden: Tensor, head: Head, targets: Tensor) -> None:
    """Refuses inputs that the kernels cannot handle.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together, or a softcap or temperature is not positive.
        NotImplementedError: A quantised head.
    """
    weight, bias = head.weight, head.bias
    if weight.dtype not in FLOATS:
        raise NotImplementedError(
            f"the head is quantised ({type(weight).__name__}, {weight.dtype}); it must be bfloat16, float16 "
            "or float32. Leave the head out of quantisation (bitsandbytes: llm_int8_skip_modules=['lm_head']) or "
            "dequantise it once before the call."
        )
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden must be [N, H] and weight [V, H]; got {tuple(hidden.shape)} and {tuple(weight.shape)}. Select the "
            "positions that have a target and flatten the batch first."
        )
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype}, the head is {weight.dtype}; convert one of them first")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64 [N] = [{hidden.shape[0]}]; got {targets.dtype} {tuple(targets.shape)}")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype not in FLOATS):
        raise ValueError(f"bias must be a float tensor [V] = [{weight.shape[0]}]; got {bias.dtype} {tuple(bias.shape)}")
    if head.vocabulary == 0 or weight.shape[1] == 0:
        raise ValueError(f"the head is empty: {tuple(weight.shape)}")
    if head.softcap is not None and not head.softcap > 0:
        raise ValueError(f"softcap must be positive or None; got {head.softcap}")
    if not head.temperature > 0:
        raise ValueError(f"temperature must be positive; got {head.temperature}")
    devices = {t.device for t in (hidden, weight, targets, bias) if t is not None}
    if len(devices) > 1:
        raise ValueError(f"hidden, weight, targets and bias must share a device; got {sorted(map(str, devices))}")
