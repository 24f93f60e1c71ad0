"""Sizes, defaults and coefficients of the kernels that no comparison of results would show to be wrong."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dpoeng.kernels import rows, tiled_logps
from dpoeng.kernels.row_logps import token_logps_from_logits
from dpoeng.kernels.tiles import LINEAR_16, LINEAR_32, candidates, chunk_rows


def test_the_chunk_of_logits_is_at_most_640_mib_in_whole_tiles() -> None:
    assert chunk_rows(152_064) == 1024  # Qwen2.5's vocabulary
    assert chunk_rows(1000) == 4096
    assert chunk_rows(10**9) == 256
    for vocabulary in range(50_000, 260_000, 1111):
        assert chunk_rows(vocabulary) % 256 == 0
        assert 0 <= 640 * 2**20 - 4 * vocabulary * chunk_rows(vocabulary) < 4 * vocabulary * 256


def test_a_tile_outside_of_gpus_is_4_mib() -> None:
    assert 4 * tiled_logps.ROWS * tiled_logps.TILE == 4 << 20
    assert 4 * tiled_logps.ROWS * tiled_logps.TILE_BF16 == 16 << 20


def test_the_series_of_nearly_certain_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """-log(1 + rest) for the largest logit, to the first coefficient that is left out: rest^6 / 6."""
    numpy_as_triton = SimpleNamespace(where=np.where, log=np.log, exp=np.exp)
    monkeypatch.setattr(rows, "tl", numpy_as_triton)
    rest = np.array([1e-9, 1e-4, 0.01, 0.0299])
    found = rows.logp_of.fn(np.zeros(4), rest)
    assert (np.abs(found + np.log1p(rest)) <= rest**6 / 6 + 1e-16).all()
    # what rounding lifts above 0 is 0; NaN stays NaN
    above, nan = rows.logp_of.fn(np.array([1e-7, np.nan]), np.array([-1e-3, 0.5]))
    assert above == 0
    assert np.isnan(nan)


def test_logits_are_left_as_they_are() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 9, requires_grad=True)
    before = logits.detach().clone()
    token_logps_from_logits(logits, torch.tensor([1, 2, -100, 3])).sum().backward()
    assert torch.equal(logits.detach(), before)


def test_a_gpu_is_tuned_among_tiles_of_powers_of_two() -> None:
    """Triton takes no others, and tuning skips what it refuses."""
    for table_tile in (LINEAR_32, *LINEAR_16.values()):
        near = candidates(table_tile)
        assert near[0] == table_tile
        assert len(set(near)) == len(near) >= 6
        sizes = {size for tile in near for size in (tile.rows, tile.cols, tile.depth, tile.group)}
        assert all(size & (size - 1) == 0 for size in sizes), sizes
        assert all(tile.stages >= 1 for tile in near)
        assert min(tile.cols * tile.depth for tile in near) < table_tile.cols * table_tile.depth
