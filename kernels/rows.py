"""Building blocks of the row kernels: from one row of logits to its sums and gradient.

For target y, with `peak = max_v z_v`:

    rest  = sum_{v != y} exp(z_v - peak)         total = rest + exp(z_y - peak)
    logp  = (z_y - peak) - log(total)            1 - p_y = rest / total

`rest` excludes the target on purpose: if p_y is close to 1, computing `1 - p_y` or `log p_y` directly cancels the
digits that the sum of the others still has.

Exceptional values follow torch.log_softmax: -inf excludes an entry; a row of only -inf, or with NaN or +inf, gives NaN.
A target outside [0, V) gives NaN. Triton's max skips NaN, so NaN propagates through the sums.
"""

# Triton parses these signatures itself, and its decorator has no types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """Rational approximation, accurate to a few ulps (the coefficients of Eigen's and XLA's float32 tanh).

    `1 - 2 / (exp(2x) + 1)` loses the digits of small x, and the interpreter has no libdevice.
    """
    x = tl.where(
        x > 7.90531110763549805, 7.90531110763549805, tl.where(x < -7.90531110763549805, -7.90531110763549805, x)
    )
    y = x * x
    top = -2.76076847742355e-16
    top = top * y + 2.00018790482477e-13
    top = top * y - 8.60467152213735e-11
    top = top * y + 5.12229709037114e-08
    top = top * y + 1.48572235717979e-05
    top = top * y + 6.37261928875436e-04
    top = top * y + 4.89352455891786e-03
    bottom = 1.19825839466702e-06
    bottom = bottom * y + 1.18534705686654e-04
    bottom = bottom * y + 2.26843463243900e-03
    bottom = bottom * y + 4.89352518554385e-03
    return x * top / bottom


@triton.jit
def map_logits(raw, inner, outer, SOFTCAP: tl.constexpr):
    """Maps raw products to logits and the slope dz/draw. `inner` and `outer` are those of `kernels.head.Head`."""
    if SOFTCAP:
        t = tanh(raw * inner)
        return t * outer, (1.0 - t * t) * (inner * outer)
    return raw * outer, tl.full(raw.shape, 1.0, tl.float32) * outer


@triton.jit
def logp_of(below, rest):
    """log p from `below = z_y - peak` and `rest`; at most 0, or NaN."""
    # The hardware logarithm is accurate to 1e-7 absolute; if the target is nearly certain, a series is accurate to 1e-8
    # relative.
    series = rest * (1.0 - rest * (0.5 - rest * (1.0 / 3 - rest * (0.25 - rest * 0.2))))
    logp = tl.where((below == 0.0) & (rest < 0.03), -series, below - tl.log(rest + tl.exp(below)))
    return tl.where(logp > 0.0, 0.0, logp)


@triton.jit
def load_raw(row, bias, cols, mask):
    """Logits as float32, plus the bias if there is one."""
    raw = tl.load(row + cols, mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        raw += tl.load(bias + cols, mask=mask, other=0.0).to(tl.float32)
    return raw


@triton.jit
def row_sums(row, bias, target, size, inner, outer, BLOCK: tl.constexpr, SOFTCAP: tl.constexpr):
    """One pass over a row: `peak`, `rest` and `below = z_target - peak`."""
    peak = -float("inf")
    rest = 0.0
    for low in range(0, size, BLOCK):
        cols = low + tl.arange(0, BLOCK)
        z, _ = map_logits(load_raw(row, bias, cols, cols < size), inner, outer, SOFTCAP)
        z = tl.where(cols < size, z, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(z, 0))
        anchor = tl.where(new_peak == -float("inf"), 0.0, new_peak)  # exp(-inf + inf) would be NaN
        rest = rest * tl.exp(peak - anchor) + tl.sum(tl.where(cols == target, 0.0, tl.exp(z - anchor)), 0)
        peak = new_peak
    return peak, rest, target_logit(row, bias, target, size, inner, outer, SOFTCAP) - peak


@triton.jit
def target_logit(row, bias, target, size, inner, outer, SOFTCAP: tl.constexpr):
    """z of the target, bit for bit as the pass computes it; NaN for a target outside the vocabulary."""
    inside = (target >= 0) & (target < size)
    z, _ = map_logits(load_raw(row, bias, target, inside), inner, outer, SOFTCAP)
    return tl.where(inside, z, float("nan"))


@triton.jit
def gradient_entries(z, slope, cols, target, peak, rest, total):
    """(1[v = y] - p_v) dz/draw; the target's entry comes from `rest`, not from 1 - p."""
    anchor = tl.where(peak == -float("inf"), 0.0, peak)
    return tl.where(cols == target, rest, -tl.exp(z - anchor)) * slope / total
