"""The group `dpoeng cache`, with its list of commands."""

from __future__ import annotations

import click

from dpoeng.cli.main import LazyGroup

COMMANDS = {
    "info": ("dpoeng.cli.cache.contents:info", "Show the references, rows, sizes and views of a cache."),
    "verify": ("dpoeng.cli.cache.contents:verify", "Check a cache and change nothing."),
    "stats": ("dpoeng.cli.cache.contents:stats", "Show the reference's margins, and pairs that look mislabelled."),
    "diff": ("dpoeng.cli.cache.references:diff", "Show how the references of two caches differ."),
    "explain": ("dpoeng.cli.cache.references:explain", "Explain why a run found nothing to reuse."),
    "export": ("dpoeng.cli.cache.files:export", "Write token ids and reference log-probs of a view to a file."),
    "import": ("dpoeng.cli.cache.files:import_", "Import reference log-probs from a file."),
    "merge": ("dpoeng.cli.cache.files:merge", "Copy references, rows and views into another cache."),
    "gc": ("dpoeng.cli.cache.files:gc", "Remove files that nothing refers to."),
}


@click.group(cls=LazyGroup, table=COMMANDS, invoke_without_command=True)
@click.pass_context
def cache(ctx: click.Context) -> None:
    """Inspect and verify a reference cache; export, import and merge its rows."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
