"""Both phases with layer offloading leave the bytes that they leave without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from dpoeng_testing import tree

from dpoeng.cache.store import Store
from dpoeng.engine.config.fields import PrecomputeConfig
from dpoeng.engine.recipes.precompute import precompute_reference


def cached(folder: Path, pairs: Path, model: Path, **settings: Any) -> dict[str, str]:
    """The objects of a cache, by name."""
    precompute_reference(PrecomputeConfig(pairs=(pairs,), model=str(model), cache=folder, **settings))
    return tree(folder, "objects")


def test_a_cache_has_the_same_objects(tmp_path: Path, pairs_file: Path, tiny_model: Path, sft_adapter: Path) -> None:
    settings: Any = {"adapter": str(sft_adapter), "shard_tokens": 300, "batch_tokens": 128}
    ordinary = cached(tmp_path / "a", pairs_file, tiny_model, **settings)
    assert len(ordinary) > 2
    assert cached(tmp_path / "b", pairs_file, tiny_model, layer_offloading="on", **settings) == ordinary
    small = {"layer_offloading": "on", "offload_gib": 1e-5, "offload_folder": tmp_path / "scratch"}
    assert cached(tmp_path / "c", pairs_file, tiny_model, **settings, **small) == ordinary


def test_a_killed_pass_is_done_again(
    tmp_path: Path, pairs_file: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: Any = {"shard_tokens": 300, "batch_tokens": 128}
    ordinary = cached(tmp_path / "a", pairs_file, tiny_model, **settings)
    settings |= {"layer_offloading": "on", "offload_gib": 4e-5}
    commit, count = Store.commit_shard, 0

    def dying(self: Store, *args: Any) -> Any:
        nonlocal count
        count += 1
        if count == 2:
            raise KeyboardInterrupt
        return commit(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "commit_shard", dying)
        with pytest.raises(KeyboardInterrupt):
            cached(tmp_path / "b", pairs_file, tiny_model, **settings)
    assert len(tree(tmp_path / "b", "objects")) == 1
    assert cached(tmp_path / "b", pairs_file, tiny_model, **settings) == ordinary


def test_auto_turns_it_on_where_the_base_does_not_fit(
    tmp_path: Path, pairs_file: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ordinary = cached(tmp_path / "a", pairs_file, tiny_model)
    monkeypatch.setattr("dpoeng.engine.memory.fit._is_small", lambda *_: False)
    monkeypatch.setattr("dpoeng.engine.memory.fit.available_bytes", lambda _: 10**5)
    read: list[int] = []
    from dpoeng.engine.models.layers.files import LayerFiles

    add = LayerFiles.add
    monkeypatch.setattr(LayerFiles, "add", lambda self, n_bytes: (read.append(n_bytes), add(self, n_bytes))[1])
    assert cached(tmp_path / "b", pairs_file, tiny_model) == ordinary
    assert read
