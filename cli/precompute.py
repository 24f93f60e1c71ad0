"""`dpoeng precompute-ref`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dpoeng.cache.words import counted, gib, speed
from dpoeng.cli.options import ConfigCommand, config_options, given
from dpoeng.cli.tables import Table, facts_table, json_option, say, say_json, training_command
from dpoeng.engine.config.fields import PrecomputeConfig
from dpoeng.engine.config.files import load_config
from dpoeng.engine.data.where import GRAMMAR

if TYPE_CHECKING:
    from dpoeng.engine.data.tokenization import TokenizedData
    from dpoeng.engine.recipes.precompute import PrecomputeSummary

EPILOG = (
    """\b
Examples:
  dpoeng precompute-ref pairs.jsonl --model sft-model
  dpoeng precompute-ref pairs.jsonl --model Qwen/Qwen2.5-32B --adapter sft-lora --quantization 8bit
  dpoeng precompute-ref pairs.jsonl --model sft-model --where confident --columns chosen=response_a
  torchrun --nproc-per-node 4 --no-python dpoeng precompute-ref pairs.jsonl --model sft-model

\b
Conditions of --where, over the columns of a row:
"""
    + GRAMMAR
)


@click.command("precompute-ref", cls=ConfigCommand, epilog=EPILOG)
@click.argument("pairs", nargs=-1, type=click.Path(path_type=Path))
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="YAML file.  [default: dpoeng.yaml]")
@json_option
@config_options(PrecomputeConfig, skip=frozenset({"pairs"}))
def precompute_ref(pairs: tuple[Path, ...], config_file: Path | None, as_json: bool, **options: Any) -> None:
    """Phase one: run the frozen SFT model over PAIRS once and store its log-probs.

    PAIRS are files or folders of preference pairs (JSON Lines, JSON, Parquet, CSV, Arrow; also .gz and .zst). The
    reference is exactly base + adapter as named. After an interruption, or with more pairs, run the same command again:
    it computes only what the cache lacks.
    """
    values = given(options)
    if pairs:
        values["pairs"] = pairs
    config = load_config(PrecomputeConfig, values, config_file)

    from dpoeng.cli.progress import TerminalProgress, importing

    with importing():
        from dpoeng.engine.recipes.precompute import precompute_reference

    summary = precompute_reference(config, TerminalProgress())
    if summary.reports:
        say_json(summary_record(summary)) if as_json else print_summary(summary)


def summary_record(summary: PrecomputeSummary) -> dict[str, Any]:
    """The result of phase one without the pairs: counts, lengths, rejected rows."""
    whole = {"rejects", "data", "source"}
    return {
        **{name: getattr(summary, name) for name in summary.__dataclass_fields__ if name not in whole},
        "lengths": summary.data.counts.lengths,
        "unusual": {name: getattr(summary.data.counts, name) for name in _NOTES},
        "rejected": summary.rejects,
    }


def print_summary(summary: PrecomputeSummary) -> None:
    """Prints lengths, what was computed and left out, and the next command."""
    say(length_table(summary.data))
    kind = summary.source.kind
    what = "pairs" if kind == "pairs" else "rows"
    facts = [(what, _counts(summary))]
    if summary.quarantined:
        facts.append(("damaged", f"{counted(summary.quarantined, 'object')} moved to quarantine and recomputed"))
    if summary.computed:
        seconds = max(summary.seconds, 1e-9)
        facts.append(
            (
                "speed",
                f"{speed(summary.computed, seconds, 'pairs')}, {speed(summary.computed_tokens, seconds, 'tokens')} on "
                f"{summary.device} (loading included)",
            )
        )
        facts.append(("layout", f"{summary.layout}: {summary.layout_reason}"))
        fewer = summary.apart_tokens / max(summary.computed_tokens, 1)
        if fewer > 1.05:
            tokens = f"{summary.computed_tokens:,}, {fewer:.1f} times fewer than with a row for each response"
            facts.append(("tokens", tokens))
    if summary.trunk_layer is not None:
        stored = f"{counted(summary.trunk_texts, 'text')} stored, {summary.trunk_bytes / 1e6:,.1f} MB"
        facts.append(("trunk", f"states that enter layer {summary.trunk_layer}: {stored}"))
    if summary.peak_bytes is not None:
        facts.append(("peak memory", f"{gib(summary.peak_bytes)} allocated on the device"))
    if kind == "unpaired":
        desirable = sum(pair.extra["label"] for pair in summary.data.pairs)
        facts.append(("labels", f"{desirable:,} desirable, {len(summary.data.pairs) - desirable:,} not"))
    elif not summary.pending:
        share = f"{100 * summary.reference_accuracy:.0f} %"
        which = "better response in {} of a row's pairs" if what == "rows" else "chosen response in {} of the pairs"
        facts.append(("reference", f"prefers the {which.format(share)} (by sums of log-probs, as DPO)"))
    for label, count, word, text in (
        ("duplicates", len(summary.source.duplicates), "pair", "repeated; each is scored once"),
        ("contradictions", len(summary.source.contradictions), "pair", "with chosen and rejected swapped elsewhere"),
        ("multi-turn", summary.source.multi_turn, "response", "with later user turns, which are scored, too"),
    ):
        if count:
            facts.append((label, f"{counted(count, word)} {text}"))
    if summary.filtered:
        facts.append(("filtered", f"{counted(summary.filtered, 'row')} by --where"))
    if summary.rejects_file is not None:
        facts.append(("rejected", f"{counted(len(summary.rejects), 'row')}, listed in {summary.rejects_file}"))
    facts.append(("identity", summary.spec))
    say(facts_table(facts))
    if summary.pending:
        say(
            f"\nPart {summary.part.index} of {summary.part.count} is done. {counted(summary.pending, 'pair')} of other "
            "parts are not computed yet: the last job to end writes the view. If all have ended, run the command "
            "once without --shard."
        )
        return
    view = summary.view if summary.views > 1 else None
    say("\nNext: ", training_command(summary.cache, summary.source.kind, view))


def _counts(summary: PrecomputeSummary) -> str:
    """How many pairs or rows there are, and how many of them were computed."""
    told = str(summary.pairs)
    if summary.source.kind == "ranked":
        responses = counted(summary.data.counts.lengths["response"].count, "response")
        told = f"{counted(summary.rows, 'row')} of {responses}, {told} pairs of them,"
    return f"{told} in view {summary.view!r}: {summary.computed} computed, {summary.reused} reused"


_NOTES = {
    "truncated": "truncated",
    "merged": "with other prompt tokens before a response than alone",
    "unshared": "with last prompt tokens that differ between the sides",
    "duplicates": "duplicate",
    "contradictions": "with chosen and rejected swapped in an earlier pair",
    "turns": "with others' turns inside a response, which are not scored",
    "swallowed": "whose leading white space a special token absorbs",
    "thoughts": "with thoughts of earlier turns that the chat template leaves out",
    "separate": "responses tokenised apart from their prompt (the tokenizer gives no offsets)",
}


def length_table(data: TokenizedData) -> Table:
    """Tokens of prompt, responses and pair, with notes that count unusual pairs."""
    rows = []
    for part, lengths in data.counts.lengths.items():
        numbers = (lengths.p50, lengths.p95, lengths.max)
        rows.append((part, f"{lengths.count:,}", f"{lengths.mean:,.1f}", *(f"{number:,}" for number in numbers)))
    notes = [f"{getattr(data.counts, name):,} {text}" for name, text in _NOTES.items() if getattr(data.counts, name)]
    if data.rejects:
        notes.append(f"{len(data.rejects):,} left out")
    note = [", ".join(notes)] if notes else []
    number = "pairs" if "chosen" in data.counts.lengths else "number"
    return Table(rows, ("", number, "mean", "p50", "p95", "max"), "tokens", note)
