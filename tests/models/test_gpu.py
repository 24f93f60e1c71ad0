"""How a model comes onto a GPU, as far as that can be seen without one: the meta device stands for the GPU's."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dpoeng.cache.errors import UserError
from dpoeng.cli.main import _choose_allocator
from dpoeng.engine.models.loading import exact_products, keep_embedding_on_host, load_model, require_triton
from dpoeng.engine.models.sources import find_model
from dpoeng.engine.runtime.to_device import to_device


class LoadedError(Exception):
    """What ends the loading, when all has been seen."""


@pytest.mark.parametrize("quantization", ["none", "8bit"])
def test_weights_go_straight_to_the_gpu_that_kernels_are_launched_on(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, quantization: Any
) -> None:
    """Triton launches on torch's current GPU; and a 32B base in 16 bits need not pass through 65 GB of the host's."""
    from transformers import AutoModelForCausalLM

    current: list[torch.device] = []
    asked: dict[str, Any] = {}

    def from_pretrained(*_: Any, **kwargs: Any) -> Any:
        asked.update(kwargs)
        raise LoadedError

    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr("dpoeng.engine.models.loading.require_triton", current.append)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    with pytest.raises(LoadedError):
        load_model(find_model(str(tiny_model)), quantization=quantization, dtype="auto", device=torch.device("cuda", 1))
    assert current == [torch.device("cuda", 1)] * 2  # before any weight is read, Triton is tried there
    assert asked["device_map"] == {"": "cuda:1"}
    assert ("quantization_config" in asked) == (quantization == "8bit")


def test_text_is_generated_over_an_embedding_on_the_host() -> None:
    """transformers then takes the host for the model's device, and hands it masks and positions there."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Qwen2Config(vocab_size=32, num_key_value_heads=2, attn_implementation="eager", **shape)
    with torch.device("meta"):
        base = Qwen2ForCausalLM(config)
    base.set_input_embeddings(torch.nn.Embedding(32, 16))
    keep_embedding_on_host(base, torch.device("meta"))
    embedding = base.get_input_embeddings()
    embedding._forward_pre_hooks.clear()  # ids have no way back from the meta device: any will do
    embedding.register_forward_pre_hook(lambda _module, given: torch.zeros(given[0].shape, dtype=torch.long))
    assert base.device.type == "cpu"
    ids = torch.arange(5)[None]
    inputs = base.prepare_inputs_for_generation(
        ids, attention_mask=torch.ones_like(ids), position_ids=ids, use_cache=False
    )
    logits = base(**inputs).logits
    assert logits.shape[-1] == 32
    assert logits.device.type == "meta"


@pytest.mark.parametrize("fault", [RuntimeError("Failed to find C compiler."), ImportError("no module named triton")])
def test_a_triton_that_cannot_compile_is_one_message(monkeypatch: pytest.MonkeyPatch, fault: Exception) -> None:
    def fail(_: torch.device) -> None:
        raise fault

    monkeypatch.setitem(sys.modules, "dpoeng.kernels.try_triton", SimpleNamespace(try_triton=fail))
    with pytest.raises(UserError) as caught:
        require_triton(torch.device("cuda", 0))
    assert caught.value.code == "triton-unusable"
    assert str(fault) in caught.value.text()
    assert "gcc" in caught.value.text()


def by_older_name() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True


def by_newer_name() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"


@pytest.mark.parametrize("turn_on", [by_older_name, by_newer_name])
def test_float32_is_not_tf32(turn_on: Callable[[], None]) -> None:
    assert exact_products() == ()
    turn_on()
    (remark,) = exact_products()
    assert "TF32" in remark
    assert torch.backends.cuda.matmul.fp32_precision in ("none", "ieee")
    assert exact_products() == ()


def test_long_products_are_not_added_up_in_16_bits() -> None:
    """torch's own setting allows it; the head's gradient is a sum over the vocabulary."""
    products: Any = torch.backends.cuda.matmul
    products.allow_bf16_reduced_precision_reduction = products.allow_fp16_reduced_precision_reduction = True
    exact_products()
    assert not products.allow_bf16_reduced_precision_reduction
    assert not products.allow_fp16_reduced_precision_reduction
    assert not torch.backends.cudnn.allow_tf32


def test_both_phases_in_one_process_can_be_deterministic(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch looks at cuBLAS's workspaces at the first product on a GPU, which may be phase one's."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)

    def at_first_kernel(_: torch.device) -> None:
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] in (":4096:8", ":16:8")
        raise LoadedError

    monkeypatch.setattr("dpoeng.engine.models.loading.require_triton", at_first_kernel)
    with pytest.raises(LoadedError):
        load_model(find_model(str(tiny_model)), quantization="none", dtype="auto", device=torch.device("cuda", 0))


def test_memory_grows_in_place_unless_the_user_chose() -> None:
    """Every step has another number of tokens: blocks of a fixed size would be left over from each."""
    empty: dict[str, str] = {}
    _choose_allocator(empty)
    assert empty == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        chosen = {name: "max_split_size_mb:128"}
        _choose_allocator(chosen)
        assert chosen == {name: "max_split_size_mb:128"}


def test_a_copy_to_a_gpu_is_from_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """From pageable memory `non_blocking` waits for the device all the same."""
    seen: list[str] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: seen.append("pinned") or tensor)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *_, **how: seen.append(str(how)) or tensor)
    to_device(np.arange(3), torch.device("cuda", 0))
    assert seen == ["pinned", "{'non_blocking': True}"]


def test_an_embedding_on_the_host_does_not_wait_for_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Token ids come from the host, and are looked up there without asking the GPU for them."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    to = torch.Tensor.to
    sent: list[torch.Tensor] = []

    def copied(tensor: torch.Tensor, device: Any, **how: Any) -> torch.Tensor:
        assert device.type == "cuda"
        assert how == {"non_blocking": True}, "else the host waits until all queued work is done"
        sent.append(tensor)
        return to(tensor, "meta")

    monkeypatch.setattr(torch.Tensor, "to", copied)
    monkeypatch.setattr(torch.Tensor, "cpu", lambda _: pytest.fail("waits for the GPU"))
    gpu = torch.device("cuda", 0)
    words = torch.nn.Embedding(9, 4)
    base = SimpleNamespace(get_input_embeddings=lambda: words, register_forward_pre_hook=lambda *_, **__: None)
    monkeypatch.setattr(torch.nn.Embedding, "to", lambda words, _: words)
    keep_embedding_on_host(base, gpu)
    ids = to_device(np.array([[3, 1, 4]]), gpu)
    assert words(ids).is_meta
    assert len(sent) == 2
    assert torch.equal(sent[1], words.weight[[3, 1, 4]][None])
