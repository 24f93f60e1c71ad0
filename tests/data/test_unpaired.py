"""Rows of one response and a label: what is read, which response of another prompt each gets, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from dpoeng_testing import write_jsonl

from dpoeng.cache.errors import UserError
from dpoeng.engine.data.pairs import PairFile, content_key, read_pairs
from dpoeng.engine.data.tokenization import tokenize_pairs


def read(folder: Path, rows: list[dict[str, Any]], **more: Any) -> PairFile:
    return read_pairs([write_jsonl(folder / "rows.jsonl", rows)], **{"max_reject_share": 1.0, **more})


def row(prompt: str, completion: str, label: Any = True, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, "label": label, **more}


def test_each_row_gets_the_response_of_the_nearest_other_prompt(tmp_path: Path) -> None:
    rows = [row("A:", " a1"), row("A:", " a2", False), row("B:", " b1"), row("B:", " b2"), row("A:", " a3")]
    found = read(tmp_path, rows)
    assert found.kind == "unpaired"
    assert [(pair.chosen, pair.rejected) for pair in found.pairs] == [
        (" a1", " b1"),  # the first rows have no earlier one of another prompt: the nearest later one
        (" a2", " b1"),
        (" b1", " a2"),
        (" b2", " a2"),  # not b1, which is of the same prompt
        (" a3", " b2"),
    ]
    assert [pair.scores for pair in found.pairs] == [(1.0,), (0.0,), (1.0,), (1.0,), (1.0,)]
    longer = read(tmp_path, [*rows, row("C:", " c")])
    assert longer.pairs[:5] == found.pairs  # rows that are added move no other


@pytest.mark.parametrize(("label", "meant"), [(True, 1.0), (0, 0.0), ("False", 0.0), ("1", 1.0), (1.0, 1.0)])
def test_labels(tmp_path: Path, label: Any, meant: float) -> None:
    assert read(tmp_path, [row("A:", " a", label), row("B:", " b")]).pairs[0].scores == (meant,)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (row("A:", " a", None), "bad-label"),
        (row("A:", " a", 2), "bad-label"),
        (row("A:", " a", "good"), "bad-label"),
        ({"prompt": "A:", "chosen": " a", "rejected": " b"}, "mixed-rows"),
        (row("A:", "  "), "empty-response"),
        ({"completion": " a", "label": True}, "no-common-prompt"),
        ({"prompt": "A:", "label": True, "completion": None}, "missing-field"),
    ],
)
def test_rejects(tmp_path: Path, bad: dict[str, Any], reason: str) -> None:
    found = read(tmp_path, [row("B:", " b"), row("C:", " c"), bad])
    assert [reject.reason for reject in found.rejects] == [reason]


def test_one_prompt_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="same prompt") as caught:
        read(tmp_path, [row("A:", " a"), row("A:", " b")])
    assert caught.value.code == "data-one-prompt"


def test_a_label_column_under_another_name_hides_no_other_column(tmp_path: Path) -> None:
    mapped = {"label": "good"}
    rows = [row("A:", " a", "x", good=True), row("B:", " b", "y", good=False)]
    rows += [{"prompt": prompt, "completion": " c", "good": True} for prompt in ("C:", "D:")]
    found = read(tmp_path, rows, columns=mapped)
    assert [reject.reason for reject in found.rejects] == ["unused-column"] * 2
    assert len(found.pairs) == 2


def test_duplicates_and_contradictions_are_of_response_and_label(tmp_path: Path) -> None:
    found = read(tmp_path, [row("A:", " a"), row("B:", " b"), row("A:", " a"), row("B:", " b", False)])
    assert [repeat.source_row for repeat in found.duplicates] == [3]
    assert [repeat.source_row for repeat in found.contradictions] == [4]
    first, _, third, _ = found.pairs
    assert first.rejected == third.rejected or content_key(first) == content_key(third)


def test_messages_and_texts_may_be_mixed(tmp_path: Path, tokenizer: Any) -> None:
    question = [{"role": "user", "content": "Name a colour."}]
    answer = [{"role": "assistant", "content": "Red."}]
    rows = [row("Tides:", " twice a day"), {"prompt": question, "completion": answer, "label": False}]
    found = read(tmp_path, rows)
    assert [pair.rejected for pair in found.pairs] == ["Red.", [{"role": "assistant", "content": " twice a day"}]]
    data = tokenize_pairs(found.pairs, tokenizer)
    assert not data.rejects
    assert list(data.counts.lengths) == ["prompt", "completion", "mismatched", "total"]
    second = data.pairs[1]
    assert second.extra["label"] is False
    assert tokenizer.decode(second.ids.chosen_ids) == "Red.<|im_end|>\n"
    assert tokenizer.decode(second.ids.rejected_ids) == " twice a day<|im_end|>\n"


def test_pairs_keep_their_columns_named_label_and_completion(tmp_path: Path) -> None:
    pair = {"prompt": "A:", "chosen": " a", "rejected": " b", "label": 3, "completion": "x"}
    found = read(tmp_path, [pair])
    assert found.kind == "pairs"
    assert found.pairs[0].extra == {"label": 3, "completion": "x"}
