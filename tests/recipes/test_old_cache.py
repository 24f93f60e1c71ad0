"""A cache that commit ef7649b made, before rows had gaps or were anything but pairs: it opens, verifies and trains.

Made there with `dpoeng precompute-ref pairs.jsonl --model /models/tiny --cache cache-ef7649b --dtype float32`, of the
`tiny_model` fixture and `pair_rows(6)`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from dpoeng_testing import pair_rows, tree, write_jsonl

from dpoeng.cache.reader import View
from dpoeng.cache.verify import verify
from dpoeng.engine.config.fields import PrecomputeConfig, TrainConfig
from dpoeng.engine.recipes.precompute import precompute_reference
from dpoeng.engine.recipes.train import train

GOLDEN = Path(__file__).parents[1] / "cache" / "golden" / "cache-ef7649b"


def test_it_opens_verifies_and_trains_and_no_byte_of_it_changes(tmp_path: Path, tiny_model: Path) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(GOLDEN, cache)
    before = tree(cache)
    assert verify(cache, depth="all").ok
    view = View.open(cache)
    assert (view.rows, len(view), view[0].scores) == ("pairs", 6, ())
    fields = {"max_steps": 2, "lora_r": 4, "learning_rate": 1e-3, "eval_share": 0.4}
    done = train(TrainConfig(cache=cache, model=str(tiny_model), output_dir=tmp_path / "out", **fields))
    assert done.parity is not None
    assert done.parity.mean_diff < 1e-5  # the numbers of then are those of today's code
    assert tree(cache) == before


def test_its_rows_have_the_keys_and_lengths_of_today(tmp_path: Path, tiny_model: Path) -> None:
    file = write_jsonl(tmp_path / "pairs.jsonl", pair_rows(6))
    precompute_reference(
        PrecomputeConfig(pairs=(file,), model=str(tiny_model), cache=tmp_path / "cache", dtype="float32")
    )
    old, new = View.open(GOLDEN), View.open(tmp_path / "cache")
    assert [old.key(row) for row in range(6)] == [new.key(row) for row in range(6)]
    assert (tmp_path / "cache" / "FORMAT").read_bytes() == (GOLDEN / "FORMAT").read_bytes()
    shards = [
        [path.stat().st_size for path in (root / "objects").rglob("*.arrow")] for root in (GOLDEN, tmp_path / "cache")
    ]
    assert shards[0] == shards[1]
