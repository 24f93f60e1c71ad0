"""`dpoeng cache info`, `verify` and `stats`: what is in a cache, and whether it is undamaged."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dpoeng.cache.words import counted
from dpoeng.cli.cache.words import FILE, FOLDER, example, short, size, sources_of
from dpoeng.cli.options import force_option
from dpoeng.cli.tables import Marked, as_data, facts_table, json_option, say, say_json

if TYPE_CHECKING:
    from dpoeng.cache.analytics import ReferenceStats
    from dpoeng.cache.exchange.responses import ResponseStats
    from dpoeng.cache.info import CacheInfo
    from dpoeng.cache.verify import VerifyReport
    from dpoeng.engine.reference.parity import ParityReport


@click.command(epilog=example("dpoeng cache info refcache"))
@click.argument("folder", type=FOLDER)
@json_option
def info(folder: Path, as_json: bool) -> None:
    """Show what is in a cache: references, rows, sizes, views, library versions and dates."""
    from dpoeng.cache.info import cache_info

    contents = cache_info(folder)
    if as_json:
        say_json(contents)
    else:
        _print_info(folder, contents)
    if contents.problems:
        sys.exit(4)


def _print_info(folder: Path, contents: CacheInfo) -> None:
    trunks = f", trunks {len(contents.trunks)}" if contents.trunks else ""
    say(Marked(str(folder), "bold"), f": references {len(contents.references)}{trunks}, views {len(contents.views)}")
    for reference in contents.references:
        facts = [
            ("reference", reference.digest),
            *((name, short(value)) for name, value in reference.summary.items()),
            ("rows", f"{reference.rows:,} in {counted(reference.objects, 'object')}, {size(reference.bytes)}"),
            ("finished run", f"generation {reference.generation}" if reference.generation else "none yet"),
            ("last changed", reference.changed.strftime("%Y-%m-%d %H:%M") if reference.changed else "never"),
            *(("written by", short(provenance)) for provenance in reference.provenance),
        ]
        say("")
        say(facts_table(facts))
    for trunk in contents.trunks:
        facts = [
            ("trunk", trunk.digest),
            ("states", f"that enter layer {trunk.layer}, {trunk.width} x {trunk.dtype} a token"),
            ("texts", f"{trunk.texts:,} in {counted(trunk.objects, 'object')}, {size(trunk.bytes)}"),
            ("finished run", f"generation {trunk.generation}" if trunk.generation else "none yet"),
            ("reference", trunk.reference),
        ]
        say("")
        say(facts_table(facts))
    for view in contents.views:
        say("")
        kind = view.meta.get("rows", "pairs")
        stored = " (two responses each; a row of the data is several)" if kind == "ranked" else ""
        rows = f"{view.rows:,}{stored}"
        say(facts_table([("view", view.name), ("kind", kind), ("rows", rows), ("reference", view.spec)]))
        say(facts_table([(f"  {name}", short(value)) for name, value in view.meta.items()]))
    for problem in contents.problems:
        say(Marked("damaged:", "error"), f" {problem}")


@click.command(epilog=example("dpoeng cache verify refcache", "dpoeng cache verify refcache --recompute 16"))
@click.argument("folder", type=FOLDER)
@click.option(
    "--depth",
    type=click.Choice(["open", "semantic", "full", "all"]),
    default="all",
    show_default=True,
    help="open: records, sizes, structure. full: also every byte's hash and every log-prob. "
    "semantic: also every sum, key and view entry. all: both.",
)
@click.option("--recompute", type=click.IntRange(min=1), help="Also score this many pairs of a view again and compare.")
@click.option("--view", help="The view for --recompute.  [default: the only one]")
@json_option
@click.option("--model", help="The base's location, for --recompute.  [default: as recorded]")
@click.option("--adapter", help="The SFT adapter's location, for --recompute.  [default: as recorded]")
@click.option(
    "--layer-offloading",
    type=click.Choice(["auto", "on", "off"]),
    default="auto",
    show_default=True,
    help="For --recompute: load the base's layers one at a time; auto: if it does not fit.",
)
def verify(
    folder: Path,
    depth: Any,
    recompute: int | None,
    view: str | None,
    as_json: bool,
    model: str | None,
    adapter: str | None,
    layer_offloading: Any,
) -> None:
    """Verify a cache without changing it; the exit status is 4 if something is wrong."""
    from dpoeng.cache.info import cache_info
    from dpoeng.cache.verify import verify as run
    from dpoeng.cli.progress import TerminalProgress

    done = 0
    known = cache_info(folder)
    total_bytes = sum(one.bytes for one in known.references) + sum(one.bytes for one in known.trunks)
    with TerminalProgress().task("verify", total_bytes, "B") as advance:

        def progress(now: int, total: int) -> None:
            nonlocal done
            advance(now - done, f"{size(now)} of {size(total)}")
            done = now

        report = run(folder, depth=depth, progress=progress)
    if not as_json:
        _print_verified(report)
    recomputed = None
    if recompute is not None and report.ok:
        from dpoeng.cache.reader import View
        from dpoeng.cache.records import ROW_KINDS
        from dpoeng.engine.recipes.recompute import recompute_pairs

        recomputed = recompute_pairs(
            View.open(folder, view, rows=ROW_KINDS),
            recompute,
            model=model,
            adapter=adapter,
            layer_offloading=layer_offloading,
            progress=TerminalProgress(),
        )
    if as_json:
        say_json({"ok": report.ok, **as_data(report), "recomputed": recomputed})
    elif recomputed is not None:
        _print_recomputed(recomputed)
    if not report.ok or (recomputed is not None and not recomputed.ok):
        sys.exit(4)


def _print_verified(report: VerifyReport) -> None:
    for problem in report.problems:
        say(Marked("damaged", "error"), f" {problem.where}")
        say(f"  expected: {problem.expected}\n  found:    {problem.found}")
    counts = ", ".join(f"{name} {count:,}" for name, count in report.counts.items() if count)
    speed = report.bytes / max(report.seconds, 1e-9)
    say(f"{counts}\ndepth {report.depth}, {size(report.bytes)} in {report.seconds:.2f} s ({size(speed)}/s)")
    if report.ok:
        say(Marked("sound", "ok"))
        return
    say(
        Marked(f"{len(report.problems)} damaged.", "error"),
        " Run the same `dpoeng precompute-ref` again: it moves damaged files to quarantine and recomputes their rows.",
    )


def _print_recomputed(parity: ParityReport) -> None:
    say(
        f"{counted(parity.pairs, 'pair')} scored again: mean difference {parity.mean_diff:.2g}, largest "
        f"{parity.max_diff:.2g} nats per token (allowed mean: {parity.tolerance:g})"
    )
    for layer, one in parity.trunks.items():
        say(
            f"{counted(one.pairs, 'pair')} run from the states that enter layer {layer}: mean difference "
            f"{one.mean_diff:.2g}, largest {one.max_diff:.2g} nats per token"
        )
    if parity.ok:
        say(Marked("they are this model's log-probs", "ok"))
    else:
        say(Marked("These are not this model's log-probs.", "error"), " Were its files changed?")


@click.command(epilog=example("dpoeng cache stats refcache", "dpoeng cache stats refcache --html reference.html"))
@click.argument("folder", type=FOLDER)
@click.option("--view", help="The view.  [default: the only one]")
@click.option("--html", type=FILE, help="Write a page with plots; it needs no network.")
@force_option
@json_option
@click.option("--pairs", default=10, show_default=True, help="Number of strongly ranked pairs or rows to list.")
def stats(folder: Path, view: str | None, html: Path | None, force: bool, as_json: bool, pairs: int) -> None:
    """Show the reference's margins on the data, lengths, and rows that look mislabelled.

    Of rows with labels or scores: lengths, log-probs, and how often the reference agrees with labels and scores.
    """
    from dpoeng.cache.analytics import ReferenceStats, reference_stats
    from dpoeng.cache.exchange.responses import response_stats
    from dpoeng.cache.reader import View
    from dpoeng.cache.records import ROW_KINDS

    opened = View.open(folder, view, rows=ROW_KINDS)
    of_pairs = opened.rows == "pairs"
    statistics = reference_stats(opened, notes=pairs) if of_pairs else response_stats(opened, notes=pairs)
    if html:
        from dpoeng.cli.pages.html import write_page
        from dpoeng.cli.pages.reference import html_report, responses_report

        facts = [("view", opened.name), ("reference", opened.spec.digest)]
        title = f"The reference on {opened.name}"
        if isinstance(statistics, ReferenceStats):
            content = html_report(statistics, title, facts)
        else:
            content = responses_report(statistics, title, facts)
        write_page(html, content, inputs=sources_of(opened), force=force)
    if as_json:
        say_json(statistics)
        return
    _print_stats(statistics)
    if html:
        say(f"Plots written to {html}")


def _print_stats(statistics: ReferenceStats | ResponseStats) -> None:
    from dpoeng.cache.analytics import ReferenceStats
    from dpoeng.cli.pages import reference

    if isinstance(statistics, ReferenceStats):
        facts, margin = reference.reference_facts(statistics), reference.MARGIN
    else:
        facts, margin = reference.responses_facts(statistics), reference.MARGIN_OF_ROW
    say(reference.distributions_table(statistics, (1, 3, 5)), facts_table(facts))
    for title, notes in (("strongly wrong", statistics.strongly_wrong), ("strongly right", statistics.strongly_right)):
        if notes:
            say(reference.notes_table(notes, title, margin))
