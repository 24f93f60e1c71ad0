"""The figures of `dpoeng judge`, for the terminal and for a run's page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dpoeng.cache.words import counted
from dpoeng.cli.tables import Cell, Table, facts_table, interval


def judgement_table(found: Mapping[str, Any]) -> Table:
    """The win rate and its parts.

    Args:
        found: the fields of `Judgement`, as in judgement.json.
    """
    wins, losses, ties = found["wins"], found["losses"], found["ties"]
    facts: list[tuple[str, Cell]] = [("trained", str(found["trained"])), ("judge", found["judge"])]
    for name, field in (("win rate", "win_rate"), ("length-controlled", "length_controlled")):
        if found[field] is not None:
            number = f" (n = {wins + losses + ties:,})" if field == "win_rate" else ""
            facts.append((name, f"{_rate(found[field], found[f'{field}_interval'])}{number}"))
    same, contradictions, cut = found["same"], found["contradictions"], found["cut"]
    of_ties = [f"{same:,} equal answers"] if same else []
    of_ties += [f"{contradictions:,} decided by position only"] if contradictions else []
    facts += [
        ("after training", f"{wins:,} better, {losses:,} worse, {counted(ties, 'tie')}"),
        *([("of the ties", ", ".join(of_ties))] if of_ties else []),
        ("tokens", f"{found['before_tokens']:.0f} before, {found['after_tokens']:.0f} after, on average"),
    ]
    if any(cut):
        facts.append(("cut off", f"by --max-new-tokens: {cut[0]:,} before, {cut[1]:,} after"))
    if found["first_share"] is not None:
        facts.append(("position", f"{found['first_share']:.0%} of the verdicts prefer the first answer"))
    facts.append(("questions", f"{found['asked']:,} asked, {found['kept']:,} stored from before"))
    return facts_table(facts)


def _rate(value: float, bounds: Sequence[float] | None) -> str:
    return f"{value:.3f}" + (f", 95 % interval {interval(bounds, '.3f')}" if bounds else "")
