"""Models and adapters from strangers: what they claim is refused by name before anything is read or allocated."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest

from dpoeng.cache.errors import UserError
from dpoeng.engine.models.foreign.checkpoints import MAX_HEADER_BYTES, check_pattern
from dpoeng.engine.models.sources import find_adapter, find_model


def refusal(name: str, *, adapter: bool = False) -> UserError:
    with pytest.raises(UserError) as caught:
        (find_adapter if adapter else find_model)(name)
    assert caught.value.code in ("checkpoint-claims", "checkpoint-json")
    assert caught.value.remedy
    return caught.value


def indexed(tmp_path: Path, weight_map: Any) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("outside", ["../outside.safetensors", "a/../../outside.safetensors", "ABSOLUTE"])
def test_an_index_names_no_file_outside(tmp_path: Path, outside: str) -> None:
    secret = tmp_path / "outside.safetensors"
    secret.write_bytes(bytes(16))
    name = str(secret) if outside == "ABSOLUTE" else outside
    error = refusal(str(indexed(tmp_path, {"w": name})))
    assert name == error.found
    assert "weight_map" in str(error.where)


@pytest.mark.parametrize("weight_map", [["a.safetensors"], "x", {"a": 1}, {"a": None}, {"a": "weights.bin"}, 7])
def test_an_index_is_a_map_of_safetensors(tmp_path: Path, weight_map: Any) -> None:
    refusal(str(indexed(tmp_path, weight_map)))


def test_links_of_the_hub_are_followed(tmp_path: Path) -> None:
    folder = indexed(tmp_path, {"w": "model-1.safetensors"})
    (tmp_path / "blob").write_bytes(bytes(16))
    (folder / "model-1.safetensors").symlink_to("../blob")
    assert find_model(str(folder)).weight_files == (folder / "model-1.safetensors",)


def test_a_header_longer_than_any_models_is_refused(tmp_path: Path) -> None:
    folder = indexed(tmp_path, {})
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", MAX_HEADER_BYTES + 1))
        file.truncate(MAX_HEADER_BYTES + 9)
    assert "32 MiB" in str(refusal(str(folder)).expected)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 10**12),
        ("vocab_size", 1 << 23),  # possible, but not with these files
        ("head_dim", 0),
        ("num_hidden_layers", 10**9),
        ("hidden_size", -1),
        ("hidden_size", "large"),
        ("num_attention_heads", 1.5),
        ("text_config", {"vocab_size": 10**12}),
        ("intermediate_size", [64, 10**12]),
    ],
)
def test_sizes_that_no_model_has(tiny_model: Path, tmp_path: Path, field: str, value: Any) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    held = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**held, field: value}))
    assert (field if field != "text_config" else "vocab_size") in str(refusal(str(folder)).where)


def test_a_config_of_brackets_alone(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "config.json").write_text("[" * 100_000)
    refusal(str(folder))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lora_alpha", 1e308),
        ("lora_alpha", "much"),
        ("lora_alpha", float("nan")),
        ("r", 0),
        ("r", 10**9),
        ("r", 8.0),
        ("r", True),
        ("rank_pattern", {"(a+)+$": 4}),
        ("rank_pattern", {"q_proj": 10**9}),
        ("rank_pattern", ["q_proj"]),
        ("alpha_pattern", {"q_proj": 1e308}),
        ("alpha_pattern", {"(x*)*": 1.0}),
        ("target_modules", "(([a-z._0-9])+.)+qq"),
        ("target_modules", 7),
        ("exclude_modules", "(a|aa)+b"),
        ("exclude_modules", "(unclosed"),
        ("layers_pattern", ["layers", "(.*)*x"]),
        ("layer_replication", [[0, 10**7]]),
        ("layer_replication", [[3, 1]]),
        ("layer_replication", "all"),
    ],
)
def test_settings_that_no_adapter_has(sft_adapter: Path, tmp_path: Path, field: str, value: Any) -> None:
    folder = shutil.copytree(sft_adapter, tmp_path / "adapter")
    held = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**held, field: value}))
    refusal(str(folder), adapter=True)


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.(q|k|v|o)_proj",
        r"model\.layers\.(1[0-9]|2[0-3])\.(self_attn|mlp)\..*_proj",
        r"^(?!.*vision).*(?:q_proj|v_proj)$",
        r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:q_proj|k_proj|v_proj"
        r"|o_proj|gate_proj|up_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj)))",
        r"(.*\.)?q_proj",
        r"layers\.\d+\.mlp",
    ],
)
def test_patterns_that_people_write_pass(pattern: str) -> None:
    check_pattern("here", "target_modules", pattern)


@pytest.mark.parametrize("pattern", ["(a?){50}b", "a?" * 40 + "b", "(a|b|ab)" * 30, ".*" * 8 + "x", "((a{1,9}){1,9})x"])
def test_patterns_of_too_many_ways_are_refused(pattern: str) -> None:
    with pytest.raises(UserError):
        check_pattern("here", "target_modules", pattern)
