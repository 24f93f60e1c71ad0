"""What `dpoeng check` can find in pairs: level, meaning and remedy of each kind, in one table; the tally of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dpoeng.engine.data.in_memory import place
from dpoeng.engine.data.rejects import REASONS, Reject
from dpoeng.engine.data.shapes import PreferencePair

Level = Literal["error", "warning", "info"]
LEVELS: tuple[Level, ...] = ("error", "warning", "info")

SNIPPET = 90
"""Characters of a text that an example shows."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One thing that can be found."""

    level: Level
    what: str
    why: str
    remedy: str


KINDS: dict[str, Kind] = {
    "too-many-rejects": Kind(
        "error",
        "more rows cannot be used than --max-reject-share allows",
        "phase one stops there: so many bad rows mostly mean that a column or a file is not what it was taken for",
        "look at the reasons below; name columns with --columns, or leave rows out with --where",
    ),
    "template-in-messages": Kind(
        "error",
        "messages that hold a chat template's markers already",
        "the tokenizer's template is put around them again, so the model sees headers inside a message",
        "give the texts without markers as messages, or the finished texts as plain prompt, chosen and rejected",
    ),
    "eval-same-pair": Kind(
        "error",
        "pairs that stand in the evaluation files too",
        "the evaluation then measures what was learnt by heart",
        "take them out of one side",
    ),
    "eval-same-prompt": Kind(
        "warning",
        "pairs whose prompt stands in the evaluation files too",
        "answers to a prompt that was trained on tell little about new prompts",
        "split by prompt: without --eval-view, dpoeng train does so by itself",
    ),
    "id-above-vocabulary": Kind(
        "error",
        "pairs with token ids that the model does not have",
        "phase one stops there: the tokenizer has more tokens than the model's embedding",
        "use the tokenizer that belongs to this model; added tokens need resized embeddings",
    ),
    "beyond-positions": Kind(
        "error",
        "pairs longer than the positions that the model has",
        "no model was trained beyond its positions, and some have none there at all",
        "set --max-length to that number of positions, or leave the long pairs out",
    ),
    "contradiction": Kind(
        "warning",
        "pairs that stand the other way round elsewhere",
        "the two pull in opposite directions, and the accuracy that can be reached falls",
        "keep the one that is right",
    ),
    "duplicate": Kind(
        "warning",
        "pairs that are there already",
        "each is scored once but trained on as often as it stands there, so it weighs more than others",
        "take the repetitions out unless the weight is meant",
    ),
    "nearly-same": Kind(
        "warning",
        "pairs whose responses differ in white space or letter case alone",
        "what is learnt from them is formatting",
        "take them out, unless formatting is what should be learnt",
    ),
    "score-against-preference": Kind(
        "warning",
        "pairs whose own score does not prefer the chosen response",
        "a margin of at most 0, or a chosen score not above the rejected one, says that the order is doubtful or wrong",
        "leave them out with --where, e.g. --where 'margin > 0', or look whether the columns are swapped",
    ),
    "tie": Kind(
        "warning",
        "pairs that say of themselves that neither response is better",
        "they are trained on as if chosen were",
        "leave them out with --where, e.g. --where \"winner != 'tie'\"",
    ),
    "mixed-types": Kind(
        "warning",
        "values of another type than most of their column",
        "a filter cannot compare text with a number and leaves the row out; no score and no weight is read from text",
        "write the column alike in all rows: numbers, true and false without quotes",
    ),
    "later-human-turn": Kind(
        "warning",
        "pairs with a later turn of the user inside a response",
        "everything behind the prompt is scored, so the policy also learns what users say",
        "end both responses before that turn, or give messages: then only the assistant's turns are scored",
    ),
    "system-twice": Kind(
        "warning",
        "prompts with more than one system prompt",
        "a model is used to one, at the beginning; two are mostly one too many from a template",
        "keep one system message, the first",
    ),
    "foreign-template": Kind(
        "warning",
        "texts with markers of a chat template that this tokenizer does not know",
        "they are split into ordinary characters: the model has never seen them as markers",
        "use the template of this model, or give the pairs as messages",
    ),
    "special-token-inside": Kind(
        "warning",
        "texts with a beginning or end token in the middle",
        "the model reads it as a boundary: what follows an end token was never trained",
        "take these tokens out of the texts; dpoeng adds the one at the end",
    ),
    "bos-in-text": Kind(
        "info",
        "texts that begin with a written beginning token",
        "many trainers put a second one in front; dpoeng keeps one",
        "nothing needs to be done here; leave it out of data that other tools read",
    ),
    "end-token-in-text": Kind(
        "info",
        "responses with a written end token at their end",
        "many trainers put a second one behind; dpoeng keeps one, where it is the tokenizer's own end token",
        "nothing needs to be done here; leave it out of data that other tools read",
    ),
    "end-token-missing": Kind(
        "warning",
        "responses that end without an end token",
        "nothing tells the policy to stop there",
        "texts: leave append_eos on, unless the SFT data had no end token either; messages: mend the chat template",
    ),
    "end-marker-one-sided": Kind(
        "warning",
        "an ending that one side has far more often than the other",
        "it alone tells chosen from rejected, and the policy learns to write or avoid it",
        "end both sides alike; responses that were cut off while generating are best left out",
    ),
    "end-marker-missing": Kind(
        "warning",
        "responses that lack the ending nearly all others have",
        "they were probably cut off while generating",
        "complete them, or leave them out",
    ),
    "others-in-response": Kind(
        "info",
        "pairs with turns of others inside a response: results of tools, further questions",
        "they stand in the text and are not scored; the assistant's turns around them are",
        "nothing; --train-on last scores the last turn alone, --train-on all scores everything",
    ),
    "thought-dropped": Kind(
        "warning",
        "pairs with thoughts of earlier turns that the chat template leaves out",
        "reasoning models are used so; what is left out is neither read nor scored",
        "nothing, if SFT went through the same template",
    ),
    "space-swallowed": Kind(
        "warning",
        "pairs of which a special token swallows the white space that a response begins with",
        "the model neither reads nor learns it, and responses that differ there alone become one",
        "begin responses without white space",
    ),
    "boundary-one-sided": Kind(
        "warning",
        "pairs of which one response begins with white space and the other does not",
        "the first token then tells chosen from rejected",
        "begin both alike",
    ),
    "joined-words": Kind(
        "warning",
        "texts whose prompt and response run together without white space",
        "texts are joined as they are, so `Response:` and `Yes` become `Response:Yes`, other tokens than in SFT",
        "put the space or line break that SFT had at the prompt's end or the response's beginning",
    ),
    "boundary-merged": Kind(
        "warning",
        "pairs whose last prompt token reaches into the response",
        "the model is asked for another token than it sees when it answers; such a token is scored with the response",
        "end the prompt before the space, not behind it: `Response:` and ` Yes`",
    ),
    "truncated": Kind(
        "warning",
        "pairs that max_length or max_prompt_length cuts",
        "a response without its end teaches no stopping, a prompt without its beginning may not tell the task",
        "raise --max-length as far as memory allows, or leave the longest out",
    ),
    "unknown-token": Kind(
        "warning",
        "pairs with text that the tokenizer does not know",
        "it becomes the one unknown token, the same for all such text",
        "use the tokenizer of the SFT model, or mend the text",
    ),
    "damaged-text": Kind(
        "warning",
        "texts with replacement or control characters, or UTF-8 read as Latin-1",
        "the policy learns to write the damage",
        "read the source again with the right encoding",
    ),
    "longer-is-better": Kind(
        "warning",
        "the chosen response is mostly the longer one",
        "DPO learns to write longer for that alone (https://arxiv.org/abs/2403.19159)",
        "balance lengths, or compare runs with a length-normalised loss",
    ),
    "shorter-is-better": Kind(
        "warning",
        "the chosen response is mostly the shorter one",
        "DPO learns to write shorter for that alone",
        "balance lengths, or compare runs with a length-normalised loss",
    ),
    "one-response-often": Kind(
        "warning",
        "one text that is the response of many pairs",
        "its words are pushed down (or up) in every context: better answers that share them suffer",
        "keep a few of these pairs, or vary the text",
    ),
    "prompt-from-transcript": Kind(
        "info",
        "pairs without a prompt, whose prompt is guessed: what both texts have in common",
        "where the guess is wrong, the beginning of the answer is not scored, or the end of the question is",
        "look at the example; a `prompt` column, or --columns prompt=NAME, leaves nothing to guess",
    ),
    "prompt-repeated": Kind(
        "info",
        "pairs whose responses repeated the prompt; it stands once now",
        "a prompt inside a response would be scored",
        "nothing",
    ),
    "prompt-begins-responses": Kind(
        "warning",
        "pairs whose responses both begin with the words of their short prompt",
        "a prompt that is repeated stands there twice and is scored; one or two words may begin both by chance",
        "take the prompt out of the responses",
    ),
    "conversation-made": Kind(
        "info",
        "pairs whose question, system prompt and history were made one conversation",
        "it goes through the chat template, as such data sets are used",
        "nothing, if SFT went through the same template",
    ),
    "other-tokenizer": Kind(
        "info",
        "pairs tokenised by another tokenizer than the model's",
        "what stands beside an SFT adapter is what SFT used",
        "nothing; --tokenizer names another one",
    ),
    "prompt-from-instruction": Kind(
        "info",
        "pairs without a prompt, whose instruction or question is taken for it",
        "where SFT put more around the instruction, the model is asked something else than it was trained on",
        "nothing, if SFT had the bare instruction too; else name the prompt's column with --columns prompt=NAME, or "
        "say what stood around it with --prompt-format",
    ),
    "unused-column": Kind(
        "info",
        "pairs in files with an unused column that may be a misspelt one",
        "a column of another name is kept beside the pair and does nothing",
        "correct its name, or give the field with --columns",
    ),
    "rare-category": Kind(
        "info",
        "categories with fewer than five pairs",
        "no evaluation can say anything about them",
        "gather more, or leave them out of per-category reports",
    ),
    "no-category": Kind(
        "info",
        "pairs without a value in a column that nearly all others have",
        "they are missing from per-category reports",
        "fill the column in",
    ),
    "not-confident": Kind(
        "info",
        "pairs that say of themselves that they are not confident",
        "they are trained on like the others",
        "--where confident leaves them out",
    ),
    "default-system-prompt": Kind(
        "info",
        "pairs to which the chat template adds a system prompt of its own",
        "it is scored with every prompt; a model that is used without it sees other prompts than it was trained on",
        "nothing, if the SFT data went through the same template; else give a system message",
    ),
    "few-pairs": Kind(
        "info",
        "fewer than 100 pairs",
        "held-out figures rest on a handful of pairs, and a few epochs learn the rest by heart",
        "read accuracies with their interval; keep the learning rate low and the epochs few",
    ),
}


def kind(code: str) -> Kind:
    """The kind of a finding; a reason for which rows are left out is one too."""
    if code in KINDS:
        return KINDS[code]
    what, remedy = REASONS[code]
    return Kind("warning", f"rows left out: {what}", "they are neither scored nor trained on", remedy)


@dataclass(slots=True)
class Finding:
    """One kind, as often as it was found.

    Attributes:
        count: how many pairs (rows, for what is left out).
        of: out of how many.
        detail: figures, where a count alone does not tell it.
        examples: (file:line, what stands there), the first ones.
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
        """`count` of `of`."""
        return self.count / self.of if self.of else 0.0


class Tally:
    """Counts findings while rows go by, and keeps the first examples of each."""

    def __init__(self, examples: int) -> None:
        self._examples = examples
        self._counts: dict[str, int] = {}
        self._details: dict[str, str] = {}
        self._shown: dict[str, list[tuple[str, str]]] = {}

    def add(self, code: str, row: PreferencePair | Reject, shown: str) -> None:
        """One more row; `shown` is what an example tells."""
        self.count(code, 1)
        self.example(code, place(row.source_file, row.source_row), shown)

    def count(self, code: str, count: int, detail: str = "") -> None:
        """So many more, without an example."""
        self._counts[code] = self._counts.get(code, 0) + count
        if detail:
            self._details[code] = detail

    def example(self, code: str, where: str, shown: str) -> None:
        """An example alone; only the first ones are kept."""
        kept = self._shown.setdefault(code, [])
        if len(kept) < self._examples:
            kept.append((where, shown))

    def findings(self, rows: int) -> list[Finding]:
        """All that was found, errors first, then the most frequent."""
        found = []
        for code, count in self._counts.items():
            this = kind(code)
            found.append(
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
        return sorted(found, key=lambda one: (LEVELS.index(one.level), -one.count, one.code))


def snippet(text: str, *, end: bool = False) -> str:
    """The beginning (or end) of a text on one line, as Python would quote it."""
    if len(text) <= SNIPPET:
        return repr(text)
    return "…" + repr(text[-SNIPPET:]) if end else repr(text[:SNIPPET]) + "…"
