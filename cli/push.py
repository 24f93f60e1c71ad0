"""`dpoeng push`."""

from __future__ import annotations

from pathlib import Path

import click

from dpoeng.cli.options import KeyValue
from dpoeng.cli.tables import facts_table, json_option, say, say_json

EPILOG = """\b
Examples:
  dpoeng push out my-name/my-adapter --rename /models/Qwen2.5-32B=Qwen/Qwen2.5-32B
  dpoeng push merged my-name/my-model --public
"""


@click.command("push", epilog=EPILOG)
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("repo")
@click.option("--public", is_flag=True, help="Make a new repository public.  [default: private]")
@click.option("--force", is_flag=True, help="Replace existing files; the hub keeps the earlier commit.")
@click.option(
    "--rename",
    multiple=True,
    type=KeyValue("PATH=ORG/NAME", "/models/base=Qwen/Qwen2.5-32B"),
    help="Replace a path of this machine by its name on the hub, in the model card and the adapter's config.",
)
@json_option
def push(
    folder: Path, repo: str, public: bool, force: bool, rename: tuple[tuple[str, str], ...], as_json: bool
) -> None:
    """Upload a result to the Hugging Face hub: an adapter or a checkpoint, with its model card.

    FOLDER is the output folder of a complete run, its adapter, or a merged checkpoint; REPO is organisation/name. The
    token comes from `hf auth login` or HF_TOKEN.
    """
    from dpoeng.engine.recipes.push import push as upload

    done = upload(folder, repo, private=not public, force=force, rename=dict(rename))
    if as_json:
        say_json(done)
        return
    facts = [("repository", done.repo), ("commit", done.url), ("files", ", ".join(done.files))]
    if done.replaced:
        facts.append(("replaced", ", ".join(done.replaced)))
    say(facts_table(facts))
