"""`ReferenceStats` as one HTML page that needs nothing else: no script, no font, no network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from dpoeng.cache.analytics import Distribution, PairNote, ReferenceStats

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --dim: #687076; --bar: #3b7dd8; --line: #d7dbdf; --page: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #eceef0; --dim: #9ba1a6; --bar: #6aa5f0; --line: #3a3f42; --page: #16181a; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .8rem .2rem 0; text-align: right; border-bottom: 1px solid var(--line) }
th:first-child, td:first-child { text-align: left } th { color: var(--dim); font-weight: 500 }
figure { display: inline-block; margin: 1rem 1.5rem 0 0 } figcaption { color: var(--dim) }
rect { fill: var(--bar) } line { stroke: var(--line) } line.zero { stroke: var(--ink); stroke-dasharray: 3 3 }
text { fill: var(--dim); font-size: 11px } p.dim { color: var(--dim) }
"""
_WIDTH, _HEIGHT, _FLOOR = 420, 160, 140  # of a plot, in pixels; the bars stand on the floor


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
        f"<h1>{escape(title)}</h1>",
        _table((), summary),
        "<h2>Distributions</h2>",
        _table(
            ("", "mean", "std", "least", "5 %", "25 %", "median", "75 %", "95 %", "greatest"),
            [(name, *map(_number, (item.mean, item.std, *item.quantiles))) for name, _, item in shown],
        ),
        *(_histogram(name, unit, item) for name, unit, item in shown),
        "<h2>Pairs that the reference ranks strongly wrong</h2>",
        '<p class="dim">Mislabelled pairs gather here: read some before training on them.</p>',
        _notes(stats.strongly_wrong),
        "<h2>Pairs that the reference ranks strongly right</h2>",
        _notes(stats.strongly_right),
    ]
    if stats.contradictions:
        parts += [
            "<h2>Contradictions</h2>",
            '<p class="dim">Two rows that are each other with chosen and rejected swapped.</p>',
            _table(("row", "row"), [(str(one), str(other)) for one, other in stats.contradictions[:50]]),
        ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + (line(head, "th") if head else "") + "".join(line(row, "td") for row in rows) + "</table>"


def _notes(notes: Sequence[PairNote]) -> str:
    if not notes:
        return '<p class="dim">none</p>'
    return _table(
        ("source", "row", "margin", "margin per token"),
        [
            (note.source_file, f"{note.source_row}", f"{note.margin:+.2f}", f"{note.margin_per_token:+.3f}")
            for note in notes
        ],
    )


def _histogram(name: str, unit: str, distribution: Distribution) -> str:
    """A bar chart; each bar carries its range and count as a tooltip."""
    counts, edges = distribution.counts, distribution.edges
    low, high, top = edges[0], edges[-1], max(*counts, 1)
    step = _WIDTH / len(counts)
    bars = [
        f'<rect x="{k * step:.1f}" y="{_FLOOR * (1 - count / top):.1f}" width="{step - 1:.1f}" '
        f'height="{_FLOOR * count / top:.1f}"><title>{_number(edges[k])} to {_number(edges[k + 1])}: {count:,}'
        "</title></rect>"
        for k, count in enumerate(counts)
        if count
    ]
    if low < 0 < high:
        zero = _WIDTH * -low / (high - low)
        bars.append(f'<line class="zero" x1="{zero:.1f}" x2="{zero:.1f}" y1="0" y2="{_FLOOR}"/>')
    return (
        f'<figure><svg width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="histogram of {escape(name)}">{"".join(bars)}'
        f'<line x1="0" x2="{_WIDTH}" y1="{_FLOOR}" y2="{_FLOOR}"/>'
        f'<text x="0" y="{_HEIGHT - 5}">{_number(low)}</text>'
        f'<text x="{_WIDTH}" y="{_HEIGHT - 5}" text-anchor="end">{_number(high)}</text></svg>'
        f"<figcaption>{escape(name)} ({escape(unit)})</figcaption></figure>"
    )
