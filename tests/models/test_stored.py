"""Bases that others quantised: every weight is what its codes stand for, to the bit, and stays codes in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stored_checkpoints import FORMATS, write_mxfp4, write_stored

from dpoeng.bench.studies.tiny_models import save_tiny, tiny_config, tiny_model
from dpoeng.cache.errors import UserError
from dpoeng.engine.config.fields import TrainConfig
from dpoeng.engine.models.adapters import add_policy_adapter, lora_arguments
from dpoeng.engine.models.experts.stacks import experts_modules, held_by, stack_names, stack_of
from dpoeng.engine.models.loading import empty_model, load_model
from dpoeng.engine.models.model import CausalLM, set_mode
from dpoeng.engine.models.quantized import quantized_tensors
from dpoeng.engine.models.sources import find_model, stored_quantization
from dpoeng.engine.models.stored.formats import format_of
from dpoeng.engine.models.stored.reading import read_weight
from dpoeng.engine.models.stored.weights import StoredLinear

CPU = torch.device("cpu")


def load(folder: Path, quantization: Any, dtype: str = "float32") -> CausalLM:
    lm = load_model(find_model(str(folder)), quantization=quantization, dtype=dtype, device=CPU, tokenizer=False)
    set_mode(lm, training=False)
    return lm


def make(tmp_path: Path, name: str, model_type: str) -> tuple[Path, Path]:
    plain = tmp_path / "plain"
    if name == "mxfp4":
        config = tiny_config(model_type)
        config.hidden_size = config.intermediate_size = 64  # an exponent is for 32 weights
        tiny_model(config).save_pretrained(plain)
        write_mxfp4(plain, tmp_path / "stored")
    else:
        save_tiny(model_type, plain)
        write_stored(plain, tmp_path / "stored", name)
    return plain, tmp_path / "stored"


def compare_weights(stored: CausalLM, plain: CausalLM) -> int:
    """Compares every weight to the bit; returns how many are held as codes."""
    coded, own = 0, dict(plain.base.named_modules())
    for name, module in stored.base.named_modules():
        if isinstance(module, StoredLinear):
            held: Any = held_by(module.weight)
            assert torch.equal(held.widened(torch.float32), own[name].weight), name
            assert torch.equal(held.widened(torch.bfloat16), own[name].weight.bfloat16()), name
            coded += 1
        for stack in stack_names(module):
            count = len(getattr(module, stack))
            wide = stack_of(module, stack).widened(0, count, torch.float32)
            assert torch.equal(wide, stack_of(own[name], stack).widened(0, count, torch.float32)), name
            coded += held_by(getattr(module, stack)) is not None
    return coded


def compare_numbers(stored: CausalLM, plain: CausalLM) -> None:
    """Logits and the gradient of the input, against the plain model of the widened weights."""
    ids = torch.randint(0, 320, (2, 11), generator=torch.Generator().manual_seed(0))
    results = []
    for lm in (stored, plain):
        embedded = lm.base.get_input_embeddings()(ids).detach().requires_grad_(True)
        logits = lm.base(inputs_embeds=embedded, use_cache=False).logits
        logits.log_softmax(-1)[..., 7].sum().backward()
        results.append((logits.detach(), embedded.grad))
    for ours, plains in zip(*results, strict=True):
        torch.testing.assert_close(ours, plains, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", FORMATS)
def test_a_stored_base_is_the_model_of_its_widened_weights(name: str, tmp_path: Path) -> None:
    plain, folder = make(tmp_path, name, "qwen3")
    assert stored_quantization(find_model(str(folder))) == {"quantization": "stored"}
    stored, whole = load(folder, "stored"), load(plain, "none")
    assert compare_weights(stored, whole) == 14
    assert any("14 weights in" in remark for remark in stored.remarks)
    compare_numbers(stored, whole)
    assert all(bool(m.weight.isnan().all()) for m in stored.base.modules() if isinstance(m, StoredLinear))


@pytest.mark.parametrize(
    ("name", "model_type"),
    [("fp8 blocks", "deepseek_v3"), ("gptq", "qwen3_moe"), ("awq", "mixtral"), ("mxfp4", "gpt_oss")],
)
def test_stored_experts_are_those_of_their_widened_weights(name: str, model_type: str, tmp_path: Path) -> None:
    plain, folder = make(tmp_path, name, model_type)
    stored, whole = load(folder, "stored"), load(plain, "none")
    assert compare_weights(stored, whole)
    assert all(held_by(getattr(m, s)) is not None for _, m in experts_modules(stored.base) for s in stack_names(m))
    compare_numbers(stored, whole)


@pytest.mark.parametrize("name", ["fp8 blocks", "pack-quantized", "gptq, any order", "nvfp4"])
def test_codes_alone_are_in_memory(name: str, tmp_path: Path) -> None:
    """The bytes of what is held are those of the files, within what indices of groups and tables add."""
    _, folder = make(tmp_path, name, "qwen3")
    lm = load(folder, "stored")
    files = load_file(folder / "model.safetensors")
    coded = sum(t.nbytes for key, t in files.items() if "_proj" in key and "g_idx" not in key and "shape" not in key)
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in quantized_tensors(lm.base)}
    assert coded <= sum(held.values()) <= 1.5 * coded + 4096
    placeholders = [m.weight for m in lm.base.modules() if isinstance(m, StoredLinear)]
    assert {p.untyped_storage().nbytes() for p in placeholders} == {4}


@pytest.mark.parametrize("name", [*FORMATS, "mxfp4"])
def test_plan_has_the_tensors_that_loading_gives(name: str, tmp_path: Path) -> None:
    """From config.json alone: every tensor of the loaded model by its dtype and size."""
    _, folder = make(tmp_path, name, "gpt_oss" if name == "mxfp4" else "qwen3")
    lm = load(folder, "stored", dtype="bfloat16")
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    planned = empty_model(fields, quantization="stored", dtype=torch.bfloat16)
    sizes = []
    for model in (lm.base, planned.base):
        held = {id(t): (t.dtype, t.numel()) for t in (*quantized_tensors(model), *model.parameters())}
        # Indices of groups exist where their order is another than the usual one: values decide.
        sizes.append(sorted(str(one) for one in held.values() if one[0] != torch.int32))
    assert sizes[0] == sizes[1]


def test_a_zero_point_that_programs_read_in_two_ways_is_refused(tmp_path: Path) -> None:
    _, folder = make(tmp_path, "gptq", "qwen3")
    tensors = load_file(folder / "model.safetensors")
    name = next(key for key in tensors if key.endswith("qzeros"))
    tensors[name] = torch.full_like(tensors[name], -1)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError) as caught:
        load(folder, "stored")
    assert caught.value.code == "quantization-stored"
    assert "two ways" in str(caught.value.found)
    assert name.removesuffix("qzeros") in str(caught.value.where)


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "marlin"),
        ({"quant_method": "awq", "version": "gemv"}, "GEMM"),
        ({"quant_method": "compressed-tensors", "format": "marlin-24", "config_groups": {"a": {}}}, "sparse"),
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized", "transform_config": {"a": 1}},
            "transforms",
        ),
        ({"quant_method": "hqq"}, "cannot read its method"),
        ({"quant_method": "gptq", "bits": "four"}, "four"),
        ({"quant_method": "gptq", "bits": 0}, "codes of 0 bits"),
        ({"quant_method": "gptq", "bits": [4]}, "int()"),
        ({"quant_method": "gptq", "group_size": 10**40}, "not two sizes"),
        ({"quant_method": "fp8", "weight_block_size": [0, 16]}, "not two sizes"),
        ({"quant_method": "fp8", "weight_block_size": [16]}, "not two sizes"),
        ({"quant_method": "fp8", "modules_to_not_convert": [["a"]]}, "no texts"),
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"g": 5}},
            "no attribute",
        ),
    ],
)
def test_what_cannot_be_had_is_named(record: dict[str, Any], why: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": record}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        stored_quantization(find_model(str(tmp_path)))
    assert caught.value.code == "quantization-stored"
    assert why in f"{caught.value} {caught.value.found}"
    assert "full-precision" in str(caught.value.remedy)


@pytest.mark.parametrize(
    ("name", "part", "damage", "said"),
    [
        ("gptq, any order", "g_idx", lambda t: torch.cat([t[:1] * 0 - 1, t[1:]]), "groups -1 to"),
        ("gptq, any order", "g_idx", lambda t: t + 10**9, "groups 1000000000 to"),
        ("gptq, any order", "g_idx", lambda t: t[: len(t) // 2].clone(), "groups ("),
        ("gptq", "g_idx", lambda t: t.float(), "groups in torch.float32"),
        ("gptq", "qweight", lambda t: t.reshape(-1), ""),
        ("gptq", "qzeros", lambda t: t[:0], "zero points"),
        ("gptq", "qweight", lambda t: t.to(torch.int64), "codes in torch.int64"),
        ("awq", "qzeros", lambda t: t.to(torch.int64), "zero points in torch.int64"),
        ("pack-quantized, zero points", "weight_zero_point", lambda t: t.to(torch.int64), "zero points in torch.int64"),
        ("fp8 blocks", "weight_scale_inv", lambda t: t[None, None], "4 dimensions"),
        ("fp8 blocks", "weight_scale_inv", lambda t: t[:0], ""),
    ],
)
def test_wild_parts_are_refused(name: str, part: str, damage: Any, said: str, tmp_path: Path) -> None:
    """Of every kind; an index of -1 beside others once made them all count as unused, without a word."""
    _, folder = make(tmp_path, name, "qwen3")
    tensors = load_file(folder / "model.safetensors")
    key = next(key for key in tensors if key.endswith(part))
    tensors[key] = damage(tensors[key])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError) as caught:
        load(folder, "stored")
    assert caught.value.code == "quantization-stored"
    assert said in str(caught.value.found)


def test_codes_without_scales_are_refused(tmp_path: Path) -> None:
    _, folder = make(tmp_path, "fp8 blocks", "qwen3")
    tensors = load_file(folder / "model.safetensors")
    del tensors[next(key for key in tensors if key.endswith("_scale_inv"))]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError) as caught:
        load(folder, "stored")
    assert "without scales" in str(caught.value.found)


def test_another_quantization_than_the_files_have_is_refused(tmp_path: Path) -> None:
    plain, folder = make(tmp_path, "awq", "qwen3")
    for where, asked in ((folder, "4bit"), (folder, "none"), (plain, "stored")):
        with pytest.raises(UserError) as caught:
            load(where, asked)
        assert caught.value.code == "quantization-stored"


def test_lora_over_codes_trains_as_over_the_widened_weights(tmp_path: Path) -> None:
    plain, folder = make(tmp_path, "pack-quantized, zero points", "qwen3")
    gradients = []
    for lm in (load(folder, "stored"), load(plain, "none")):
        lm = add_policy_adapter(lm, "new", None, lora_arguments(TrainConfig(cache="x", lora_r=3)))
        with torch.no_grad():
            for i, (_, parameter) in enumerate(lm.trainable_parameters()):
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(i))
        set_mode(lm, training=True)
        lm.model(input_ids=torch.arange(2, 13)[None], use_cache=False).logits.log_softmax(-1)[..., 7].sum().backward()
        gradients.append({name: p.grad for name, p in lm.trainable_parameters()})
    assert len(gradients[0]) == 28
    for name, ours in gradients[0].items():
        theirs = gradients[1][name]
        assert ours is not None
        assert theirs is not None
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-7, name


def test_a_dora_over_codes_is_refused(tmp_path: Path) -> None:
    _, folder = make(tmp_path, "awq", "qwen3")
    with pytest.raises(UserError) as caught:
        add_policy_adapter(load(folder, "stored"), "new", None, lora_arguments(TrainConfig(cache="x", use_dora=True)))
    assert caught.value.code == "adapter-mode"


def test_a_scale_is_that_of_transformers_and_of_gpt_oss() -> None:
    """Against transformers' own arithmetic: FP8 in blocks, and MXFP4."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    random = torch.Generator().manual_seed(0)
    codes = torch.randn(32, 64, generator=random).to(torch.float8_e4m3fn)
    scales = torch.rand(2, 2, generator=random)
    stored = format_of({"quant_method": "fp8", "weight_block_size": [16, 32]})
    ours = read_weight(stored, {"codes": codes, "scales": scales}, (32, 64))
    theirs = Fp8Dequantize(None)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(ours.widened(dtype), theirs._dequantize_one(codes, scales, dtype))
    nibbles = torch.randint(0, 256, (32, 32), dtype=torch.uint8, generator=random).view(torch.int8)
    exponents = torch.randint(120, 130, (32, 2), dtype=torch.uint8, generator=random)
    four = read_weight(format_of({"quant_method": "fp8"}), {"codes": nibbles, "scales": exponents}, (32, 64))
    assert torch.equal(four.widened(torch.float32), theirs._dequantize_one(nibbles, exponents, torch.float32))
    blocks = torch.randint(0, 256, (3, 8, 2, 16), dtype=torch.uint8, generator=random)
    powers = torch.randint(118, 131, (3, 8, 2), dtype=torch.uint8, generator=random)
    wide = convert_moe_packed_tensors(blocks, powers, dtype=torch.bfloat16)  # [E, I, O]
    for expert in range(3):
        parts = {"codes": blocks[expert].flatten(1), "scales": powers[expert]}
        mine = read_weight(format_of({"quant_method": "mxfp4"}), parts, (8, 64))
        assert torch.equal(mine.widened(torch.bfloat16), wide[expert].T)


def test_weights_of_compressed_tensors_are_those_that_it_decompresses() -> None:
    """Packed and widened by compressed-tensors itself: `cases/compressed_tensors.safetensors` names its version."""
    file = Path(__file__).parent / "cases" / "compressed_tensors.safetensors"
    with safe_open(file, "pt") as opened:
        records = json.loads(opened.metadata()["schemes"])
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    assert len(records) == 10
    for name, record in records.items():
        stored, expected = format_of(record), tensors[f"{name}/expected"]
        parts = {what: tensors[f"{name}/{part}"] for part, what in stored.parts.items() if f"{name}/{part}" in tensors}
        found = read_weight(stored, {what: part for what, part in parts.items() if what}, tuple(expected.shape))
        if name == "nvfp4":  # there the divided scales are rounded to bfloat16 too
            torch.testing.assert_close(found.widened(torch.bfloat16), expected, rtol=2**-7, atol=0)
        else:
            assert torch.equal(found.widened(torch.bfloat16), expected), name
