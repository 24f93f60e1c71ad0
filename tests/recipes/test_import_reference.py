"""Numbers that another program computed: taken over, checked against the model, trained against."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from dpoeng_testing import pair_rows, save_tiny_model, write_jsonl

from dpoeng.cache.errors import UserError
from dpoeng.cache.exchange.export import export_view
from dpoeng.cache.reader import View
from dpoeng.engine.config.fields import PrecomputeConfig, TrainConfig
from dpoeng.engine.recipes.import_reference import import_reference
from dpoeng.engine.recipes.phase_two.summary import TrainSummary
from dpoeng.engine.recipes.precompute import precompute_reference
from dpoeng.engine.recipes.train import train
from dpoeng.engine.reference.parity import recompute
from dpoeng.engine.runtime.progress import QUIET


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("computed")
    pairs = write_jsonl(folder / "pairs.jsonl", pair_rows(12))
    precompute_reference(PrecomputeConfig(pairs=(pairs,), model=str(tiny_model), cache=folder / "cache"))
    return folder / "cache"


def rows_of(cache: Path, path: Path, *, without: tuple[str, ...] = (), shift: float = 0.0) -> Path:
    export_view(View.open(cache), path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["ref_chosen_logps"] += shift
    return write_jsonl(path, [{name: value for name, value in row.items() if name not in without} for row in rows])


TOKENS = ("ref_chosen_token_logps", "ref_rejected_token_logps", "source_file", "source_row")


def quick(cache: Path, out: Path, **fields: Any) -> TrainSummary:
    return train(TrainConfig(cache=cache, output_dir=out, max_steps=3, learning_rate=1e-3, **fields))


@pytest.mark.parametrize("without", [(), TOKENS])
def test_what_was_imported_trains_as_what_was_computed(
    tmp_path: Path, tiny_model: Path, computed: Path, without: tuple[str, ...]
) -> None:
    path = rows_of(computed, tmp_path / "rows.jsonl", without=without)
    done, sums = import_reference(PrecomputeConfig(model=str(tiny_model), cache=tmp_path / "cache"), path)
    assert (done.rows, done.added, done.view, sums) == (12, 12, "rows", bool(without))
    view = View.open(tmp_path / "cache")
    assert view.meta["imported"]["name"] == "rows.jsonl"
    assert (view.spec.digest == View.open(computed).spec.digest) != sums
    assert recompute(view, 12).ok
    here, there = quick(tmp_path / "cache", tmp_path / "here"), quick(computed, tmp_path / "there")
    assert here.last["loss"] == pytest.approx(there.last["loss"], rel=1e-6)
    assert here.last["rewards/margins"] == pytest.approx(there.last["rewards/margins"], abs=1e-6)


def test_numbers_of_another_model_are_refused_before_the_first_step(
    tmp_path: Path, tiny_model: Path, tokenizer: Any, computed: Path
) -> None:
    other = save_tiny_model(tmp_path / "other", tokenizer, seed=7)
    path = rows_of(computed, tmp_path / "rows.jsonl", without=TOKENS)
    import_reference(PrecomputeConfig(model=str(other), cache=tmp_path / "cache"), path)
    with pytest.raises(UserError) as caught:
        quick(tmp_path / "cache", tmp_path / "out")
    assert caught.value.code == "parity-failed"


def test_sums_that_are_off_are_noticed(tmp_path: Path, tiny_model: Path, computed: Path) -> None:
    """A sum that lacks 5 nats of 20 tokens is 0.25 nats per token."""
    path = rows_of(computed, tmp_path / "rows.jsonl", without=TOKENS, shift=-5.0)
    import_reference(PrecomputeConfig(model=str(tiny_model), cache=tmp_path / "cache"), path)
    assert not recompute(View.open(tmp_path / "cache"), 4).ok


def test_a_loss_that_weighs_tokens_is_refused_on_sums(tmp_path: Path, tiny_model: Path, computed: Path) -> None:
    path = rows_of(computed, tmp_path / "rows.jsonl", without=TOKENS)
    import_reference(PrecomputeConfig(model=str(tiny_model), cache=tmp_path / "cache"), path)
    with pytest.raises(UserError) as caught:
        quick(tmp_path / "cache", tmp_path / "out", ld_alpha=0.5)
    assert caught.value.code == "cache-sums-only"


def test_an_import_without_a_model_says_what_is_needed(tmp_path: Path, computed: Path) -> None:
    path = rows_of(computed, tmp_path / "rows.jsonl")
    with pytest.raises(UserError) as caught:
        import_reference(PrecomputeConfig(cache=tmp_path / "cache"), path)
    assert (caught.value.code, caught.value.where) == ("config-missing", "--model")


def test_a_view_with_changed_rows_is_reported(tmp_path: Path, tiny_model: Path, computed: Path) -> None:
    notes: list[str] = []
    progress: Any = SimpleNamespace(note=notes.append, task=QUIET.task)
    config = PrecomputeConfig(model=str(tiny_model), cache=tmp_path / "cache", name="rows")
    path = rows_of(computed, tmp_path / "rows.jsonl")
    for _ in range(2):
        import_reference(config, path, progress)
    assert not [note for note in notes if "contained" in note]
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join(path.read_text().splitlines(keepends=True)[:5]))
    import_reference(config, fewer, progress)
    assert "view 'rows' contained 12 rows of another import or file" in notes[-1]
