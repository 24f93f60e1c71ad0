"""Turns a judge's replies into outcomes: both orders, ties, and scores of several answers to a prompt."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from dpoeng.engine.recipes.rounds.judges import Asked, Judge, Prompt, Question, Said, ask_all, parse_verdict
from dpoeng.engine.runs.kept import Kept
from dpoeng.engine.runtime.progress import Progress

_BETTER = {"first": -1, "tie": 0, "second": 1}


@dataclass(frozen=True, slots=True)
class Outcome:
    """The better one of two answers.

    Attributes:
        value: 1 if the second is, -1 if the first is, 0 for a tie; None if the judge gave no verdict.
        orders: the verdicts, each naming the answer that was shown `first` or `second`: with the
            first answer in front, then with the second one in front. Empty if the judge scores.
        why: without a verdict, the reply instead.
        same: whether the answers are equal, so no judge was asked.
    """

    value: int | None
    orders: tuple[str, ...] = ()
    why: str = ""
    same: bool = False

    @property
    def contradicts(self) -> bool:
        """Whether the two orders prefer different answers, so that only the position decided."""
        return self.orders in (("first", "first"), ("second", "second"))


def compare_answers(
    judge: Judge, items: Sequence[tuple[Prompt, str, str]], kept: Kept, progress: Progress
) -> tuple[list[Outcome], Asked]:
    """Judges pairs of answers, each pair in both orders if the judge compares.

    Args:
        judge: the judge.
        items: prompt, first and second answer.
        kept: its stored replies.
        progress: shows the work.

    Raises:
        UserError: see `ask_all`.
    """
    asked_of = [place for place, (_, first, second) in enumerate(items) if first != second]
    questions: list[Question] = []
    for place in asked_of:
        prompt, *both = items[place]
        questions += [(prompt, *both), (prompt, *both[::-1])] if judge.compares else [(prompt, one) for one in both]
    said, asked = ask_all(judge, questions, kept, progress)
    outcomes = [Outcome(0, same=True)] * len(items)
    for number, place in enumerate(asked_of):
        words = said[2 * number : 2 * number + 2]
        outcomes[place] = _of_verdicts(words) if judge.compares else _of_scores(words)
    return outcomes, asked


def _of_verdicts(both: Sequence[Said]) -> Outcome:
    """The outcome of two orders: an answer wins if it wins in one and does not lose in the other; else a tie."""
    verdicts = [None if "refused" in words else parse_verdict(words["reply"]) for words in both]
    if None in verdicts:
        return Outcome(None, why=_why(both[verdicts.index(None)]))
    one, other = (_BETTER[str(verdict)] for verdict in verdicts)
    total = one - other  # in the other order, the first answer was shown second
    return Outcome((total > 0) - (total < 0), tuple(map(str, verdicts)))


def _of_scores(both: Sequence[Said]) -> Outcome:
    refused = next((words for words in both if "refused" in words), None)
    if refused is not None:
        return Outcome(None, why=_why(refused))
    first, second = (words["score"] for words in both)
    return Outcome((second > first) - (second < first))


def _why(words: Said) -> str:
    """The end of a reply, where the verdict should be, or the reason why there is none."""
    return str(words.get("refused") or words["reply"].strip()[-200:] or "an empty reply")


def score_answers(
    judge: Judge, groups: Sequence[tuple[Prompt, Sequence[str]]], kept: Kept, progress: Progress
) -> tuple[list[list[float | None]], Asked]:
    """Scores several answers to a prompt; None if the judge gave no score.

    A judge that compares sees each two of them in both orders: an answer's score is its share of wins, with a tie as
    half a win. That is N (N - 1) questions for N answers.

    Args:
        judge: the judge.
        groups: a prompt and its answers, all different.
        kept: its stored replies.
        progress: shows the work.

    Raises:
        UserError: see `ask_all`.
    """
    if not judge.compares:
        questions = [(prompt, answer) for prompt, answers in groups for answer in answers]
        said, asked = ask_all(judge, questions, kept, progress)
        rest = iter(said)
        return [[next(rest).get("score") for _ in answers] for _, answers in groups], asked
    items = [
        (prompt, first, second) for prompt, answers in groups for first, second in itertools.combinations(answers, 2)
    ]
    outcomes, asked = compare_answers(judge, items, kept, progress)
    left = iter(outcomes)
    scores = []
    for _, answers in groups:
        won: list[list[float]] = [[] for _ in answers]
        for one, other in itertools.combinations(range(len(answers)), 2):
            if (value := next(left).value) is not None:
                won[one].append(0.5 - value / 2)
                won[other].append(0.5 + value / 2)
        scores.append([sum(of) / len(of) if of else None for of in won])
    return scores, asked
