"""`dpoeng select`: which rows are kept, worked by hand; the view that it writes; what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner

from dpoeng.cache.errors import CacheError, UserError
from dpoeng.cache.reader import View
from dpoeng.cache.schema import PairIds, ScoredPair, as_ids, pair_key
from dpoeng.cache.selection.rules import Rules, choose, quotas
from dpoeng.cache.selection.views import write_rows
from dpoeng.cache.spec import ReferenceSpec
from dpoeng.cache.store import Store
from dpoeng.cache.table import ViewEntry
from dpoeng.cache.verify import verify
from dpoeng.cli.select import select

# Sums of chosen and rejected, and a category. Margins 3, -1, 0.5, -4, 2, 0.5; row 5 is row 2 again.
SUMS = [(-1.0, -4.0), (-3.0, -2.0), (-1.5, -2.0), (-6.0, -2.0), (-2.0, -4.0), (-1.5, -2.0)]
KINDS = ["a", "a", "b", "a", "b", "b"]


def pair(number: int, chosen: float, rejected: float) -> ScoredPair:
    """Prompt of 1 token, chosen of 2, rejected of 1 + `number` tokens."""
    ids = PairIds(as_ids([number]), as_ids([1, 2]), as_ids(range(3, 4 + number)))
    return ScoredPair(ids, np.full(2, chosen / 2, np.float32), np.full(1 + number, rejected / (1 + number), np.float32))


def made(root: Path, sums: Sequence[tuple[float, float]], name: str = "pairs", spec: str = "reference") -> View:
    rows = [pair(2 if i == 5 else i, *both) for i, both in enumerate(sums)]
    store = Store.open(root, create=True)
    digest = store.put_spec(ReferenceSpec.from_fields({"model": spec}))
    store.commit_shard(digest, [*rows[:3], *rows[3:5]], {})
    store.seal(digest)
    entries = [
        ViewEntry("pairs.jsonl", i + 1, pair_key(row.ids), {"kind": kind, "score": i / 2})
        for i, (row, kind) in enumerate(zip(rows, KINDS, strict=False))
    ]
    store.write_view(digest, name, entries, {"max_length": 64})
    return View.open(root, name)


@pytest.fixture
def view(tmp_path: Path) -> View:
    return made(tmp_path / "refcache", SUMS)


@pytest.mark.parametrize(
    ("rules", "rows", "left_out"),
    [
        (Rules(rule="large", count=2), [0, 4], {"not among the largest scores": 4}),
        (Rules(rule="small", count=3), [1, 2, 5], {"not among the scores nearest to 0": 3}),
        (Rules(rule="small", count=1), [2], {"not among the scores nearest to 0": 5}),  # of two equals the earlier
        # A third of 6 is 2, one of each group: half of 2 in proportion to 3 and 3.
        (Rules(rule="large", share=1 / 3, group_by="kind"), [0, 4], {"not among the largest scores": 4}),
        (Rules(rule="large", count=1, by="length_difference"), [0], {"not among the largest scores": 5}),
        (Rules(rule="large", count=2, by="column:score"), [4, 5], {"not among the largest scores": 4}),
        # Per token: -0.5 + 4, -1.5 + 1, -0.75 + 2/3, -3 + 0.5, -1 + 0.8, as row 2.
        (Rules(rule="small", count=2, by="margin_per_token"), [2, 5], {"not among the scores nearest to 0": 4}),
        (Rules(least=0, most=2.5), [2, 4, 5], {"margin below 0": 2, "margin above 2.5": 1}),
        (Rules(drop_duplicates=True), [0, 1, 2, 3, 4], {"equal to an earlier pair": 1}),
        # Tokens 4, 5, 6, 7, 8, 6; the duplicate counts under its first reason.
        (Rules(drop_duplicates=True, max_tokens=5), [0, 1],
         {"equal to an earlier pair": 1, "longer than 5 tokens": 3}),
        # The filters leave 0, 2, 4 and 5; half of these are two.
        (Rules(rule="large", share=0.5, least=0), [0, 4], {"margin below 0": 2, "not among the largest scores": 2}),
    ],
)  # fmt: skip
def test_which_rows_are_kept(view: View, rules: Rules, rows: list[int], left_out: dict[str, int]) -> None:
    chosen = choose(view, rules)
    assert (chosen.rows.tolist(), chosen.left_out) == (rows, left_out)
    assert len(rows) + sum(left_out.values()) == len(view)


def test_random_rows_are_those_of_the_seed(view: View) -> None:
    drawn = {tuple(choose(view, Rules(rule="random", count=3, seed=seed)).rows.tolist()) for seed in range(20)}
    assert len(drawn) > 5
    again = choose(view, Rules(rule="random", count=3, seed=4)).rows.tolist()
    assert choose(view, Rules(rule="random", count=3, seed=4)).rows.tolist() == again


def test_gaps_against_another_model(view: View, tmp_path: Path) -> None:
    """The policy raised row 3's chosen response by 5 nats, and nothing else: gaps 0, 0, 0, 5, 0, 0."""
    sums = [(c + 5 * (i == 3), r) for i, (c, r) in enumerate(SUMS)]
    policy = made(tmp_path / "refcache", sums, "trained", "policy")
    chosen = choose(view, Rules(rule="large", count=1), policy)
    assert chosen.rows.tolist() == [3]
    assert chosen.scores.tolist() == pytest.approx([0, 0, 0, 5, 0, 0], abs=1e-6)
    few = made(tmp_path / "refcache", SUMS[:2], "few", "policy")
    with pytest.raises(UserError, match="missing") as caught:
        choose(view, Rules(rule="large", count=1), few)
    assert caught.value.code == "select-against"


def test_swapped_pairs_are_both_left_out(tmp_path: Path) -> None:
    one = pair(1, -1.0, -2.0)
    other = ScoredPair(one.ids.swapped(), one.rejected_logps, one.chosen_logps)
    store = Store.open(tmp_path / "refcache", create=True)
    digest = store.put_spec(ReferenceSpec.from_fields({"model": "m"}))
    rows = [one, pair(2, -1.0, -2.0), other]
    store.commit_shard(digest, rows, {})
    entries = [ViewEntry("p.jsonl", i + 1, pair_key(row.ids)) for i, row in enumerate([*rows, one])]
    store.write_view(digest, "pairs", entries, {})
    chosen = choose(View.open(tmp_path / "refcache"), Rules(drop_contradictions=True))
    assert (chosen.rows.tolist(), chosen.left_out) == ([1], {"swapped in another pair": 3})


@pytest.mark.parametrize(
    ("sizes", "total", "balanced", "expected"),
    [
        ([6, 3, 1], 5, False, [3, 2, 0]),  # 3, 1.5 and 0.5: the earlier of two equal fractions is rounded up
        ([6, 3, 1], 10, False, [6, 3, 1]),
        ([6, 3, 1], 99, True, [6, 3, 1]),
        ([6, 3, 1], 5, True, [2, 2, 1]),
        ([6, 1, 1], 6, True, [4, 1, 1]),
        ([6, 3, 1], 2, True, [1, 1, 0]),
    ],
)
def test_quotas(sizes: list[int], total: int, balanced: bool, expected: list[int]) -> None:
    found = quotas(sizes, total, balanced=balanced)
    assert sum(found) == min(total, sum(sizes))
    assert found == expected


@pytest.fixture
def run() -> Callable[..., dict[str, Any]]:
    def invoke(*arguments: object) -> dict[str, Any]:
        result = CliRunner().invoke(select, [str(argument) for argument in arguments])
        if isinstance(result.exception, UserError):
            raise result.exception
        assert result.exit_code == 0, result.output
        return json.loads(result.output) if "--json" in arguments else {"text": result.output}

    return invoke


def test_the_view_that_is_written(view: View, tmp_path: Path, run: Callable[..., dict[str, Any]]) -> None:
    root = tmp_path / "refcache"
    objects = sorted(path.name for path in root.glob("objects/*/*"))
    line = (
        "--cache",
        root,
        "--view",
        "pairs",
        "--output",
        "best",
        "--rule",
        "large",
        "--count",
        3,
        "--group-by",
        "kind",
    )
    found = run(*line, "--balanced", "--json")
    assert found["groups"] == {"a": {"rows": 2, "rows_before": 3}, "b": {"rows": 1, "rows_before": 3}}
    assert (found["rows"], found["left_out"]) == (3, {"not among the largest scores": 3})
    written = View.open(root, "best")
    assert [written.source(i)[1] for i in range(3)] == [1, 2, 5]
    for i, row in enumerate((0, 1, 4)):
        assert written.key(i) == view.key(row)
        assert written[i].chosen_logps.tolist() == view[row].chosen_logps.tolist()
        assert written.extra(i) == view.extra(row)
    assert written.spec.digest == view.spec.digest
    assert written.meta["selection"]["view"] == "pairs"
    assert sorted(path.name for path in root.glob("objects/*/*")) == objects  # no copy
    assert verify(root, depth="all").ok
    before = (root / "views" / "best.json").read_bytes()
    assert "6 of pairs" in run(*line, "--balanced")["text"]  # the same again is the same
    assert (root / "views" / "best.json").read_bytes() == before
    with pytest.raises(UserError) as caught:
        run(*line)
    assert caught.value.code == "select-exists"
    run(*line, "--force")
    with pytest.raises(UserError, match="that view"):
        run("--cache", root, "--view", "pairs", "--output", "pairs", "--min-score", 0, "--force")


@pytest.mark.parametrize(
    ("more", "code"),
    [
        (("--by", "column:none", "--rule", "large", "--count", 1), "select-column"),
        (("--by", "column:kind", "--rule", "large", "--count", 1), "select-column"),
        (("--group-by", "none", "--rule", "large", "--count", 1), "select-column"),
        (("--min-score", 9), "select-nothing"),
    ],
)
def test_what_is_refused(view: View, tmp_path: Path, run: Any, more: tuple[object, ...], code: str) -> None:
    with pytest.raises(UserError) as caught:
        run("--cache", tmp_path / "refcache", "--output", "new", *more)
    assert caught.value.code == code
    assert Store.open(tmp_path / "refcache").views() == ["pairs"]


@pytest.mark.parametrize(
    "more", [("--rule", "large"), ("--share", 0.5), ("--rule", "large", "--share", 0.5, "--count", 1),
             ("--balanced",), ("--group-by", "kind"), ("--rule", "large", "--share", "nan"), ("--min-score", "nan")],
)  # fmt: skip
def test_an_option_without_effect_is_refused(view: View, tmp_path: Path, more: tuple[object, ...]) -> None:
    arguments = ("--cache", tmp_path / "refcache", "--output", "new", *more)
    assert CliRunner().invoke(select, [str(argument) for argument in arguments]).exit_code == 2


@pytest.mark.parametrize("extra", [b"[" * 100_000, b"[]", b"\xff"])
def test_columns_that_are_not_objects_are_named(view: View, monkeypatch: pytest.MonkeyPatch, extra: bytes) -> None:
    monkeypatch.setattr(view._table, "_extra", pa.array([extra] * len(view), pa.large_binary()))
    with pytest.raises(CacheError, match="damaged"):
        view.extra(0)


def test_no_torch_is_imported() -> None:
    program = "import sys, dpoeng.cli.select, dpoeng.cache.selection.views; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "False"


# --------------------------------------------------------------------------- rows that are no pairs


def ranked_view(root: Path) -> View:
    """Four rows of three or two responses.

    Sums and scores of its responses, of which the first named has 1 token, and so on:

    - row 0: (-1, score 2), (-4, 1), (-3, 3): best is the third, worst the second
    - row 1: (-2, 1), (-8, 5)
    - row 2: as row 0, in another order
    - row 3: the texts of row 0, with the best and the worst exchanged
    """
    rows = [
        (1, [(1, -1.0, 2.0), (2, -4.0, 1.0), (3, -3.0, 3.0)]),
        (2, [(1, -2.0, 1.0), (4, -8.0, 5.0)]),
        (1, [(3, -3.0, 3.0), (1, -1.0, 2.0), (2, -4.0, 1.0)]),
        (1, [(1, -1.0, 2.0), (2, -4.0, 3.0), (3, -3.0, 1.0)]),
    ]
    store = Store.open(root, create=True)
    digest = store.put_spec(ReferenceSpec.from_fields({"model": "reference"}))
    pairs, entries = [], []
    for number, (prompt, responses) in enumerate(rows):
        scores = [score for _, _, score in responses]
        for first in range(0, len(responses), 2):
            both = [responses[first], responses[(first + 1) % len(responses)]]
            sides = [as_ids([7] * tokens) for tokens, _, _ in both]
            logps = [np.full(tokens, total / tokens, np.float32) for tokens, total, _ in both]
            pairs.append(ScoredPair(PairIds(as_ids([prompt]), *sides), *logps))
            extra = {} if first else {"scores": scores, "topic": "ab"[number % 2]}
            entries.append(ViewEntry("rows.jsonl", number + 1, pair_key(pairs[-1].ids), extra))
    distinct = {pair_key(pair.ids): pair for pair in pairs}
    store.commit_shard(digest, list(distinct.values()), {})
    store.seal(digest)
    store.write_view(digest, "ranked", entries, {"rows": "ranked"})
    return View.open(root, "ranked", rows=("ranked",))


@pytest.mark.parametrize(
    ("by", "scores"),
    [
        ("margin", [1.0, -6.0, 1.0, -1.0]),
        ("margin_per_token", [1.0, 0.0, 1.0, -1.0]),
        ("length_difference", [1.0, 3.0, 1.0, -1.0]),
        ("spread", [2.0, 4.0, 2.0, 2.0]),
        # Row 0: 3 over 2 (-3, -1) is wrong, 3 over 1 (-3, -4) and 2 over 1 (-1, -4) are right.
        ("agreement", [2 / 3, 0.0, 2 / 3, 1 / 3]),
    ],
)
def test_scores_of_ranked_rows_by_hand(tmp_path: Path, by: str, scores: list[float]) -> None:
    assert choose(ranked_view(tmp_path), Rules(by=by)).scores.tolist() == pytest.approx(scores)


def test_a_ranked_row_is_taken_with_all_its_responses(tmp_path: Path) -> None:
    view = ranked_view(tmp_path)
    assert view.row_starts() == [0, 2, 3, 5]
    for rules, rows, left_out in (
        (Rules(rule="large", count=1, by="spread"), [1], {"not among the largest scores": 3}),
        (Rules(drop_duplicates=True), [0, 1, 3], {"equal to an earlier row": 1}),  # in any order
        (Rules(drop_contradictions=True), [1], {"ordered otherwise in another row": 3}),
        (Rules(max_tokens=6), [1], {"longer than 6 tokens": 3}),  # 1 + 1 + 2 + 3, and 1 + 1 + 4
        (Rules(rule="large", count=2, group_by="topic", balanced=True), [0, 3], {"not among the largest scores": 2}),
    ):
        chosen = choose(view, rules)
        assert (chosen.rows.tolist(), chosen.left_out) == (rows, left_out)
    write_rows(tmp_path, view, np.array([1, 3]), "some", {})
    some = View.open(tmp_path, "some", rows=("ranked",))
    assert (len(some), list(some.row_starts())) == (3, [0, 1])
    assert [some.scores(place) for place in some.row_starts()] == [(1.0, 5.0), (2.0, 3.0, 1.0)]
    assert len(some.row(1).pairs) == 2  # type: ignore[union-attr]
    assert verify(tmp_path, depth="all").ok


def test_unpaired_rows_by_hand(tmp_path: Path) -> None:
    """Rows 0 and 2 give the same response another label, 1 and 3 are equal; mismatched responses do not count."""
    rows = [(1, 1, True), (2, 2, True), (1, 1, False), (2, 2, True)]
    store = Store.open(tmp_path, create=True)
    digest = store.put_spec(ReferenceSpec.from_fields({"model": "reference"}))
    pairs = [
        ScoredPair(
            PairIds(as_ids([prompt]), as_ids([7] * tokens), as_ids([8] * (i + 1))),
            np.full(tokens, -prompt, np.float32), np.full(i + 1, -9, np.float32),
        )
        for i, (prompt, tokens, _) in enumerate(rows)
    ]  # fmt: skip
    store.commit_shard(digest, pairs, {})
    store.seal(digest)
    entries = [
        ViewEntry("rows.jsonl", i + 1, pair_key(pairs[i].ids), {"label": label}) for i, (*_, label) in enumerate(rows)
    ]
    store.write_view(digest, "labels", entries, {"rows": "unpaired"})
    view = View.open(tmp_path, "labels", rows=("unpaired",))
    for by, scores in (("logp", [-1, -4, -1, -4]), ("logp_per_token", [-1, -2, -1, -2]), ("length", [1, 2, 1, 2])):
        assert choose(view, Rules(by=by)).scores.tolist() == pytest.approx(scores)
    assert choose(view, Rules(by="logp", drop_duplicates=True)).rows.tolist() == [0, 1, 2]
    chosen = choose(view, Rules(by="logp", drop_contradictions=True))
    assert (chosen.rows.tolist(), chosen.left_out) == ([1, 3], {"labelled otherwise in another row": 2})
    assert choose(view, Rules(by="logp", max_tokens=2)).rows.tolist() == [0, 2]
    with pytest.raises(CacheError) as caught:
        choose(view, Rules(by="margin"))
    assert caught.value.code == "select-score"
