"""The cache's benchmark runs and reports what it says; the figures that the cache must reach are a slow test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dpoeng.bench.cache import run


def test_a_small_run_reports_every_figure_and_leaves_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    found = run(pairs=1500, weight_bytes=1_000_000, folder=tmp_path, say=said.append)
    assert [step["pairs"] for step in found["sizes"]] == [1000, 1500]
    for step in found["sizes"]:
        # 60 prompt and 2 x 60 response tokens of 4 bytes, 120 log-probs of 4, key and sums 32, offsets 20
        assert step["bytes_a_pair"] == pytest.approx(180 * 4 + 120 * 4 + 52, rel=0.05)
        assert all(value > 0 for value in step.values())
    assert found["read"]["pairs"] == 1500
    assert all(value > 0 for name, value in found["read"].items() if name != "anonymous_mib")
    assert found["weights"]["bytes"] == pytest.approx(1_000_000, rel=0.02)
    assert found["weights"]["identity_gb_per_s"] > 0
    assert said[0] == "cache of 1,000 pairs"
    assert list(tmp_path.iterdir()) == []
    json.dumps(found)


@pytest.mark.slow
def test_the_figures_that_the_cache_must_reach() -> None:
    """1e6 pairs, on an otherwise idle machine; needs 4 GB of disk. Its output is what docs quote."""
    output = subprocess.check_output([sys.executable, "-m", "dpoeng.bench.cache", "--pairs", "1000000"], text=True)
    print(output)
    found = json.loads(output)
    read, weights, sizes = found["read"], found["weights"], found["sizes"]
    assert read["open_ms"] <= 1000
    assert read["rows_per_s"] >= 100_000
    assert read["anonymous_mib"] <= 64
    assert read["verify_gb_per_s"] >= 3
    assert weights["identity_gb_per_s"] >= max(3, 2 * weights["sha256_gb_per_s"])
    for step in (
        "commit_us",
        "lookup_us",
        "hit_us",
        "write_view_us",
    ):  # flat: the largest costs no more than a small one
        assert sizes[-1][step] <= 2 * sizes[1][step]
