"""Right adapters under other names are loaded: of another class, of a compiled model, of experts one by one."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from dpoeng_testing import save_multimodal
from safetensors.torch import load_file, save_file

from dpoeng.bench.studies.tiny_models import save_tiny
from dpoeng.cache.errors import UserError
from dpoeng.engine.config.fields import TrainConfig
from dpoeng.engine.models.adapters import (
    add_policy_adapter,
    check_savable,
    load_reference_adapter,
    make_trainable,
    save_policy_adapter,
)
from dpoeng.engine.models.checkpoint_names import class_to_load
from dpoeng.engine.models.full_finetuning import save_model, train_all
from dpoeng.engine.models.loading import load_model
from dpoeng.engine.models.model import CausalLM, set_mode
from dpoeng.engine.models.model_config import auto_class_of
from dpoeng.engine.models.sources import find_adapter, find_model
from dpoeng.engine.recipes.merge import merge

IDS = torch.arange(2, 42)[None]


def load(folder: Path) -> CausalLM:
    return load_model(
        find_model(str(folder)), quantization="none", dtype="float32", device=torch.device("cpu"), tokenizer=False
    )


def adapter_of(model: Path, folder: Path, loader: Any, **lora: Any) -> torch.Tensor:
    """Saves a random adapter, made by plain peft on the class that `loader` gives; returns its log-probs."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = loader.from_pretrained(model, dtype=torch.float32)
    adapted = get_peft_model(base, LoraConfig(**{"r": 4, "target_modules": ["q_proj", "down_proj"], **lora}))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(folder)
    return log_probs(adapted)


@torch.no_grad()
def log_probs(model: Any) -> torch.Tensor:
    try:
        logits: torch.Tensor = model.eval()(input_ids=IDS, use_cache=False).logits
    except AttributeError as error:  # transformers 5.24's Llama 4 asks its decoder for outputs of images
        if "image_outputs" not in str(error):
            raise
        pytest.skip(f"transformers {transformers.__version__} does not run {type(model).__name__} on text alone")
    return logits.double().log_softmax(-1)


def through_dpoeng(model: Path, adapter: Path) -> torch.Tensor:
    lm = load_reference_adapter(load(model), find_adapter(str(adapter)))
    set_mode(lm, training=False)
    return log_probs(lm.model)


def renamed(folder: Path, change: Callable[[str], str]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({change(name): tensor for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("multimodal")
    return {name: save_tiny(name, root / name) for name in ("gemma3", "qwen3_5")}


def test_names_of_a_compiled_model(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    truth = adapter_of(tiny_model, tmp_path, AutoModelForCausalLM)
    renamed(tmp_path, lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."))
    torch.testing.assert_close(through_dpoeng(tiny_model, tmp_path), truth, atol=1e-4, rtol=0)


@pytest.mark.parametrize("where", ["language_model.model.layers.", "model.layers.", "model.language_model.layers."])
def test_names_of_other_classes_of_a_multimodal_model(multimodal: dict[str, Path], tmp_path: Path, where: str) -> None:
    """As transformers before 4.52 had them, as the text class has them, and as the whole class has them."""
    from transformers import AutoModelForCausalLM

    targets = r".*language_model.*\.(q_proj|down_proj)"
    truth = adapter_of(multimodal["gemma3"], tmp_path, AutoModelForCausalLM, target_modules=targets)
    renamed(tmp_path, lambda name: name.replace("model.language_model.layers.", where))
    torch.testing.assert_close(through_dpoeng(multimodal["gemma3"], tmp_path), truth, atol=1e-4, rtol=0)


def test_an_adapter_of_the_whole_class_on_the_text_class(multimodal: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    model = save_multimodal("qwen3_5", tmp_path / "whole")
    truth = adapter_of(model, tmp_path / "adapter", AutoModelForImageTextToText)
    assert any(".language_model." in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert type(load(model).base).__name__ == "Qwen3_5ForCausalLM"
    torch.testing.assert_close(through_dpoeng(model, tmp_path / "adapter"), truth, atol=1e-4, rtol=0)


def test_experts_that_were_adapted_one_by_one(tmp_path: Path) -> None:
    """As transformers 4 had Mixtral; peft stacks them, and what it loads is not taken for another adapter."""
    from peft import LoraConfig, PeftModel
    from transformers import AutoModelForCausalLM

    model, folder = save_tiny("mixtral", tmp_path / "model"), tmp_path / "adapter"
    LoraConfig(r=2, target_modules=["q_proj", "w1", "w2", "w3"], task_type="CAUSAL_LM").save_pretrained(folder)
    torch.manual_seed(0)
    tensors = {}
    for layer in range(2):
        shapes = {f"{layer}.block_sparse_moe.experts.{e}.{w}": (32, 48) for e in range(4) for w in ("w1", "w3")}
        shapes |= {f"{layer}.block_sparse_moe.experts.{e}.w2": (48, 32) for e in range(4)}
        shapes[f"{layer}.self_attn.q_proj"] = (32, 32)
        for name, (into, out) in shapes.items():
            tensors[f"base_model.model.model.layers.{name}.lora_A.weight"] = 0.3 * torch.randn(2, into)
            tensors[f"base_model.model.model.layers.{name}.lora_B.weight"] = 0.3 * torch.randn(out, 2)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    before = log_probs(base)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys")
        truth = log_probs(PeftModel.from_pretrained(base, str(folder)))
    assert float((before - truth).abs().mean()) > 0.01
    torch.testing.assert_close(through_dpoeng(model, folder), truth, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("model_type", "targets"),
    [
        ("qwen3_5", ["down_proj"]),
        ("llama4", ["q_proj", "o_proj"]),
        ("gemma3", ["q_proj", "down_proj"]),
        *(
            pytest.param(name, ["q_proj", "down_proj"], marks=pytest.mark.slow)
            for name in ("qwen2_5_vl", "mistral3", "qwen3_vl")
        ),
    ],
)
def test_a_saved_adapter_loads_in_the_class_that_the_config_names(
    model_type: str, targets: list[str], tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    model = save_multimodal(model_type, tmp_path / "whole")
    lm = add_policy_adapter(load(model), "new", None, {"r": 2, "target_modules": targets})
    for _, parameter in lm.trainable_parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    truth = log_probs(lm.model)
    save_policy_adapter(lm, tmp_path / "adapter")
    fields = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == str(model)
    whole = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32)
    assert float((log_probs(whole) - truth).abs().mean()) > 0.05
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        whole = PeftModel.from_pretrained(whole, str(tmp_path / "adapter"))
    assert not [name for name, _ in whole.named_modules() if "vision" in name and "lora_A" in name]
    torch.testing.assert_close(log_probs(whole), truth, atol=1e-4, rtol=0)
    # And back: by dpoeng, and merged, as the whole and as its text part.
    torch.testing.assert_close(through_dpoeng(model, tmp_path / "adapter"), truth, atol=1e-4, rtol=0)
    merge(find_model(str(model)), [find_adapter(str(tmp_path / "adapter"))], tmp_path / "merged")
    for kind in (AutoModelForImageTextToText, auto_class_of(model)):
        merged, info = kind.from_pretrained(tmp_path / "merged", dtype=torch.float32, output_loading_info=True)
        assert not info["missing_keys"]
        torch.testing.assert_close(log_probs(merged), truth, atol=1e-3, rtol=0)


def test_a_model_trained_whole_keeps_the_parts_that_its_config_promises(tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    model = save_multimodal("qwen3_5", tmp_path / "whole")
    lm = train_all(load(model))
    with torch.no_grad():
        lm.base.lm_head.weight += 0.1 * torch.randn_like(lm.base.lm_head.weight)
    assert lm.source is not None
    (tmp_path / "trained").mkdir()
    save_model(lm, lm.source, tmp_path / "trained")
    before = AutoModelForImageTextToText.from_pretrained(model)
    after, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "trained", output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"]
    assert all(torch.equal(a, b) for a, b in zip(before.model.parameters(), after.model.parameters(), strict=True))
    torch.testing.assert_close(log_probs(after), log_probs(lm.model), atol=1e-4, rtol=0)
    # The lines of run.json name the class that reads all of it.
    assert class_to_load(lm.source, lm.base) == "Qwen3_5ForConditionalGeneration"


def test_the_base_is_named_as_the_user_named_it(tiny_model: Path, tmp_path: Path) -> None:
    lm = add_policy_adapter(load(tiny_model), "new", None, {"r": 2, "target_modules": ["q_proj"]})
    assert lm.source is not None
    lm.source = replace(lm.source, name="someone/tiny", revision="abc123")
    save_policy_adapter(lm, tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (fields["base_model_name_or_path"], fields["revision"]) == ("someone/tiny", "abc123")


def test_empty_tensors_say_what_they_are(sft_adapter: Path, tmp_path: Path, tiny_model: Path) -> None:
    tensors = load_file(sft_adapter / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text((sft_adapter / "adapter_config.json").read_text())
    save_file({name: torch.zeros(0) for name in tensors}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match="empty") as caught:
        through_dpoeng(tiny_model, tmp_path)
    assert "ZeRO-3" in str(caught.value.found)


def test_another_size_shows_the_tensor(sft_adapter: Path, tmp_path: Path, tiny_model: Path) -> None:
    tensors = load_file(sft_adapter / "adapter_model.safetensors")
    fields = json.loads((sft_adapter / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    first = min(tensors)
    save_file({**tensors, first: tensors[first][:, :8].contiguous()}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError) as caught:
        through_dpoeng(tiny_model, tmp_path)
    assert "size mismatch" in str(caught.value.found)
    assert "resize" in str(caught.value.remedy)


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [("laguna", {}), ("llama", {}), ("qwen3_moe", {"lora_target_parameters": ["gate_up_proj", "down_proj"]})],
)
def test_what_plain_peft_would_lose_is_told_before_training(
    model_type: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    from peft import PeftModel, get_peft_model_state_dict

    model = save_tiny(model_type, tmp_path / "model")
    lm = make_trainable(load(model), TrainConfig.model_validate({"lora_r": 2, **settings}), "new")
    for _, parameter in lm.trainable_parameters():
        torch.nn.init.normal_(parameter)
    save_policy_adapter(lm, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = PeftModel.from_pretrained(auto_class_of(model).from_pretrained(model), str(tmp_path / "adapter"))
    read = get_peft_model_state_dict(plain, save_embedding_layers=False)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    lost = sum(not torch.equal(read[name], tensor) for name, tensor in saved.items())
    before = lm.remarks
    check_savable(lm)
    told = [remark for remark in lm.remarks[len(before) :] if "plain peft" in remark]
    assert lost == {"laguna": 6}.get(model_type, 0)
    assert [f"loads {lost} of the {len(saved)} tensors" in remark for remark in told] == [True] * bool(lost)
