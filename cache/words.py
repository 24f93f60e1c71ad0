"""Formats numbers and sizes for sentences."""

from __future__ import annotations

MIB = 2**20
GIB = 2**30


def gib(n_bytes: float) -> str:
    """`1.50 GiB`."""
    return f"{n_bytes / GIB:.2f} GiB"


def counted(count: int, word: str, many: str = "") -> str:
    """`1 pair`, `2 pairs`, `1,000 pairs`; `many` is an irregular plural."""
    return f"{count:,} {word if count == 1 else many or word + 's'}"


def number(value: float, digits: int = 4) -> str:
    """A number with this many digits: `0.01234`, `12.34`, `12,340`; powers of ten only below 0.0001."""
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    if value and abs(value) < 1e-4:
        mantissa, _, power = f"{value:.{digits - 1}e}".partition("e")
        return f"{float(mantissa):g}e{int(power)}"
    return f"{value:.{digits}g}"


def speed(done: float, seconds: float, unit: str) -> str:
    """`250 pairs/s`, `2.5 pairs/s`, or `25.0 s/pair` below one a second."""
    rate = done / max(seconds, 1e-9)
    return (
        f"{number(rate, 3)} {unit}/s" if rate >= 1 or not done else f"{number(1 / rate, 3)} s/{unit.removesuffix('s')}"
    )
