"""Defines the findings of `dpoeng check` (level, meaning, remedy), and counts them in a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dpoeng.engine.data.in_memory import place
from dpoeng.engine.data.rejects import REASONS, Reject
from dpoeng.engine.data.shapes import PreferencePair

Level = Literal["error", "warning", "info"]
LEVELS: tuple[Level, ...] = ("error", "warning", "info")

SNIPPET = 90
"""Characters of a text in an example."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of finding: its level, meaning, consequence and remedy."""

    level: Level
    what: str
    why: str
    remedy: str


KINDS: dict[str, Kind] = {
    "too-many-rejects": Kind(
        "error",
        "more rows cannot be used than --max-reject-share allows",
        "phase one stops there: this many bad rows usually mean a wrong column or a wrong file",
        "read the reasons below; name columns with --columns, or leave rows out with --where",
    ),
    "template-in-messages": Kind(
        "error",
        "messages that already contain a chat template's markers",
        "the tokenizer's template is applied again, so the model sees headers inside a message",
        "remove the markers, or give the finished texts as plain prompt, chosen and rejected",
    ),
    "eval-same-pair": Kind(
        "error",
        "pairs that are also in the evaluation files",
        "the evaluation then measures memorisation",
        "remove them from one side",
    ),
    "eval-same-prompt": Kind(
        "warning",
        "pairs whose prompt is also in the evaluation files",
        "answers to a trained prompt say little about new prompts",
        "split by prompt; without --eval-view, dpoeng train does this for you",
    ),
    "id-above-vocabulary": Kind(
        "error",
        "pairs with token ids that the model does not have",
        "phase one stops there: the tokenizer has more tokens than the model's embedding",
        "use the tokenizer that belongs to this model; added tokens need resized embeddings",
    ),
    "beyond-positions": Kind(
        "error",
        "pairs longer than the model's positions",
        "the model was not trained beyond its positions, and may have none there",
        "set --max-length to the number of positions, or leave the long pairs out",
    ),
    "contradiction": Kind(
        "warning",
        "pairs that appear elsewhere with chosen and rejected swapped",
        "the two pull in opposite directions and limit the accuracy you can reach",
        "keep the correct one",
    ),
    "duplicate": Kind(
        "warning",
        "repeated pairs",
        "each is scored once but trained on every time it appears, so it weighs more than others",
        "remove the repeats, unless you want the extra weight",
    ),
    "nearly-same": Kind(
        "warning",
        "pairs whose responses differ only in white space or letter case",
        "the policy learns formatting from them",
        "remove them, unless you want to teach formatting",
    ),
    "score-against-preference": Kind(
        "warning",
        "pairs whose own score does not prefer the chosen response",
        "a margin of 0 or less, or a chosen score not above the rejected one, makes the order doubtful",
        "leave them out with --where, e.g. --where 'margin > 0', or check whether the columns are swapped",
    ),
    "tie": Kind(
        "warning",
        "pairs marked as a tie",
        "training still prefers chosen",
        "leave them out with --where, e.g. --where \"winner != 'tie'\" or --where 'margin > 0'",
    ),
    "mixed-types": Kind(
        "warning",
        "values whose type differs from most of their column",
        "a filter cannot compare text with a number and rejects the row; scores and weights are not read from text",
        "use one type in all rows: numbers, true and false without quotes",
    ),
    "later-human-turn": Kind(
        "warning",
        "pairs with a later user turn inside a response",
        "everything after the prompt is scored, so the policy also learns what users say",
        "end both responses before that turn, or give messages: then only assistant turns are scored",
    ),
    "system-twice": Kind(
        "warning",
        "prompts with more than one system prompt",
        "a model expects one, at the beginning; the second often comes from a template",
        "keep only the first system message",
    ),
    "foreign-template": Kind(
        "warning",
        "texts with chat-template markers that this tokenizer does not know",
        "they become ordinary characters, which the model has never seen as markers",
        "use this model's template, or give the pairs as messages",
    ),
    "special-token-inside": Kind(
        "warning",
        "texts with a beginning or end token in the middle",
        "the model reads it as a boundary: nothing after an end token was ever trained",
        "remove these tokens from the texts; dpoeng adds the final one",
    ),
    "bos-in-text": Kind(
        "info",
        "texts that begin with a written-out beginning token",
        "many trainers add a second one in front; dpoeng keeps one",
        "nothing; leave it out of data for other tools",
    ),
    "end-token-in-text": Kind(
        "info",
        "responses that end with a written-out end token",
        "many trainers add a second one; dpoeng keeps one if it is the tokenizer's own end token",
        "nothing; leave it out of data for other tools",
    ),
    "end-token-missing": Kind(
        "warning",
        "responses that end without an end token",
        "the policy does not learn to stop there",
        "texts: leave append_eos on, unless the SFT data had no end token either; messages: fix the chat template",
    ),
    "end-marker-one-sided": Kind(
        "warning",
        "an ending that is far more frequent on one side",
        "it alone separates chosen from rejected, so the policy learns to write or avoid it",
        "end both sides alike; leave out responses that were cut off during generation",
    ),
    "end-marker-missing": Kind(
        "warning",
        "responses without the ending that nearly all others have",
        "they were probably cut off during generation",
        "complete them, or leave them out",
    ),
    "others-in-response": Kind(
        "info",
        "pairs with turns of others inside a response, such as tool results or further questions",
        "they stay in the text unscored; the assistant's turns around them are scored",
        "nothing; --train-on last scores only the last turn, --train-on all scores everything",
    ),
    "thought-dropped": Kind(
        "warning",
        "pairs with thoughts of earlier turns that the chat template drops",
        "reasoning models are used this way; dropped thoughts are neither read nor scored",
        "nothing, if SFT used the same template",
    ),
    "space-swallowed": Kind(
        "warning",
        "pairs whose response begins with white space that a special token swallows",
        "the model neither reads nor learns it, and responses that differ only there become equal",
        "begin responses without white space",
    ),
    "boundary-one-sided": Kind(
        "warning",
        "pairs where only one response begins with white space",
        "the first token then separates chosen from rejected",
        "begin both the same way",
    ),
    "joined-words": Kind(
        "warning",
        "texts whose prompt and response join without white space",
        "texts are joined as they are: `Response:` and `Yes` become `Response:Yes`, with other tokens than in SFT",
        "add the space or line break that SFT had, at the prompt's end or the response's beginning",
    ),
    "boundary-merged": Kind(
        "warning",
        "pairs whose last prompt token reaches into the response",
        "in use the model sees another token there; the merged token is scored with the response",
        "end the prompt before the space, not after it: `Response:` and ` Yes`",
    ),
    "truncated": Kind(
        "warning",
        "pairs cut by max_length or max_prompt_length",
        "a cut response does not teach stopping, and a cut prompt may lose the task",
        "raise --max-length as far as memory allows, or leave out the longest pairs",
    ),
    "unknown-token": Kind(
        "warning",
        "pairs with text that the tokenizer does not know",
        "all of it becomes the same unknown token",
        "use the SFT model's tokenizer, or fix the text",
    ),
    "damaged-text": Kind(
        "warning",
        "texts with replacement or control characters, or UTF-8 read as Latin-1",
        "the policy learns to reproduce the damage",
        "read the source again with the correct encoding",
    ),
    "longer-is-better": Kind(
        "warning",
        "the chosen response is usually the longer one",
        "DPO learns to write longer from that alone (https://arxiv.org/abs/2403.19159)",
        "balance lengths, or compare runs with a length-normalised loss",
    ),
    "shorter-is-better": Kind(
        "warning",
        "the chosen response is usually the shorter one",
        "DPO learns to write shorter from that alone",
        "balance lengths, or compare runs with a length-normalised loss",
    ),
    "one-response-often": Kind(
        "warning",
        "one text that is a response in many pairs",
        "its words are pushed down (or up) in every context, also in better answers",
        "keep a few of these pairs, or vary the text",
    ),
    "prompt-from-transcript": Kind(
        "info",
        "pairs without a prompt; the prompt is guessed from the texts' common beginning",
        "a wrong guess leaves the answer's beginning unscored, or scores the question's end",
        "look at the example; a `prompt` column or --columns prompt=NAME removes the guess",
    ),
    "prompt-repeated": Kind(
        "info",
        "pairs whose responses repeated the prompt; dpoeng keeps it once",
        "a prompt inside a response would be scored",
        "nothing",
    ),
    "prompt-begins-responses": Kind(
        "warning",
        "pairs whose responses both begin with the words of their short prompt",
        "a repeated prompt appears twice and is scored; one or two shared words may be chance",
        "remove the prompt from the responses",
    ),
    "conversation-made": Kind(
        "info",
        "pairs whose question, system prompt and history were joined into one conversation",
        "it goes through the chat template, as usual for such data sets",
        "nothing, if SFT used the same template",
    ),
    "other-tokenizer": Kind(
        "info",
        "pairs tokenised with a tokenizer other than the model's",
        "the tokenizer saved with an SFT adapter is the one that SFT used",
        "nothing; --tokenizer selects another one",
    ),
    "prompt-from-instruction": Kind(
        "info",
        "pairs without a prompt; the instruction or question is used",
        "if SFT wrapped the instruction, the model sees other prompts than in training",
        "nothing, if SFT had the bare instruction too; else name the prompt's column with --columns prompt=NAME, or "
        "say what stood around it with --prompt-format",
    ),
    "unused-column": Kind(
        "info",
        "pairs in files with an unused column whose name may be misspelt",
        "an unknown column is kept with the pair and has no effect",
        "correct its name, or map it with --columns",
    ),
    "rare-category": Kind(
        "info",
        "categories with fewer than five pairs",
        "their evaluation says nothing",
        "collect more, or leave them out of per-category reports",
    ),
    "no-category": Kind(
        "info",
        "pairs without a value in a column that nearly all others have",
        "they are missing from per-category reports",
        "fill the column in",
    ),
    "not-confident": Kind(
        "info",
        "pairs marked as not confident",
        "training treats them like the others",
        "--where confident leaves them out",
    ),
    "default-system-prompt": Kind(
        "info",
        "pairs to which the chat template adds its own system prompt",
        "every prompt includes it; without it in use, the model sees other prompts than in training",
        "nothing, if SFT used the same template; otherwise add a system message",
    ),
    "label-desirable": Kind(
        "info",
        "rows whose response is desirable",
        "losses of labels weigh both kinds of rows by their number",
        "KTO wants desirable_weight times their number to be 1 to 4/3 of undesirable_weight times that of the others",
    ),
    "label-undesirable": Kind(
        "info",
        "rows whose response is not desirable",
        "losses of labels weigh both kinds of rows by their number",
        "see label-desirable; with no such row, or no other, a run learns to say more of everything, or less",
    ),
    "ranked-row": Kind(
        "info",
        "rows of several responses with scores",
        "they are kept whole: losses of pairs compare responses as pairs_in_row says, others look at all of them",
        "--ranked-pairs best or all makes pairs of them, for commands that work on pairs (round, other trainers)",
    ),
    "equal-scores": Kind(
        "info",
        "rows in which some responses have equal scores",
        "no loss says anything about the order of these responses",
        "nothing, if they are equally good; otherwise finer scores",
    ),
    "few-pairs": Kind(
        "info",
        "fewer than 100 pairs",
        "held-out figures rest on a handful of pairs, and a few epochs memorise the rest",
        "read accuracies with their interval; use a low learning rate and few epochs",
    ),
}


def kind(code: str) -> Kind:
    """The kind of a finding with this code. Reasons for leaving rows out are kinds, too."""
    if code in KINDS:
        return KINDS[code]
    what, remedy = REASONS[code]
    return Kind("warning", f"rows left out: {what}", "they are neither scored nor used in training", remedy)


@dataclass(slots=True)
class Finding:
    """A kind and how often it occurred.

    Attributes:
        count: number of pairs (of rows, if they are left out).
        of: number of pairs checked.
        detail: figures, if the count alone does not tell enough.
        examples: (file:line, text) of the first ones.
    """

    code: str
    level: Level
    what: str
    count: int
    of: int
    why: str
    remedy: str
    detail: str = ""
    examples: list[tuple[str, str]] = field(default_factory=list)

    @property
    def share(self) -> float:
        """`count` divided by `of`."""
        return self.count / self.of if self.of else 0.0


class Tally:
    """Counts findings row by row, and keeps the first examples of each."""

    def __init__(self, examples: int) -> None:
        self._examples = examples
        self._counts: dict[str, int] = {}
        self._details: dict[str, str] = {}
        self._shown: dict[str, list[tuple[str, str]]] = {}

    def add(self, code: str, row: PreferencePair | Reject, example: str) -> None:
        """Counts one row; `shown` is the text of its example."""
        self.count(code, 1)
        self.example(code, place(row.source_file, row.source_row), example)

    def count(self, code: str, count: int, detail: str = "") -> None:
        """Adds `count` without an example."""
        self._counts[code] = self._counts.get(code, 0) + count
        if detail:
            self._details[code] = detail

    def example(self, code: str, where: str, example: str) -> None:
        """Adds an example without counting; only the first ones are kept."""
        examples = self._shown.setdefault(code, [])
        if len(examples) < self._examples:
            examples.append((where, example))

    def findings(self, rows: int) -> list[Finding]:
        """All findings: errors first, then by frequency."""
        findings = []
        for code, count in self._counts.items():
            this = kind(code)
            findings.append(
                Finding(
                    code=code,
                    level=this.level,
                    what=this.what,
                    count=count,
                    of=rows,
                    why=this.why,
                    remedy=this.remedy,
                    detail=self._details.get(code, ""),
                    examples=self._shown.get(code, []),
                )
            )
        return sorted(findings, key=lambda one: (LEVELS.index(one.level), -one.count, one.code))


def snippet(text: str, *, end: bool = False) -> str:
    """The beginning (or end) of a text in one line, quoted as in Python."""
    if len(text) <= SNIPPET:
        return repr(text)
    return "…" + repr(text[-SNIPPET:]) if end else repr(text[:SNIPPET]) + "…"
