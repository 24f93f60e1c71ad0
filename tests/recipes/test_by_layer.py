"""Both phases with layer offloading leave the bytes that they leave without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dpoeng_testing import pair_rows, tree, write_jsonl
from plain_varlen import use_plain_arithmetic

from dpoeng.bench.studies.tiny_models import save_tiny
from dpoeng.cache.errors import UserError
from dpoeng.cache.store import Store
from dpoeng.engine.config.fields import PrecomputeConfig, TrainConfig
from dpoeng.engine.models.sources import find_model
from dpoeng.engine.recipes.precompute import precompute_reference
from dpoeng.engine.recipes.quantize import quantize
from dpoeng.engine.recipes.train import train
from dpoeng.engine.scoring import scored_end


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
    # Neither the batch nor a pair fits with all layers; what is simulated layer by layer does.
    rooms = iter([10**5, 10**5, 10**12])
    monkeypatch.setattr("dpoeng.engine.memory.fit.available_bytes", lambda _: next(rooms))
    read: list[int] = []
    from dpoeng.engine.models.layers.files import LayerFiles

    add = LayerFiles.add
    monkeypatch.setattr(LayerFiles, "add", lambda self, n_bytes: (read.append(n_bytes), add(self, n_bytes))[1])
    assert cached(tmp_path / "b", pairs_file, tiny_model) == ordinary
    assert read


# --------------------------------------------------------------------------- phase two


def trained(folder: Path, cache: Path, **settings: Any) -> dict[str, str]:
    """A hash of the adapter, of the last checkpoint's tensors, and of the metrics."""
    given: dict[str, Any] = {
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "learning_rate": 1e-3,
        "eval_share": 0.2,
        "lora_r": 4,
    }
    if settings.get("adapter_mode") == "continue":
        del given["lora_r"]
    train(TrainConfig(cache=cache, output_dir=folder, **{**given, **settings}))
    files = tree(folder)
    return {
        name: digest
        for name, digest in files.items()
        if name.endswith((".safetensors", "metrics.jsonl", "pairs.jsonl")) and "optimizer" not in name
    }


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, sft_adapter: Path) -> dict[str, Path]:
    """Of the tiny model, and of it with the SFT adapter."""
    folder = tmp_path_factory.mktemp("caches")
    pairs = write_jsonl(folder / "pairs.jsonl", pair_rows(24))
    for name, settings in (("base", {}), ("sft", {"adapter": str(sft_adapter)})):
        cached(folder / name, pairs, tiny_model, **settings)
    return {name: folder / name for name in ("base", "sft")}


@pytest.mark.parametrize(
    ("cache", "settings"),
    [
        ("base", {"lora_dropout": 0.3}),
        ("base", {"dtype": "bfloat16"}),
        ("sft", {"adapter_mode": "continue", "lora_dropout": 0.1}),
        ("sft", {"adapter_mode": "stack"}),
        ("base", {"loss_type": ("aot",)}),  # the pairs of a step meet in the loss
        ("base", {"layout": "separate", "lora_target_modules": ("q_proj",)}),
        ("base", {"quantization": "8bit", "lora_dropout": 0.2}),
        ("base", {"quantization": "4bit"}),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(map(str, value.values())),
)
def test_an_adapter_has_the_same_bytes(
    cache: str, settings: dict[str, Any], tmp_path: Path, caches: dict[str, Path]
) -> None:
    if "quantization" in settings or "dtype" in settings:
        settings = {**settings, "parity_tolerance": 5.0}
    ordinary = trained(tmp_path / "a", caches[cache], **settings)
    assert any(name.endswith("adapter_model.safetensors") for name in ordinary)
    assert trained(tmp_path / "b", caches[cache], layer_offloading="on", **settings) == ordinary


def test_the_short_last_layer_of_a_gpu_has_the_same_bytes(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both phases with varlen attention, of which a CPU has a stand-in here: by layer, too, only scored positions."""
    pytest.importorskip("torch.nn.attention.varlen", reason="not in the oldest torch that is accepted")
    use_plain_arithmetic()
    monkeypatch.setattr("dpoeng.engine.recipes.policy.refuse_attention_on_cpu", lambda *_: None)
    rows: list[tuple[bool, int, int]] = []
    over_scored = scored_end._over_scored

    def noting(layer: Any, *given: Any, **named: Any) -> Any:
        plan, out = named.get("dpoeng_plan"), over_scored(layer, *given, **named)
        if plan is not None and plan.last is not None:
            rows.append((torch.is_grad_enabled(), given[3].shape[1], out.shape[1]))
        return out

    monkeypatch.setattr(scored_end, "_over_scored", noting)
    pairs = write_jsonl(tmp_path / "pairs.jsonl", pair_rows(24))
    ways: Any = ("off", "on")
    caches = [
        cached(tmp_path / way, pairs, tiny_model, attention="varlen", layer_offloading=way, batch_tokens=128)
        for way in ways
    ]
    assert caches[0] == caches[1]
    found = []
    for way in ways:
        rows.clear()
        settings: Any = {"attention": "varlen", "layer_offloading": way, "lora_dropout": 0.1}
        found.append(trained(tmp_path / f"out-{way}", tmp_path / "off", **settings))
        assert {grad for grad, before, after in rows if after < before} == {False, True}
    assert found[0] == found[1]


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_a_base_that_is_stored_quantised_has_the_same_bytes(
    quantization: Any, tmp_path: Path, tiny_model: Path, pairs_file: Path
) -> None:
    """Both phases read its layers as they are stored; from a trunk too."""
    quantize(find_model(str(tiny_model)), tmp_path / "model", quantization=quantization)
    ordinary, layers = (
        cached(tmp_path / way, pairs_file, tmp_path / "model", layer_offloading=way, trunk_layer=1)
        for way in ("off", "on")
    )
    assert ordinary == layers
    for settings in ({"lora_dropout": 0.1}, {"train_last_layers": 1}):
        one, other = (
            trained(tmp_path / f"{way}-{next(iter(settings))}", tmp_path / "off", **settings,
                    layer_offloading=way, max_steps=1)
            for way in ("off", "on")
        )  # fmt: skip
        assert one == other


@pytest.mark.parametrize(
    "model_type",
    [
        "nemotron_h",  # a buffer of each router that the files hold, and Mamba, attention and experts in turn
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3_next", "jamba", "falcon_h1", "deepseek_v3")),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt_oss", "mixtral", "llama4_text", "lfm2")),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen2", "qwen3", "qwen3_moe", "mistral", "gemma2")),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma3_text", "phi3", "granite", "smollm3")),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("olmo2", "cohere", "gpt2", "gpt_neox")),
    ],
)
def test_both_phases_of_a_family_leave_the_same_bytes(model_type: str, tmp_path: Path, pairs_file: Path) -> None:
    save_tiny(model_type, tmp_path / "model")
    settings = {"dtype": "float32", "max_length": 120}
    ordinary, layers = (
        cached(tmp_path / way, pairs_file, tmp_path / "model", layer_offloading=way, **settings)
        for way in ("off", "on")
    )
    assert ordinary == layers
    one, other = (
        trained(tmp_path / f"out-{way}", tmp_path / "off", layer_offloading=way, lora_dropout=0.1, max_steps=1)
        for way in ("off", "on")
    )
    assert one == other


def test_a_killed_run_continues_either_way(
    tmp_path: Path, caches: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"lora_dropout": 0.3, "save_steps": 1}
    ordinary = trained(tmp_path / "a", caches["base"], **settings)

    class KilledError(Exception):
        pass

    from dpoeng.engine.training import loop

    step = loop.train_step

    def dying(run: Any, number: int) -> Any:
        if number == 2:
            raise KilledError
        return step(run, number)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", dying)
        with pytest.raises(KilledError):
            trained(tmp_path / "b", caches["base"], layer_offloading="on", **settings)
    assert trained(tmp_path / "b", caches["base"], **settings) == ordinary


def test_weights_are_read_twice_a_step_and_hidden_states_may_wait_in_a_file(
    tmp_path: Path, caches: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpoeng.engine.models.layers.files import LayerFiles
    from dpoeng.engine.training import loop

    reads: list[int] = []
    read = LayerFiles.read
    monkeypatch.setattr(LayerFiles, "read", lambda self, number: (reads.append(number), read(self, number))[1])
    step = loop.train_step
    of_steps: list[list[int]] = []

    def counting(run: Any, number: int) -> Any:
        before = len(reads)
        metrics = step(run, number)
        of_steps.append(reads[before:])
        return metrics

    monkeypatch.setattr(loop, "train_step", counting)
    settings: Any = {"eval_share": 0.0}
    ordinary = trained(tmp_path / "a", caches["base"], **settings)
    scratch = {"layer_offloading": "on", "offload_folder": tmp_path / "scratch"}
    assert trained(tmp_path / "b", caches["base"], **scratch, **settings) == ordinary
    # Both layers forwards, one back: the last layer is there still. The next step begins with the first one in place.
    assert of_steps[-3:] in ([[0, 1, 0], [1, 0], [1, 0]], [[1, 0], [1, 0], [1, 0]])


def test_a_lora_outside_the_layers_is_refused(tmp_path: Path, caches: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="lm_head"):
        trained(tmp_path, caches["base"], layer_offloading="on", lora_target_modules=("q_proj", "lm_head"))


def test_a_step_whose_hidden_states_have_no_room_is_refused(tmp_path: Path, caches: dict[str, Path]) -> None:
    with pytest.raises(UserError) as caught:
        trained(tmp_path, caches["base"], layer_offloading="on", offload_gib=1e-6)
    assert caught.value.code == "offload-room"
