"""GPU training: log-probs and their unit gradient, in chunks of rows, around one fused Triton pass.

For each chunk of C rows: product `raw = h @ W.T` (cuBLAS, float32 out); one pass over each row that gathers the
log-prob and turns `raw` into `d logp / d raw` in place; product `G = d @ W` (cuBLAS). That is two products, as many as
plain autograd needs for a frozen head, and one chunk of logits instead of all of them.

The plain PyTorch twin of the pass:

    logp = log_softmax(map(raw), -1).gather(-1, y);   d = (one_hot(y) - softmax(map(raw))) * dmap/draw

Never allocated: anything of `[N, V]`. The chunk takes at most `tiles.CHUNK_BYTES`.
"""

# Triton parses these signatures itself, and its decorator has no types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpoeng.kernels.device import launching_on
from dpoeng.kernels.head import Head
from dpoeng.kernels.rows import gradient_entries, load_raw, logp_of, map_logits, row_sums
from dpoeng.kernels.tiles import chunk_shape, row_tile


@triton.jit
def unit_gradient_rows(
    raw, bias, targets, logps, grad, stride, grad_stride, size, ignore_index, inner, outer,
    BLOCK: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    counts = target != ignore_index
    source = raw + row * stride
    peak, rest, below = row_sums(source, bias, target, size, inner, outer, BLOCK, SOFTCAP)
    tl.store(logps + row, tl.where(counts, logp_of(below, rest), 0.0))
    total = rest + tl.exp(below)
    for low in range(0, size, BLOCK):
        cols = low + tl.arange(0, BLOCK)
        mask = cols < size
        z, slope = map_logits(load_raw(source, bias, cols, mask), inner, outer, SOFTCAP)
        entries = tl.where(counts, gradient_entries(z, slope, cols, target, peak, rest, total), 0.0)
        # `grad` may be `raw` reinterpreted as a 16-bit type: entry v is then written over bytes of entry v // 2, which
        # another warp may not have read yet. The barrier puts all reads of a block before its writes. Earlier blocks
        # are read already, and a write never reaches beyond the block being read.
        tl.debug_barrier()
        tl.store(grad + row * grad_stride + cols, entries.to(grad.dtype.element_ty), mask=mask)


def chunked_logps(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    ignore_index: int,
    unit_gradient: Tensor | None,
    *,
    narrow: bool = False,
) -> Tensor:
    """Log-probs `[N]` float32; fills `unit_gradient` `[N, H]`.

    Args:
        hidden: `[N, H]` bfloat16, float16 or float32.
        head: weight of the same dtype.
        targets: `[N]` int64.
        ignore_index: Rows with this target get 0.0 and a zero gradient.
        unit_gradient: `[N, H]`, overwritten; None for log-probs only, without the second product.
        narrow: Keep the logits in the inputs' dtype: half the chunk's memory, with an error of 7e-3 per log-prob in
            bfloat16 (what rounded logits cost any head) instead of 5e-7.
    """
    n, size = hidden.shape[0], head.vocabulary
    rows, padded = chunk_shape(n, size)
    buffer = hidden.new_empty((rows, padded), dtype=hidden.dtype if narrow else torch.float32)
    raw = buffer[:, :size]
    grad = buffer.view(hidden.dtype)[:, :size]  # shares memory: row r starts where row r of the logits starts
    logps = hidden.new_empty(n, dtype=torch.float32)
    for start in range(0, n, rows):
        some = slice(start, min(n, start + rows))
        count = some.stop - start
        product(hidden[some], head.weight.T, raw[:count])
        fused_pass(raw[:count], head, targets[some], ignore_index, logps[some], grad[:count])
        if unit_gradient is not None:
            torch.mm(grad[:count], head.weight, out=unit_gradient[some])
    return logps


def fused_pass(raw: Tensor, head: Head, targets: Tensor, ignore_index: int, logps: Tensor, grad: Tensor) -> None:
    """Launches the pass over `raw` `[C, V]`; fills `logps` `[C]` and `grad` `[C, V]`, which may share raw's memory."""
    tile = row_tile()
    with launching_on(raw):
        unit_gradient_rows[(raw.shape[0],)](
            raw, head.bias, targets.contiguous(), logps, grad, raw.stride(0), grad.stride(0), head.vocabulary,
            ignore_index, head.inner, head.outer, BLOCK=tile.block, SOFTCAP=head.softcap is not None, **tile.options,
        )  # fmt: skip


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Writes `a @ b` to `out`, whose dtype may be wider than theirs."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:  # CPUs have no widening product; only the interpreter's tests come here
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)
