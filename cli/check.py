"""`dpoeng check`: of pairs, and of a loss of the user's own."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dpoeng.cache.words import counted
from dpoeng.cli.options import ConfigCommand, as_words, config_options, force_option, given
from dpoeng.cli.tables import Marked, command_line, facts_table, json_option, say, say_json
from dpoeng.engine.config.fields import PrecomputeConfig, TrainConfig
from dpoeng.engine.config.files import config_of, load_config
from dpoeng.engine.data.where import GRAMMAR

if TYPE_CHECKING:
    from dpoeng.engine.checks.findings import Finding
    from dpoeng.engine.recipes.check import CheckReport

EPILOG = (
    """\b
Examples:
  dpoeng check pairs.jsonl
  dpoeng check pairs.jsonl --model sft-model --eval held-out.jsonl --html check.html
  dpoeng check pairs.jsonl --model sft-model --json --strict
  dpoeng check --loss-type my_loss.py:my_loss

\b
Conditions of --where, over the columns of a row:
"""
    + GRAMMAR
)

_USED = frozenset(
    "model adapter tokenizer columns prompt_format ranked_pairs where max_reject_share max_length max_prompt_length "
    "truncation_mode append_eos train_on".split()
)
EXIT_FOUND = 3
_MARKS = ("[[", "]]")


@click.command("check", cls=ConfigCommand, epilog=EPILOG)
@click.argument("pairs", nargs=-1, type=click.Path(path_type=Path))
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="YAML file.  [default: dpoeng.yaml]")
@click.option(
    "--eval", "eval_files", multiple=True, type=click.Path(path_type=Path), help="Held-out pairs, to look for leakage."
)
@click.option(
    "--examples", type=click.IntRange(min=0), default=3, show_default=True, help="Rows to show for each finding."
)
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), help="Also write the report as one HTML page.")
@force_option
@json_option
@click.option("--strict", is_flag=True, help="Exit with status 3 on warnings too.")
@click.option("--loss-type", metavar="LOSS[,LOSS...]", help="Instead of pairs, try your own losses: FILE.py:FUNCTION "
              "or MODULE:FUNCTION.")  # fmt: skip
@click.option("--beta", type=float, help="For --loss-type.  [default: 0.1]")
@config_options(PrecomputeConfig, skip=frozenset(PrecomputeConfig.model_fields) - _USED)
def check(
    pairs: tuple[Path, ...],
    config_file: Path | None,
    eval_files: tuple[Path, ...],
    examples: int,
    html: Path | None,
    force: bool,
    as_json: bool,
    strict: bool,
    loss_type: str | None,
    beta: float | None,
    **options: Any,
) -> None:
    """Check PAIRS for anything that could spoil a run, before you use a GPU.

    With --model, lengths are in tokens, and the tokenizer is checked, too (truncation, boundaries, template, end
    tokens); no weights are loaded. The exit status is 3 if an error was found, with --strict also for a warning.

    With --loss-type, check losses of your own instead, as `dpoeng train` does before a run: one finite loss a pair, a
    gradient that is its slope, and no dependence on a pair's neighbours.
    """
    values = given(options)
    if loss_type is not None:
        if pairs or eval_files or html or values or strict or config_file:
            raise click.UsageError("--loss-type tries a loss without pairs: leave the other options out")
        _check_losses({"loss_type": loss_type, **({} if beta is None else {"beta": beta})}, as_json=as_json)
        return
    if beta is not None:
        raise click.UsageError("--beta goes with --loss-type")
    then = [*map(str, pairs), *(["--config", str(config_file)] if config_file else []), *as_words(values)]
    if pairs:
        values["pairs"] = pairs
    config = load_config(PrecomputeConfig, values, config_file)

    from dpoeng.engine.models.tokenizer import without_torch
    from dpoeng.engine.recipes.check import check_pairs
    from dpoeng.engine.runtime.outputs import PAGE, refuse_output

    inputs = [*(path for path in config.pairs if isinstance(path, Path)), *eval_files]
    inputs += [config_file or Path("dpoeng.yaml"), *([Path(config.model)] if config.model else [])]
    if html is not None:
        refuse_output(html, PAGE, inputs=inputs, force=force)
    with without_torch(config.model, config.tokenizer):
        report = check_pairs(config, eval_files, examples=examples)
    if html is not None:
        from dpoeng.cli.pages.check import check_page
        from dpoeng.cli.pages.html import write_page

        write_page(html, check_page(report), inputs=inputs, force=force)
    if as_json:
        say_json(report)
    else:
        print_report(report, html, then)
    if report.count("error") or (strict and report.count("warning")):
        sys.exit(EXIT_FOUND)


def _check_losses(fields: Mapping[str, Any], *, as_json: bool) -> None:
    """Tries losses, and shows what each check saw; the exit status is 3 if one cannot be trained with."""
    from dpoeng.cache.errors import UserError
    from dpoeng.engine.losses.own import OwnLoss
    from dpoeng.engine.losses.own_check import try_loss

    config = config_of(TrainConfig, fields)
    results: list[dict[str, Any]] = []
    for name in config.loss_type:
        seen: list[dict[str, str]] = []
        error = None
        try:
            for asked, found in try_loss(name, config.beta) if isinstance(name, OwnLoss) else ():
                seen.append({"asked": asked, "found": found})  # one by one, so that those before a fault are shown
        except UserError as fault:
            error = fault.text()
        results.append({"loss": name, "ok": error is None, "seen": seen, "error": error})
    for one in () if as_json else results:
        say(Marked(one["loss"], "bold"), "" if isinstance(one["loss"], OwnLoss) else ": built in, nothing to try")
        if one["seen"]:
            say(facts_table([(line["asked"], line["found"]) for line in one["seen"]]))
        say(Marked("fine" if one["ok"] else one["error"], "ok" if one["ok"] else "error"))
    if as_json:
        say_json(results)
    if not all(one["ok"] for one in results):
        sys.exit(EXIT_FOUND)


def print_report(report: CheckReport, html: Path | None, then: Sequence[str]) -> None:
    """Prints findings, then tables, then the next command; `then` are the arguments for phase one."""
    from dpoeng.cli.pages.check import categories_table, lengths_table

    for finding in report.findings:
        _print_finding(finding)
    _print_texts(report)
    say(lengths_table(report))
    if report.categories:
        say(categories_table(report))
    left_out = f", {report.rejected:,} left out" if report.rejected else ""
    filtered = f", {report.filtered:,} by --where" if report.filtered else ""
    rows, prompts = counted(report.rows, "row"), counted(report.prompts, "prompt")
    facts = [("pairs", f"{report.pairs:,} of {rows}{left_out}{filtered}; {prompts}")]
    if report.bias is not None:
        bias = report.bias
        facts.append(
            (
                "length",
                f"chosen is longer in {bias.share_longer:.0%} of pairs of unequal length, on average by "
                f"{bias.mean_difference:+.1f} {report.unit} (sign test p = {bias.p_value:.2g})",
            )
        )
    if report.max_length_needed is not None:
        facts.append(("max_length", f"{report.max_length_needed:,} would cut nothing"))
    if report.eval_pairs:
        facts.append(("evaluation", counted(report.eval_pairs, "pair")))
    facts.append(("time", f"{report.seconds:.1f} s"))
    if html is not None:
        facts.append(("page", str(html)))
    say(facts_table(facts))
    errors, warnings = report.count("error"), report.count("warning")
    if not errors and not warnings:
        say("\n", Marked("fine", "ok"))
    else:
        kinds = f"{counted(errors, 'kind')} of errors, {warnings} of warnings"
        say("\n", Marked(kinds, "error" if errors else "warning"))
    if not errors:
        say("Next: ", "" if report.model else "the same with --model, then ", command_line("precompute-ref", *then))


def _print_texts(report: CheckReport) -> None:
    """Prints the first pairs as the model sees them; scored parts are in colour, or between marks without colours."""
    if not report.shown:
        return
    how = "in green" if colours() else f"between {_MARKS[0]} and {_MARKS[1]}"
    say(Marked("texts", "bold"), f" as the model gets them; the scored part is {how}")
    for pair in report.shown:
        for name, pieces in zip(pair.names, (pair.chosen, pair.rejected), strict=True):
            say(Marked(f"{pair.where}, {name}", "dim"))
            say(*(_scored(piece.text) if piece.scored else piece.text for piece in pieces))
    say("")


def colours() -> bool:
    """Whether stdout shows colours."""
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") not in (None, "dumb")


def _scored(text: str) -> Marked | str:
    return Marked(text, "ok") if colours() else f"{_MARKS[0]}{text}{_MARKS[1]}"


def _print_finding(finding: Finding) -> None:
    say(
        *(Marked(finding.level, finding.level), f" {finding.what}: ", Marked(f"{finding.count:,}", "bold")),
        *(f" of {finding.of:,} ({finding.share:.1%}) ", Marked(f"[{finding.code}]", "dim")),
    )
    if finding.detail:
        say(f"  {finding.detail}")
    for where, example in finding.examples:
        say("  ", Marked(where, "dim"), f"  {example}")
    say(f"  why:    {finding.why}\n  remedy: {finding.remedy}\n")
