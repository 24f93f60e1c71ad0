"""Tokenises text with a known response start, with any transformers tokenizer.

Prompt and response are tokenised together, as in SFT. The response starts at the first token that contains one of its
characters; a token is scored if it contains a scored character. Independent of pairs, end tokens and truncation.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dpoeng.cache.errors import UserError
from dpoeng.engine.data.chat import Side, to_sides
from dpoeng.engine.data.rendering import Spans
from dpoeng.engine.data.shapes import PreferencePair
from dpoeng.engine.data.strict_json import RowFault

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(slots=True)
class Encoded:
    """The tokens of one side.

    Attributes:
        ids: token ids, with special tokens at the beginning as the model expects them and none added at the end.
        start: index of the first scored token, usually the first with a character of the response; len(ids) if none is.
        merged: whether the prompt alone has other tokens than the beginning of `ids`.
        joint: whether prompt and response were tokenised together.
        unscored: [begin, end) of unscored tokens after `start`, where others speak.
        swallowed: whether a special token absorbed white space of the response.
        bos: whether the tokenizer or the template, not the data, added a beginning token.
        fault: why the row cannot be used, if so.
    """

    ids: list[int]
    start: int
    merged: bool
    joint: bool
    unscored: list[tuple[int, int]] = field(default_factory=list)
    swallowed: bool = False
    bos: bool = False
    fault: RowFault | None = None


def encode(sides: Sequence[Side], tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    """Tokenises sides. Earlier uses of the tokenizer do not affect the result, and it is left unchanged."""
    backend = getattr(tokenizer, "backend_tokenizer", None) if getattr(tokenizer, "is_fast", False) else None
    if backend is None:
        encoded = [_encode_without_offsets(side, tokenizer) for side in sides]
    else:
        with _pristine(backend, split_special_tokens=bool(getattr(tokenizer, "split_special_tokens", False))):
            encoded = _encode_with_offsets(sides, backend)
    for side, tokens in zip(sides, encoded, strict=True):
        tokens.bos = _is_given(side, tokens, tokenizer)
        _keep_one_beginning(tokens, tokenizer.bos_token_id)
    return encoded


def _is_given(side: Side, encoded: Encoded, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether tokenizer or template added the beginning token. One that the data contains may be cut off."""
    bos = getattr(tokenizer, "bos_token", None)
    if not encoded.ids or bos is None or encoded.ids[0] != tokenizer.bos_token_id:
        return False
    return side.from_template or not side.text.startswith(bos) or encoded.ids[:2] == [encoded.ids[0]] * 2


def encode_response(pair: PreferencePair, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """The prompt of a pair with its chosen response, as phase one tokenises them.

    Raises:
        UserError: the pair is messages and the tokenizer has no chat template.
        RowFault: the template refuses the messages.
    """
    (encoded,) = encode(to_sides(pair, tokenizer)[:1], tokenizer)
    return encoded


@contextmanager
def _pristine(backend: Any, *, split_special_tokens: bool) -> Iterator[None]:
    """Switches off padding and truncation that earlier calls left enabled in a `tokenizers.Tokenizer`.

    Byte-level tokenizers usually exclude spaces from their offsets; a token that ends with a space would then seem to
    end before it. This is also switched off in the block.
    """
    padding, truncation, split = backend.padding, backend.truncation, backend.encode_special_tokens
    processor = backend.post_processor
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = split_special_tokens
    if processor is not None:
        untrimmed = copy.copy(processor)
        untrimmed.__setstate__(processor.__getstate__().replace(b'"trim_offsets":true', b'"trim_offsets":false'))
        backend.post_processor = untrimmed
    try:
        yield
    finally:
        if processor is not None:
            backend.post_processor = processor
        backend.encode_special_tokens = split
        if padding is not None:
            backend.enable_padding(**padding)
        if truncation is not None:
            backend.enable_truncation(**truncation)


def _encode_with_offsets(sides: Sequence[Side], backend: Any) -> list[Encoded]:
    prompts: dict[tuple[str, bool], list[int]] = {
        (side.text[: side.boundary], side.from_template): [] for side in sides
    }
    results: list[Any] = [None] * len(sides)
    added = {number for number, token in backend.get_added_tokens_decoder().items() if token.rstrip}
    for from_template in (False, True):
        texts_of_kind = [text for text, kind in prompts if kind == from_template]
        for text, encoding in zip(texts_of_kind, _encode_batch(backend, texts_of_kind, from_template), strict=True):
            prompts[text, from_template] = _ids_and_places(encoding)[0]
        numbers = [i for i, side in enumerate(sides) if side.from_template == from_template]
        encodings = _encode_batch(backend, [sides[i].text for i in numbers], from_template)
        for i, encoding in zip(numbers, encodings, strict=True):
            boundary = sides[i].boundary
            ids, places = _ids_and_places(encoding)
            start = next((at for at, (_, end) in enumerate(places) if end > boundary), len(ids))
            # A special token may absorb the white space after it (`rstrip`). The token still belongs to the prompt, and
            # no token contains the white space.
            swallowed = start < len(ids) and places[start][0] < boundary and ids[start] in added
            start += swallowed
            merged = ids[:start] != prompts[sides[i].text[:boundary], from_template]
            results[i] = Encoded(ids, start, merged, joint=True, swallowed=swallowed)
            _mark_unscored(results[i], places, sides[i])
    return results


def _mark_unscored(encoded: Encoded, places: Sequence[tuple[int, int]], side: Side) -> None:
    """Moves `start` to the first scored token, drops tokens after the last one, and records the gaps between them."""
    if side.scored is None:
        return
    scored = [
        at
        for at in range(encoded.start, len(encoded.ids))
        if any(places[at][0] < last and places[at][1] > first for first, last in side.scored)
    ]
    if not scored:
        encoded.start = len(encoded.ids)
        return
    encoded.start = scored[0]
    del encoded.ids[scored[-1] + 1 :]
    encoded.unscored = [(a + 1, b) for a, b in itertools.pairwise(scored) if b > a + 1]


def _encode_batch(backend: Any, texts: list[str], from_template: bool) -> list[Any]:
    try:
        return list(backend.encode_batch(texts, add_special_tokens=not from_template)) if texts else []
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # the class for a panic in Rust; it does not derive from Exception
            raise
        if len(texts) > 1:  # find out which text it is
            return [encoding for text in texts for encoding in _encode_batch(backend, [text], from_template)]
        raise UserError(
            "the tokenizer failed on a text",
            code="tokenizer-failed",
            where=f"{texts[0][:80]!r}, {len(texts[0])} characters",
            expected="a pattern that splits any text",
            found=str(error).rpartition(": ")[2][:200],
            remedy="leave the text out with --where, or name another tokenizer with --tokenizer",
            exit_status=3,
        ) from None


def _ids_and_places(encoding: Any) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids, and the characters of each token; drops tokens added after the text, and tokens added before have none."""
    added = [sequence is None for sequence in encoding.sequence_ids]
    length = len(added)
    while length and added[length - 1] and not all(added[:length]):
        length -= 1
    places = [(0, 0) if new else place for new, place in zip(added, encoding.offsets, strict=True)]
    return list(encoding.ids[:length]), places[:length]


def _encode_without_offsets(side: Side, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Tokenises both together if the prompt's tokens are then at the beginning, otherwise prompt and response
    separately.

    If others speak in the response, every piece must have the same tokens alone as in the whole; otherwise the row is
    refused.
    """
    prompt = _encode_plain(side.text[: side.boundary], tokenizer, side.from_template)
    together = _encode_plain(side.text, tokenizer, side.from_template)
    if side.scored is not None:
        return _encode_pieces(side, side.scored, together, tokenizer)
    if together[: len(prompt)] == prompt:
        return Encoded(together, len(prompt), merged=False, joint=True)
    response = tokenizer.encode(side.text[side.boundary :], add_special_tokens=False)
    return Encoded([*prompt, *response], len(prompt), merged=False, joint=False)


def _encode_pieces(side: Side, scored: Spans, together: list[int], tokenizer: PreTrainedTokenizerBase) -> Encoded:
    counts = [len(_encode_plain(side.text[:cut], tokenizer, side.from_template)) for span in scored for cut in span]
    if any(
        together[:count] != _encode_plain(side.text[:cut], tokenizer, side.from_template)
        for count, cut in zip(counts, (cut for span in scored for cut in span), strict=True)
    ):
        fault = RowFault("template-turns", "the tokenizer gives no offsets, and its tokens cross turn boundaries")
        return Encoded(together, counts[0], merged=False, joint=True, fault=fault)
    edges = list(zip(counts[1:-1:2], counts[2::2], strict=True))
    return Encoded(
        together[: counts[-1]], counts[0], merged=False, joint=True, unscored=[e for e in edges if e[0] < e[1]]
    )


def _encode_plain(text: str, tokenizer: PreTrainedTokenizerBase, from_template: bool) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=not from_template)
    end = tokenizer.eos_token
    if ids and not from_template and ids[-1] == tokenizer.eos_token_id and not (end and text.endswith(end)):
        ids.pop()
    return ids


def _keep_one_beginning(encoded: Encoded, bos: int | None) -> None:
    """Drops repeated beginning tokens, which appear if text or template already contains the one that is added."""
    while bos is not None and encoded.start > 1 and encoded.ids[:2] == [bos, bos]:
        del encoded.ids[0]
        encoded.start -= 1
        encoded.unscored = [(first - 1, last - 1) for first, last in encoded.unscored]
