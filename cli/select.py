"""`dpoeng select`: a view of the rows that are worth training on, judged by the cache's log-probs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dpoeng.cache.words import counted
from dpoeng.cli.cache.words import FOLDER, example
from dpoeng.cli.options import force_option
from dpoeng.cli.tables import Table, facts_table, json_option, say, say_json, training_command

if TYPE_CHECKING:
    from dpoeng.cache.selection.rules import Chosen

_SCORES = (
    "margin, margin_per_token, length_difference; of ranked rows also spread, agreement; of unpaired ones logp, "
    "logp_per_token, length"
)


@click.command(
    epilog=example(
        "dpoeng select --cache refcache --output large --rule large --share 0.5",
        "dpoeng select --cache refcache --output small --rule small --share 0.1 --against trained",
        "dpoeng select --cache refcache --output clean --drop-duplicates --drop-contradictions --max-tokens 2048",
    )
)
@click.option("--cache", "folder", type=FOLDER, default=Path("refcache"), show_default=True, help="The cache.")
@click.option("--view", help="The view to select from.  [default: the only one]")
@click.option("--output", required=True, help="Name of the new view.")
@click.option("--by", help=f"The score of a row: {_SCORES}; or column:NAME for your own number. Log-probs are those "
                           "of the reference, in nats.  [default: margin; logp of unpaired rows]")  # fmt: skip
@click.option("--against", help="A view of the same rows by another model, e.g. after training: margins are then "
                                "DPO's implicit reward gaps (policy minus reference).")  # fmt: skip
@click.option("--rule", type=click.Choice(["large", "small", "random"]),
              help="Which scores to take first: the largest (arXiv 2502.14560), those nearest to 0 (2508.04149), or "
                   "any. [default: all rows that pass the filters]")  # fmt: skip
@click.option("--share", type=click.FloatRange(0, 1, min_open=True), help="Share of the rows that pass the filters.")
@click.option("--count", type=click.IntRange(1), help="Number of rows, instead of --share.")
@click.option("--group-by", help="A column, e.g. category: apply the rule within each of its values; each keeps "
                                 "its share of the whole.")  # fmt: skip
@click.option(
    "--balanced", is_flag=True, help="Take equally many rows of each value of --group-by, as far as available."
)
@click.option("--min-score", type=float, help="Drop rows with a lower score.")
@click.option("--max-score", type=float, help="Drop rows with a higher score.")
@click.option("--max-tokens", type=click.IntRange(1), help="Drop longer rows, counting prompt and all responses.")
@click.option("--drop-duplicates", is_flag=True, help="Keep the first of equal rows.")
@click.option(
    "--drop-contradictions",
    is_flag=True,
    help="Drop both of two rows with the same texts that say the opposite: a swapped pair, another order or label.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed for --rule random.")
@force_option
@json_option
def select(folder: Path, view: str | None, output: str, against: str | None, force: bool, as_json: bool,
           **options: Any) -> None:  # fmt: skip
    """Select rows by their reference log-probs, as a new view. Copies no log-probs and loads no model.

    Of a ranked row the best response is compared with the worst one.
    """
    _check(options)
    from dpoeng.cache.reader import View
    from dpoeng.cache.records import ROW_KINDS
    from dpoeng.cache.selection.rules import Rules, choose
    from dpoeng.cache.selection.scores import MEASURES
    from dpoeng.cache.selection.views import write_rows

    opened = View.open(folder, view, beside=output if view is None else None, rows=ROW_KINDS)
    other = View.open(folder, against, rows=(opened.rows,)) if against is not None else None
    options["by"] = options["by"] or MEASURES[opened.rows][0]
    rules = Rules(least=options.pop("min_score"), most=options.pop("max_score"), **options)
    chosen = choose(opened, rules, other)
    about = {**rules.record(), **({"against": against, "against_spec": other.spec.digest} if other else {})}
    write_rows(folder, opened, chosen.rows, output, about, force=force)
    if as_json:
        say_json(_record(opened.name, output, chosen))
        return
    _print(opened.name, output, chosen, rules.by)
    say("\nNext: ", training_command(folder, opened.rows, output))


def _check(options: dict[str, Any]) -> None:
    """Raises click.UsageError for contradictory options, and for options without effect."""
    rule, sized = options["rule"], [n for n in ("share", "count") if options[n] is not None]
    if wrong := [name for name in ("share", "min_score", "max_score") if options[name] != options[name]]:
        raise click.UsageError(f"--{wrong[0].replace('_', '-')} takes a number, not nan")
    if len(sized) > 1 or (rule is None) != (not sized):
        raise click.UsageError("--rule says which rows, --share or --count how many: give --rule and one of these two")
    if options["balanced"] and options["group_by"] is None:
        raise click.UsageError("--balanced needs --group-by, the column whose values get equally many rows")
    if rule is None and options["group_by"] is not None:
        raise click.UsageError("--group-by has no effect without --rule")


def _record(source: str, output: str, chosen: Chosen) -> dict[str, Any]:
    return {
        "view": output,
        "of": source,
        "rows": len(chosen.rows),
        "rows_before": len(chosen.scores),
        "left_out": chosen.left_out,
        "groups": {value: {"rows": taken, "rows_before": total} for value, (taken, total) in chosen.groups.items()},
        "score": {"mean": float(chosen.scores[chosen.rows].mean()), "mean_before": float(chosen.scores.mean())},
    }


def _print(source: str, output: str, chosen: Chosen, by: str) -> None:
    scores, everything = chosen.scores[chosen.rows], chosen.scores
    say(
        facts_table(
            [
                ("view", f"{output}, {counted(len(scores), 'row')} of {len(everything):,} of {source}"),
                (f"mean {by}", f"{scores.mean():.4g}, before {everything.mean():.4g}"),
                (f"{by} from, to", f"{scores.min():.4g} to {scores.max():.4g}, before {everything.min():.4g} to "
                                   f"{everything.max():.4g}"),
            ]
        )
    )  # fmt: skip
    if chosen.left_out:
        say(Table([(reason, f"{count:,}") for reason, count in chosen.left_out.items()], ("left out", "rows")))
    if chosen.groups:
        rows = [(value, f"{scores:,}", f"{held:,}") for value, (scores, held) in chosen.groups.items()]
        say(Table(rows, ("group", "kept", "rows")))
