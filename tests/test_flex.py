"""FlexAttention's tiles against the rule itself, and their count. Its numbers are compared in test_scoring."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dpoeng_testing import pair_rows, write_jsonl
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from dpoeng.cache.reader import View
from dpoeng.cache.schema import PairIds, ScoredPair, as_ids, pair_key
from dpoeng.cache.store import Store, ViewEntry
from dpoeng.cli.train import print_summary
from dpoeng.engine import flex as flex_module
from dpoeng.engine.attention import AttentionPlan, shared_prompt_attention
from dpoeng.engine.config import PrecomputeConfig, TrainConfig
from dpoeng.engine.flex import BlockCount, _attention, block_lists, block_mask, segments, visible
from dpoeng.engine.layout import GroupSpan
from dpoeng.engine.precompute import precompute_reference
from dpoeng.engine.train import train


@st.composite
def spans(draw: st.DrawFn) -> list[GroupSpan]:
    made, cursor = [], 0
    for _ in range(draw(st.integers(1, 5))):
        begin, cursor = cursor, cursor + draw(st.integers(0, 9))
        prompt_end, branches = cursor, []
        for _ in range(draw(st.integers(1, 3))):
            branches.append((cursor, cursor + draw(st.integers(1, 9))))
            cursor = branches[-1][1]
        made.append(GroupSpan(begin, prompt_end, tuple(branches)))
    return made


@given(spans(), st.sampled_from([None, 1, 3, 8]), st.sampled_from([1, 2, 4, 7]))
@hypothesis_settings(max_examples=150)
def test_tiles_cover_what_is_visible_and_no_more(groups: list[GroupSpan], window: int | None, block: int) -> None:
    rows = segments(groups)
    total = groups[-1].branches[-1][1]
    every = np.arange(total)
    dense = visible(rows, window)(every[:, None], every[None, :])
    # The rule, said again from the spans: each branch is a causal text of its own, [prompt | branch].
    truth = np.zeros((total, total), bool)
    for span in groups:
        for begin, end in [(span.prompt_end, span.prompt_end), *span.branches]:
            text = [*range(span.prompt_begin, span.prompt_end), *range(begin, end)]
            for i, q in enumerate(text):
                truth[q, text[max(0, i + 1 - window) if window else 0 : i + 1]] = True
    assert (dense == truth).all()
    partial, full = block_lists(rows, window, block)
    for tile in range(-(-total // block)):
        for other in range(-(-total // block)):
            seen = truth[tile * block : (tile + 1) * block, other * block : (other + 1) * block]
            assert (other in full[tile]) <= bool(seen.all())
            assert (other in partial[tile] or other in full[tile]) == bool(seen.any())
            assert not (other in partial[tile] and other in full[tile])


def pairs_in_a_row(count: int, prompt: int, response: int) -> list[GroupSpan]:
    groups, cursor = [], 0
    for _ in range(count):
        chosen, rejected = cursor + prompt, cursor + prompt + response
        groups.append(GroupSpan(cursor, chosen, ((chosen, rejected), (rejected, rejected + response))))
        cursor = rejected + response
    return groups


def test_the_mask_of_a_long_row_is_sparse() -> None:
    """What FlexAttention is for: of 32 pairs in a row, a tile meets its own pair only."""
    made = block_mask(pairs_in_a_row(32, 128, 64), None, torch.device("cpu"))
    assert made.mask.sparsity() > 95
    assert 100 * (1 - made.blocks.computed / made.blocks.total) == pytest.approx(made.mask.sparsity(), abs=0.01)


@pytest.mark.parametrize(("window", "of_a_pair"), [(None, 5), (128, 5), (1, 3)])
def test_blocks_counted_by_hand(window: int | None, of_a_pair: int) -> None:
    """Prompt, chosen and rejected of one tile each: the prompt meets itself, each response itself and the prompt.

    A token that sees itself only has no use for the prompt. Two pairs are 6 x 6 tiles.
    """
    blocks = block_mask(pairs_in_a_row(2, 128, 128), window, torch.device("cpu")).blocks
    assert (blocks.computed, blocks.total) == (2 * of_a_pair, 36)
    if of_a_pair == 5:
        assert str(blocks) == "27.8 % of 128 x 128 blocks computed"
        blocks.add(BlockCount(2, 4))  # of another row
        assert blocks.record() == {"size": 128, "computed": 12, "total": 40, "share": 0.3}


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (64, None), (None, 20.0)])
def test_compiled_it_gives_the_numbers_of_segments(window: int | None, softcap: float | None) -> None:
    """By inductor, for this CPU, whose kernel takes the tiles into account; rows of any length without compiling anew.

    It has no backward pass and no sums of scores here, which sinks need.
    """
    from torch._dynamo.utils import counters

    _attention.cache_clear()
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    for pairs in (pairs_in_a_row(2, 150, 70), pairs_in_a_row(3, 40, 90), pairs_in_a_row(1, 300, 129)):
        total = pairs[-1].branches[-1][1]
        q, k, v = (torch.randn(1, heads, total, 32) for heads in (4, 2, 2))
        mask = block_mask(pairs, window, torch.device("cpu")).mask
        with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(flex_module, "_attention", lambda _compiled: _attention(True))
            found = flex_module.flex(q, k, v, mask, scaling=None, softcap=softcap, sinks=None)
            plan = AttentionPlan(tuple(pairs))
            expected, _ = shared_prompt_attention(
                torch.nn.Module(), q, k, v, None, sliding_window=window, softcap=softcap, dpoeng_plan=plan
            )
        torch.testing.assert_close(found.transpose(1, 2), expected, atol=1e-5, rtol=0)
    assert counters["stats"]["unique_graphs"] == 1


def test_a_run_with_flex_attention_tells_how_many_blocks_it_computed(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pairs of which prompt, chosen and rejected fill one tile each: of a row's 9 tiles 5 are computed.

    FlexAttention has no backward pass on a CPU: its rule as a dense mask stands in for it.
    """

    def dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **more: Any) -> torch.Tensor:
        row = torch.arange(query.shape[2])
        seen = mask.mask_mod(0, 0, row[:, None], row[None, :])
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=seen, scale=more["scaling"], enable_gqa=True
        )

    rng = np.random.default_rng(0)

    def tile(count: int) -> list[ScoredPair]:
        made = []
        for _ in range(count):
            ids = PairIds(*(as_ids(rng.integers(0, 200, 128)) for _ in range(3)))
            made.append(ScoredPair(ids, *(np.full(128, -5.0, np.float32) for _ in range(2))))
        return made

    cache = tmp_path / "cache"
    pairs = write_jsonl(tmp_path / "any.jsonl", pair_rows(4))
    precompute_reference(PrecomputeConfig(pairs=(pairs,), model=str(tiny_model), cache=cache, batch_tokens=300))
    store, view = Store.open(cache), View.open(cache)
    rows = tile(4)
    store.commit_shard(view.spec.digest, rows, {})
    store.seal(view.spec.digest)
    entries = [ViewEntry("tiles", i + 1, pair_key(row.ids), {}) for i, row in enumerate(rows)]
    store.write_view(view.spec.digest, "tiles", entries, view.meta)

    monkeypatch.setattr("dpoeng.engine.attention.flex", dense)
    monkeypatch.setattr("dpoeng.engine.train.refuse_attention_on_cpu", lambda *_: None)
    settings: dict[str, Any] = {"cache": cache, "max_steps": 1, "eval_share": 0, "parity_tolerance": 100.0}
    settings |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    summary = train(TrainConfig(output_dir=tmp_path / "out", view="tiles", attention="flex", **settings))
    assert summary.blocks.computed / summary.blocks.total == pytest.approx(5 / 9)
    written = json.loads((tmp_path / "out" / "run.json").read_text())["attention_blocks"]
    assert written == {**summary.blocks.record(), "size": 128}
    print_summary(summary)
    assert "55.6 % of 128 x 128 blocks computed" in " ".join(capsys.readouterr().out.split())
    plain = train(TrainConfig(output_dir=tmp_path / "plain", view="any", **settings))
    assert plain.blocks.total == 0
    assert "attention_blocks" not in json.loads((tmp_path / "plain" / "run.json").read_text())
