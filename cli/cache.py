"""`dpoeng cache`: look into a reference cache, check it, carry rows in and out of it."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dpoeng.cache.words import counted
from dpoeng.cli.options import config_options, force_option, given
from dpoeng.cli.tables import Marked, Table, facts_table, say
from dpoeng.engine.config.fields import PrecomputeConfig
from dpoeng.engine.config.files import load_config

if TYPE_CHECKING:
    from dpoeng.cache.analytics import ReferenceStats
    from dpoeng.cache.reader import View
    from dpoeng.cache.spec import FieldChange
    from dpoeng.cache.store import Store

_FOLDER = click.Path(path_type=Path, file_okay=False)
_FILE = click.Path(path_type=Path, dir_okay=False)
_SHOWN_CHANGES = 20
_OF_A_REFERENCE = frozenset(
    "model adapter cache name quantization dtype bnb_4bit_quant_type bnb_4bit_use_double_quant batch_tokens".split()
)


def _example(*lines: str) -> str:
    return "\n".join(["\b", "Example:", *(f"  {line}" for line in lines)])


@click.group(invoke_without_command=True)
@click.pass_context
def cache(ctx: click.Context) -> None:
    """Look into a reference cache, check it, carry rows in and out of it."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@cache.command(epilog=_example("dpoeng cache info refcache"))
@click.argument("folder", type=_FOLDER)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(folder: Path, as_json: bool) -> None:
    """Show what a cache holds: references, rows, sizes, views, library versions and dates."""
    from dpoeng.cache.info import cache_info

    found = cache_info(folder)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(found), indent=2, default=str))
        return
    say(Marked(str(folder), "bold"), f": references {len(found.references)}, views {len(found.views)}")
    for reference in found.references:
        facts = [
            ("reference", reference.digest),
            *((name, _short(value)) for name, value in reference.summary.items()),
            ("rows", f"{reference.rows:,} in {counted(reference.objects, 'object')}, {_size(reference.bytes)}"),
            ("finished run", f"generation {reference.generation}" if reference.generation else "none yet"),
            ("last changed", reference.changed.strftime("%Y-%m-%d %H:%M") if reference.changed else "never"),
            *(("written by", _short(provenance)) for provenance in reference.provenance),
        ]
        say("")
        say(facts_table(facts))
    for view in found.views:
        say("")
        say(facts_table([("view", view.name), ("rows", f"{view.rows:,}"), ("reference", view.spec)]))
        say(facts_table([(f"  {name}", _short(value)) for name, value in view.meta.items()]))
    for problem in found.problems:
        say(Marked("damaged:", "error"), f" {problem}")
    if found.problems:
        sys.exit(4)


@cache.command(epilog=_example("dpoeng cache verify refcache", "dpoeng cache verify refcache --recompute 16"))
@click.argument("folder", type=_FOLDER)
@click.option(
    "--depth",
    type=click.Choice(["open", "semantic", "full", "all"]),
    default="all",
    show_default=True,
    help="open: records, sizes, structure. full: also every byte's hash and every log-prob. "
    "semantic: also every sum, key and view entry. all: both.",
)
@click.option("--recompute", type=click.IntRange(min=1), help="Also score this many pairs of a view anew and compare.")
@click.option("--view", help="The view for --recompute.  [default: the only one]")
@click.option("--model", help="Where the base is now, for --recompute.  [default: where it was]")
@click.option("--adapter", help="Where the SFT adapter is now, for --recompute.  [default: where it was]")
def verify(
    folder: Path, depth: Any, recompute: int | None, view: str | None, model: str | None, adapter: str | None
) -> None:
    """Check a cache and change nothing; the exit status is 4 if something is wrong."""
    from dpoeng.cache.info import cache_info
    from dpoeng.cache.verify import verify as run
    from dpoeng.cli.progress import TerminalProgress

    done = 0
    total_bytes = sum(reference.bytes for reference in cache_info(folder).references)
    with TerminalProgress().task("verify", total_bytes, "B") as advance:

        def progress(now: int, total: int) -> None:
            nonlocal done
            advance(now - done, f"{_size(now)} of {_size(total)}")
            done = now

        report = run(folder, depth=depth, progress=progress)
    for problem in report.problems:
        say(Marked("damaged", "error"), f" {problem.where}")
        say(f"  expected: {problem.expected}\n  found:    {problem.found}")
    counts = ", ".join(f"{name} {count:,}" for name, count in report.counts.items() if count)
    speed = report.bytes / max(report.seconds, 1e-9)
    say(f"{counts}\ndepth {depth}, {_size(report.bytes)} in {report.seconds:.2f} s ({_size(speed)}/s)")
    if not report.ok:
        say(
            Marked(f"{len(report.problems)} damaged.", "error"),
            " Run the same `dpoeng precompute-ref` again: it sets damaged files aside and computes their rows anew.",
        )
        sys.exit(4)
    say(Marked("sound", "ok"))
    if recompute is not None:
        from dpoeng.cache.reader import View
        from dpoeng.engine.reference.parity import recompute as score_anew

        found = score_anew(View.open(folder, view), recompute, model=model, adapter=adapter)
        say(
            f"{counted(found.pairs, 'pair')} scored anew: mean difference {found.mean_diff:.2g}, largest "
            f"{found.max_diff:.2g} nats a token (allowed mean: {found.tolerance:g})"
        )
        if not found.ok:
            say(Marked("These are not the numbers of this model.", "error"), " Was it changed in its place?")
            sys.exit(4)
        say(Marked("the model's own", "ok"))


@cache.command(
    epilog=_example("dpoeng cache export refcache pairs.parquet", "dpoeng cache export refcache out.jsonl --view eval")
)
@click.argument("folder", type=_FOLDER)
@click.argument("file", type=_FILE)
@click.option("--view", help="Which view.  [default: the only one]")
@force_option
def export(folder: Path, file: Path, view: str | None, force: bool) -> None:
    """Write token ids and reference log-probs of a view to FILE (.jsonl or .parquet), in the order of its source."""
    from dpoeng.cache.exchange import export_view, is_export
    from dpoeng.cache.reader import View
    from dpoeng.engine.runtime.outputs import Kind, refuse_output

    opened = View.open(folder, view)
    refuse_output(file, Kind("the export", is_export), inputs=_sources(opened), force=force)
    count = export_view(opened, file)
    say(f"{counted(count, 'row')} written to {file}")


@cache.command(
    epilog=_example(
        "dpoeng cache diff old-cache new-cache", "dpoeng cache diff refcache refcache --old 3f2a --new 9b1c"
    )
)
@click.argument("old_folder", metavar="OLD", type=_FOLDER)
@click.argument("new_folder", metavar="NEW", type=_FOLDER)
@click.option("--old", help="Reference in OLD: the beginning of its digest.  [default: the only one]")
@click.option("--new", help="Reference in NEW.  [default: the only one]")
def diff(old_folder: Path, new_folder: Path, old: str | None, new: str | None) -> None:
    """Show in which fields the references of two caches differ; the exit status is 1 if they do."""
    from dpoeng.cache.spec import diff_specs
    from dpoeng.cache.store import Store

    stores = Store.open(old_folder), Store.open(new_folder)
    before, after = (store.spec(_choose(store, prefix)) for store, prefix in zip(stores, (old, new), strict=True))
    changes = diff_specs(before, after)
    if not changes:
        say(f"the same reference: {before.digest}")
        return
    _print_changes(changes)
    sys.exit(1)


@cache.command(epilog=_example("dpoeng cache explain refcache", "dpoeng cache explain refcache 9b1c"))
@click.argument("folder", type=_FOLDER)
@click.argument("reference", required=False)
def explain(folder: Path, reference: str | None) -> None:
    """Say why a run found nothing to reuse: the fields in which its REFERENCE differs from the nearest other one.

    REFERENCE is the beginning of a digest; without it, the one that was added last.
    """
    from dpoeng.cache.info import newest_spec
    from dpoeng.cache.spec import explain_miss
    from dpoeng.cache.store import Store

    store = Store.open(folder)
    digest = _choose(store, reference) if reference else newest_spec(store)
    explained = explain_miss(store.spec(digest), store.specs())
    if explained is None:
        say(f"{digest} is the only reference here: nothing was there to reuse")
        return
    nearest, changes = explained
    say(f"reference {digest} was new to the cache. The nearest other one is {nearest}; what differs:")
    _print_changes(changes)


@cache.command(
    "import",
    epilog=_example(
        "dpoeng cache import rows.parquet --model sft-model",
        "dpoeng cache import from_trl.parquet --model Qwen/Qwen2.5-0.5B --dtype bfloat16 --name pairs",
    ),
)
@click.argument("file", type=_FILE)
@config_options(PrecomputeConfig, skip=frozenset(PrecomputeConfig.model_fields) - _OF_A_REFERENCE)
def import_(file: Path, **options: Any) -> None:
    """Take over reference log-probs from FILE (.jsonl, .parquet, .arrow): `dpoeng cache export` wrote it, or TRL.

    Needed are prompt_ids, chosen_ids, rejected_ids, and either log-probs of tokens (ref_chosen_token_logps,
    ref_rejected_token_logps) or sums (ref_chosen_logps, ref_rejected_logps). From TRL, once it has precomputed:
    `trainer.train_dataset.to_parquet(FILE)`. You vouch that the model named here gave these numbers; `dpoeng train`
    checks a sample against it before its first step. Sums serve every loss but those that weigh tokens (ld_alpha).
    """
    config = load_config(PrecomputeConfig, given(options))

    from dpoeng.cli.progress import TerminalProgress
    from dpoeng.engine.recipes.import_reference import import_reference

    done, sums = import_reference(config, file, TerminalProgress())
    say(
        f"{counted(done.rows, 'row')} read, {done.added:,} of them new; view {done.view!r} written"
        + (" (sums only)" if sums else "")
        + f"\n\nNext: {shlex.join(['dpoeng', 'train', '--cache', str(config.cache), '--view', str(done.view)])}"
    )


@cache.command(epilog=_example("dpoeng cache merge refcache other-cache third-cache"))
@click.argument("target", type=_FOLDER)
@click.argument("sources", nargs=-1, required=True, type=_FOLDER)
def merge(target: Path, sources: tuple[Path, ...]) -> None:
    """Copy references, rows and views of SOURCES into TARGET, which may be new. Nothing in SOURCES changes."""
    from dpoeng.cache.exchange import merge as run
    from dpoeng.cache.store import Store

    opened = [(source, Store.open(source)) for source in sources]
    store = Store.open(target, create=True)
    for source, other in opened:
        objects, views = run(store, other)
        say(f"{source}: {objects} new objects; views: {', '.join(views) or 'none'}")


@cache.command(epilog=_example("dpoeng cache gc refcache", "dpoeng cache gc refcache --delete --drop-spec 3f2a"))
@click.argument("folder", type=_FOLDER)
@click.option("--delete", is_flag=True, help="Remove the files. Without it, only list them.")
@click.option("--drop-spec", "drop", multiple=True, help="Also this reference and all its rows; no view may use it.")
@click.option("--quarantine", is_flag=True, help="Also damaged files that were set aside.")
@click.option("--min-age-s", default=3600.0, show_default=True, help="Keep files younger than this, in seconds.")
def gc(folder: Path, delete: bool, drop: tuple[str, ...], quarantine: bool, min_age_s: float) -> None:
    """Remove files that nothing refers to: leftovers of killed writers, superseded views, orphaned objects."""
    from dpoeng.cache.gc import collect
    from dpoeng.cache.store import Store

    store = Store.open(folder)
    digests = [_choose(store, prefix) for prefix in drop]
    garbage = collect(folder, dry_run=not delete, drop_specs=digests, quarantine=quarantine, grace_s=min_age_s)
    for item in garbage:
        say(f"{item.kind:<10} {_size(item.bytes):>10}  {item.name}")
    total = _size(sum(item.bytes for item in garbage))
    files = counted(len(garbage), "file")
    if delete:
        say(f"{files} removed, {total}")
    else:
        say(f"{files}, {total}; nothing was removed" + (" (--delete does)" if garbage else ""))


@cache.command(epilog=_example("dpoeng cache stats refcache", "dpoeng cache stats refcache --html reference.html"))
@click.argument("folder", type=_FOLDER)
@click.option("--view", help="Which view.  [default: the only one]")
@click.option("--html", type=_FILE, help="Write a page with plots; it needs no network.")
@force_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--pairs", default=10, show_default=True, help="How many strongly ranked pairs to name.")
def stats(folder: Path, view: str | None, html: Path | None, force: bool, as_json: bool, pairs: int) -> None:
    """Show the reference's margins on the data, lengths, and pairs that look mislabelled."""
    from dpoeng.cache.analytics import reference_stats
    from dpoeng.cache.reader import View

    opened = View.open(folder, view)
    found = reference_stats(opened, notes=pairs)
    if html:
        from dpoeng.cli.pages.html import write_page
        from dpoeng.cli.pages.reference import html_report

        facts = [("view", opened.name), ("reference", opened.spec.digest)]
        content = html_report(found, f"The reference on {opened.name}", facts)
        write_page(html, content, inputs=_sources(opened), force=force)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(found), indent=2))
        return
    _print_stats(found)
    if html:
        say(f"plots in {html}")


def _sources(view: View) -> list[Path]:
    """The files that a view's pairs came from: no output may replace them."""
    return [Path(name) for name in view.meta.get("files") or {}]


def _print_stats(found: ReferenceStats) -> None:
    from dpoeng.cli.pages.reference import distributions_table, notes_table, reference_facts

    say(distributions_table(found, (1, 3, 5)), facts_table(reference_facts(found)))
    for title, notes in (("strongly wrong", found.strongly_wrong), ("strongly right", found.strongly_right)):
        if notes:
            say(notes_table(notes, title))


def _choose(store: Store, prefix: str | None) -> str:
    """The one reference whose digest begins so."""
    from dpoeng.cache.errors import CacheError

    digests = store.spec_digests()
    found = [digest for digest in digests if digest.startswith(prefix or "")]
    if len(found) != 1:
        raise CacheError(
            "this does not name one reference",
            code="cache-which-spec",
            where=str(store.root),
            expected="the beginning of one of: " + (", ".join(digests) or "(none)"),
            found=prefix or counted(len(digests), "reference"),
            remedy="`dpoeng cache info` shows what each of them is" if digests else "run `dpoeng precompute-ref` first",
            exit_status=2,
        )
    return found[0]


def _print_changes(changes: list[FieldChange]) -> None:
    rows = [(change.field, _short(change.old), _short(change.new)) for change in changes[:_SHOWN_CHANGES]]
    say(Table(rows, ("field", "old", "new"), words=3))
    if len(changes) > _SHOWN_CHANGES:
        say(f"... and {len(changes) - _SHOWN_CHANGES} more fields")


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 200 else text[:199] + "…"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
