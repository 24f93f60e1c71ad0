"""A checkpoint whose files and model differ: refused by name, or told where a part is rightly left out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpoeng.cache.errors import UserError
from dpoeng.engine.models.loading import load_model
from dpoeng.engine.models.sources import find_model

Tensors = dict[str, torch.Tensor]


def changed(tiny: Path, folder: Path, change: Callable[[Tensors], None], **fields: Any) -> Path:
    shutil.copytree(tiny, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return folder


def load(folder: Path) -> Any:
    return load_model(
        find_model(str(folder)), quantization="none", dtype="auto", device=torch.device("cpu"), tokenizer=False
    )


Q = "model.layers.0.self_attn.q_proj"


def as_float8(tensors: Tensors) -> None:
    tensors[f"{Q}.weight"] = tensors[f"{Q}.weight"].to(torch.float8_e4m3fn)
    tensors[f"{Q}.weight_scale"] = torch.tensor(0.01)


def add(name: str, *shape: int) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: torch.ones(*shape)})


WRONG: dict[str, tuple[Callable[[Tensors], None], dict[str, Any], str, str]] = {
    "float8 with scales and no record": (as_float8, {}, "quantization-stored", f"{Q}.weight (F8_E4M3)"),
    "scales beside wide weights": (add(f"{Q}.weight_scale", 1), {}, "quantization-stored", "weight_scale"),
    "whole numbers, as MLX packs them": (
        lambda tensors: tensors.update({f"{Q}.weight": torch.ones(32, 4, dtype=torch.uint32)}),
        {"quantization": {"group_size": 64, "bits": 4}},
        "quantization-stored",
        "MLX",
    ),
    "a bias that config.json denies": (add(f"{Q}.bias", 32), {}, "model-unexpected-tensors", f"{Q}.bias"),
    "a bias of the head": (add("lm_head.bias", 400), {}, "model-unexpected-tensors", "lm_head.bias"),
    "a norm that the layer lacks": (
        add("model.layers.0.self_attn.q_norm.weight", 8), {}, "model-unexpected-tensors", "q_norm.weight",
    ),
    "a layer too many": (lambda _: None, {"num_hidden_layers": 1}, "model-unexpected-tensors", "model.layers.1."),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_tensors_without_a_place_stop_the_load(name: str, tiny_model: Path, tmp_path: Path) -> None:
    change, fields, code, word = WRONG[name]
    with pytest.raises(UserError) as caught:
        load(changed(tiny_model, tmp_path / "model", change, **fields))
    assert caught.value.code == code
    assert word in str(caught.value.message) + str(caught.value.found)


HARMLESS = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": (4,),
    "model.layers.0.attn.masked_bias": (1,),
}


def test_buffers_of_older_releases_pass_in_silence(tiny_model: Path, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        for name, shape in HARMLESS.items():
            add(name, *shape)(tensors)

    assert load(changed(tiny_model, tmp_path / "model", change)).remarks == ()


def test_parts_that_text_does_not_pass_through_are_told(tiny_model: Path, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        add("model.visual.blocks.0.attn.qkv.weight", 4, 4)(tensors)
        add("mtp.layers.0.fc.weight", 4, 4)(tensors)

    (remark,) = load(changed(tiny_model, tmp_path / "model", change)).remarks
    assert "visual (1 tensor), mtp (1 tensor)" in remark
