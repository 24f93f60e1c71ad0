"""Numbers in sentences."""

from __future__ import annotations


def counted(count: int, word: str, many: str = "") -> str:
    """`1 pair`, `2 pairs`, `1,000 pairs`; `many` where the plural is not the word with an s."""
    return f"{count:,} {word if count == 1 else many or word + 's'}"
