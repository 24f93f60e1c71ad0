"""Rows of several responses with scores: which pairs they become, with which columns, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from dpoeng_testing import write_jsonl

from dpoeng.engine.config.fields import PrecomputeConfig
from dpoeng.engine.data.pairs import PairFile, read_pairs
from dpoeng.engine.recipes.check import check_pairs


def read(folder: Path, rows: list[dict[str, Any]], **more: Any) -> PairFile:
    return read_pairs([write_jsonl(folder / "rows.jsonl", rows)], **{"max_reject_share": 1.0, **more})


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
        ({"responses": [" a", 5, " c", " d"]}, "wrong-type", "chosen"),
    ],
)
def test_rejects(tmp_path: Path, change: dict[str, Any], reason: str, said: str) -> None:
    found = read(tmp_path, [{**ROW, **change}, {**ROW, "prompt": "R:"}])
    assert [reject.reason for reject in found.rejects] == [reason]
    assert said in found.rejects[0].detail
    assert len(found.pairs) == 3  # a row that cannot be used leaves no pair behind


def test_a_row_makes_no_more_pairs_than_it_may(tmp_path: Path) -> None:
    row = {"prompt": "p", "responses": [f"r{i}" for i in range(2000)], "scores": list(range(2000))}
    plain = {"prompt": "p", "chosen": "a", "rejected": "b"}
    found = read(tmp_path, [row, plain], ranked_pairs="all", max_reject_share=1)
    assert [reject.reason for reject in found.rejects] == ["bad-ranking"]
    assert len(read(tmp_path, [row], ranked_pairs="best").pairs) == 1999


def test_check_looks_at_every_pair_of_a_row(tmp_path: Path, tiny_model: Path, tokenizer: Any) -> None:
    rows = [{**ROW, "prompt": f"Instruction: {i}?\nResponse:"} for i in range(3)]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    report = check_pairs(PrecomputeConfig(pairs=(file,), model=str(tiny_model)))
    assert (report.pairs, report.prompts) == (9, 3)
    lengths = next(one for one in report.lengths if one.part == "rejected")
    tokens = [len(tokenizer(text).input_ids) + 1 for text in (" a", " c", " d")]  # and the end
    assert lengths.mean == pytest.approx(sum(tokens) / 3)
