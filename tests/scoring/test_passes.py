"""Layer by layer the numbers are those of the ordinary order, bit for bit; weights are read once a pass."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from families import SHARED_FAMILIES, make
from safetensors.torch import load_file, save_file

from dpoeng.cache.errors import UserError
from dpoeng.cache.schema import PairIds, ScoredPair
from dpoeng.engine.memory.tracker import MemoryTracker
from dpoeng.engine.models.layers.by_layer import ByLayer
from dpoeng.engine.models.layers.waiting import Waiting
from dpoeng.engine.models.loading import load_model
from dpoeng.engine.models.model import CausalLM, set_mode
from dpoeng.engine.models.sources import find_model
from dpoeng.engine.scoring import forward, layer_passes
from dpoeng.engine.scoring.layer_passes import plan_passes
from dpoeng.engine.scoring.passes import Batches, choose_how_to_score, score_batches

# Experts that are stacked, windows, soft caps, tuples, learnt positions: the rest differs in sizes alone.
QUICK = ("LlamaConfig", "Gemma3TextConfig", "GptOssConfig", "GPT2Config", "Qwen3MoeConfig")


def saved(folder: Path, name: str, **more: Any) -> Path:
    """A tiny model of four layers on the disk."""
    depth = {"n_layer": 4} if name == "GPT2Config" else {"num_hidden_layers": 4}
    make(name, {**SHARED_FAMILIES.get(name, {}), **depth, **more}).base.save_pretrained(folder)
    return folder


def loaded(folder: Path, *, by_layer: bool, quantization: Any = "none", dtype: str = "float32") -> CausalLM:
    source = find_model(str(folder))
    device = torch.device("cpu")
    settings: Any = {"quantization": quantization, "dtype": dtype, "device": device, "tokenizer": False}
    lm = load_model(source, by_layer=by_layer, **settings)
    set_mode(lm, training=False)
    choose_how_to_score(lm)
    return lm


def some_batches() -> list[list[PairIds]]:
    rng = np.random.default_rng(3)

    def draw() -> Any:
        return rng.integers(0, 97, int(rng.integers(2, 20)), dtype=np.int32)

    pairs = [PairIds(draw(), draw(), draw()) for _ in range(7)]
    return [pairs[:3], pairs[3:4], pairs[4:]]


def scored(lm: CausalLM) -> list[ScoredPair]:
    return [row for rows in score_batches(lm, Batches.of(some_batches())) for row in rows]


def same(one: list[ScoredPair], other: list[ScoredPair]) -> bool:
    return all(
        np.array_equal(getattr(a, side), getattr(b, side))
        for a, b in zip(one, other, strict=True)
        for side in ("chosen_logps", "rejected_logps")
    )


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in SHARED_FAMILIES]
)
def test_every_family_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", name)
    ordinary, by_layer = loaded(folder, by_layer=False), loaded(folder, by_layer=True)
    assert (by_layer.layout, by_layer.attention) == (ordinary.layout, ordinary.attention)
    assert same(scored(ordinary), scored(by_layer))


@pytest.mark.parametrize(
    ("quantization", "dtype"),
    [("none", "bfloat16"), ("8bit", "float32"), ("4bit", "bfloat16"), ("4bit", "float32")],
)
def test_every_precision_gives_the_same_bits(quantization: str, dtype: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "LlamaConfig")
    both = [loaded(folder, by_layer=way, quantization=quantization, dtype=dtype) for way in (False, True)]
    assert same(*map(scored, both))


def test_weights_are_read_once_a_pass(tmp_path: Path) -> None:
    lm = loaded(saved(tmp_path / "model", "LlamaConfig"), by_layer=True)
    assert lm.by_layer is not None
    layers = 4 * sum(parameter.numel() * 4 for parameter in lm.backbone.layers[0].parameters())
    before = lm.by_layer.bytes_read()
    scored(lm)
    assert lm.by_layer.bytes_read() - before == layers
    lm.by_layer.limit_bytes = 1  # each batch is a pass of its own
    before = lm.by_layer.bytes_read()
    scored(lm)
    assert lm.by_layer.bytes_read() - before == len(some_batches()) * layers


def test_hidden_states_may_wait_in_a_file(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "LlamaConfig")
    ordinary, lm = loaded(folder, by_layer=False), loaded(folder, by_layer=True)
    assert lm.by_layer is not None
    lm.by_layer.folder = tmp_path / "scratch"
    assert same(scored(ordinary), scored(lm))
    assert list((tmp_path / "scratch").iterdir()) == []  # the file has no name: a kill leaves nothing


def test_weights_are_mapped_and_let_go(tmp_path: Path) -> None:
    lm = loaded(saved(tmp_path / "model", "LlamaConfig"), by_layer=True)
    assert lm.by_layer is not None
    kept: list[int] = []
    weight = [layer.mlp.up_proj for layer in lm.backbone.layers]

    def bytes_there() -> int:
        return sum(one.weight.untyped_storage().nbytes() > 4 for one in weight)

    list(score_batches(lm, Batches.of(some_batches()), advance=lambda _amount, _shown: kept.append(bytes_there())))
    assert set(kept) == {1}, "one layer at a time has weights"
    lm.backbone.layers[0].mlp.up_proj(torch.zeros(1, 32))


@pytest.mark.parametrize("change", ["a hidden channel", "another order"])
def test_layers_that_share_more_than_hidden_states_are_refused(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel

    folder = saved(tmp_path / "model", "LlamaConfig")
    if change == "a hidden channel":
        forward = LlamaDecoderLayer.forward

        def with_memory(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            plan = kwargs["position_embeddings"][0]  # one object a forward, as caches and shared keys are
            added = getattr(plan, "left_by_a_layer", 0.0)
            plan.left_by_a_layer = added + 1.0
            return forward(self, hidden_states, *args, **kwargs) * (1.0 + 0.01 * added)

        monkeypatch.setattr(LlamaDecoderLayer, "forward", with_memory)
    else:
        own = LlamaModel.forward

        def twice(self: Any, *args: Any, **kwargs: Any) -> Any:
            own(self, *args, **kwargs)
            return own(self, *args, **kwargs)

        monkeypatch.setattr(LlamaModel, "forward", twice)
    with pytest.raises(UserError) as caught:
        loaded(folder, by_layer=True)
    assert caught.value.code == "layer-offloading-unsupported"
    scored(loaded(folder, by_layer=False))


def test_passes_end_where_something_is_stored() -> None:
    assert plan_passes([3, 3, 3, 3], 100) == [range(4)]
    assert plan_passes([3, 3, 3, 3], 7) == [range(2), range(2, 4)]
    assert plan_passes([3, 3, 3, 3], 10, ends={1, 3}) == [range(2), range(2, 4)]
    assert plan_passes([30, 3, 3], 5, ends={0, 2}) == [range(1), range(1, 2), range(2, 3)]


@pytest.mark.parametrize("most", [2, 1])
def test_a_pass_that_runs_out_of_memory_cuts_the_forward_at_work(
    most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the same halves as the ordinary order, and so with the same bits; the progress counts each token once."""
    folder = saved(tmp_path / "model", "LlamaConfig")

    def short(predict: Any) -> Any:
        def call(lm: CausalLM, groups: Any) -> Any:
            if len(groups) > most:
                raise MemoryError("short")
            return predict(lm, groups)

        return call

    ordinary, by_layer = loaded(folder, by_layer=False), loaded(folder, by_layer=True)
    for module in (layer_passes, forward):
        monkeypatch.setattr(module, "predict_groups", short(module.predict_groups))
    notes: list[str] = []
    told: list[int] = []
    cut = list(score_batches(ordinary, Batches.of(some_batches()), note=notes.append))
    assert len(notes) == {2: 2, 1: 4}[most]
    again: list[str] = []
    advance = lambda amount, _shown: told.append(amount)  # noqa: E731
    found = list(score_batches(by_layer, Batches.of(some_batches()), note=again.append, advance=advance))
    assert again == notes
    assert [len(rows) for rows in found] == [3, 1, 3]
    assert all(same(one, other) for one, other in zip(cut, found, strict=True))
    assert sum(told) == sum(ids.total_tokens for batch in some_batches() for ids in batch)
    most = 0
    with pytest.raises(UserError) as caught:
        list(score_batches(by_layer, Batches.of(some_batches())))
    assert caught.value.code == "memory-full"
    assert "longest pair" in str(caught.value.where)


def test_hidden_states_without_room_cut_the_pass_and_move_no_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path / "model", "LlamaConfig")
    ordinary, by_layer = loaded(folder, by_layer=False), loaded(folder, by_layer=True)
    put = Waiting.put
    room = 32 * 4 * sum(ids.total_tokens for batch in some_batches() for ids in batch) - 1  # too little for all of them

    def full(self: Waiting, tensor: torch.Tensor, slot: Any = None) -> Any:
        if slot is None and self.n_bytes + tensor.nbytes > room:
            raise MemoryError("no room")
        return put(self, tensor, slot)

    expected = scored(ordinary)
    monkeypatch.setattr(Waiting, "put", full)
    notes: list[str] = []
    found = [row for rows in score_batches(by_layer, Batches.of(some_batches()), note=notes.append) for row in rows]
    assert same(expected, found)
    assert notes == ["out of memory with 3 forwards in a pass: running it in halves"]


def test_memory_does_not_grow_with_the_depth(tmp_path: Path) -> None:
    peaks = []
    for depth in (4, 8):
        folder = saved(tmp_path / f"model{depth}", "LlamaConfig", num_hidden_layers=depth)
        tensors = next(folder.glob("*.safetensors"))
        save_file({name: tensor.bfloat16() for name, tensor in load_file(tensors).items()}, tensors, {"format": "pt"})
        lm = loaded(folder, by_layer=True)  # in float32: what is read is converted, and so is memory of this process
        with MemoryTracker("cpu") as tracker:
            scored(lm)
        peaks.append(tracker.peak().n_bytes)
    layer = 4 * sum(parameter.numel() for parameter in lm.backbone.layers[0].parameters())
    assert layer > 10_000
    assert abs(peaks[1] - peaks[0]) < layer / 10


def test_what_waits_in_pinned_memory_counts_as_torch_allocates_it(tmp_path: Path) -> None:
    """72 MB become 128: a limit of half the host's memory would be all of it."""
    gates: Any = SimpleNamespace(device=torch.device("cuda", 0))
    by_layer = ByLayer(gates, contextlib.nullcontext, lambda: 0, bytes_per_position=2 * 5120)
    assert by_layer.taken(2 * 5120 * 7000) == 2**27
    assert (by_layer.taken(2**26), by_layer.taken(0)) == (2**26, 0)
    assert replace(by_layer, folder=tmp_path).taken(2 * 5120 * 7000) == 2 * 5120 * 7000
    host: Any = SimpleNamespace(device=torch.device("cpu"))
    on_host = replace(by_layer, gates=host)
    assert on_host.taken(2 * 5120 * 7000) == 2 * 5120 * 7000
