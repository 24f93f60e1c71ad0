"""Margins and lengths under a reference: tables, and an HTML page."""

from __future__ import annotations

from collections.abc import Sequence

from dpoeng.cache.analytics import PairNote, ReferenceStats
from dpoeng.cache.exchange.responses import ResponseStats
from dpoeng.cache.words import counted, number
from dpoeng.cli.pages.charts import histogram
from dpoeng.cli.pages.html import Html, heading, page, paragraph, plots, table
from dpoeng.cli.tables import Table, facts_table

# title, unit, attribute
_SHOWN = (
    ("margin", "nats, sums", "margin"),
    ("margin per token", "nats, means", "margin_per_token"),
    ("length difference", "tokens, chosen − rejected", "length_difference"),
    ("prompt", "tokens", "prompt_tokens"),
    ("chosen", "scored tokens", "chosen_tokens"),
    ("rejected", "scored tokens", "rejected_tokens"),
)
MARGIN = (
    "Margin: log p_ref(chosen) − log p_ref(rejected), sums over each response, as in DPO's loss; per token: the "
    "same for means."
)
MARGIN_OF_ROW = (
    "Margin: log p_ref(a best response) − log p_ref(a worst one), sums over each response; per token: the same for "
    "means."
)
# title, unit, attribute of rows that are no pairs; not every kind has all
_SHOWN_OF_RESPONSES = (
    ("margin", "nats, sums, best − worst", "margin"),
    ("margin per token", "nats, means", "margin_per_token"),
    ("spread of scores", "best − worst", "spread"),
    ("prompt", "tokens", "prompt_tokens"),
    ("response", "scored tokens", "response_tokens"),
    ("responses a row", "responses", "responses_a_row"),
    ("log-prob per token", "nats", "logp_per_token"),
)
_QUANTILES = ("least", "5 %", "25 %", "median", "75 %", "95 %", "greatest")


def html_report(stats: ReferenceStats, title: str, facts: Sequence[tuple[str, str]] = ()) -> str:
    """The page of some statistics.

    Args:
        stats: the statistics.
        title: title of the page.
        facts: label and text to show at the top (which reference, which view).
    """
    parts = [
        table(facts_table([*facts, *reference_facts(stats)])),
        heading("Distributions"),
        table(distributions_table(stats)),
        plots(_histogram(stats, title, unit, name) for title, unit, name in shown_of(stats)),
        heading("Pairs that the reference ranks strongly wrong"),
        paragraph(f"{MARGIN} Mislabelled pairs are often among these: read some before you train on them.", "dim"),
        _notes(stats.strongly_wrong),
        heading("Pairs that the reference ranks strongly right"),
        _notes(stats.strongly_right),
    ]
    if stats.contradictions:
        parts += [
            heading("Contradictions"),
            paragraph("Pairs of rows that are equal but for a swap of chosen and rejected.", "dim"),
            table(Table([(str(one), str(other)) for one, other in stats.contradictions[:50]], ("row", "row"))),
        ]
    return page(title, parts)


def responses_report(stats: ResponseStats, title: str, facts: Sequence[tuple[str, str]] = ()) -> str:
    """The same page of rows that are no pairs."""
    parts = [
        table(facts_table([*facts, *responses_facts(stats)])),
        heading("Distributions"),
        table(distributions_table(stats)),
        plots(_histogram(stats, title, unit, name) for title, unit, name in shown_of(stats)),
    ]
    if stats.margin is not None:
        parts += [
            heading("Rows that the reference ranks strongly wrong"),
            paragraph(
                f"{MARGIN_OF_ROW} Wrong scores are often among these: read some before you train on them.", "dim"
            ),
            _notes(stats.strongly_wrong),
            heading("Rows that the reference ranks strongly right"),
            _notes(stats.strongly_right),
        ]
    return page(title, parts)


def shown_of(stats: ReferenceStats | ResponseStats) -> list[tuple[str, str, str]]:
    """The distributions of such rows: title, unit, attribute."""
    every = _SHOWN if isinstance(stats, ReferenceStats) else _SHOWN_OF_RESPONSES
    return [one for one in every if getattr(stats, one[2]) is not None]


def responses_facts(stats: ResponseStats) -> list[tuple[str, str]]:
    """Counts, and how far the reference agrees with labels or scores."""
    facts = [("rows", f"{counted(stats.rows, f'{stats.kind} row')} of {counted(stats.responses, 'response')}")]
    if stats.desirable is not None:
        facts.append(("labels", f"{stats.desirable:,} desirable, {stats.rows - stats.desirable:,} not"))
    if stats.best_less_worst is not None:
        sides = "best less worst response" if stats.desirable is None else "desirable less other responses"
        facts.append(("reference", f"{sides}: {stats.best_less_worst:+.3f} nats per token"))
    if stats.accuracy is not None:
        per_token = f"per token {stats.accuracy_per_token:.1%}"
        facts.append(("prefers the better", f"{stats.accuracy:.1%} of a row's pairs (sums); {per_token}"))
    return facts


def _histogram(stats: ReferenceStats | ResponseStats, title: str, unit: str, name: str) -> Html:
    item = getattr(stats, name)
    of_responses = name in ("response_tokens", "logp_per_token")
    of = "pair" if isinstance(stats, ReferenceStats) else "response" if of_responses else "row"
    return histogram(title, unit, item.edges, item.counts, of=of, whole="tokens" in unit or unit == "responses")


def reference_facts(stats: ReferenceStats) -> list[tuple[str, str]]:
    """Counts, and how often the reference prefers the chosen response."""
    return [
        ("rows", f"{stats.rows:,}"),
        ("distinct pairs", f"{stats.pairs:,}"),
        ("contradictions", f"{len(stats.contradictions):,}"),
        ("reference prefers chosen", f"{stats.accuracy:.1%} of pairs (sums); per token {stats.accuracy_per_token:.1%}"),
        ("margin follows length", f"r = {stats.length_correlation:+.2f}"),
    ]


def distributions_table(stats: ReferenceStats | ResponseStats, quantiles: Sequence[int] = range(7)) -> Table:
    """Mean, standard deviation and quantiles of margins and lengths."""
    items = [(title, getattr(stats, name)) for title, _, name in shown_of(stats)]
    rows = [
        (title, *map(number, (item.mean, item.std, *(item.quantiles[place] for place in quantiles))))
        for title, item in items
    ]
    return Table(rows, ("", "mean", "std", *(_QUANTILES[place] for place in quantiles)))


def notes_table(notes: Sequence[PairNote], title: str = "", margin: str = MARGIN) -> Table:
    """Strongly ranked pairs or rows, with their sources; `margin` says what a margin is."""
    rows = [
        (note.source_file, f"{note.source_row}", f"{note.margin:+.2f}", f"{note.margin_per_token:+.3f}")
        for note in notes
    ]
    return Table(rows, ("source", "row", "margin", "margin per token"), title, [margin] if title else [])


def _notes(notes: Sequence[PairNote]) -> Html:
    return table(notes_table(notes)) if notes else paragraph("none", "dim")
