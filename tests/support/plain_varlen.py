"""torch's operator of FlashAttention over texts of different lengths, with plain arithmetic as its kernels on a CPU."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch


def plain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_at: Any, k_at: Any, causal: bool, scale: Any, window: Any,
    grad: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """What the operator's documentation says, text by text, in float64: the output, or the gradients of q, k and v."""
    outputs, grads = [], [torch.zeros_like(x, dtype=torch.float64) for x in (q, k, v)]
    repeats, scale = q.shape[1] // k.shape[1], scale or q.shape[-1] ** -0.5
    for i in range(len(q_at) - 1):
        rows, seen = slice(int(q_at[i]), int(q_at[i + 1])), slice(int(k_at[i]), int(k_at[i + 1]))
        a, (c, d) = q[rows].double(), (x[seen].double().repeat_interleave(repeats, 1) for x in (k, v))
        late = torch.arange(len(c))[None, :] - (torch.arange(len(a))[:, None] + len(c) - len(a))
        left, right = window
        hidden = torch.zeros_like(late, dtype=torch.bool)
        if causal or right >= 0:
            hidden |= late > (0 if causal else right)
        if left >= 0:
            hidden |= -late > left
        weights = (torch.einsum("qhd,khd->hqk", a, c) * scale).masked_fill(hidden, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, d).to(q.dtype))
        if grad is not None:
            pull = grad[rows].double()
            of_weights = torch.einsum("qhd,khd->hqk", pull, d)
            of_scores = scale * weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True))
            grads[0][rows] = torch.einsum("hqk,khd->qhd", of_scores, c)
            for x, one in ((1, (of_scores, a)), (2, (weights, pull))):
                grads[x][seen] = torch.einsum("hqk,qhd->khd", *one).unflatten(1, (-1, repeats)).sum(2)
    return tuple(x.to(q.dtype) for x in grads) if grad is not None else (torch.cat(outputs),)


@cache
def use_plain_arithmetic() -> None:
    """Gives the operator two kernels for a CPU, where PyTorch has none: forward and backward."""
    from torch.nn.attention import varlen as torch_varlen

    def forward(
        q: Any, k: Any, v: Any, q_at: Any, k_at: Any, most_q: int, most_k: int, causal: bool = False,
        scale: Any = None, window_size: Any = None, *_: Any, **__: Any,
    ) -> Any:  # fmt: skip
        assert most_q == int(q_at.diff().max())
        assert most_k == int(k_at.diff().max())
        assert q_at.dtype == k_at.dtype == torch.int32
        sums = torch.empty(q.shape[1], q.shape[0])
        return *plain(q, k, v, q_at, k_at, causal, scale, window_size), sums, torch.zeros(2, dtype=torch.uint64)

    def backward(
        grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, q_at: Any, k_at: Any, most_q: int, most_k: int,
        causal: bool, state: Any, scale: Any = None, window_size: Any = None,
    ) -> Any:  # fmt: skip
        return plain(q, k, v, q_at, k_at, causal, scale, window_size, grad)

    torch_varlen._varlen_attn.register_kernel("cpu")(forward)
    torch_varlen._varlen_attn_backward.register_kernel("cpu")(backward)
