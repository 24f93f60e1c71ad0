"""The report of `dpoeng check`: its tables, and its HTML page."""

from __future__ import annotations

from dpoeng.cache.words import counted, number
from dpoeng.cli.pages.charts import histogram
from dpoeng.cli.pages.html import Html, cards, heading, page, paragraph, plots, table, tag, text
from dpoeng.cli.tables import Table, facts_table
from dpoeng.engine.checks.findings import Finding
from dpoeng.engine.checks.shown import ShownPair
from dpoeng.engine.recipes.check import CheckReport


def check_page(report: CheckReport) -> str:
    """The page of a report."""
    facts = [
        ("pairs", f"{report.pairs:,}"),
        ("distinct prompts", f"{report.prompts:,}"),
        ("rows left out", f"{report.rejected:,}"),
        ("errors", str(report.count("error"))),
        ("warnings", str(report.count("warning"))),
    ]
    if report.bias is not None:
        facts.append(("chosen is longer", f"{report.bias.share_longer:.0%}"))
    subtitle = ", ".join(report.files) + (f" with the tokenizer of {report.tokenizer}" if report.tokenizer else "")
    parts: list[str] = [cards(facts), heading("Findings")]
    parts += [_finding(finding) for finding in report.findings] or [paragraph("Nothing was found.", "good")]
    if report.shown:
        parts += [heading("Texts"), paragraph("As the model sees them; scored parts are marked.", "dim")]
        parts += [_shown(pair) for pair in report.shown]
    parts += [
        heading("Lengths"),
        table(lengths_table(report)),
        plots(histogram(one.part, report.unit, one.edges, one.counts, whole=True) for one in report.lengths),
    ]
    if report.bias is not None:
        bias = report.bias
        parts.append(
            paragraph(
                f"Chosen is longer in {counted(bias.longer, 'pair')}, shorter in {bias.shorter:,}, equal in "
                f"{bias.equal:,}; on average by {bias.mean_difference:+.1f} {report.unit} (sign test p = "
                f"{bias.p_value:.2g}).",
                "dim",
            )
        )
    if report.categories:
        parts += [heading("Categories"), table(categories_table(report))]
    return page("Preference pairs", parts, subtitle)


def _shown(pair: ShownPair) -> Html:
    inner = ""
    for name, pieces in zip(pair.names, (pair.chosen, pair.rejected), strict=True):
        marked = "".join(f"<mark>{text(one.text)}</mark>" if one.scored else text(one.text) for one in pieces)
        inner += f"<p class=dim>{text(f'{pair.where}, {name}')}</p><pre>{marked}</pre>"
    return Html(inner)


def lengths_table(report: CheckReport) -> Table:
    """Lengths of prompt, chosen and rejected, in characters or tokens."""
    rows = [(one.part, *map(number, (one.mean, *one.quantiles))) for one in report.lengths]
    return Table(rows, ("", "mean", "least", "5 %", "median", "95 %", "greatest"), report.unit)


def categories_table(report: CheckReport) -> Table:
    """Number of pairs for each value of the grouping columns."""
    column_count = 5 if report.bias is not None else 4
    rows = [category.row(report.pairs)[:column_count] for category in report.categories]
    return Table(rows, ("column", "value", "pairs", "share", "chosen is longer")[:column_count], "categories", words=2)


def _finding(finding: Finding) -> Html:
    count = f"{finding.count:,} of {finding.of:,} ({finding.share:.1%})"
    inner = f"<h3>{tag(finding.level)} {text(finding.what)}</h3>"
    inner += f"<p>{count} <span class=dim>{text(finding.code)}</span>"
    inner += (f": {text(finding.detail)}" if finding.detail else "") + "</p>"
    inner += paragraph(f"Why it matters: {finding.why}.", "dim") + paragraph(f"Remedy: {finding.remedy}.")
    if finding.examples:
        inner += table(facts_table(finding.examples))
    return Html(f'<div class="finding {finding.level}">{inner}</div>')
