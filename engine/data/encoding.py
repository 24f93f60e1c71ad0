"""Text with a boundary to token ids with a boundary, by any tokenizer of transformers.

Prompt and response are tokenised together, as they were in SFT; the response begins at the first token that holds one
of its characters. Knows nothing of pairs, end tokens or truncation.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dpoeng.engine.data.chat import Side

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(slots=True)
class Encoded:
    """The tokens of one side.

    Attributes:
        ids: token ids, special tokens at the beginning as the model wants them, none added at the end.
        start: index of the first token with a character of the response; len(ids) if there is none.
        merged: whether the prompt by itself has other tokens than `ids[:start]`.
        joint: whether prompt and response were tokenised together.
    """

    ids: list[int]
    start: int
    merged: bool
    joint: bool


def encode(sides: Sequence[Side], tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    """Tokenise sides; the result does not depend on what the tokenizer was used for before, nor is it left changed."""
    backend = getattr(tokenizer, "backend_tokenizer", None) if getattr(tokenizer, "is_fast", False) else None
    if backend is None:
        encoded = [_encode_without_offsets(side, tokenizer) for side in sides]
    else:
        with _pristine(backend, split_special_tokens=bool(getattr(tokenizer, "split_special_tokens", False))):
            encoded = _encode_with_offsets(sides, backend)
    for side in encoded:
        _keep_one_beginning(side, tokenizer.bos_token_id)
    return encoded


@contextmanager
def _pristine(backend: Any, *, split_special_tokens: bool) -> Iterator[None]:
    """Without the padding and truncation that earlier calls leave switched on in a `tokenizers.Tokenizer`.

    Byte-level tokenizers mostly trim spaces off their offsets; a token that ends with a space would then seem to end
    before it. That, too, is off for the time.
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
    results: list[Encoded | None] = [None] * len(sides)
    for from_template in (False, True):
        of_kind = [text for text, kind in prompts if kind == from_template]
        for text, encoding in zip(of_kind, _encode_batch(backend, of_kind, from_template), strict=True):
            prompts[text, from_template] = _ids_and_ends(encoding)[0]
        numbers = [i for i, side in enumerate(sides) if side.from_template == from_template]
        encodings = _encode_batch(backend, [sides[i].text for i in numbers], from_template)
        for i, encoding in zip(numbers, encodings, strict=True):
            boundary = sides[i].boundary
            ids, ends = _ids_and_ends(encoding)
            start = next((at for at, end in enumerate(ends) if end > boundary), len(ids))
            merged = ids[:start] != prompts[sides[i].text[:boundary], from_template]
            results[i] = Encoded(ids, start, merged, joint=True)
    return [result for result in results if result is not None]


def _encode_batch(backend: Any, texts: list[str], from_template: bool) -> list[Any]:
    return list(backend.encode_batch(texts, add_special_tokens=not from_template)) if texts else []


def _ids_and_ends(encoding: Any) -> tuple[list[int], list[int]]:
    """Ids, and behind which character each token ends; tokens added before the text end at 0, those after it go."""
    added = [sequence is None for sequence in encoding.sequence_ids]
    length = len(added)
    while length and added[length - 1] and not all(added[:length]):
        length -= 1
    ends = [0 if new else end for new, (_, end) in zip(added, encoding.offsets, strict=True)]
    return list(encoding.ids[:length]), ends[:length]


def _encode_without_offsets(side: Side, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Together if the prompt's tokens then stand at the beginning; otherwise prompt and response one by one."""
    prompt = _encode_plain(side.text[: side.boundary], tokenizer, side.from_template)
    together = _encode_plain(side.text, tokenizer, side.from_template)
    if together[: len(prompt)] == prompt:
        return Encoded(together, len(prompt), merged=False, joint=True)
    response = tokenizer.encode(side.text[side.boundary :], add_special_tokens=False)
    return Encoded([*prompt, *response], len(prompt), merged=False, joint=False)


def _encode_plain(text: str, tokenizer: PreTrainedTokenizerBase, from_template: bool) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=not from_template)
    end = tokenizer.eos_token
    if ids and not from_template and ids[-1] == tokenizer.eos_token_id and not (end and text.endswith(end)):
        ids.pop()
    return ids


def _keep_one_beginning(encoded: Encoded, bos: int | None) -> None:
    """Drop repeated beginning tokens, which arise where text or template already holds the one that is added."""
    while bos is not None and encoded.start > 1 and encoded.ids[:2] == [bos, bos]:
        del encoded.ids[0]
        encoded.start -= 1
