"""Shows the text of a pair as the model sees it, split where scoring begins and ends, for a person to read.

Decodes token ids, so that everything that tokenisation adds, drops or cuts is visible. Independent of findings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dpoeng.cache.schema import Gaps, IdArray, PairIds
from dpoeng.engine.data.in_memory import place
from dpoeng.engine.data.shapes import PreferencePair

PAIR = ("chosen", "rejected")


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a text, either scored or not."""

    text: str
    scored: bool


@dataclass(frozen=True, slots=True)
class ShownPair:
    """Both texts of a pair, in pieces. `where` is file and row; `names` are the labels of the two texts."""

    where: str
    chosen: list[Piece]
    rejected: list[Piece]
    names: tuple[str, str] = PAIR


def show_tokens(where: str, ids: PairIds, tokenizer: Any, names: tuple[str, str] = PAIR) -> ShownPair:
    """Decodes token ids to texts."""
    chosen = _pieces(ids.prompt_ids, ids.chosen_ids, ids.chosen_start, ids.chosen_gaps, tokenizer)
    rejected = _pieces(ids.prompt_ids, ids.rejected_ids, ids.rejected_start, ids.rejected_gaps, tokenizer)
    return ShownPair(where, chosen, rejected, names)


def show_texts(pair: PreferencePair, names: tuple[str, str] = PAIR) -> ShownPair | None:
    """The texts of a pair without a tokenizer; None for messages, which need a chat template."""
    if not (isinstance(pair.prompt, str) and isinstance(pair.chosen, str) and isinstance(pair.rejected, str)):
        return None
    prompt = Piece(pair.prompt, False)
    where = place(pair.source_file, pair.source_row)
    return ShownPair(where, [prompt, Piece(pair.chosen, True)], [prompt, Piece(pair.rejected, True)], names)


def _pieces(prompt: IdArray, response: IdArray, start: int, gaps: Gaps, tokenizer: Any) -> list[Piece]:
    ids = [*prompt.tolist(), *response.tolist()]
    pieces = []
    decoded = ""
    for end, scored in _runs(len(prompt), len(response), start, gaps):
        # Decode all runs together: some tokenizers drop the space before a first token.
        text = str(tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        pieces.append(Piece(text[len(decoded) :], scored))
        decoded = text
    return [piece for piece in pieces if piece.text]


def _runs(prompt: int, response: int, start: int, gaps: Gaps) -> Iterator[tuple[int, bool]]:
    """The end of each run of tokens, and whether it is scored."""
    edges: Sequence[tuple[int, bool]] = [
        (start, False),
        *((edge, scored) for gap in gaps for edge, scored in zip(gap, (True, False), strict=True)),
        (response, True),
    ]
    for edge, scored in edges:
        yield prompt + edge, scored
