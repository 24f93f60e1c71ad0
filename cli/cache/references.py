"""`dpoeng cache diff` and `explain`: how references differ."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dpoeng.cli.cache.words import FOLDER, choose, example, short
from dpoeng.cli.tables import Table, json_option, say, say_json

if TYPE_CHECKING:
    from dpoeng.cache.spec import FieldChange

_SHOWN_CHANGES = 20


@click.command(
    epilog=example("dpoeng cache diff old-cache new-cache", "dpoeng cache diff refcache refcache --old 3f2a --new 9b1c")
)
@click.argument("old_folder", metavar="OLD", type=FOLDER)
@click.argument("new_folder", metavar="NEW", type=FOLDER)
@click.option("--old", help="Reference in OLD, by the beginning of its digest.  [default: the only one]")
@click.option("--new", help="Reference in NEW.  [default: the only one]")
@json_option
def diff(old_folder: Path, new_folder: Path, old: str | None, new: str | None, as_json: bool) -> None:
    """Show how the references of two caches differ; the exit status is 1 if they do."""
    from dpoeng.cache.spec import diff_specs
    from dpoeng.cache.store import Store

    stores = Store.open(old_folder), Store.open(new_folder)
    before, after = (store.spec(choose(store, prefix)) for store, prefix in zip(stores, (old, new), strict=True))
    changes = diff_specs(before, after)
    if as_json:
        say_json({"old": before.digest, "new": after.digest, "changes": _listed(changes)})
    elif not changes:
        say(f"the same reference: {before.digest}")
    else:
        _print_changes(changes)
    sys.exit(1 if changes else 0)


@click.command(epilog=example("dpoeng cache explain refcache", "dpoeng cache explain refcache 9b1c"))
@click.argument("folder", type=FOLDER)
@click.argument("reference", required=False)
@json_option
def explain(folder: Path, reference: str | None, as_json: bool) -> None:
    """Explain why a run found nothing to reuse: how its REFERENCE differs from the most similar one.

    REFERENCE is the beginning of a digest; by default the one that was added last.
    """
    from dpoeng.cache.info import newest_spec
    from dpoeng.cache.spec import explain_miss
    from dpoeng.cache.store import Store

    store = Store.open(folder)
    digest = choose(store, reference) if reference else newest_spec(store)
    explained = explain_miss(store.spec(digest), {one: store.spec(one) for one in store.reference_digests()})
    if as_json:
        nearest, changes = explained or (None, [])
        say_json({"reference": digest, "nearest": nearest, "changes": _listed(changes)})
        return
    if explained is None:
        say(f"{digest} is the only reference here: there was nothing to reuse")
        return
    nearest, changes = explained
    say(f"reference {digest} was new to the cache. The most similar one is {nearest}; differences:")
    _print_changes(changes)


def _print_changes(changes: list[FieldChange]) -> None:
    rows = [(change.field, short(change.old), short(change.new)) for change in changes[:_SHOWN_CHANGES]]
    say(Table(rows, ("field", "old", "new"), words=3))
    if len(changes) > _SHOWN_CHANGES:
        say(f"... and {len(changes) - _SHOWN_CHANGES} more fields")


def _listed(changes: list[FieldChange]) -> list[dict[str, Any]]:
    """Each change as an object; a side without the field has no value."""
    from dpoeng.cache.spec import ABSENT

    return [
        {
            "field": change.field,
            **{side: value for side, value in (("old", change.old), ("new", change.new)) if value is not ABSENT},
        }
        for change in changes
    ]
