"""`dpoeng bench offload` over a tiny model: the files, what is read of them, and the record's tables."""

from __future__ import annotations

import json
from pathlib import Path

from dpoeng.bench.offload import OffloadSettings, bench_offload
from dpoeng.cli.bench.tables import tables_of

TINY = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}


def test_both_phases_run_over_the_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    record = bench_offload(OffloadSettings(model=str(tmp_path), pairs=3, steps=1, folder=tmp_path))
    one, two = record["phases"]
    layer = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32 + 2 * 32)
    assert record["layer_bytes"] == 3 * layer
    assert record["file_bytes"] > record["layer_bytes"] + 2 * 2 * 300 * 32
    # A trial reads a layer twice, since all are of one shape; a pass reads each once.
    assert one["layer_reads"] == round(1 + 2 / 3, 3)
    # The comparison with the cache, the step forwards (its first layer is not there any more) and back.
    assert 2.6 < two["layer_reads"] < 3.7
    assert min(one["anonymous_bytes"], two["anonymous_bytes"]) > 1e6
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert len(tables_of(record)) == 2
