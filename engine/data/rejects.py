"""Rejected rows: always listed, and limited to the share that the user allows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dpoeng.cache.errors import UserError
from dpoeng.cache.words import counted
from dpoeng.engine.data.in_memory import place

# Reason -> what is wrong with the row, and how to fix it.
_SYNTAX = "write the file with a JSON (or CSV) library, not by hand"
_MESSAGES = "write messages as objects with `role` and text `content`; begin each response with the assistant's message"
_PROMPT = "add a `prompt` column, or begin both texts with the same conversation"
REASONS: dict[str, tuple[str, str]] = {
    "bad-json": ("cannot be parsed as JSON", _SYNTAX),
    "bad-csv": ("cannot be parsed as CSV", _SYNTAX),
    "cut-line": ("the last line is incomplete", "write or copy the file again"),
    "bad-utf8": ("not UTF-8", "convert the file, e.g. with `iconv -t utf-8`"),
    "lone-surrogate": ("half a character", "cut texts at characters, not at UTF-16 units"),
    "not-finite": ("NaN, Infinity or a number too large for a double", "write null instead"),
    "duplicate-key": ("a key twice in one object", _SYNTAX),
    "json-too-deep": ("nested more than 64 levels deep", "give texts or messages, not nested objects"),
    "line-too-long": ("more than 16 MiB in one row", "split the row, or leave it out"),
    "not-an-object": ("not a JSON object", "write one object with prompt, chosen and rejected a line"),
    "bad-value": ("a table value that cannot be written as JSON", "convert the column to text or numbers"),
    "mixed-rows": ("another kind of row than the first", "put each kind of rows in a separate file and run"),
    "bad-ranking": (
        "several responses without a score or rank each, or none of them better than another",
        "give `responses` and `scores` (or `ranks`, 1 the best) of the same length",
    ),
    "bad-label": ("a label that is neither true nor false", "write true or false, or 1 or 0"),
    "missing-field": ("a response is missing or null", "fill it in, or name the column with --columns"),
    "wrong-type": ("a column that is neither text nor messages", "give a text or a list of messages"),
    "empty-prompt": ("a prompt without messages", "give at least one message"),
    "empty-response": ("a response of white space only", "leave the row out"),
    "same-response": ("chosen and rejected are equal", "leave the row out: it states no preference"),
    "bad-messages": ("a message without role or text, or a response that does not begin with the assistant", _MESSAGES),
    "unknown-role": ("a role that no chat template knows", "use the roles system, user, assistant or tool"),
    "messages-as-text": ("messages stored as unreadable text", "write lists, or JSON text"),
    "unused-column": (
        "a prompt column that this shape of prompt cannot include",
        "give the prompt as messages, or leave the column out with --columns NAME=",
    ),
    "not-text": ("a message contains images or other parts that are not text", "dpoeng trains on text only"),
    "mixed-shapes": ("one response is text, the other is messages", "give both in the same form"),
    "no-common-prompt": ("no prompt, and the two sides share no beginning", _PROMPT),
    "prompt-mismatch": ("a prompt that differs from the conversations' beginning", _PROMPT),
    "bad-template-kwargs": ("a template argument that dpoeng sets itself", "remove it from chat_template_kwargs"),
    "filter-type": ("a value that --where cannot put in order", "correct the value or the filter"),
    "template-error": ("the chat template refuses the messages", "see the detail; roles usually have to alternate"),
    "template-boundary": ("the answer's beginning cannot be found in the template's output", "give texts instead"),
    "template-drops": (
        "the chat template leaves out a part of the messages, or changes it",
        "use the SFT model's template (--tokenizer), or remove the part from the data",
    ),
    "template-turns": (
        "the assistant's tokens cannot be separated from those of others",
        "end both responses after the assistant's first turn, or use --train-on all",
    ),
    "no-context": ("no token before the response", "give a prompt, or nothing predicts the first token"),
    "prompt-too-long": ("the prompt alone fills max_length", "raise --max-length or set --max-prompt-length"),
    "response-too-long": ("the response alone fills max_length", "raise --max-length, or --truncation-mode keep_start"),
    "same-tokens": ("responses with equal tokens, or equal after truncation", "raise --max-length"),
}


@dataclass(frozen=True, slots=True)
class Reject:
    """A row that was left out, and the reason.

    Attributes:
        reason: stable short code; docs/data.md explains each.
        detail: the exact problem in this row.
    """

    source_file: str
    source_row: int
    reason: str
    detail: str


def check_reject_share(rejects: Sequence[Reject], rows: int, limit: float) -> None:
    """Raises if too many rows were rejected.

    Args:
        rejects: the rows left out.
        rows: total number of rows, good and bad.
        limit: the largest allowed share, 0 to 1.

    Raises:
        UserError: lists the most frequent reasons with the first example of each.
    """
    if len(rejects) <= limit * rows:
        return
    first: dict[str, Reject] = {}
    for reject in rejects:
        first.setdefault(reject.reason, reject)
    reasons = Counter(reject.reason for reject in rejects).most_common(4)
    examples = [
        f"{reason} x {count}, first {place(first[reason].source_file, first[reason].source_row)}: "
        f"{first[reason].detail}"
        for reason, count in reasons
    ]
    raise UserError(
        f"{len(rejects)} of {counted(rows, 'row')} cannot be used",
        code="data-rejects",
        where=rejects[0].source_file,
        expected=f"at most {limit:.3g} of the rows",
        found="\n            ".join(examples),
        remedy="fix these rows, leave them out with --where, or raise --max-reject-share",
        exit_status=3,
    )


def is_rejects(path: Path) -> bool:
    """Whether `write_rejects` wrote this file. Raises ValueError if it is not JSON."""
    with path.open("rb") as stream:
        line = stream.readline()
    return not line or list(json.loads(line)) == list(Reject.__slots__)


def write_rejects(path: Path, rejects: Iterable[Reject]) -> None:
    """Writes rejects as JSON Lines: `source_file`, `source_row`, `reason`, `detail`."""
    with path.open("w", encoding="utf-8", newline="\n") as stream:
        for reject in rejects:
            record = {name: getattr(reject, name) for name in Reject.__slots__}
            # ASCII, so that lone surrogates in a detail can be written
            stream.write(json.dumps(record) + "\n")
