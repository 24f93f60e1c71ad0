"""Towers for images and sound are neither loaded nor part of a reference's identity, and nothing of them gets lost."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dpoeng_testing import pair_rows, save_multimodal, write_jsonl
from safetensors.torch import load_file, save_file

from dpoeng.cache.store import Store
from dpoeng.engine.config.fields import PrecomputeConfig
from dpoeng.engine.models.adapters import add_policy_adapter, save_policy_adapter
from dpoeng.engine.models.checkpoint_names import Beside, beside_language
from dpoeng.engine.models.full_finetuning import save_model, train_all
from dpoeng.engine.models.loading import empty_model, load_model
from dpoeng.engine.models.model import CausalLM, set_mode
from dpoeng.engine.models.multimodal.towers import left_out
from dpoeng.engine.models.sources import find_adapter, find_model, read_fields
from dpoeng.engine.recipes.merge import merge
from dpoeng.engine.recipes.precompute import PrecomputeSummary, precompute_reference
from dpoeng.engine.recipes.quantize import quantize
from dpoeng.engine.reference import identity
from dpoeng.engine.runtime.progress import NoProgress
from dpoeng.engine.scoring.choose_layout import choose_layout

IDS = torch.arange(2, 42)[None]

TOWERS = {
    "gemma3": {"model.vision_tower", "model.multi_modal_projector"},
    "qwen2_5_vl": {"model.visual"},
    "mistral3": {"model.vision_tower", "model.multi_modal_projector"},
    "qwen3_vl": {"model.visual"},
    "idefics2": {"model.vision_model", "model.connector"},  # a connector with layers of its own
    "gemma4": {"model.vision_tower", "model.embed_vision"},  # asks for values before its decoder
}
"""Types whose causal class is the multimodal one, or that have no other; and their towers."""

WITH_TEXT_CLASS = ("llama4", "qwen3_5")


def load(folder: Path, **how: Any) -> CausalLM:
    how = {"quantization": "none", "dtype": "float32", **how}
    return load_model(find_model(str(folder)), device=torch.device("cpu"), tokenizer=False, **how)


@torch.no_grad()
def log_probs(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model.eval()(input_ids=IDS, use_cache=False).logits
    return logits.double().log_softmax(-1)


def whole(folder: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    model, info = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    return model.eval()


def is_of_tower(name: str) -> bool:
    return any(part in name for part in ("vision", "visual", "projector", "connector"))


def changed(folder: Path, into: Path, which: Callable[[str], bool]) -> Path:
    """A copy whose first tensor of this kind has another value in one place."""
    shutil.copytree(folder, into)
    tensors = load_file(into / "model.safetensors")
    tensors[min(filter(which, tensors))].view(-1)[0] += 1
    save_file(tensors, into / "model.safetensors", metadata={"format": "pt"})
    return into


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_multimodal("gemma3", tmp_path_factory.mktemp("gemma3") / "model")


@pytest.mark.parametrize(
    "model_type", [pytest.param(name, marks=[pytest.mark.slow] * (i > 3)) for i, name in enumerate(TOWERS)]
)
def test_text_runs_without_the_tower(model_type: str, tmp_path: Path) -> None:
    model = save_multimodal(model_type, tmp_path / "model")
    lm = load(model)
    assert set(left_out(lm.base)) == TOWERS[model_type]
    assert not [name for name, _ in lm.base.named_parameters() if name.startswith(tuple(TOWERS[model_type]))]
    (remark,) = lm.remarks
    assert all(tower.rpartition(".")[2] in remark for tower in TOWERS[model_type])
    torch.testing.assert_close(log_probs(lm.base), log_probs(whole(model)), atol=1e-4, rtol=0)
    set_mode(lm, training=False)
    choose_layout(lm)  # ours against the model's own forward
    # The forecast counts what is loaded: the same parameters.
    empty = empty_model(read_fields(find_model(str(model))), quantization="none", dtype=torch.float32)
    assert {name for name, _ in empty.base.named_parameters()} == {name for name, _ in lm.base.named_parameters()}


@pytest.mark.parametrize("model_type", ["gemma3", "mistral3", *WITH_TEXT_CLASS])
def test_the_identity_is_that_of_the_language_model(model_type: str, tmp_path: Path) -> None:
    model = save_multimodal(model_type, tmp_path / "model")
    tower = changed(model, tmp_path / "tower", is_of_tower)
    text = changed(model, tmp_path / "text", lambda name: not is_of_tower(name))
    fields = json.loads((tower / "config.json").read_text())
    fields["vision_config"]["patch_size"] = 7
    (tower / "config.json").write_text(json.dumps(fields))
    config = PrecomputeConfig(pairs=("p.jsonl",), device="cpu", dtype="float32")
    specs = [identity.reference_spec(config, find_model(str(one)), None) for one in (model, tower, text)]
    assert specs[0] == specs[1]
    assert specs[0].fields["weights"] != specs[2].fields["weights"]
    assert "vision_config" not in specs[0].fields["config"]
    assert "text_config" in specs[0].fields["config"]
    found = beside_language(find_model(str(model))).tensors
    assert found == {name for name in load_file(model / "model.safetensors") if is_of_tower(name)}


def test_text_models_keep_their_identity(tiny_model: Path) -> None:
    assert beside_language(find_model(str(tiny_model))) == Beside()


class Notes(NoProgress):
    """Keeps what the user is told."""

    def __init__(self, notes: list[str]) -> None:
        self.notes = notes

    def note(self, text: str) -> None:
        self.notes.append(text)


def precompute(model: Path, work: Path) -> tuple[PrecomputeSummary, list[str]]:
    notes: list[str] = []
    file = write_jsonl(work / "pairs.jsonl", pair_rows(4))
    config = PrecomputeConfig(pairs=(file,), model=str(model), cache=work / "cache", device="cpu", dtype="float32")
    return precompute_reference(config, Notes(notes)), notes


def test_a_cache_with_the_tower_in_its_identity_stays_valid(
    gemma: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as before:  # as it was once
        before.setattr(identity, "beside_language", lambda source: Beside())
        first, _ = precompute(gemma, tmp_path)
    again, notes = precompute(gemma, tmp_path)
    assert (again.spec, again.computed, again.reused) == (first.spec, 0, 4)
    assert any("together with its parts for images" in note for note in notes)
    # With another tower the old numbers are not found: they are computed, and then serve every tower.
    other, notes = precompute(changed(gemma, tmp_path / "tower", is_of_tower), tmp_path)
    assert (other.computed, other.spec != first.spec) == (4, True)
    assert not any("together with its parts" in note for note in notes)
    last, _ = precompute(gemma, tmp_path)
    assert (last.spec, last.computed) == (other.spec, 0)
    assert Store.open(tmp_path / "cache").reference_digests() == sorted({first.spec, other.spec})


def test_a_quantised_checkpoint_keeps_the_tower(gemma: Path, tmp_path: Path) -> None:
    quantize(find_model(str(gemma)), tmp_path / "8bit", quantization="8bit", dtype="float32")
    names = {name.removesuffix(".SCB") for name in load_file(tmp_path / "8bit" / "model.safetensors")}
    assert set(load_file(gemma / "model.safetensors")) <= names
    lm, on_load = load(tmp_path / "8bit", quantization="8bit"), load(gemma, quantization="8bit")
    assert set(left_out(lm.base)) == TOWERS["gemma3"]
    assert torch.equal(log_probs(lm.base), log_probs(on_load.base))


def test_a_model_trained_whole_keeps_the_tower(gemma: Path, tmp_path: Path) -> None:
    lm = train_all(load(gemma))
    with torch.no_grad():
        lm.base.get_input_embeddings().weight += 0.01
    assert lm.source is not None
    (tmp_path / "trained").mkdir()
    save_model(lm, lm.source, tmp_path / "trained")
    before, after = whole(gemma), whole(tmp_path / "trained")
    for name, parameter in before.named_parameters():
        if name.startswith(tuple(TOWERS["gemma3"])):
            assert torch.equal(parameter, after.get_parameter(name)), name
    torch.testing.assert_close(log_probs(after), log_probs(lm.base), atol=1e-4, rtol=0)


def adapter_in_both(model: Path, folder: Path, targets: tuple[str, ...] = ("q_proj", "v_proj")) -> torch.Tensor:
    """An adapter of plain peft in decoder and tower, as `all-linear` makes it; returns its log-probs."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    adapted = get_peft_model(whole(model), LoraConfig(r=2, target_modules=list(targets)))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(folder)
    assert [name for name in load_file(folder / "adapter_model.safetensors") if is_of_tower(name)]
    return log_probs(adapted)


@pytest.mark.parametrize(
    ("model_type", "targets"), [("gemma3", ("q_proj", "v_proj")), ("qwen3_5", ("down_proj", "qkv", "proj"))]
)
def test_an_adapter_of_the_tower_is_carried_on(model_type: str, targets: tuple[str, ...], tmp_path: Path) -> None:
    """For one with a multimodal class alone, and one with a class for text, whose names in an adapter differ."""
    from peft import PeftModel

    model, sft, saved = save_multimodal(model_type, tmp_path / "model"), tmp_path / "sft", tmp_path / "adapter"
    expected = adapter_in_both(model, sft, targets)
    lm = add_policy_adapter(load(model), "continue", find_adapter(str(sft)), {})
    torch.testing.assert_close(log_probs(lm.model), expected, atol=1e-4, rtol=0)
    assert "are saved as they are" in lm.remarks[-1]
    save_policy_adapter(lm, saved)
    tensors, before = load_file(saved / "adapter_model.safetensors"), load_file(sft / "adapter_model.safetensors")
    towers = [name for name in before if is_of_tower(name)]
    assert towers
    assert all(torch.equal(tensors[name], before[name]) for name in towers)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        loaded = PeftModel.from_pretrained(whole(model), str(saved))
    torch.testing.assert_close(log_probs(loaded), expected, atol=1e-4, rtol=0)
    placed = {name.replace(".default.", ".") for name, _ in loaded.named_parameters() if "lora_" in name}
    assert placed == set(tensors)
    # Merging works on the files, towers included.
    source = find_model(str(model))
    merge(source, [find_adapter(str(saved))], tmp_path / "merged")
    old, new = load_file(model / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    assert [name for name in old if is_of_tower(name) and not torch.equal(old[name], new[name])]


def test_below_a_new_adapter_the_part_in_the_tower_is_left_out(gemma: Path, tmp_path: Path) -> None:
    expected = adapter_in_both(gemma, tmp_path / "sft")
    sft = find_adapter(str(tmp_path / "sft"))
    lm = add_policy_adapter(load(gemma), "stack", sft, {"r": 2, "target_modules": "all-linear"})
    torch.testing.assert_close(log_probs(lm.model), expected, atol=1e-4, rtol=0)
    assert "are not loaded" in lm.remarks[-1]
