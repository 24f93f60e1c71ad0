"""Data sets of the hub: pinned to a commit, one split, the same pairs as the files alone; results pushed to it."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub  # noqa: F401  # reads HF_ENDPOINT once, so before a test sets it
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dpoeng_testing import pair_rows, write_jsonl
from fake_hub import COMMIT, CONVERTED_COMMIT, TOKEN, FakeHub, serving

from dpoeng.cache.errors import UserError
from dpoeng.cli.main import main
from dpoeng.engine.config.fields import PrecomputeConfig, TrainConfig
from dpoeng.engine.data import hub as hub_module
from dpoeng.engine.data.hub import HubSource, hub_view_name, local_file, parse, shown_name
from dpoeng.engine.data.pairs import ensure_unchanged, read_pairs
from dpoeng.engine.recipes.precompute import precompute_reference
from dpoeng.engine.recipes.push import push
from dpoeng.engine.recipes.train import train

ROWS = pair_rows(8)


def as_jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    hub_module.hub_files.cache_clear()
    with serving() as served:
        monkeypatch.setenv("HF_ENDPOINT", served.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # a service of its own
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield served
    hub_module.hub_files.cache_clear()


def texts(source: str) -> list[tuple[Any, Any, Any]]:
    return [(pair.prompt, pair.chosen, pair.rejected) for pair in read_pairs([Path(source)]).pairs]


# --------------------------------------------------------------------------- names


def test_addresses_of_data_sets() -> None:
    assert parse(Path("hf://org/name")) == HubSource("org/name")
    whole = parse("hf://datasets/org/n-a.me@v1/data/x.jsonl?config=c&split=train_prefs")
    assert whole == HubSource("org/n-a.me", "v1", "data/x.jsonl", "c", "train_prefs")
    assert whole.url(split="test") == "hf://org/n-a.me@v1/data/x.jsonl?config=c&split=test"
    assert hub_view_name("hf://org/pairs?split=train") == "pairs-train"
    for wrong in ("hf://name", "hf://org/name?part=2", "hf://org/name?split=a&split=b", "hf:///org/name",
                  "hf://../..", "hf://org/..", "hf://org/name@..", "hf://org/name/../../x.jsonl"):  # fmt: skip
        with pytest.raises(UserError, match="hub-name"):
            parse(wrong)


@pytest.mark.parametrize("name", ["org/name@c/../../../../../x.jsonl", "org/..@c/x", "org/name@../x"])
def test_a_recorded_name_leads_to_no_other_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's library joins the parts of a name to a path, and looks whether that is a file."""
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: str(tmp_path / "x.jsonl"))
    assert local_file(f"hf://datasets/{name}") is None
    assert local_file("hf://datasets/org/name@c/x.jsonl") == tmp_path / "x.jsonl"


# --------------------------------------------------------------------------- which files


def test_files_are_those_of_a_local_copy_and_pinned(hub: FakeHub, tmp_path: Path) -> None:
    hub.datasets["org/pairs"] = {"main": {"README.md": b"# nothing", "pairs.jsonl": as_jsonl(ROWS)}}
    local = write_jsonl(tmp_path / "pairs.jsonl", ROWS)
    found = read_pairs([Path("hf://org/pairs")])
    assert texts("hf://org/pairs") == texts(str(local))
    name = f"hf://datasets/org/pairs@{COMMIT}/pairs.jsonl"
    assert list(found.files) == [name]
    assert found.files[name] == read_pairs([local]).files[str(local)]
    assert {pair.source_file for pair in found.pairs} == {name}
    ensure_unchanged(found.files)
    asked = len(hub.requests)
    assert texts("hf://org/pairs") == texts(str(local))  # of the commit that was taken first
    assert len(hub.requests) == asked
    hub_module.hub_files.cache_clear()
    assert texts(name) == texts(str(local))  # what a record says can be named again


def test_a_card_says_configs_and_splits(hub: FakeHub) -> None:
    card = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*
  - split: test
    path: data/test-*
- config_name: other
  data_files: other/*.jsonl
---
"""
    hub.datasets["org/pairs"] = {
        "main": {
            "README.md": card.encode(),
            "data/train-00000-of-00002.parquet": as_parquet(ROWS[:3]),
            "data/train-00001-of-00002.parquet": as_parquet(ROWS[3:5]),
            "data/test-00000-of-00001.parquet": as_parquet(ROWS[5:6]),
            "other/x.jsonl": as_jsonl(ROWS[6:]),
        }
    }
    assert len(texts("hf://org/pairs?split=train")) == 5
    assert len(texts("hf://org/pairs?split=test")) == 1
    assert len(texts("hf://org/pairs?config=other")) == 2
    assert len(texts("hf://org/pairs/data/test-00000-of-00001.parquet")) == 1
    with pytest.raises(UserError, match=r"data-splits.*\n.*\n.*\n.*test, train\n.*hf://org/pairs\?split=test"):
        texts("hf://org/pairs")
    with pytest.raises(UserError, match="no config none"):
        texts("hf://org/pairs?config=none")
    with pytest.raises(UserError, match="no split validation"):
        texts("hf://org/pairs?split=validation")
    del hub.datasets["org/pairs"]["main"]["data/train-00001-of-00002.parquet"]
    hub_module.hub_files.cache_clear()
    with pytest.raises(UserError, match="some parts of the data set are missing"):
        texts("hf://org/pairs?split=train")


def test_names_of_files_and_the_hubs_own_parquet(hub: FakeHub) -> None:
    hub.datasets["org/plain"] = {"main": {"train.jsonl": as_jsonl(ROWS[:4]), "test.jsonl": as_jsonl(ROWS[4:])}}
    assert len(texts("hf://org/plain?split=train")) == 4
    with pytest.raises(UserError, match="several splits"):
        texts("hf://org/plain")
    hub.datasets["org/script"] = {
        "main": {"script.py": b"print()"},
        "refs/convert/parquet": {"default/train/0000.parquet": as_parquet(ROWS), "default/test/0000.parquet": b"x"},
    }
    found = read_pairs([Path("hf://org/script?split=train")])
    assert found.count == 8
    assert list(found.files) == [f"hf://datasets/org/script@{CONVERTED_COMMIT}/default/train/0000.parquet"]
    hub.datasets["org/none"] = {"main": {"a.bin": b"x"}, "refs/convert/parquet": {}}
    with pytest.raises(UserError, match="no readable file"):
        texts("hf://org/none")


def test_without_a_network_what_was_downloaded_is_taken(hub: FakeHub) -> None:
    hub.datasets["org/pairs"] = {"main": {"pairs.jsonl": as_jsonl(ROWS)}}
    before = texts("hf://org/pairs")
    hub_module.hub_files.cache_clear()
    hub.broken = True
    assert texts("hf://org/pairs") == before
    hub_module.hub_files.cache_clear()
    with pytest.raises(UserError, match="hub-failed"):
        texts("hf://org/others")


def test_the_hubs_answer_is_shown_without_the_token(hub: FakeHub) -> None:
    with pytest.raises(UserError, match="hub-failed") as refused:
        texts("hf://org/missing")
    assert TOKEN not in refused.value.text()
    assert "hf auth login" in refused.value.text()
    assert hub.tokens == {TOKEN}  # private data sets are read with it
    error = hub_module.hub_error(ValueError(f"bad token {TOKEN}"), "x", "y")
    assert TOKEN not in error.text()


def test_a_file_of_no_data_set_keeps_its_path(tmp_path: Path) -> None:
    assert shown_name(tmp_path / "pairs.jsonl") == str(tmp_path / "pairs.jsonl")


# --------------------------------------------------------------------------- both phases and back


@pytest.fixture
def trained(hub: FakeHub, tmp_path: Path, tiny_model: Path) -> Path:
    hub.datasets["org/pairs"] = {"main": {"pairs.jsonl": as_jsonl(pair_rows(8))}}
    cache = tmp_path / "cache"
    precompute_reference(PrecomputeConfig(pairs=(Path("hf://org/pairs"),), model=str(tiny_model), cache=cache))
    train(TrainConfig(cache=cache, output_dir=tmp_path / "out", max_steps=1, parity_pairs=2, lora_r=2, eval_share=0.3))
    return tmp_path / "out"


def test_a_result_is_pushed_with_its_card(
    hub: FakeHub, trained: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="hub-paths") as refused:
        push(trained, "me/adapter")
    assert f"--rename={tiny_model}=ORG/NAME" in refused.value.text()
    assert not hub.models
    words = ["push", str(trained), "me/adapter", f"--rename={tiny_model}=org/base"]
    with pytest.raises(SystemExit) as stop:
        main([*words, "--json"])
    said = capsys.readouterr()
    assert stop.value.code == 0, said.err
    assert json.loads(said.out)["commit"] == COMMIT
    pushed = hub.models["me/adapter"]
    assert hub.private["me/adapter"]
    weights = (trained / "adapter" / "adapter_model.safetensors").read_bytes()
    assert pushed["adapter_model.safetensors"] == weights
    assert json.loads(pushed["adapter_config.json"])["base_model_name_or_path"] == "org/base"
    card = pushed["README.md"].decode()
    assert "base_model: org/base" in card
    assert f"hf://datasets/org/pairs@{COMMIT}/pairs.jsonl" in card
    assert "| licence of the base |" in card
    assert str(tiny_model) not in "".join(data.decode("latin-1") for data in pushed.values())
    assert TOKEN not in said.out + said.err + "".join(data.decode("latin-1") for data in pushed.values())
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code != 0
    assert "[output-exists]" in capsys.readouterr().err
    done = push(trained, "me/adapter", force=True, rename={str(tiny_model): "org/base"})
    assert "adapter_config.json" in done.replaced
    for file in trained.rglob("*"):
        assert not file.is_file() or TOKEN.encode() not in file.read_bytes(), file


def test_a_push_that_cannot_be_is_refused_before_the_training(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    del hub
    for repo, code in (("no name", "[hub-name]"), ("me/new", "[hub-failed]")):
        if repo == "me/new":
            monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
        with pytest.raises(SystemExit):
            main(["train", "--cache", str(tmp_path / "none"), "--push-to", repo])
        assert code in capsys.readouterr().err
    with pytest.raises(UserError, match="run-not-found"):
        push(tmp_path, "me/new")
