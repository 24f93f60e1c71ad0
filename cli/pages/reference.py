"""`ReferenceStats` as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence

from dpoeng.cache.analytics import PairNote, ReferenceStats
from dpoeng.cli.pages.html import Html, heading, histogram, number, page, paragraph, plots, table


def html_report(stats: ReferenceStats, title: str, facts: Sequence[tuple[str, str]] = ()) -> str:
    """The page.

    Args:
        stats: what to show.
        title: of the page.
        facts: label and text, shown at the top (which reference, which view).
    """
    shown = [
        ("margin", "nats", stats.margin),
        ("margin per token", "nats", stats.margin_per_token),
        ("length difference", "tokens, chosen − rejected", stats.length_difference),
        ("prompt", "tokens", stats.prompt_tokens),
        ("chosen", "scored tokens", stats.chosen_tokens),
        ("rejected", "scored tokens", stats.rejected_tokens),
    ]
    summary = [
        *facts,
        ("rows", f"{stats.rows:,}"),
        ("distinct pairs", f"{stats.pairs:,}"),
        ("contradictions", f"{len(stats.contradictions):,}"),
        ("reference prefers chosen", f"{stats.accuracy:.1%} of pairs; per token {stats.accuracy_per_token:.1%}"),
        ("margin follows length", f"r = {stats.length_correlation:+.2f}"),
    ]
    parts = [
        table((), summary, words=True),
        heading("Distributions"),
        table(
            ("", "mean", "std", "least", "5 %", "25 %", "median", "75 %", "95 %", "greatest"),
            [(name, *map(number, (item.mean, item.std, *item.quantiles))) for name, _, item in shown],
        ),
        plots(histogram(name, unit, item.edges, item.counts) for name, unit, item in shown),
        heading("Pairs that the reference ranks strongly wrong"),
        paragraph("Mislabelled pairs gather here: read some before training on them.", "dim"),
        _notes(stats.strongly_wrong),
        heading("Pairs that the reference ranks strongly right"),
        _notes(stats.strongly_right),
    ]
    if stats.contradictions:
        parts += [
            heading("Contradictions"),
            paragraph("Two rows that are each other with chosen and rejected swapped.", "dim"),
            table(("row", "row"), [(str(one), str(other)) for one, other in stats.contradictions[:50]]),
        ]
    return page(title, parts)


def _notes(notes: Sequence[PairNote]) -> Html:
    if not notes:
        return paragraph("none", "dim")
    return table(
        ("source", "row", "margin", "margin per token"),
        [
            (note.source_file, f"{note.source_row}", f"{note.margin:+.2f}", f"{note.margin_per_token:+.3f}")
            for note in notes
        ],
    )
