"""Rows out of a cache and into one, merged caches, and the numbers about them: every value worked out here again."""

from __future__ import annotations

import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from dpoeng.bench.cache import synthetic_rows
from dpoeng.cache.analytics import QUANTILES, reference_stats
from dpoeng.cache.errors import UserError
from dpoeng.cache.exchange.export import export_view
from dpoeng.cache.exchange.importing import file_holds_sums, import_rows
from dpoeng.cache.exchange.merging import merge
from dpoeng.cache.reader import View
from dpoeng.cache.schema import PairIds, ScoredPair, as_ids, pair_key
from dpoeng.cache.spec import ReferenceSpec
from dpoeng.cache.store import Store
from dpoeng.cache.table import ViewEntry
from dpoeng.cache.verify import verify
from dpoeng.cli.pages.reference import html_report

SPEC = ReferenceSpec.from_fields({"model": "exchange"})


def pair(prompt: list[int], chosen: list[float], rejected: list[float], first: int = 100, start: int = 0) -> ScoredPair:
    """A pair with these log-probs; its response ids count up from `first` and `first + 50`."""
    ids = PairIds(
        as_ids(prompt),
        as_ids(range(first, first + len(chosen) + start)),
        as_ids(range(first + 50, first + 50 + len(rejected))),
        start,
    )
    return ScoredPair(ids, np.array(chosen, np.float32), np.array(rejected, np.float32))


def made(root: Path, rows: list[ScoredPair], view: str = "pairs") -> Store:
    store = Store.open(root, create=True)
    spec = store.put_spec(SPEC)
    index = store.lookup(spec)
    if new := [row for row in {pair_key(row.ids): row for row in rows}.values() if row.ids not in index]:
        store.commit_shard(spec, new, {})
    store.seal(spec)
    store.write_view(
        spec, view, [ViewEntry(f"{view}.jsonl", i + 1, pair_key(row.ids)) for i, row in enumerate(rows)], {}
    )
    return store


def read(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
        return rows
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_export_has_every_column_of_every_source_row_in_order(tmp_path: Path, suffix: str) -> None:
    one = pair([1, 2], [-0.1, -0.25], [-3.0], start=1)
    two = pair([3], [-1.5], [-0.5, -0.7], first=7)
    made(tmp_path / "cache", [two, one, two])
    path = tmp_path / f"out{suffix}"
    assert export_view(View.open(tmp_path / "cache"), path) == 3
    rows = read(path)
    assert [row["source_row"] for row in rows] == [1, 2, 3]
    assert {**rows[0], "source_row": 3} == rows[2]
    tenth, seven_tenths = float(np.float32(-0.1)), float(np.float32(-0.7))
    assert rows[1] == {
        "prompt_ids": [1, 2],
        "chosen_ids": [100, 101, 102],
        "rejected_ids": [150],
        "ref_chosen_logps": tenth - 0.25,
        "ref_rejected_logps": -3.0,
        "ref_chosen_token_logps": [tenth, -0.25],
        "ref_rejected_token_logps": [-3.0],
        "source_file": "pairs.jsonl",
        "source_row": 2,
    }
    assert rows[0]["ref_rejected_logps"] == -0.5 + seven_tenths
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", path.name]  # nothing temporary is left


def test_export_to_an_unknown_ending_is_refused(tmp_path: Path) -> None:
    made(tmp_path / "cache", synthetic_rows(1))
    with pytest.raises(UserError) as caught:
        export_view(View.open(tmp_path / "cache"), tmp_path / "out.csv")
    assert (caught.value.code, caught.value.found) == ("export-format", ".csv")


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_what_was_exported_comes_back_bit_for_bit(tmp_path: Path, suffix: str) -> None:
    rows = [*synthetic_rows(50), pair([1], [-0.1, -2.0], [-3.0], start=2)]
    rows.append(rows[3])
    made(tmp_path / "a", rows)
    path = tmp_path / f"out{suffix}"
    export_view(View.open(tmp_path / "a"), path)
    store = Store.open(tmp_path / "b", create=True)
    done = import_rows(store, SPEC, path, "back")
    assert (done.rows, done.added, done.view) == (52, 51, "back")
    view = View.open(tmp_path / "b")
    for i, row in enumerate(rows):
        assert view[i].ids.same_as(row.ids)
        assert view[i].chosen_logps.tobytes() == row.chosen_logps.tobytes()
        assert view[i].rejected_logps.tobytes() == row.rejected_logps.tobytes()
        assert view.source(i) == ("pairs.jsonl", i + 1)
    assert verify(tmp_path / "b", depth="all").ok
    [commit] = store.commits(SPEC.digest, [])
    assert commit.provenance["imported"]["name"] == path.name
    assert import_rows(store, SPEC, path).added == 0


GOOD = {
    "prompt_ids": [1],
    "chosen_ids": [2],
    "rejected_ids": [3],
    "ref_chosen_token_logps": [-1.0],
    "ref_rejected_token_logps": [-2.0],
}
SUMS = {name: GOOD[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")}


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({**SUMS, "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0}, "import-columns"),  # sums among tokens
        (SUMS, "import-columns"),
        ({"prompt": "x", "chosen": "y"}, "import-columns"),
        ({**GOOD, "ref_chosen_token_logps": [0.5]}, "import-row"),
        ({**GOOD, "ref_chosen_token_logps": [float("nan")]}, "import-row"),
        ({**GOOD, "ref_chosen_token_logps": []}, "import-row"),
        ({**GOOD, "ref_chosen_token_logps": [-1.0, -1.0]}, "import-row"),
        ({**GOOD, "chosen_ids": [-2]}, "import-row"),
        ({**GOOD, "chosen_ids": [2**40]}, "import-row"),
        ({**GOOD, "chosen_ids": "text"}, "import-row"),
        ([1], "import-row"),
    ],
)
def test_an_import_that_cannot_be_right_is_refused_with_its_row(tmp_path: Path, row: Any, code: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{json.dumps(row)}\n")
    store = Store.open(tmp_path / "cache", create=True)
    with pytest.raises(UserError) as caught:
        import_rows(store, SPEC, path)
    assert caught.value.code == code
    assert str(caught.value.where).startswith(f"{path}:2")
    assert store.spec_digests() == []


@pytest.mark.parametrize(
    "names", [("ref_chosen_logps", "ref_rejected_logps"), ("reference_chosen_logps", "reference_rejected_logps")]
)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".arrow"])
def test_sums_are_taken_as_a_reference_of_their_own(tmp_path: Path, names: tuple[str, str], suffix: str) -> None:
    rows = [
        {**SUMS, "chosen_ids": [2, 4, 5], names[0]: -12.25, names[1]: -2.0},
        {**SUMS, "prompt_ids": [6], names[0]: -1.0, names[1]: 0.0},
    ]
    path = tmp_path / f"in{suffix}"
    table = pa.Table.from_pylist(rows)
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif suffix == ".parquet":
        parquet.write_table(table, path)
    else:
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    assert file_holds_sums(path)
    store = Store.open(tmp_path / "cache", create=True)
    import_rows(store, SPEC.of_sums(), path, "sums")
    view = View.open(tmp_path / "cache")
    assert view.spec.holds_sums
    assert view.spec.digest != SPEC.digest
    assert (view[0].chosen_sum, view[0].rejected_sum, view[1].rejected_sum) == (-12.25, -2.0, 0.0)
    assert verify(tmp_path / "cache", depth="all").ok
    export_view(view, tmp_path / "out.jsonl")
    first = read(tmp_path / "out.jsonl")[0]
    assert (first["ref_chosen_logps"], first["ref_chosen_token_logps"]) == (-12.25, None)
    assert file_holds_sums(tmp_path / "out.jsonl")


def test_a_file_without_numbers_or_rows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    for text in (json.dumps({**SUMS, "ref_chosen_logps": -1.0}), ""):
        path.write_text(text)
        with pytest.raises(UserError) as caught:
            file_holds_sums(path)
        assert caught.value.code == "import-columns"


def test_an_import_of_broken_lines_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{{broken\n")
    store = Store.open(tmp_path / "cache", create=True)
    with pytest.raises(UserError) as caught:
        import_rows(store, SPEC, path)
    assert (caught.value.code, caught.value.where) == ("import-row", f"{path}:2")


def test_merging_brings_rows_views_and_references_together(tmp_path: Path) -> None:
    rows = synthetic_rows(20)
    made(tmp_path / "a", rows[:12], "a")
    other = made(tmp_path / "b", rows[8:], "b")
    second = other.put_spec(ReferenceSpec.from_fields({"model": "second"}))
    other.commit_shard(second, rows[:2], {})
    target = Store.open(tmp_path / "both", create=True)
    assert merge(target, Store.open(tmp_path / "a")) == (1, ["a"])
    assert merge(target, other) == (2, ["b"])
    assert merge(target, other) == (0, ["b"])
    assert verify(tmp_path / "both", depth="all").ok
    assert target.views() == ["a", "b"]
    index = target.lookup(SPEC.digest)
    assert all(row.ids in index for row in rows)
    assert len(target.lookup(second)) == 2
    assert View.open(tmp_path / "both", "b")[11].chosen_sum == rows[19].chosen_sum


def test_merging_another_view_of_the_same_name_is_refused_before_anything_is_copied(tmp_path: Path) -> None:
    rows = synthetic_rows(4)
    target = made(tmp_path / "a", rows[:2])
    with pytest.raises(UserError) as caught:
        merge(target, made(tmp_path / "b", rows[2:]))
    assert caught.value.code == "cache-view-exists"
    assert len(target.lookup(SPEC.digest)) == 2


def test_merging_a_damaged_cache_copies_nothing_damaged(tmp_path: Path) -> None:
    made(tmp_path / "a", synthetic_rows(4))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    victim = next((tmp_path / "b" / "objects").rglob("*.arrow"))
    victim.write_bytes(victim.read_bytes()[:-9] + b"x" * 9)
    target = Store.open(tmp_path / "c", create=True)
    merge(target, Store.open(tmp_path / "b"))
    assert len(target.lookup(SPEC.digest)) == 0


# -- analytics --------------------------------------------------------------------------------------------------------


@pytest.fixture
def view(tmp_path: Path) -> View:
    """Six rows worked out by hand: five distinct pairs, one of them the contradiction of another."""
    right = pair([1, 2], [-1.0, -1.0], [-4.0, -4.0, -4.0])  # margin 10, per token 3
    wrong = pair([3], [-6.0], [-0.5, -0.5], first=10)  # -5, -5.5
    longer = pair([4], [-1.0] * 4, [-2.0], first=20)  # -2, +1: length decides
    swapped = ScoredPair(
        PairIds(right.ids.prompt_ids, right.ids.rejected_ids, right.ids.chosen_ids),
        right.rejected_logps,
        right.chosen_logps,
    )  # -10, -3
    even = pair([5], [-2.0], [-2.0], first=30)  # 0, 0
    made(tmp_path / "stats", [right, wrong, longer, right, swapped, even])
    return View.open(tmp_path / "stats")


def test_statistics_worked_by_hand(view: View) -> None:
    found = reference_stats(view, notes=2)
    assert (found.rows, found.pairs) == (6, 5)
    assert found.contradictions == ((0, 4),)
    margins = [10.0, -5.0, -2.0, -10.0, 0.0]
    assert found.margin.mean == pytest.approx(np.mean(margins))
    assert found.margin.std == pytest.approx(np.std(margins))
    assert found.margin.quantiles == pytest.approx(np.quantile(margins, QUANTILES))
    assert found.margin_per_token.quantiles[0] == -5.5
    assert found.margin_per_token.quantiles[-1] == 3.0
    assert found.accuracy == pytest.approx(1 / 5)
    assert found.accuracy_per_token == pytest.approx(2 / 5)
    assert found.length_difference.quantiles[0] == -1
    assert found.length_difference.quantiles[-1] == 3
    assert found.prompt_tokens.mean == pytest.approx((2 + 1 + 1 + 2 + 1) / 5)
    assert found.length_correlation == pytest.approx(np.corrcoef(margins, [-1, -1, 3, 1, 0])[0, 1])
    assert [(note.row, note.source_row, note.margin_per_token) for note in found.strongly_wrong] == [
        (4, 5, -3.0),
        (1, 2, -5.5),
    ]
    # By sums, as DPO has them: row 2 is right by its mean and wrong by its sum.
    assert [(note.row, note.margin) for note in found.strongly_right] == [(0, 10.0)]
    for item in (found.margin, found.prompt_tokens, found.length_difference):
        assert sum(item.counts) == 5
        assert len(item.edges) == len(item.counts) + 1


def test_statistics_of_pairs_that_are_all_alike_are_finite(tmp_path: Path) -> None:
    made(tmp_path, [pair([i], [-1.0], [-1.0]) for i in range(3)])
    found = reference_stats(View.open(tmp_path))
    assert found.length_correlation == 0.0
    assert found.strongly_right == found.strongly_wrong == ()
    assert math.isfinite(found.margin.mean)
    assert sum(found.margin.counts) == 3


class Links(HTMLParser):
    """Everything by which a page could ask for something else, and its tags."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.asks: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.asks += [
            name for name, _ in attrs if name in ("src", "href", "data", "xlink:href") or name.startswith("on")
        ]


def test_the_page_stands_alone_and_escapes_what_users_wrote(view: View) -> None:
    nasty = "<script>alert(1)</script>&\"'"
    page = html_report(reference_stats(view), nasty, [("view", nasty)])
    links = Links()
    links.feed(page)
    assert links.asks == []
    assert "script" not in links.tags
    assert "url(" not in page
    assert "@import" not in page
    assert page.count("&lt;script&gt;") == 3
    drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(drawings) == 6
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        bars = root.findall("rect")
        counted = sum(int(str(bar.findtext("title")).rsplit(": ", 1)[1].split()[0].replace(",", "")) for bar in bars)
        assert counted == 5  # every distinct pair is in one bar
        assert all(0 <= float(bar.attrib["y"]) <= 170 and float(bar.attrib["height"]) > 0 for bar in bars)
    assert "pairs.jsonl" in page
    assert "-5.500" in page
