"""Numbers and sizes in sentences."""

from __future__ import annotations

MIB = 2**20
GIB = 2**30


def gib(n_bytes: float) -> str:
    """`1.50 GiB`."""
    return f"{n_bytes / GIB:.2f} GiB"


def counted(count: int, word: str, many: str = "") -> str:
    """`1 pair`, `2 pairs`, `1,000 pairs`; `many` where the plural is not the word with an s."""
    return f"{count:,} {word if count == 1 else many or word + 's'}"
