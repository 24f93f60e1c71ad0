"""Rows of several responses with scores: kept whole, or which pairs they become; and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from dpoeng_testing import write_jsonl

from dpoeng.engine.config.fields import PrecomputeConfig
from dpoeng.engine.data.kinds import ranked
from dpoeng.engine.data.pairs import PairFile, read_pairs
from dpoeng.engine.data.tokenization import tokenize_pairs
from dpoeng.engine.recipes.check import check_pairs


def read(folder: Path, rows: list[dict[str, Any]], **more: Any) -> PairFile:
    fields = {"max_reject_share": 1.0, "ranked_pairs": "best", **more}
    return read_pairs([write_jsonl(folder / "rows.jsonl", rows)], **fields)


def whole(folder: Path, rows: list[dict[str, Any]], **more: Any) -> PairFile:
    return read(folder, rows, ranked_pairs=None, **more)


def sides(found: PairFile) -> list[tuple[Any, Any]]:
    return [(pair.chosen, pair.rejected) for pair in found.pairs]


ROW = {"prompt": "Q:", "responses": [" a", " b", " c", " d"], "scores": [2, 5, 2, 1], "topic": "x"}


def test_the_best_against_the_others(tmp_path: Path) -> None:
    found = read(tmp_path, [ROW])
    assert sides(found) == [(" b", " a"), (" b", " c"), (" b", " d")]
    assert found.pairs[0].extra == {
        "topic": "x",
        "score_chosen": 5.0,
        "score_rejected": 2.0,
        "score_margin": 3.0,
        "pair_share": 1 / 3,
        "pair_of_row": 0,
    }
    assert [pair.extra["pair_of_row"] for pair in found.pairs] == [0, 1, 2]
    assert found.column_remark() == "1 row of several responses became 3 pairs"
    assert found.kind == "pairs"


def test_all_against_all_but_equal_scores(tmp_path: Path) -> None:
    found = read(tmp_path, [ROW], ranked_pairs="all")
    assert sides(found) == [(" b", " a"), (" b", " c"), (" b", " d"), (" a", " d"), (" c", " d")]
    assert sum(pair.extra["pair_share"] for pair in found.pairs) == pytest.approx(1)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q:", "responses": [" good", " bad"], "ranks": [1, 2]},
        {"prompt": "Q:", "responses": [" bad", " good"], "scores": ["1.5", "2"]},
        {"prompt": "Q:", "chosen": [" good"], "rejected": " bad"},
        {"prompt": "Q:", "completions": [{"response": " bad", "rating": 1}, {"response": " good", "rating": 4}]},
        {"instruction": "Q:", "completions": [{"response": " good", "overall_score": 7},
                                              {"response": " bad", "overall_score": 2}]},
    ],
)  # fmt: skip
def test_the_ways_to_write_it(tmp_path: Path, row: dict[str, Any]) -> None:
    found = read(tmp_path, [row])
    assert found.rejects == []
    assert sides(found) == [(" good", " bad")]
    assert found.pairs[0].prompt == "Q:"


def test_messages_and_mapped_columns(tmp_path: Path) -> None:
    answers = [[{"role": "assistant", "content": text}] for text in ("no", "yes")]
    row = {"prompt": [{"role": "user", "content": "?"}], "answers": answers, "stars": [1, 2]}
    found = read(tmp_path, [row], columns={"responses": "answers", "scores": "stars"})
    assert sides(found) == [(answers[1], answers[0])]


def test_several_chosen_against_several_rejected(tmp_path: Path) -> None:
    row = {"prompt": "Q:", "chosen": [" a", " b"], "rejected": [" c", " d"]}
    assert sides(read(tmp_path, [row], ranked_pairs="all")) == [(" a", " c"), (" a", " d"), (" b", " c"), (" b", " d")]


def test_a_row_is_kept_whole(tmp_path: Path) -> None:
    found = whole(tmp_path, [ROW, {**ROW, "scores": [20, 50, 20, 10]}, {**ROW, "scores": [1, 0, 1, 2]}])
    assert (found.kind, found.count, found.rejects) == ("ranked", 3, [])
    pair = found.pairs[0]
    assert pair.sides == (" a", " b", " c", " d")
    assert pair.scores == (2.0, 5.0, 2.0, 1.0)
    assert pair.extra == {"topic": "x", "scores": [2.0, 5.0, 2.0, 1.0]}
    assert found.column_remark() == "3 rows of 12 responses, ranked by their scores"
    # Of equal order, and of the opposite one.
    assert [(repeat.source_row, repeat.first_row) for repeat in found.duplicates] == [(2, 1)]
    assert [repeat.source_row for repeat in found.contradictions] == [3]


def test_all_responses_of_a_row_have_one_prompt(tmp_path: Path, tokenizer: Any) -> None:
    """Cut for the longest response, and at what tokens of the prompt all have in common."""
    row = {"prompt": "one two three four", "responses": [" a", " b c d e f", " g h"], "scores": [1, 3, 2]}
    pairs = whole(tmp_path, [row]).pairs
    long = max(len(tokenizer(side).input_ids) for side in pairs[0].sides) + 1
    data = tokenize_pairs(pairs, tokenizer, max_length=long + 2, truncation_mode="keep_end")
    assert (data.rows, len(data.pairs)) == (1, 2)
    first, second = data.pairs[0], data.pairs[1]
    assert len(first.ids.prompt_ids) == 2
    assert first.ids.prompt_ids.tolist() == second.ids.prompt_ids.tolist()
    assert second.ids.rejected_ids.tolist() == first.ids.chosen_ids.tolist()  # of an odd number, the first again
    assert (second.extra, first.extra["scores"]) == ({}, [1.0, 3.0, 2.0])
    assert {name: one.count for name, one in data.counts.lengths.items()} == {"prompt": 1, "response": 3, "total": 1}
    assert data.counts.lengths["response"].max == long


def test_a_row_with_a_response_that_cannot_be_used_is_left_out_whole(tmp_path: Path, tokenizer: Any) -> None:
    rows = [
        {**ROW, "responses": [" a", " b", " c", " a b c d e f g h"]},
        {**ROW, "responses": [" a", " b", " c", " d"]},
    ]
    pairs = whole(tmp_path, rows).pairs
    data = tokenize_pairs(pairs, tokenizer, max_length=8, truncation_mode="keep_end", append_eos=False)
    assert [(reject.source_row, reject.reason) for reject in data.rejects] == [(1, "response-too-long")]
    assert data.rows == 1
    cut = tokenize_pairs(
        whole(tmp_path, [{**ROW, "responses": [" a b c", " a b d", " e", " f"]}]).pairs, tokenizer,
        max_length=len(tokenizer("Q: a b").input_ids), append_eos=False,
    )  # fmt: skip
    assert [reject.reason for reject in cut.rejects] == ["same-tokens"]


def test_pairs_and_ranked_rows_do_not_mix_unless_they_are_made_pairs(tmp_path: Path) -> None:
    rows = [ROW, {"prompt": "Q:", "chosen": " a", "rejected": " b"}]
    found = whole(tmp_path, rows)
    assert [reject.reason for reject in found.rejects] == ["mixed-rows"]
    assert "--ranked-pairs best" in found.rejects[0].detail
    assert len(read(tmp_path, rows).pairs) == 4


@pytest.mark.parametrize("wanted", [None, "best"])
@pytest.mark.parametrize(
    ("change", "reason", "said"),
    [
        ({"scores": [1, 1, 1, 1]}, "bad-ranking", "all scores are 1"),
        ({"scores": [1, 2]}, "bad-ranking", "4 responses"),
        ({"scores": [1, 2, None, 3]}, "bad-ranking", "None"),
        ({"scores": [1, 2, 10**400, 3]}, "bad-ranking", "numbers"),
        ({"scores": None}, "bad-ranking", "neither"),
        ({"responses": [" a"]}, "bad-ranking", "1 responses"),
        ({"responses": "text"}, "bad-ranking", "must be a list"),
        ({"score_margin": 3}, "unused-column", "score_margin"),
        ({"responses": [" a", 5, " c", " d"]}, "wrong-type", "must be"),
    ],
)
def test_rejects(tmp_path: Path, change: dict[str, Any], reason: str, said: str, wanted: Any) -> None:
    found = read(tmp_path, [{**ROW, **change}, {**ROW, "prompt": "R:"}], ranked_pairs=wanted)
    if wanted is None and "score_margin" in change:
        assert found.pairs[0].extra["score_margin"] == 3
        return
    assert [reject.reason for reject in found.rejects] == [reason]
    assert said in found.rejects[0].detail
    assert len(found.pairs) == (1 if wanted is None else 3)  # a row that cannot be used leaves no pair behind


@pytest.mark.parametrize(
    ("change", "reason", "said"),
    [
        ({"responses": [" a", " b", " c", " b"]}, "same-response", "responses 2 and 4"),
        ({"responses": [" a", " b", " c", " "]}, "empty-response", "response 4"),
        ({"responses": [" a", " b", None, " d"]}, "missing-field", "response 3"),
    ],
)
def test_rejects_of_rows_that_are_kept_whole(tmp_path: Path, change: dict[str, Any], reason: str, said: str) -> None:
    found = whole(tmp_path, [{**ROW, **change}, {**ROW, "prompt": "R:"}])
    assert [reject.reason for reject in found.rejects] == [reason]
    assert said in found.rejects[0].detail


def test_a_column_of_the_name_of_the_scores(tmp_path: Path) -> None:
    given = [{"response": " a", "rating": 1}, {"response": " b", "rating": 2}]
    rows = [{"prompt": "Q:", "completions": given, "scores": 1}, {"prompt": "Q:", "completions": given}]
    assert [reject.reason for reject in whole(tmp_path, rows).rejects] == ["unused-column"]


def test_a_row_makes_no_more_pairs_than_it_may(tmp_path: Path) -> None:
    row = {"prompt": "p", "responses": [f"r{i}" for i in range(2000)], "scores": list(range(2000))}
    plain = {"prompt": "p", "chosen": "a", "rejected": "b"}
    found = read(tmp_path, [row, plain], ranked_pairs="all", max_reject_share=1)
    assert [reject.reason for reject in found.rejects] == ["bad-ranking"]
    assert len(read(tmp_path, [row], ranked_pairs="best").pairs) == 1999


def test_a_whole_row_has_no_more_responses_than_it_may(tmp_path: Path) -> None:
    """Training compares all of them with each other, and reading looks for equal ones."""
    rows = [{"prompt": "Q:", "responses": [f" {i}" for i in range(n)], "scores": list(range(n))} for n in (1024, 1025)]
    found = whole(tmp_path, rows)
    assert [len(pair.responses) for pair in found.pairs] == [1024]
    assert [(reject.source_row, reject.reason) for reject in found.rejects] == [(2, "bad-ranking")]
    assert "1,025 responses are more than the 1,024" in found.rejects[0].detail
    assert len(read(tmp_path, rows[1:]).pairs) == 1024  # --ranked-pairs best


@pytest.mark.parametrize("wanted", ["best", "all", None])
def test_a_prompt_is_repeated_no_more_than_it_may(tmp_path: Path, wanted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranked, "MAX_REPEATED", 400)
    long = {**ROW, "prompt": "p" * 134}
    found = read(tmp_path, [long, {**ROW, "prompt": "q" * 66}], ranked_pairs=wanted)
    assert [reject.reason for reject in found.rejects] == ["bad-ranking"]
    assert "the limit of one row is 400 characters" in found.rejects[0].detail


def test_check_looks_at_every_pair_of_a_row(tmp_path: Path, tiny_model: Path, tokenizer: Any) -> None:
    rows = [{**ROW, "prompt": f"Instruction: {i}?\nResponse:"} for i in range(3)]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    report = check_pairs(PrecomputeConfig(pairs=(file,), model=str(tiny_model), ranked_pairs="best"))
    assert (report.pairs, report.prompts) == (9, 3)
    lengths = next(one for one in report.lengths if one.part == "rejected")
    tokens = [len(tokenizer(text).input_ids) + 1 for text in (" a", " c", " d")]  # and the end
    assert lengths.mean == pytest.approx(sum(tokens) / 3)
