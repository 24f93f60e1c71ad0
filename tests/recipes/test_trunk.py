"""The trunk: training from stored hidden states is training the whole model with the same trained layers."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from dpoeng_testing import pair_rows, save_tiny_model, tree, write_jsonl
from safetensors.torch import load_file

from dpoeng.bench.measuring.allocator import trace_allocator
from dpoeng.cache.errors import UserError
from dpoeng.cache.folder import FORMAT_BYTES
from dpoeng.cache.reader import View
from dpoeng.cache.store import Store
from dpoeng.cache.trunk.index import TrunkIndex, commit_states, trunks_of
from dpoeng.cache.trunk.objects import as_float32
from dpoeng.cache.trunk.texts import text_key
from dpoeng.cache.verify import verify
from dpoeng.cli.main import main
from dpoeng.engine.config.fields import PrecomputeConfig, SweepConfig, TrainConfig
from dpoeng.engine.config.plan import PlanConfig
from dpoeng.engine.memory import fit
from dpoeng.engine.models.loading import load_model
from dpoeng.engine.models.quantized import quantized_tensors
from dpoeng.engine.models.sources import find_model
from dpoeng.engine.recipes import policy as policy_module
from dpoeng.engine.recipes.plan import make_plan, suggested
from dpoeng.engine.recipes.precompute import PrecomputeSummary, precompute_reference
from dpoeng.engine.recipes.recompute import recompute_pairs
from dpoeng.engine.recipes.sweeps.plan import plan_sweep
from dpoeng.engine.recipes.sweeps.run import run_sweep
from dpoeng.engine.recipes.train import train
from dpoeng.engine.reference import limits, trunk_pass

DEPTH, LAYER = 4, 2
QUICK: dict[str, Any] = {
    "max_steps": 3,
    "learning_rate": 1e-3,
    "lora_r": 4,
    "lora_dropout": 0.1,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "eval_share": 0.2,
    "train_last_layers": DEPTH - LAYER,
}


class Notes:
    """Collects notes."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)

    def task(self, *_: Any) -> Any:
        return contextlib.nullcontext(lambda amount, shown: None)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("deep") / "model", tokenizer, layers=DEPTH, hidden=64)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("rows") / "pairs.jsonl", pair_rows(12))


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, model: Path, pairs: Path) -> Path:
    """A cache with a trunk; one pair a forward, as QUICK trains."""
    cache = tmp_path_factory.mktemp("trunk") / "cache"
    precompute(cache, model, pairs)
    return cache


def precompute(cache: Path, model: Path, pairs: Path, **options: Any) -> PrecomputeSummary:
    settings = {"trunk_layer": LAYER, "batch_tokens": 1, **options}
    return precompute_reference(PrecomputeConfig(pairs=(pairs,), model=str(model), cache=cache, **settings))


def adapter_bytes(out: Path) -> dict[str, str]:
    return {name: digest for name, digest in tree(out / "adapter").items() if name != "README.md"}  # names the trunk


def both(cache: Path, root: Path, **options: Any) -> tuple[Path, Path]:
    """The output folders of a run of all layers, and of the same run from the trunk."""
    whole, above = root / "whole", root / "above"
    settings = {**QUICK, **options}
    assert not train(TrainConfig(cache=cache, output_dir=whole, **settings, trunk_layer=0)).loaded
    assert train(TrainConfig(cache=cache, output_dir=above, **settings)).loaded.startswith(f"from layer {LAYER}")
    return whole, above


# --------------------------------------------------------------------------- the same numbers


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_checkpointing": True, "loss_type": ("ipo",)},
        # One trained layer above another that is not.
        {"train_last_layers": None, "layers_to_transform": (3,), "lora_target_modules": ("q_proj", "down_proj")},
    ],
)
def test_the_adapter_is_the_same_to_the_byte(stored: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    whole, above = both(stored, tmp_path, **options)
    assert adapter_bytes(whole) == adapter_bytes(above)
    lines = [(out / "metrics.jsonl").read_text() for out in (whole, above)]
    assert lines[0] == lines[1]
    assert json.loads((above / "run.json").read_text())["trunk_layer"] == LAYER
    held = load_file(above / "adapter" / "adapter_model.safetensors")
    layers = {int(name.split(".layers.")[1].split(".")[0]) for name in held}
    assert layers == ({3} if "layers_to_transform" in options else {2, 3})


@pytest.mark.parametrize(
    ("phase_one", "options"),
    [
        # Other rows in a forward than in training; texts that stand apart and are padded.
        ({"batch_tokens": 2048}, {"per_device_train_batch_size": 2}),
        ({"layout": "separate"}, {"layout": "separate", "per_device_train_batch_size": 2}),
        pytest.param({"quantization": "8bit"}, {}, marks=pytest.mark.slow),
        ({"quantization": "4bit"}, {"gradient_checkpointing": True}),
    ],
)
def test_the_adapter_is_the_same_but_for_rounding(
    tmp_path: Path, model: Path, pairs: Path, phase_one: dict[str, Any], options: dict[str, Any]
) -> None:
    precompute(tmp_path / "cache", model, pairs, **phase_one)
    # Adam divides by the root of squares: where a gradient is near nothing, rounding would be a whole step.
    outs = both(tmp_path / "cache", tmp_path, **options, adam_epsilon=1e-3)
    one, other = (load_file(out / "adapter" / "adapter_model.safetensors") for out in outs)
    assert one.keys() == other.keys()
    assert max(float((one[name] - other[name]).abs().max()) for name in one) < 1e-6
    if "quantization" in phase_one:  # the same rows: the same codes, and the same bytes
        assert adapter_bytes(outs[0]) == adapter_bytes(outs[1])


def test_over_an_sft_adapter(tmp_path: Path, model: Path, pairs: Path) -> None:
    """The trunk holds states of base and SFT adapter; a new LoRA is stacked on what of it lies above."""
    sft = save_adapter(tmp_path / "sft", model, None)
    precompute(tmp_path / "cache", model, pairs, adapter=str(sft))
    whole, above = both(tmp_path / "cache", tmp_path, adapter_mode="stack")
    assert adapter_bytes(whole) == adapter_bytes(above)
    # Trained further, its layers below the trunk would move what enters it.
    config = TrainConfig(cache=tmp_path / "cache", output_dir=tmp_path / "out", max_steps=1, trunk_layer=LAYER)
    with pytest.raises(UserError, match="layers below the trunk are trained") as caught:
        train(config)
    assert "--adapter-mode stack" in caught.value.remedy


def test_an_sft_adapter_of_the_upper_layers_is_trained_further(tmp_path: Path, model: Path, pairs: Path) -> None:
    sft = save_adapter(tmp_path / "sft", model, [2, 3])
    precompute(tmp_path / "cache", model, pairs, adapter=str(sft))
    options = {**QUICK, "train_last_layers": None}
    del options["lora_r"]
    whole, above = (tmp_path / name for name in ("whole", "above"))
    for out, layer in ((whole, 0), (above, None)):
        train(TrainConfig(cache=tmp_path / "cache", output_dir=out, **options, trunk_layer=layer))
    assert json.loads((above / "run.json").read_text())["trunk_layer"] == LAYER
    assert adapter_bytes(whole) == adapter_bytes(above)


def save_adapter(folder: Path, model: Path, layers: list[int] | None) -> Path:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(5)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], layers_to_transform=layers, task_type="CAUSAL_LM")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(folder)
    return folder


def test_a_killed_run_continues_from_the_trunk(stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {**QUICK, "cache": stored, "save_steps": 1}
    train(TrainConfig(**settings, output_dir=tmp_path / "whole"))

    def stop(line: Any) -> None:
        if line["step"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(TrainConfig(**settings, output_dir=tmp_path / "killed"), on_metrics=stop)
    with pytest.raises(UserError, match="trunk_layer"):  # it would continue with other rounding
        train(TrainConfig(**settings, output_dir=tmp_path / "killed", trunk_layer=0))
    train(TrainConfig(**settings, output_dir=tmp_path / "killed"))
    assert adapter_bytes(tmp_path / "whole") == adapter_bytes(tmp_path / "killed")


def test_all_runs_of_a_sweep_begin_from_one_trunk(
    stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpoeng.engine.reference import loading

    loads: list[int | None] = []
    real = loading.load_policy_base

    def counted(*arguments: Any, **named: Any) -> Any:
        loads.append(named["trunk_layer"])
        return real(*arguments, **named)

    monkeypatch.setattr(loading, "load_policy_base", counted)
    options = {**QUICK, "cache": stored, "output_dir": tmp_path / "sweep"}
    results = run_sweep(plan_sweep(SweepConfig.model_validate({"vary": {"beta": [0.1, 0.3]}}), options))
    assert not any(result.error for result in results)
    assert loads == [LAYER]
    train(TrainConfig(**{**options, "output_dir": tmp_path / "alone"}, beta=0.3))
    assert adapter_bytes(tmp_path / "alone") == adapter_bytes(tmp_path / "sweep" / "beta=0.3")


# --------------------------------------------------------------------------- what is loaded


@pytest.mark.parametrize("quantization", ["none", "8bit"])
def test_nothing_below_the_trunk_is_loaded(tmp_path: Path, quantization: Any, tokenizer: Any) -> None:
    """By the allocator: of twelve layers with a large embedding, the last three and the head."""
    folder = save_tiny_model(tmp_path / "model", tokenizer, layers=12, hidden=128)
    loaded: list[Any] = []

    def load(layer: int | None) -> Callable[[], None]:
        how = {"quantization": quantization, "dtype": "auto", "device": torch.device("cpu"), "tokenizer": False}
        return lambda: loaded.append(load_model(find_model(str(folder)), **how, trunk_layer=layer))

    file_bytes = (folder / "model.safetensors").stat().st_size  # mapped, which the allocator counts too
    peaks = [trace_allocator(load(layer), torch.device("cpu")).peak_bytes - file_bytes for layer in (None, 9)]
    whole, above = (sum(t.nbytes for t in [*lm.base.parameters(), *quantized_tensors(lm.base)]) for lm in loaded)
    embedding, head = (
        of().weight.nbytes for of in (loaded[0].base.get_input_embeddings, loaded[0].base.get_output_embeddings)
    )
    norm = 4 * 128
    assert above == pytest.approx((whole - embedding - head - norm) / 4 + head + norm, rel=1e-6)
    if quantization != "none":  # else weights stay in the mapped file
        assert peaks[1] < above + 4 * 128 * 256 * 4
        assert peaks[1] < 0.6 * peaks[0]


def test_the_forecast_is_of_the_layers_that_are_run(
    stored: Path, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`train` hands the trunk to the simulation, which needs as much less as is not there."""
    asked: list[int] = []
    real = policy_module.decide_step

    def seen(*arguments: Any, **named: Any) -> Any:
        asked.append(named["trunk_layer"])
        return real(*arguments, **named)

    monkeypatch.setattr(policy_module, "decide_step", seen)
    monkeypatch.setattr(fit, "_is_small", lambda *_: False)
    above = train(TrainConfig(cache=stored, output_dir=tmp_path / "above", **QUICK))
    whole = train(TrainConfig(cache=stored, output_dir=tmp_path / "whole", **QUICK, trunk_layer=0))
    assert asked == [LAYER, 0]
    assert above.predicted_bytes is not None
    assert whole.predicted_bytes is not None
    half = sum(tensor.nbytes for name, tensor in load_file(model / "model.safetensors").items() if ".layers.0" in name)
    assert whole.predicted_bytes - above.predicted_bytes > 2 * half


# --------------------------------------------------------------------------- the cache's side


def test_log_probs_are_the_same_bytes_with_a_trunk_and_without(
    stored: Path, tmp_path: Path, model: Path, pairs: Path
) -> None:
    precompute(tmp_path / "plain", model, pairs, trunk_layer=None)
    assert Store.open(tmp_path / "plain").format == FORMAT_BYTES
    plain, with_trunk = tree(tmp_path / "plain", "objects", "views", "runs"), tree(stored, "objects", "views", "runs")
    assert {name: with_trunk.get(name) for name in plain} == plain


def test_it_is_added_to_a_cache_that_has_the_log_probs(stored: Path, tmp_path: Path, model: Path, pairs: Path) -> None:
    """Forwards that end at the layer give the same states."""
    cache = tmp_path / "cache"
    precompute(cache, model, pairs, trunk_layer=None)
    summary = precompute(cache, model, pairs)
    assert (summary.computed, summary.trunk_layer) == (0, LAYER)
    assert summary.trunk_texts > 24
    assert tree(cache, "objects", "views") == tree(stored, "objects", "views")
    again = precompute(cache, model, pairs)
    assert (again.computed, again.trunk_texts) == (0, 0)


@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.0, "gradient_accumulation_steps": 3}])
def test_the_layers_above_are_loaded_one_at_a_time(
    stored: Path, tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes; the files of the layers below are not read."""
    read: list[str] = []
    from dpoeng.engine.models.layers.files import LayerFiles

    one = LayerFiles.read
    monkeypatch.setattr(LayerFiles, "read", lambda self, n: (read.append(self.prefixes[n]), one(self, n))[1])
    whole, above = both(stored, tmp_path, **options)
    assert not read
    settings = {**QUICK, **options, "layer_offloading": "on"}
    summary = train(TrainConfig(cache=stored, output_dir=tmp_path / "layers", **settings))
    assert summary.loaded.startswith(f"from layer {LAYER}")
    assert "one at a time" in summary.loaded
    assert {*read} == {f"model.layers.{number}" for number in range(LAYER, DEPTH)}
    assert adapter_bytes(tmp_path / "layers") == adapter_bytes(above) == adapter_bytes(whole)
    assert (tmp_path / "layers/metrics.jsonl").read_text() == (above / "metrics.jsonl").read_text()


@pytest.mark.parametrize("first_without", [False, True])
def test_layer_offloading_stores_the_same_bytes(
    stored: Path, tmp_path: Path, model: Path, pairs: Path, first_without: bool
) -> None:
    """With the log-probs or after them; one layer at a time, all pairs of a pass through it."""
    cache = tmp_path / "cache"
    if first_without:
        precompute(cache, model, pairs, trunk_layer=None)
    precompute(cache, model, pairs, layer_offloading="on")
    assert tree(cache, "objects", "views") == tree(stored, "objects", "views")


def test_it_is_extended_with_pairs(tmp_path: Path, model: Path, pairs: Path) -> None:
    cache = tmp_path / "cache"
    few = write_jsonl(tmp_path / "few.jsonl", pair_rows(5))
    precompute(cache, model, few)
    before = tree(cache, "objects")
    precompute(cache, model, pairs)
    assert before.items() <= tree(cache, "objects").items()
    assert verify(cache, depth="all").ok
    assert train(TrainConfig(cache=cache, view="pairs", output_dir=tmp_path / "out", **QUICK)).loaded


@pytest.mark.parametrize("first_without", [False, True])
@pytest.mark.parametrize("kill_at", [1, 2, 3])
def test_a_pass_that_is_killed_leaves_the_same_bytes(
    tmp_path: Path, model: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch, kill_at: int, first_without: bool
) -> None:
    """Killed while it writes its first object, its second or third; with the log-probs or after them."""
    options = {"shard_tokens": 300}
    monkeypatch.setattr(trunk_pass, "OBJECT_BYTES", 40_000)
    for name in ("whole", "killed"):
        if first_without:
            precompute(tmp_path / name, model, pairs, **options, trunk_layer=None)
    precompute(tmp_path / "whole", model, pairs, **options)
    real, calls = trunk_pass.commit_states, 0

    def killed(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == kill_at:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(trunk_pass, "commit_states", killed)
    with pytest.raises(KeyboardInterrupt):
        precompute(tmp_path / "killed", model, pairs, **options)
    precompute(tmp_path / "killed", model, pairs, **options)
    folders = ("objects", "runs", "specs", "views")
    assert tree(tmp_path / "killed", *folders) == tree(tmp_path / "whole", *folders)
    assert len(list((tmp_path / "whole" / "objects").rglob("*.arrow"))) > 6


def test_a_damaged_object_is_named_set_aside_and_computed_again(
    stored: Path, tmp_path: Path, model: Path, pairs: Path
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(stored, cache)
    path = max((cache / "objects").rglob("*.arrow"), key=lambda file: file.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        train(TrainConfig(cache=cache, output_dir=tmp_path / "out", **QUICK))
    assert caught.value.code == "cache-corrupt"
    assert path.name in str(caught.value.where)
    assert precompute(cache, model, pairs).quarantined == 1
    assert tree(cache, "objects") == tree(stored, "objects")
    assert len(list((cache / "quarantine").iterdir())) == 2


def test_a_disk_that_is_too_small_is_refused_before_anything_is_computed(
    tmp_path: Path, model: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from collections import namedtuple

    from dpoeng.engine.recipes import precompute as recipe

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(limits.shutil, "disk_usage", lambda _: usage(10**6, 9 * 10**5, 10**5))
    monkeypatch.setattr(recipe, "load_reference", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(UserError, match="for the hidden states of") as caught:
        precompute_reference(
            PrecomputeConfig(pairs=(pairs,), model=str(model), cache=tmp_path / "c", trunk_layer=LAYER)
        )
    assert caught.value.code == "cache-disk-small"


def test_states_are_exported_as_the_model_gives_them(stored: Path, tmp_path: Path, model: Path) -> None:
    """Against transformers' own hidden states, text by text."""
    import pyarrow.parquet
    from transformers import AutoModelForCausalLM

    with pytest.raises(SystemExit) as ended:
        main(["cache", "export", str(stored), str(tmp_path / "states.parquet"), "--trunk-layer", str(LAYER)])
    assert ended.value.code == 0
    table = pyarrow.parquet.read_table(tmp_path / "states.parquet")
    assert table.schema.metadata[b"dpoeng.trunk.width"] == b"64"
    plain = AutoModelForCausalLM.from_pretrained(model)
    rows = table.to_pylist()
    assert len(rows) == 12
    for row in rows[::4]:
        for side in ("chosen", "rejected"):
            ids = torch.tensor([[*row["prompt_ids"], *row[f"{side}_ids"]]])
            with torch.no_grad():
                own = plain(ids, output_hidden_states=True).hidden_states[LAYER][0]
            found = torch.tensor([*row["prompt_states"], *row[f"{side}_states"]]).view(-1, 64)
            assert torch.allclose(found, own, atol=1e-5)


def test_stored_states_are_checked_against_the_model(stored: Path, tmp_path: Path) -> None:
    """The deepest verification: the stored states give the cached log-probs; wrong ones do not."""
    cache = tmp_path / "cache"
    shutil.copytree(stored, cache)
    report = recompute_pairs(View.open(cache), 4)
    assert report.trunks[LAYER].pairs == 4
    assert report.trunks[LAYER].max_diff < 1e-5
    assert recompute_pairs(View.open(cache), 4, layer_offloading="on") == report
    store = Store.open(cache)
    (spec,) = trunks_of(store, store.reference_digests()[0]).values()
    wrong = TrunkIndex.open(store, spec.digest)
    texts = {
        key: 2.0 * as_float32(wrong.states(*ids), "float32") for key, ids in texts_of_view(View.open(cache)).items()
    }
    shutil.rmtree(cache / "runs" / spec.digest)
    commit_states(store, spec, [(key, states.astype("<f4").view("u1")) for key, states in texts.items()], {})
    report = recompute_pairs(View.open(cache), 4)
    assert report.mean_diff < 1e-5
    assert not report.trunks[LAYER].ok
    assert not report.ok


def texts_of_view(view: View) -> dict[bytes, tuple[Any, ...]]:
    found: dict[bytes, tuple[Any, ...]] = {}
    for i in range(len(view)):
        ids = view[i].ids
        for response in (None, ids.chosen_ids, ids.rejected_ids):
            found[text_key(ids.prompt_ids, response)] = (ids.prompt_ids, response)
    return found


def test_the_plan_knows_what_lies_above_a_trunk(model: Path) -> None:
    """Peaks are those of `train`'s own forecast; the disk is tokens x width x bytes."""
    asked = {"model": str(model), "gpu": ("24gb",), "max_length": 64, "prompt_length": 16, "compare": False}
    whole, above = (make_plan(PlanConfig(**asked, **more)) for more in ({}, {"trunk_layer": 0.5}))
    assert (above.trunk_layer, above.trunk_bytes) == (LAYER, 1000 * (16 + 2 * 48) * 64 * 2)
    layers = sum(parameter.numel() for parameter in empty_layers(model))
    embedding = 400 * 64 * 2
    saved = whole.step.by_kind["weights"] - above.step.by_kind["weights"]
    assert saved == pytest.approx(layers / 2, rel=0.1, abs=1.2 * embedding)
    assert above.cards[0].times[1].flops < 0.75 * whole.cards[0].times[1].flops
    assert above.cards[0].times[0].flops == whole.cards[0].times[0].flops
    assert suggested(above, above.cards[0])["train_last_layers"] == 2


def empty_layers(model: Path) -> list[Any]:
    from dpoeng.engine.models.loading import empty_model
    from dpoeng.engine.models.sources import read_fields

    lm = empty_model(read_fields(find_model(str(model))), quantization="none", dtype=torch.bfloat16)
    return list(lm.backbone.layers.parameters())


# --------------------------------------------------------------------------- refusals and notes


def test_an_unsuitable_start_of_a_run_is_refused(stored: Path, tmp_path: Path) -> None:
    def refused(**options: Any) -> str:
        with pytest.raises(UserError) as caught:
            train(TrainConfig(cache=stored, output_dir=tmp_path / "out", **{**QUICK, **options}))
        assert not (tmp_path / "out" / "run.json").exists()
        return caught.value.code

    assert refused(trunk_layer=LAYER, train_last_layers=3) == "trunk-below"
    assert refused(trunk_layer=LAYER, train_last_layers=None) == "trunk-below"
    assert refused(trunk_layer=3, train_last_layers=1) == "cache-no-trunk"
    assert refused(trunk_layer=LAYER, quantization="4bit") == "trunk-unsupported"
    assert refused(trunk_layer=LAYER, dtype="bfloat16") == "trunk-unsupported"
    assert refused(trunk_layer=4) == "config-value"
    assert refused(train_last_layers=5) == "config-value"
    assert refused(train_last_layers=None, layers_to_transform=(4,)) == "config-value"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"train_last_layers": 3}, "trunk at layer 2 is not used: layer 1 is trained too"),
        ({"quantization": "4bit"}, "stored hidden states are not used: --quantization 4bit"),
        ({"view": "more"}, "lacks 4 pairs of this run"),
    ],
)
def test_a_trunk_that_goes_unused_is_noted(
    stored: Path, tmp_path: Path, model: Path, options: dict[str, Any], words: str
) -> None:
    cache, notes = tmp_path / "cache", Notes()
    shutil.copytree(stored, cache)
    more = write_jsonl(tmp_path / "more.jsonl", pair_rows(16))
    precompute(cache, model, more, trunk_layer=None)
    settings = {**QUICK, "view": "pairs", "max_steps": 1, **options}
    summary = train(TrainConfig(cache=cache, output_dir=tmp_path / "out", **settings), notes)
    assert not summary.loaded
    assert any(words in text for text in notes.texts), notes.texts


def test_what_a_trunk_would_save_is_noted(tmp_path: Path, model: Path, pairs: Path) -> None:
    notes = Notes()
    precompute(tmp_path / "cache", model, pairs, trunk_layer=None)
    train(TrainConfig(cache=tmp_path / "cache", output_dir=tmp_path / "out", **{**QUICK, "max_steps": 1}), notes)
    (text,) = [text for text in notes.texts if "--trunk-layer 2" in text]
    assert "2 of 4 layers" in text
    store = Store.open(tmp_path / "cache")
    precompute(tmp_path / "cache", model, pairs)
    (spec,) = trunks_of(store, store.reference_digests()[0]).values()
    stored_mb = sum(one.data.nbytes for _, one in TrunkIndex.open(store, spec.digest)._objects) / 1e6
    assert float(text.split("(")[1].split(" MB")[0]) == pytest.approx(stored_mb, rel=0.1, abs=0.5)


@contextlib.contextmanager
def upper_layers_that_look_below() -> Iterator[None]:
    """The third layer adds what the first one has computed, as layers do that share keys and values."""
    from transformers.models.llama import modeling_llama

    real, first = modeling_llama.LlamaDecoderLayer.forward, []

    def forward(self: Any, hidden_states: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
        output: torch.Tensor = real(self, hidden_states, *arguments, **named)
        number = self.self_attn.layer_idx
        if number == 0:
            first[:] = [output]
        held = first[0] if number == 3 and first and first[0].shape == output.shape else 0.0 * output
        if number == 3:
            first.clear()
        return output + held

    modeling_llama.LlamaDecoderLayer.forward = forward
    try:
        yield
    finally:
        modeling_llama.LlamaDecoderLayer.forward = real


def test_an_architecture_whose_upper_layers_need_more_is_found_out(tmp_path: Path, model: Path, pairs: Path) -> None:
    with upper_layers_that_look_below(), pytest.raises(UserError, match="need more from below") as caught:
        precompute(tmp_path / "cache", model, pairs)
    assert caught.value.code == "trunk-unsupported"
