"""Turns scored answers into pairs: each prompt's best answer against its worst."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dpoeng.engine.recipes.rounds.judges import Asked, Judge, shown_prompt
from dpoeng.engine.recipes.rounds.outcomes import score_answers
from dpoeng.engine.recipes.rounds.prompts import RoundPrompt
from dpoeng.engine.runs.kept import Kept
from dpoeng.engine.runtime.progress import Progress

Answers = Sequence[Mapping[str, Any]]
"""`{text, ended}` of each answer to a prompt."""


@dataclass(slots=True)
class Chosen:
    """Pairs of a round.

    Attributes:
        rows: the pairs with both scores, as phase one reads them.
        left_out: prompts without a pair: the reason, the answers and their scores.
        answers: number of answers; `max_new_tokens` cut off `cut` of them, `empty` have no text.
        mean_score: mean over all scored answers; None if the judge compares.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[dict[str, Any]] = field(default_factory=list)
    answers: int = 0
    cut: int = 0
    empty: int = 0
    mean_score: float | None = None

    def reasons(self) -> dict[str, int]:
        """Number of prompts per reason for leaving them out."""
        return dict(Counter(line["why"] for line in self.left_out).most_common())


def choose_pairs(
    judge: Judge,
    prompts: Sequence[RoundPrompt],
    answers: Sequence[Answers],
    kept: Kept,
    progress: Progress,
    *,
    keep_cut: bool,
) -> tuple[Chosen, Asked]:
    """Score the answers to each prompt, and pair the best with the worst.

    Args:
        judge: the judge.
        prompts: N prompts.
        answers: the answers to each, N sequences.
        kept: the judge's stored replies.
        progress: shows the work.
        keep_cut: also use answers that `max_new_tokens` cut off. Phase one adds an end token to every response, so
            training would teach the policy to stop in the middle of a sentence.

    Raises:
        UserError: see `ask_all`.
    """
    found = Chosen(
        answers=sum(map(len, answers)),
        cut=sum(not one["ended"] for of in answers for one in of),
        empty=sum(not one["text"].strip() for of in answers for one in of),
    )
    texts = [
        list(dict.fromkeys(one["text"] for one in of if one["text"].strip() and (one["ended"] or keep_cut)))
        for of in answers
    ]
    several = [place for place, of in enumerate(texts) if len(of) > 1]
    groups = [(prompts[place].pair.prompt, texts[place]) for place in several]
    scored, asked = score_answers(judge, groups, kept, progress)
    scores = dict(zip(several, scored, strict=True))
    for place, prompt in enumerate(prompts):
        why = _pair_of(found, prompt, texts[place], scores.get(place))
        if why:
            shown = {"prompt": shown_prompt(prompt.pair.prompt), "answers": texts[place], "scores": scores.get(place)}
            found.left_out.append({"why": why, **shown})
    known = [score for of in scored for score in of if score is not None]
    if known and not judge.compares:
        found.mean_score = sum(known) / len(known)
    return found, asked


def _pair_of(found: Chosen, prompt: RoundPrompt, texts: Sequence[str], scores: Sequence[float | None] | None) -> str:
    """Adds a prompt's pair; returns the reason if it has none."""
    if scores is None:
        return "all answers are equal" if texts else "every answer was cut off or empty"
    known = [(score, text) for score, text in zip(scores, texts, strict=True) if score is not None]
    if len(known) < 2:
        return "no verdict"
    best, worst = max(known, key=lambda one: one[0]), min(known, key=lambda one: one[0])
    if best[0] == worst[0]:
        return "a tie"
    found.rows.append({**prompt.row(best[1], worst[1]), "chosen_score": best[0], "rejected_score": worst[0]})
    return ""
