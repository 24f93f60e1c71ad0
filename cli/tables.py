"""What is shown of the data: how long the pairs are, and what tokenisation did to them."""

from __future__ import annotations

from rich.table import Table

from dpoeng.engine.tokens import TokenizedData

_NOTES = {
    "truncated": "truncated",
    "merged": "with other prompt tokens before a response than alone",
    "unshared": "with last prompt tokens that differ between the sides",
    "duplicates": "duplicate",
    "contradictions": "the other way round in an earlier pair",
    "separate": "responses tokenised apart from their prompt (the tokenizer gives no offsets)",
}


def length_table(data: TokenizedData) -> Table:
    """Tokens of prompt, responses and pair, with a caption that counts whatever was not as usual."""
    table = Table(title="tokens", title_justify="left", show_edge=False, pad_edge=False, caption_justify="left")
    table.add_column("")
    for heading in ("pairs", "mean", "p50", "p95", "max"):
        table.add_column(heading, justify="right")
    for part, lengths in data.counts.lengths.items():
        numbers = (lengths.p50, lengths.p95, lengths.max)
        table.add_row(part, f"{lengths.count:,}", f"{lengths.mean:,.1f}", *(f"{number:,}" for number in numbers))
    notes = [f"{getattr(data.counts, name):,} {text}" for name, text in _NOTES.items() if getattr(data.counts, name)]
    if data.rejects:
        notes.append(f"{len(data.rejects):,} left out")
    table.caption = ", ".join(notes) or None
    return table
