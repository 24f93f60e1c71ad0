"""The plan of layer offloading: its memory does not grow with the base, and it is proposed where that does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dpoeng.cache.words import GIB
from dpoeng.engine.config.fields import PrecomputeConfig, TrainConfig
from dpoeng.engine.config.plan import PlanConfig
from dpoeng.engine.memory import fit, ways
from dpoeng.engine.memory.any_depth import Memory, step_memory
from dpoeng.engine.memory.cards import Roads
from dpoeng.engine.memory.offloading import decide_scoring
from dpoeng.engine.memory.simulate import ADAPTERS, GRADIENTS, OPTIMIZER, WEIGHTS, Pair, Setup
from dpoeng.engine.memory.tracker import Peak
from dpoeng.engine.models.sources import find_model
from dpoeng.engine.recipes import plan as plan_module
from dpoeng.engine.recipes.init import suggest
from dpoeng.engine.recipes.plan import as_json, make_plan, suggested

MODEL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
LAYER = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64 + 2 * 64)


def setup(**more: Any) -> Setup:
    config = TrainConfig(gradient_checkpointing=True, lora_r=2)
    return Setup(model=MODEL, dtype=torch.bfloat16, quantization="none", config=config, **more)


def test_weights_are_two_layers_and_what_lies_outside() -> None:
    peak = step_memory(setup(by_layer=True), [Pair(3, 20, 10)]).peak
    rotary = peak.by_kind[WEIGHTS] - (2 * LAYER + 2 * 1000 * 64 + 2 * 64)  # the embedding is on the host
    assert 0 <= rotary < 1000
    ordinary = step_memory(setup(), [Pair(3, 20, 10)]).peak
    assert peak.by_kind[ADAPTERS] == ordinary.by_kind[ADAPTERS]
    assert peak.n_bytes < ordinary.n_bytes


def test_a_shallow_model_tells_of_a_deep_one() -> None:
    extended = step_memory(setup(by_layer=True), [Pair(3, 20, 10)]).peak
    assert extended == step_memory(setup(by_layer=True), [Pair(3, 20, 10)], whole=True).peak
    deeper = step_memory(setup(by_layer=True, chosen=tuple(range(8))), [Pair(3, 20, 10)]).peak
    grown = {kind for kind in extended.by_kind if extended.by_kind[kind] != deeper.by_kind.get(kind)}
    assert grown <= {ADAPTERS, GRADIENTS, OPTIMIZER}


@pytest.mark.parametrize(("room", "by_layer"), [(10**12, False), (1000, True)])
def test_a_pair_that_does_not_fit_is_scored_by_layer(
    room: int, by_layer: bool, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `eval` and `cache verify --recompute` ask, unless layer offloading is on or off."""
    monkeypatch.setattr(fit, "_is_small", lambda *_: False)
    monkeypatch.setattr(fit, "available_bytes", lambda _: room)
    notes: list[str] = []

    def decided(wanted: str, quantization: str = "none") -> bool:
        config = PrecomputeConfig.model_validate({"layer_offloading": wanted, "quantization": quantization})
        pairs = [Pair(3, 20, 10).scored().ids] * 50  # together they need not fit: they are halved
        return decide_scoring(config, find_model(str(tiny_model)), pairs, torch.device("cpu"), notes.append)

    assert decided("auto") is by_layer
    assert len(notes) == by_layer
    assert [decided("on"), decided("off"), decided("auto", "stored")] == [True, False, False]
    assert len(notes) == by_layer


def plan(**more: Any) -> Any:
    asked = {"model": "Qwen/Qwen2.5-7B", "quantization": "none", "max_length": 256, "compare": False, "pairs": 100}
    return make_plan(PlanConfig.model_validate({**asked, **more}))


def test_it_is_proposed_where_the_base_does_not_fit() -> None:
    found = plan(gpu=("12gb", "80gb"))
    small, large = found.cards
    assert small.fits
    assert small.by_layer == (True, True)
    assert large.by_layer == (False, False)
    assert suggested(found, small)["layer_offloading"] == "on"
    assert "layer_offloading" not in suggested(found, large)
    assert as_json(found)["cards"][0]["layer_offloading"] == {"phase1": True, "phase2": True}
    without = plan(gpu=("12gb",), layer_offloading="off").cards[0]
    assert not without.fits


def test_the_time_is_that_of_the_bus_where_it_is_slower() -> None:
    fast, slow = (plan(gpu=("rtx-4090-24gb",), layer_offloading="on", load_gb_per_s=speed) for speed in (1e6, 0.1))
    layers = fast.parameters - 2 * 152064 * 3584
    steps = -(-3 * 100 // 8)
    states = 3 * 100 * (1 + 2 * 255) * 3584 * 2 * 28 * 5  # each layer's wait, twice come back, and so do gradients
    assert slow.cards[0].times[1].hours == pytest.approx((2 * steps * 2 * layers + states) / 0.1e9 / 3600, rel=0.01)
    assert fast.cards[0].times[1].hours < 0.1 * slow.cards[0].times[1].hours


def test_files_that_the_host_holds_are_read_from_the_disk_once() -> None:
    """10 GB, three times: by a disk of 2 GB/s and a bus of 20 GB/s."""
    assert Roads(20.0, 2.0, 1e10).from_files(1e10, 3) == pytest.approx(5.0 + 2 * 0.5)
    assert Roads(20.0, 2.0, 1e10 - 1).from_files(1e10, 3) == pytest.approx(3 * 5.0)
    assert Roads(1.0, 2.0, 1e10).from_files(1e10, 3) == pytest.approx(3 * 10.0)
    assert Roads(20.0, 2.0, 1e10).from_files(1e10, 0.5) == pytest.approx(2.5)


@pytest.fixture
def by_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory in GiB: 10 for layers, less of them layer by layer or from a trunk; 4 for moments; r / 16 for the LoRA."""

    def step(some: Setup, pairs: Any = (), **_: Any) -> Memory:
        layers = (3 if some.trunk_layer else 10) - (2 if some.by_layer and some.trunk_layer else 7) * some.by_layer
        moments = 1 if some.config.optim == "adamw_8bit" else 4
        n_bytes = int(GIB * (layers + moments + some.config.lora_r / 16))
        return Memory(Peak(n_bytes, {WEIGHTS: n_bytes}), {})

    for module in (ways, plan_module):
        monkeypatch.setattr(module, "step_memory", step)
        monkeypatch.setattr(module, "forward_memory", lambda *_args, **_more: Memory(Peak(1, {}), {}))


NEEDED = (15, 12, 8, 5, 4.5, 4.25, 8, 5, 6, 3, 2.5, 2.25)
"""GiB by that formula, of all ways in their order."""


def of_folder(tmp_path: Path, *cards: float, **more: Any) -> Any:
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    asked = {"model": str(tmp_path), "gpu": tuple(f"{card + 0.7:.4f}gib" for card in cards), "quantization": "none"}
    return make_plan(PlanConfig.model_validate({**asked, "max_length": 64, "compare": False, **more}))


@pytest.mark.usefixtures("by_formula")
def test_a_card_gets_the_first_way_that_fits(tmp_path: Path) -> None:
    """All layers, then layer by layer, then the upper third from a trunk; each with less to train where that helps."""
    tried = of_folder(tmp_path, 0.0)
    assert not tried.cards[0].fits
    changes = [dict(way.changes) for way in tried.ways]
    smaller: list[dict[str, Any]] = [{}, {"optim": "adamw_8bit"}]
    smallest = smaller + [{"optim": "adamw_8bit", "lora_r": r, "lora_alpha": 2.0 * r} for r in (8, 4)]
    on, trunk = {"layer_offloading": "on"}, {"trunk_layer": 8, "train_last_layers": 4}
    assert changes == [
        *smaller,
        *({**on, **fields} for fields in smallest),
        *({**trunk, **fields} for fields in smaller),
        *({**on, **trunk, **fields} for fields in smallest),
    ]
    assert [way.steps[1].peak.n_bytes / GIB for way in tried.ways] == list(NEEDED)
    chosen = [n for n, needed in enumerate(NEEDED) if needed < min(NEEDED[:n], default=99)]
    assert chosen == [0, 1, 2, 3, 4, 5, 9, 10, 11]
    found = of_folder(tmp_path, *(NEEDED[n] for n in chosen))
    assert [dict(card.way.changes) for card in found.cards] == [changes[n] for n in chosen]
    assert all(card.fits for card in found.cards)
    last = suggested(found, found.cards[-1])
    assert {name: last[name] for name in changes[-1]} == changes[-1]
    assert TrainConfig.model_validate({name: last[name] for name in changes[-1]}).lora_alpha == 8.0


@pytest.mark.usefixtures("by_formula")
def test_what_was_named_is_not_changed(tmp_path: Path) -> None:
    named = of_folder(tmp_path, 0.0, lora_r=16, optim="adamw_torch", trunk_layer=6)
    assert [dict(way.changes) for way in named.ways] == [{}, {"layer_offloading": "on"}]
    assert {way.setup.trunk_layer for way in named.ways} == {6}
    off = of_folder(tmp_path, 0.0, layer_offloading="off", optim="adamw_torch")
    assert [dict(way.changes) for way in off.ways] == [{}, {"trunk_layer": 8, "train_last_layers": 4}]


@pytest.mark.usefixtures("by_formula")
def test_init_proposes_what_trains_least_last(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MODEL))

    def proposed(needed: float) -> dict[str, Any]:
        lines = suggest([], str(tmp_path), None, gpu=f"{needed + 0.7:.4f}gib")
        return {name: line.value for name, line in lines.items()}

    assert proposed(13)["optim"] == "adamw_8bit"
    by_layer = proposed(5)
    assert (by_layer["layer_offloading"], by_layer["optim"]) == ("on", "adamw_8bit")
    assert "trunk_layer" not in by_layer
    least = proposed(2.25)
    assert [least[name] for name in ("layer_offloading", "trunk_layer", "train_last_layers", "lora_r")] == [
        "on",
        8,
        4,
        4,
    ]
    assert "trunk_layer" not in proposed(1)


def test_a_trunk_and_its_layers_by_hand(tmp_path: Path) -> None:
    """Above a trunk two layers are there, and the adapters of the layers above alone."""
    by_layer, both = (step_memory(setup(by_layer=True, trunk_layer=n), [Pair(3, 20, 10)]).peak for n in (0, 8))
    assert by_layer.by_kind[WEIGHTS] == both.by_kind[WEIGHTS]
    assert both.by_kind[ADAPTERS] == by_layer.by_kind[ADAPTERS] // 3
    whole = step_memory(setup(by_layer=True, trunk_layer=8), [Pair(3, 20, 10)], whole=True).peak
    assert both == whole
