"""The cache's numbers for other trainers: the files they read, and a trainer that takes them by tokens.

TRL itself is in test_peers_reference.py; here a stand-in has what `with_cached_reference` asks of it.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from click.testing import CliRunner
from dpoeng_testing import pair_rows, write_jsonl
from pyarrow import parquet
from trainer_stand_in import stand_in

from dpoeng.cache.errors import UserError
from dpoeng.cache.reader import View
from dpoeng.cache.schema import PairIds, ScoredPair
from dpoeng.cli.cache.files import export
from dpoeng.engine.config.fields import PrecomputeConfig
from dpoeng.engine.recipes.elsewhere.lookup import Side, pair_of, sums_of
from dpoeng.engine.recipes.elsewhere.reference_files import export_for
from dpoeng.engine.recipes.precompute import precompute_reference
from dpoeng.trl import with_cached_reference


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("others")
    pairs = write_jsonl(folder / "pairs.jsonl", pair_rows(8))
    precompute_reference(PrecomputeConfig(pairs=(pairs,), model=str(tiny_model), cache=folder / "cache"))
    return folder / "cache"


def side(ids: list[int], scored: str) -> Side:
    return Side(np.array(ids, np.int32), np.array([mark == "x" for mark in scored]))


def test_a_pair_of_masks() -> None:
    """A plain pair; a boundary that was merged; a turn of another's, and what follows the last scored token."""
    plain = pair_of(side([1, 2, 3, 4], "..xx"), side([1, 2, 5], "..x"))
    assert plain is not None
    assert plain.same_as(PairIds(*(np.array(part, np.int32) for part in ([1, 2], [3, 4], [5]))))
    merged = pair_of(side([1, 2, 3, 4], "..xx"), side([1, 9, 5], "..x"))
    assert merged is not None
    assert (merged.prompt_ids.tolist(), merged.chosen_start, merged.rejected_start) == ([1], 1, 1)
    turns = pair_of(side([1, 2, 3, 4, 5, 6], ".x..x."), side([1, 7], ".x"))
    assert turns is not None
    assert (turns.chosen_ids.tolist(), turns.chosen_gaps, turns.rejected_gaps) == ([2, 3, 4, 5], ((1, 3),), ())
    assert pair_of(side([1, 2], ".."), side([1, 7], ".x")) is None


def test_sums_worked_by_hand() -> None:
    ids = PairIds(*(np.array(part, np.int32) for part in ([1], [2, 3, 4], [5])))
    pair = ScoredPair(ids, np.array([-1, -2, -4], np.float32), np.array([-8], np.float32))
    assert sums_of(pair) == (-7, -8)
    assert sums_of(pair, 0.25) == (-1 - 0.25 * 6, -8)  # one token is shared


# --------------------------------------------------------------------------- files


@pytest.mark.parametrize("ending", [".parquet", ".jsonl"])
def test_the_file_for_trl(cache: Path, tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"trl{ending}"
    view = View.open(cache)
    for _ in range(2):  # the second replaces the first
        said = CliRunner().invoke(export, [str(cache), str(file), "--for", "trl"], catch_exceptions=False).output
    longest = max(len(p.ids.prompt_ids) + max(len(p.ids.chosen_ids), len(p.ids.rejected_ids)) for p in view)  # type: ignore[attr-defined]
    assert f"8 rows written to {file}" in said
    assert f"{longest} or more" in said
    assert "trainer.precompute_ref_logps = True" in said
    if ending == ".parquet":
        rows = parquet.read_table(file).to_pylist()
    else:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert list(rows[0]) == ["prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps"]
    for i, row in enumerate(rows):
        assert row["chosen_ids"] == view[i].ids.chosen_ids.tolist()
        assert (row["ref_chosen_logps"], row["ref_rejected_logps"]) == (view[i].chosen_sum, view[i].rejected_sum)


def test_what_trl_cannot_express_is_refused(tmp_path: Path) -> None:
    """A turn of another's between scored tokens: TRL scores all of a response."""

    class OneRow(list[Any]):
        def source(self, i: int) -> tuple[str, int]:
            return "pairs.jsonl", 7

    ids = pair_of(side([1, 2, 3, 4, 5, 6], ".x..x."), side([1, 7], ".x"))
    rows: Any = OneRow([SimpleNamespace(ids=ids)])
    with pytest.raises(UserError, match=r"pairs\.jsonl:7"):
        export_for("trl", rows, tmp_path / "t.parquet")
    assert not (tmp_path / "t.parquet").exists()


@pytest.mark.parametrize(("trainer", "way_out"), [("axolotl", "post_trainer_create"), ("ms-swift", "dpoeng train")])
def test_a_trainer_that_reads_no_file_is_refused(cache: Path, tmp_path: Path, trainer: Any, way_out: str) -> None:
    with pytest.raises(UserError, match=way_out) as caught:
        export_for(trainer, View.open(cache), tmp_path / "x.parquet")
    assert caught.value.code == "export-trainer"
    assert not list(tmp_path.iterdir())


def open_instruct_rows(view: View, folder: Path, order: list[int], **changed: Any) -> Path:
    """As open-instruct saves its tokenised pairs; rows in another order than the view's, with their index."""
    rows = []
    for index, i in enumerate(order):
        ids = view[i].ids
        row: dict[str, Any] = {"index": index}
        for name, part in (("chosen", ids.chosen_ids), ("rejected", ids.rejected_ids)):
            row[f"{name}_input_ids"] = [*ids.prompt_ids.tolist(), *part.tolist()]
            row[f"{name}_labels"] = [-100] * len(ids.prompt_ids) + part.tolist()
        rows.append({**row, **changed})
    folder.mkdir()
    table = pa.Table.from_pylist(rows)
    with (
        pa.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as file,
        pa.ipc.new_stream(file, table.schema) as out,
    ):
        out.write_table(table)
    (folder / "state.json").write_text('{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}')
    return folder


def test_the_file_for_open_instruct(cache: Path, tmp_path: Path) -> None:
    """By the index of its own rows, whatever the view's order; a row that the cache lacks is refused."""
    view = View.open(cache)
    order = [5, 0, 7, 2]
    rows = open_instruct_rows(view, tmp_path / "rows", order)
    words = [str(cache), str(tmp_path / "9b1c.pt"), "--for", "open-instruct", "--rows", str(rows)]
    assert "4 rows" in CliRunner().invoke(export, words, catch_exceptions=False).output
    found = torch.load(tmp_path / "9b1c.pt", weights_only=True)
    assert found.keys() == {"chosen_logps", "rejected_logps"}
    assert found["chosen_logps"].tolist() == [np.float32(view[i].chosen_sum) for i in order]
    assert found["rejected_logps"].tolist() == [np.float32(view[i].rejected_sum) for i in order]

    other = open_instruct_rows(
        view, tmp_path / "other", order, rejected_input_ids=[3, 4, 5], rejected_labels=[-100, 4, 5]
    )
    with pytest.raises(UserError, match="4 of 4 rows are not in the cache") as caught:
        export_for("open-instruct", view, tmp_path / "x.pt", other)
    assert caught.value.code == "reference-tokens"
    twice = open_instruct_rows(view, tmp_path / "twice", order, index=1)
    with pytest.raises(UserError, match="a repeated or missing index"):
        export_for("open-instruct", view, tmp_path / "x.pt", twice)
    for rows_of, file, message in (
        (None, "x.pt", "cache_dataset_only"),
        (rows, "x.parquet", "cache_dataset_only"),
        (tmp_path / "none", "x.pt", "no such folder"),
    ):
        with pytest.raises(UserError, match=message):
            export_for("open-instruct", view, tmp_path / file, rows_of)


# --------------------------------------------------------------------------- a trainer


def test_a_trainer_gets_its_columns(cache: Path) -> None:
    view = View.open(cache)
    trainer = stand_in(view)
    assert with_cached_reference(trainer, cache) is trainer
    assert trainer.train_dataset.columns["ref_chosen_logps"] == [view[i].chosen_sum for i in range(8)]
    assert trainer.eval_dataset["some"].columns["ref_rejected_logps"] == [view[i].rejected_sum for i in range(3)]
    assert trainer.precompute_ref_logps
    assert trainer.ref_model is None
    with pytest.raises(UserError, match="already"):
        with_cached_reference(trainer, cache)


def test_a_trainer_that_truncates_or_has_other_rows_is_refused(cache: Path) -> None:
    view = View.open(cache)
    trainer = stand_in(view, length=30)
    with pytest.raises(UserError, match=r"(?s)8 of 8 rows .* row 1") as caught:
        with_cached_reference(trainer, cache)
    assert caught.value.code == "reference-tokens"
    assert "has this prompt and another" in str(caught.value)
    assert trainer.ref_model is not None  # nothing was changed
    assert "ref_chosen_logps" not in trainer.train_dataset.column_names
    trainer = stand_in(view)
    trainer.train_dataset.columns["prompt_ids"][4] = [1, 2, 3]
    with pytest.raises(UserError, match="1 of 8 rows") as caught:
        with_cached_reference(trainer, cache)
    assert "row 5" in str(caught.value)
    assert "no pair of the view has this prompt" in str(caught.value)


def test_another_reference_is_refused(cache: Path) -> None:
    view = View.open(cache)
    with pytest.raises(UserError, match="differs from the cache") as caught:
        with_cached_reference(stand_in(view, wrong=2.0), cache)
    assert caught.value.code == "reference-mismatch"
    assert with_cached_reference(stand_in(view, wrong=2.0), cache, check_pairs=0).precompute_ref_logps


def test_an_unsuitable_trainer_is_refused(cache: Path) -> None:
    view = View.open(cache)
    streamed, moving, own = stand_in(view), stand_in(view, sync_ref_model=True), stand_in(view)
    streamed.train_dataset = iter([])
    own.train_dataset = own.train_dataset.add_column("ref_chosen_logps", [0.0] * 8)
    for trainer, message in (
        (object(), "not a DPOTrainer"),
        (streamed, "token ids"),
        (moving, "changes the reference"),
        (own, "already has reference columns"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            with_cached_reference(trainer, cache)
        assert caught.value.code == "reference-trainer"
