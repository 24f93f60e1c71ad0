"""Where the response begins: joint tokenisation, one shared prompt, scored tokens that hold response characters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from dpoeng.engine.data.chat import Side
from dpoeng.engine.data.encoding import encode
from dpoeng.engine.data.shapes import PreferencePair
from dpoeng.engine.data.tokenization import TokenizedData, tokenize_pairs

SENTENCES = [
    "\n\nHuman: what is the capital of France?\n\nAssistant: The capital of France is Paris.",
    "Instruction: name a colour\nResponse: red, of course\nEND",
    "Response: I can't do that.  It isn't allowed!!",
    "naïve café — 你好 世界 🙂🙃",
] * 3


def byte_level(
    *, regex: bool = True, trim: bool = True, bos: bool = False, eos: bool = False
) -> PreTrainedTokenizerFast:
    """A byte-level BPE as GPT-2 has it; without the regex its tokens cross words, lines and the boundary freely."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    parts: list[Any] = [processors.ByteLevel(trim_offsets=trim)]
    if bos or eos:
        single = f"{'<s> ' if bos else ''}$A{' </s>' if eos else ''}"
        parts.append(processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)]))
    backend.post_processor = processors.Sequence(parts)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """As Llama 2 has it: spaces become "▁", one is put in front, unknown characters fall back to bytes."""
    backend = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    backend.train_from_iterator(SENTENCES, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS: dict[str, PreTrainedTokenizerFast] = {
    "gpt-2": byte_level(),
    "untrimmed offsets": byte_level(trim=False),
    "no regex": byte_level(regex=False),
    "no regex, untrimmed": byte_level(regex=False, trim=False),
    "bos": byte_level(bos=True),
    "bos and eos": byte_level(bos=True, eos=True),
    "sentencepiece": sentencepiece_like(),
}
BYTE_LEVEL = [name for name in TOKENIZERS if name != "sentencepiece"]


def token_bytes(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[int]:
    """How many bytes of text each token holds: a byte-level token has one character a byte, special tokens none."""
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    return [0 if number in special else len(tokenizer.convert_ids_to_tokens(number)) for number in ids]


texts = st.one_of(
    st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1, max_size=25),
    st.text(alphabet="aA .,\n'sté你🙂", min_size=1, max_size=25),
    st.sampled_from(SENTENCES),
    st.tuples(st.sampled_from(SENTENCES), st.integers(1, 30)).map(lambda drawn: drawn[0][: drawn[1]]),
).filter(lambda text: "<" not in text)


def tokenize(tokenizer: Any, *rows: tuple[Any, Any, Any], **options: Any) -> TokenizedData:
    pairs = [PreferencePair(*row, source_file="f", source_row=i) for i, row in enumerate(rows, 1)]
    return tokenize_pairs(pairs, tokenizer, **{"max_length": None, **options})


@pytest.mark.parametrize("name", TOKENIZERS)
@given(prompt=texts, chosen=texts, rejected=texts)
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_ids_are_the_tokenizers_own_and_scored_tokens_hold_the_response(
    name: str, prompt: str, chosen: str, rejected: str
) -> None:
    tokenizer = TOKENIZERS[name]
    data = tokenize(tokenizer, (prompt, chosen, rejected))
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if data.rejects:
        own = [tokenizer(prompt + side, add_special_tokens=False)["input_ids"] for side in (chosen, rejected)]
        if data.rejects[0].reason == "same-tokens":
            assert own[0] == own[1]
        else:  # the first token of a side holds the boundary, and no beginning token stands before it
            assert data.rejects[0].reason == "no-context"
            assert "bos" not in name
            assert name != "sentencepiece"
            assert any(token_bytes(tokenizer, ids)[0] > len(prompt.encode()) for ids in own)
        return
    ids = data.pairs[0].ids
    assert len(ids.prompt_ids) > 0 or (ids.chosen_start > 0 and ids.rejected_start > 0)
    before: list[list[int]] = []
    for text, response, start in (
        (prompt + chosen, ids.chosen_ids, ids.chosen_start),
        (prompt + rejected, ids.rejected_ids, ids.rejected_start),
    ):
        full = [*ids.prompt_ids.tolist(), *response.tolist()]
        own = [number for number in tokenizer(text)["input_ids"] if number != eos]
        assert full == [*own, eos]
        first = len(ids.prompt_ids) + start
        before.append(full[:first])
        if name in BYTE_LEVEL:
            sizes = token_bytes(tokenizer, full)
            assert sum(sizes) == len(text.encode())
            assert sum(sizes[:first]) <= len(prompt.encode()) < sum(sizes[: first + 1])
    # the prompt is all that the sides share before their responses
    if ids.chosen_start and ids.rejected_start:
        assert ids.chosen_ids[0] != ids.rejected_ids[0]
    if name != "sentencepiece":
        own_prompt = [number for number in tokenizer(prompt)["input_ids"] if number != eos]
        assert data.pairs[0].merged == any(side != own_prompt for side in before)
    assert bos is not None


def test_fault_15_a_token_across_the_boundary_belongs_to_the_response() -> None:
    tokenizer = TOKENIZERS["gpt-2"]
    data = tokenize(tokenizer, ("Assistant: ", "The capital", "7"))
    pair = data.pairs[0]
    # " The" is one token and takes the prompt's space with it; before "7" the space stands alone, unscored
    assert tokenizer.convert_ids_to_tokens(pair.ids.chosen_ids.tolist())[0] == "ĠThe"
    assert tokenizer.convert_ids_to_tokens(pair.ids.rejected_ids.tolist())[:2] == ["Ġ", "7"]
    assert (pair.ids.chosen_start, pair.ids.rejected_start) == (0, 1)
    assert (data.counts.merged, data.counts.unshared, pair.merged) == (1, 1, True)


def test_a_token_that_ends_with_a_space_of_the_response_belongs_to_it() -> None:
    # "t " is one token here, and the tokenizer's own offsets leave out its space
    tokenizer = TOKENIZERS["no regex"]
    assert tokenizer.tokenize("t ") == ["tĠ"]
    assert [reject.reason for reject in tokenize(tokenizer, ("t", "0", " 0")).rejects] == ["no-context"]
    ids = tokenize(tokenizer, ("xt", "0", " 0")).pairs[0].ids
    assert tokenizer.convert_ids_to_tokens(ids.rejected_ids.tolist())[0] == "tĠ"
    assert (ids.chosen_start, ids.rejected_start) == (1, 0)


def test_a_boundary_between_tokens_is_not_counted_as_merged() -> None:
    data = tokenize(TOKENIZERS["gpt-2"], ("Assistant:", " The capital", " 7"))
    assert (data.counts.merged, data.counts.unshared) == (0, 0)


def test_a_character_in_several_tokens_is_not_torn() -> None:
    # 🙂 and 🙃 share their first bytes, which are separate tokens; those belong to the response.
    tokenizer = byte_level(trim=False)
    ids = tokenize(tokenizer, ("a", "\U0001f9ff", "\U0001f9fe")).pairs[0].ids
    assert tokenizer.decode(ids.prompt_ids) == "a"
    assert (ids.chosen_start, ids.rejected_start) == (0, 0)


def test_nothing_before_the_response_is_refused_unless_a_beginning_token_is_there() -> None:
    assert [reject.reason for reject in tokenize(TOKENIZERS["gpt-2"], ("", "a", "b")).rejects] == ["no-context"]
    tokenizer = TOKENIZERS["bos"]
    ids = tokenize(tokenizer, ("", "a", "b")).pairs[0].ids
    assert ids.prompt_ids.tolist() == [tokenizer.bos_token_id]


def test_a_response_that_the_normaliser_removes_is_refused() -> None:
    backend = Tokenizer.from_str(TOKENIZERS["gpt-2"].backend_tokenizer.to_str())
    backend.normalizer = normalizers.Replace("\u200b", "")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    assert [reject.reason for reject in tokenize(tokenizer, ("p", "\u200b", "b")).rejects] == ["empty-response"]


@pytest.mark.parametrize("use", ["padding", "truncation", "both", "pairs", "split"])
def test_fault_53_earlier_use_of_the_tokenizer_does_not_matter(use: str) -> None:
    rows = [("Assistant:", " The capital of France is Paris.", " no"), ("a", "b", "c")]
    expected = [pair.ids for pair in tokenize(byte_level(bos=True), *rows).pairs]
    tokenizer = byte_level(bos=True)
    tokenizer.pad_token = "</s>"
    if use in ("padding", "both"):
        tokenizer.backend_tokenizer.enable_padding(length=64, pad_id=1, direction="left")
    if use in ("truncation", "both"):
        tokenizer.backend_tokenizer.enable_truncation(3, direction="left")
    if use == "pairs":
        tokenizer(["a", "a b"], ["c", "d"], padding="max_length", truncation="only_first", max_length=9)
        tokenizer.padding_side = tokenizer.truncation_side = "left"
    if use == "split":
        tokenizer.backend_tokenizer.encode_special_tokens = True
    state = tokenizer.backend_tokenizer.to_str()
    found = [pair.ids for pair in tokenize(tokenizer, *rows).pairs]
    assert all(a.same_as(b) for a, b in zip(found, expected, strict=True))
    assert tokenizer.backend_tokenizer.to_str() == state


def test_neighbours_do_not_matter() -> None:
    rows = [(sentence[:20], sentence[20:], " no") for sentence in SENTENCES] * 30  # more than one chunk
    together = tokenize(TOKENIZERS["bos"], *rows).pairs
    alone = [tokenize(TOKENIZERS["bos"], row).pairs[0] for row in rows[:4]]
    assert len(together) == len(rows)
    assert all(a.ids.same_as(b.ids) for a, b in zip(together[-12:], alone * 3, strict=True))


def test_a_rejected_neighbour_does_not_matter() -> None:
    good = [("Assistant:", f" yes {i}", f" no {i}") for i in range(4)]
    bad = [("", "a", "b"), ("t", "0", " 0"), ("t", " 0", "0"), ("p", "same", "same")]
    rows = [row for both in zip(good, bad, strict=True) for row in both]
    data = tokenize(TOKENIZERS["no regex"], *rows)
    assert [pair.source_row for pair in data.pairs] == [1, 3, 5, 7]
    assert [(reject.source_row, reject.reason) for reject in data.rejects] == [
        (2, "no-context"),
        (4, "no-context"),
        (6, "no-context"),
        (8, "same-tokens"),
    ]
    alone = [tokenize(TOKENIZERS["no regex"], row).pairs[0] for row in good]
    assert all(a.ids.same_as(b.ids) for a, b in zip(data.pairs, alone, strict=True))


@given(prompt=texts, chosen=texts, rejected=texts)
@settings(max_examples=40, deadline=None)
def test_without_offsets_the_ids_are_still_right_where_nothing_merges(prompt: str, chosen: str, rejected: str) -> None:
    tokenizer = ByT5Tokenizer()  # one token a byte, no offsets
    data = tokenize(tokenizer, (prompt, chosen, rejected))
    if chosen == rejected:
        assert data.rejects[0].reason == "same-tokens"
        return
    ids = data.pairs[0].ids
    assert ids.prompt_ids.tolist() == tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert [*ids.prompt_ids, *ids.rejected_ids] == tokenizer(prompt + rejected)["input_ids"]
    assert data.counts.separate == 0


def test_without_offsets_a_merged_boundary_is_tokenised_apart_and_counted() -> None:
    tokenizer: Any = NoOffsets(TOKENIZERS["gpt-2"])
    sides = [Side("Assistant: The", 11, False), Side("Assistant: 7", 10, False)]
    merged, plain = encode(sides, tokenizer)
    own = tokenizer.encode("Assistant: ", add_special_tokens=True)
    assert not merged.joint
    assert merged.ids == [*own, *tokenizer.encode("The", add_special_tokens=False)]
    assert plain.joint
    assert plain.ids == tokenizer.encode("Assistant: 7", add_special_tokens=True)


class NoOffsets:
    """A tokenizer that offers no more than the slow ones do."""

    is_fast = False

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.encode: Callable[..., list[int]] = tokenizer.encode
        self.bos_token_id, self.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.eos_token = tokenizer.eos_token
