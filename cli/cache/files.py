"""`dpoeng cache export`, `import`, `merge` and `gc`: exports and imports rows, and removes unused files."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dpoeng.cache.words import counted
from dpoeng.cli.cache.words import FILE, FOLDER, choose, example, size, sources_of
from dpoeng.cli.options import config_options, force_option, given
from dpoeng.cli.tables import json_option, say, say_json, training_command
from dpoeng.engine.config.fields import PrecomputeConfig
from dpoeng.engine.config.files import load_config
from dpoeng.engine.config.other_trainers import OTHER_TRAINERS, OtherTrainer

if TYPE_CHECKING:
    from dpoeng.cache.reader import View

_OF_A_REFERENCE = frozenset(
    "model adapter cache name quantization dtype bnb_4bit_quant_type bnb_4bit_use_double_quant batch_tokens".split()
)


@click.command(
    epilog=example(
        "dpoeng cache export refcache pairs.parquet",
        "dpoeng cache export refcache out.jsonl --view eval",
        "dpoeng cache export refcache trl.parquet --for trl",
        "dpoeng cache export refcache 5d2f.pt --for open-instruct --rows local_dataset_cache/9b1c",
    )
)
@click.argument("folder", type=FOLDER)
@click.argument("file", type=FILE)
@click.option("--view", help="The view.  [default: the only one]")
@click.option("--trunk-layer", type=int, help="Write the hidden states that enter this layer instead of log-probs.")
@click.option("--for", "trainer", type=click.Choice(OTHER_TRAINERS), help="Write for this trainer, or explain why not.")
@click.option("--rows", type=FOLDER, help="--for open-instruct: the folder with its tokenised rows.")
@force_option
@json_option
def export(
    folder: Path,
    file: Path,
    view: str | None,
    trunk_layer: int | None,
    trainer: OtherTrainer | None,
    rows: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Write token ids and reference log-probs of a view to FILE (.jsonl or .parquet), in the order of its source.

    docs/other-trainers.md: formats of other trainers, and how TRL uses a cache without a file.
    """
    from dpoeng.cache.exchange.export import export_view, is_export
    from dpoeng.cache.reader import View
    from dpoeng.cache.records import ROW_KINDS
    from dpoeng.cache.trunk.export import export_states
    from dpoeng.engine.runtime.outputs import Kind, refuse_output

    if trainer is None and rows is not None:
        raise click.UsageError("--rows goes with --for open-instruct")
    if trainer is not None and trunk_layer is not None:
        raise click.UsageError("--for writes log-probs, --trunk-layer hidden states: choose one")
    opened = View.open(folder, view, rows=ROW_KINDS if trainer is None and trunk_layer is None else ("pairs",))
    told = ""
    if trainer is not None:
        from dpoeng.engine.recipes.elsewhere.reference_files import export_for, is_file_for

        made = partial(is_file_for, trainer)
        refuse_output(file, Kind("the export", made), inputs=[*sources_of(opened), folder], force=force)
        count = export_for(trainer, opened, file, rows)
        told = _how_to_read(trainer, file, opened)
    else:
        refuse_output(file, Kind("the export", is_export), inputs=sources_of(opened), force=force)
        count = export_view(opened, file) if trunk_layer is None else export_states(opened, trunk_layer, file)
    if as_json:
        say_json({"file": file, "view": opened.name, "rows": count})
        return
    say(f"{counted(count, 'row')} written to {file}{told}")


def _how_to_read(trainer: OtherTrainer, file: Path, view: View) -> str:
    """What to type now."""
    from dpoeng.engine.recipes.elsewhere.reference_files import longest_of

    if trainer == "open-instruct":
        return f"\n\nopen-instruct says 'Loading reference logprobs cache from ...{file.name}' when it takes them."
    kind = "from_parquet" if file.suffix == ".parquet" else "from_json"
    return (
        "\n\nTRL takes it once its trainer is constructed; max_length must be None, or "
        f"{longest_of(view)} or more, and ld_alpha None:\n"
        f"  trainer.train_dataset = Dataset.{kind}({str(file)!r})\n  trainer.precompute_ref_logps = True"
    )


@click.command(
    "import",
    epilog=example(
        "dpoeng cache import rows.parquet --model sft-model",
        "dpoeng cache import from_trl.parquet --model Qwen/Qwen2.5-0.5B --dtype bfloat16 --name pairs",
    ),
)
@click.argument("file", type=FILE)
@json_option
@config_options(PrecomputeConfig, skip=frozenset(PrecomputeConfig.model_fields) - _OF_A_REFERENCE)
def import_(file: Path, as_json: bool, **options: Any) -> None:
    """Import reference log-probs from FILE (.jsonl, .parquet, .arrow), written by `dpoeng cache export` or by TRL.

    FILE needs prompt_ids, chosen_ids, rejected_ids, and either log-probs of tokens (ref_chosen_token_logps,
    ref_rejected_token_logps) or sums (ref_chosen_logps, ref_rejected_logps). Rows of other kinds have prompt_ids,
    response_ids, scores, and ref_token_logps or ref_logps, each with a list of the responses. From TRL, after it has
    precomputed them: `trainer.train_dataset.to_parquet(FILE)`. You vouch that the model named here gave these numbers;
    `dpoeng train` checks a sample before its first step. Sums work for every loss that does not weigh tokens
    (ld_alpha).
    """
    config = load_config(PrecomputeConfig, given(options))

    from dpoeng.cli.progress import TerminalProgress
    from dpoeng.engine.recipes.import_reference import import_reference

    done, sums = import_reference(config, file, TerminalProgress())
    if as_json:
        say_json({"cache": config.cache, "view": done.view, "rows": done.rows, "added": done.added, "sums_only": sums})
        return
    new = f"{done.added:,} of them new" if done.kind == "pairs" else f"{counted(done.added, 'pair')} of responses new"
    only = " (sums only)" if sums else ""
    say(f"{counted(done.rows, 'row')} read, {new}; view {done.view!r} written{only}")
    say("\nNext: ", training_command(config.cache, done.kind, done.view))


@click.command(epilog=example("dpoeng cache merge refcache other-cache third-cache"))
@click.argument("target", type=FOLDER)
@click.argument("sources", nargs=-1, required=True, type=FOLDER)
@json_option
def merge(target: Path, sources: tuple[Path, ...], as_json: bool) -> None:
    """Copy references, rows, trunks and views of SOURCES into TARGET, which may be new. SOURCES stay unchanged."""
    from dpoeng.cache.exchange.merging import merge as run
    from dpoeng.cache.store import Store

    opened = [(source, Store.open(source)) for source in sources]
    store = Store.open(target, create=True)
    copied = [(source, *run(store, other)) for source, other in opened]
    if as_json:
        say_json([{"source": source, "new_objects": objects, "views": views} for source, objects, views in copied])
        return
    for source, objects, views in copied:
        say(f"{source}: {objects} new objects; views: {', '.join(views) or 'none'}")


@click.command(epilog=example("dpoeng cache gc refcache", "dpoeng cache gc refcache --delete --drop-spec 3f2a"))
@click.argument("folder", type=FOLDER)
@click.option("--delete", is_flag=True, help="Remove the files. Without it, only list them.")
@click.option(
    "--drop-spec", "drop", multiple=True, help="Also remove this whole reference or trunk; no view may use it."
)
@click.option("--quarantine", is_flag=True, help="Also delete quarantined files.")
@click.option("--min-age-s", default=3600.0, show_default=True, help="Keep files younger than this, in seconds.")
@json_option
def gc(folder: Path, delete: bool, drop: tuple[str, ...], quarantine: bool, min_age_s: float, as_json: bool) -> None:
    """Remove files that nothing refers to: leftovers of killed writers, superseded views, orphaned objects."""
    from dpoeng.cache.gc import collect
    from dpoeng.cache.store import Store

    store = Store.open(folder)
    digests = [choose(store, prefix, trunks=True) for prefix in drop]
    garbage = collect(folder, dry_run=not delete, drop_specs=digests, quarantine=quarantine, grace_s=min_age_s)
    if as_json:
        say_json({"removed": delete, "files": garbage})
        return
    for item in garbage:
        say(f"{item.kind:<10} {size(item.bytes):>10}  {item.name}")
    total = size(sum(item.bytes for item in garbage))
    files = counted(len(garbage), "file")
    if delete:
        say(f"{files} removed, {total}")
    else:
        say(f"{files}, {total}; nothing was removed" + (" (--delete does)" if garbage else ""))
