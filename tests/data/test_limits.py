"""End tokens, beginning tokens, truncation and counts, on whole words as tokens so that each is done by hand."""

from __future__ import annotations

import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dpoeng.cache.errors import UserError
from dpoeng.cli.precompute import length_table
from dpoeng.engine.data.shapes import PreferencePair
from dpoeng.engine.data.token_counts import Lengths
from dpoeng.engine.data.tokenization import TokenizedData, tokenize_pairs

# The token of the word "7" is 7; <s> is 100, </s> is 101.
BOS, EOS = 100, 101


def words(*, bos: bool = False, eos: bool = False, unknown: str = "0") -> PreTrainedTokenizerFast:
    vocabulary = {**{str(i): i for i in range(100)}, "<s>": BOS, "</s>": EOS}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    single = f"{'<s> ' if bos else ''}$A{' </s>' if eos else ''}"
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", BOS), ("</s>", EOS)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def tokenize(*rows: tuple[str, str, str], tokenizer: Any = None, **options: Any) -> TokenizedData:
    pairs = [PreferencePair(*row, source_file="f", source_row=i) for i, row in enumerate(rows, 1)]
    return tokenize_pairs(pairs, tokenizer or words(), **options)


def parts(data: TokenizedData) -> tuple[list[int], list[int], list[int]]:
    ids = data.pairs[0].ids
    return ids.prompt_ids.tolist(), ids.chosen_ids.tolist(), ids.rejected_ids.tolist()


def count(first: int, last: int) -> str:
    return "".join(f" {i}" for i in range(first, last + 1))


@pytest.mark.parametrize("adds_eos", [False, True])
@pytest.mark.parametrize("ending", ["", " </s>", "</s>", " </s>\n", " </s></s>"])
def test_texts_end_with_exactly_one_end_token(adds_eos: bool, ending: str) -> None:
    data = tokenize(("1 2", f" 3{ending}", " 4 5"), tokenizer=words(eos=adds_eos))
    assert parts(data) == ([1, 2], [3, EOS], [4, 5, EOS])


def test_an_end_token_that_stands_for_something_else_is_not_doubled_either() -> None:
    # As in GPT-2, whose unknown token is its end token.
    assert parts(tokenize(("1", " 3 what", " 4"), tokenizer=words(unknown="</s>"))) == ([1], [3, EOS], [4, EOS])


def test_no_end_token_unless_it_is_asked_for() -> None:
    for tokenizer in (words(), words(eos=True)):
        assert parts(tokenize(("1", " 3", " 4 </s>"), tokenizer=tokenizer, append_eos=False)) == ([1], [3], [4, EOS])


def test_a_tokenizer_without_an_end_token_stops_the_run() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words().backend_tokenizer)
    with pytest.raises(UserError) as caught:
        tokenize(("1", " 3", " 4"), tokenizer=tokenizer)
    assert caught.value.code == "tokenizer-no-eos"
    assert parts(tokenize(("1", " 3", " 4"), tokenizer=tokenizer, append_eos=False)) == ([1], [3], [4])


@pytest.mark.parametrize("prompt", ["1 2", "<s> 1 2", "<s><s> 1 2"])
def test_texts_begin_with_exactly_one_beginning_token(prompt: str) -> None:
    assert parts(tokenize((prompt, " 3", " 4"), tokenizer=words(bos=True)))[0] == [BOS, 1, 2]


def test_a_model_without_beginning_token_gets_none() -> None:
    assert parts(tokenize(("1 2", " 3", " 4")))[0] == [1, 2]


# prompt 1..6, chosen 11..14 </s> (5 tokens), rejected 21 22 </s> (3 tokens)
ROW = (count(1, 6), count(11, 14), count(21, 22))


@pytest.mark.parametrize(
    ("options", "prompt", "chosen", "rejected", "truncated"),
    [
        ({"max_length": None}, [1, 2, 3, 4, 5, 6], [11, 12, 13, 14, EOS], [21, 22, EOS], False),
        ({"max_length": 11}, [1, 2, 3, 4, 5, 6], [11, 12, 13, 14, EOS], [21, 22, EOS], False),
        # keep_start: the end of each response that is too long goes
        ({"max_length": 10}, [1, 2, 3, 4, 5, 6], [11, 12, 13, 14], [21, 22, EOS], True),
        ({"max_length": 8}, [1, 2, 3, 4, 5, 6], [11, 12], [21, 22], True),
        ({"max_length": 7}, [1, 2, 3, 4, 5, 6], [11], [21], True),
        # keep_end: the prompt's beginning goes, as far as the longer response needs, alike for both
        (
            {"max_length": 10, "truncation_mode": "keep_end"},
            [2, 3, 4, 5, 6],
            [11, 12, 13, 14, EOS],
            [21, 22, EOS],
            True,
        ),
        ({"max_length": 6, "truncation_mode": "keep_end"}, [6], [11, 12, 13, 14, EOS], [21, 22, EOS], True),
        # max_prompt_length: the prompt's end stays, in either mode, before max_length counts
        ({"max_prompt_length": 2}, [5, 6], [11, 12, 13, 14, EOS], [21, 22, EOS], True),
        ({"max_prompt_length": 6}, [1, 2, 3, 4, 5, 6], [11, 12, 13, 14, EOS], [21, 22, EOS], False),
        ({"max_prompt_length": 2, "max_length": 4}, [5, 6], [11, 12], [21, 22], True),
        (
            {"max_prompt_length": 3, "max_length": 7, "truncation_mode": "keep_end"},
            [5, 6],
            [11, 12, 13, 14, EOS],
            [21, 22, EOS],
            True,
        ),
    ],
)
def test_truncation(
    options: dict[str, Any], prompt: list[int], chosen: list[int], rejected: list[int], truncated: bool
) -> None:
    data = tokenize(ROW, **options)
    assert parts(data) == (prompt, chosen, rejected)
    assert (data.pairs[0].truncated, data.counts.truncated) == (truncated, int(truncated))


def test_a_cut_prompt_keeps_its_beginning_token() -> None:
    tokenizer = words(bos=True)
    assert parts(tokenize(ROW, tokenizer=tokenizer, max_prompt_length=3))[0] == [BOS, 5, 6]
    assert parts(tokenize(ROW, tokenizer=tokenizer, max_length=8, truncation_mode="keep_end"))[0] == [BOS, 5, 6]
    assert parts(tokenize(ROW, tokenizer=tokenizer, max_prompt_length=1))[0] == [BOS]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_length": 6}, "prompt-too-long"),  # fault 14
        ({"max_length": 1}, "prompt-too-long"),
        ({"max_length": 5, "truncation_mode": "keep_end"}, "response-too-long"),
    ],
)
def test_fault_14_no_room_left_rejects_the_row(options: dict[str, Any], reason: str) -> None:
    data = tokenize(ROW, ("1", " 2", " 3"), **{**options, "append_eos": True})
    first = data.rejects[0]
    assert (first.source_file, first.source_row, first.reason) == ("f", 1, reason)
    assert all(pair.source_row == 2 for pair in data.pairs)


def test_responses_that_truncation_makes_equal_are_rejected() -> None:
    data = tokenize(("1", " 2 3", " 2 4"), max_length=2)
    assert [reject.reason for reject in data.rejects] == ["same-tokens"]


@pytest.mark.parametrize("option", ["max_length", "max_prompt_length"])
def test_a_limit_must_be_positive(option: str) -> None:
    with pytest.raises(UserError, match=option):
        tokenize(ROW, **{option: 0})


numbers = st.lists(st.integers(1, 99), min_size=1, max_size=12).map(lambda drawn: "".join(f" {i}" for i in drawn))


@given(
    prompt=numbers,
    chosen=numbers,
    rejected=numbers,
    max_length=st.integers(1, 30),
    max_prompt_length=st.one_of(st.none(), st.integers(1, 12)),
    mode=st.sampled_from(["keep_start", "keep_end"]),
    bos=st.booleans(),
)
def test_truncation_only_cuts_and_never_beyond_its_limits(
    prompt: str, chosen: str, rejected: str, max_length: int, max_prompt_length: int | None, mode: str, bos: bool
) -> None:
    tokenizer = WITH_BOS if bos else WITHOUT_BOS
    whole = tokenize((prompt, chosen, rejected), tokenizer=tokenizer, max_length=None)
    cut = tokenize(
        (prompt, chosen, rejected),
        tokenizer=tokenizer,
        max_length=max_length,
        max_prompt_length=max_prompt_length,
        truncation_mode=mode,
    )
    if whole.rejects or cut.rejects:
        expected = {"same-tokens", "prompt-too-long" if mode == "keep_start" else "response-too-long"}
        assert {reject.reason for reject in cut.rejects} <= expected
        assert len(cut.rejects) == 1
        return
    (full_prompt, *full_sides), (cut_prompt, *cut_sides) = parts(whole), parts(cut)
    body = full_prompt[1:] if bos else full_prompt
    kept = cut_prompt[1:] if bos else cut_prompt
    assert cut_prompt[: int(bos)] == full_prompt[: int(bos)]
    assert kept == body[len(body) - len(kept) :]
    for full, side in zip(full_sides, cut_sides, strict=True):
        assert side == full[: len(side)]
        assert side == full or mode == "keep_start"
        assert 0 < len(side) <= max_length - len(cut_prompt)
    if max_prompt_length is not None:
        assert len(cut_prompt) <= max_prompt_length
    assert cut.pairs[0].truncated == (parts(cut) != parts(whole))


WITH_BOS, WITHOUT_BOS = words(bos=True), words()


def test_counts_and_length_table() -> None:
    rows = [("1 2", " 3", " 4"), ("1 2", " 3", " 4"), ("1 2", " 4", " 3"), ("1", count(1, 9), " 3"), ("1", " 2", " 2")]
    data = tokenize(*rows, max_length=8)
    counts = data.counts
    assert (counts.duplicates, counts.contradictions, counts.truncated, counts.merged) == (1, 1, 1, 0)
    # prompts 2 2 2 1; chosen with </s> 2 2 2, and 10 cut to 7
    assert counts.lengths["prompt"] == Lengths(count=4, mean=1.75, p50=2, p95=2, max=2)
    assert counts.lengths["chosen"] == Lengths(count=4, mean=3.25, p50=2, p95=7, max=7)
    assert counts.lengths["total"] == Lengths(count=4, mean=7.0, p50=6, p95=10, max=10)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(length_table(data))
    text = console.export_text()
    assert "rejected" in text
    assert "1 truncated, 1 duplicate, 1 with chosen and rejected swapped in an earlier pair, 1 left out" in " ".join(
        text.split()
    )


def test_no_pairs_are_not_an_error_here() -> None:
    data = tokenize_pairs([], words())
    assert (list(data.pairs), data.rejects, data.counts.lengths) == ([], [], {})
