"""How a model comes onto a GPU, as far as that can be seen without one: the meta device stands for the GPU's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dpoeng.engine.models.loading import keep_embedding_on_host, load_model
from dpoeng.engine.models.sources import find_model


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
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    with pytest.raises(LoadedError):
        load_model(find_model(str(tiny_model)), quantization=quantization, dtype="auto", device=torch.device("cuda", 1))
    assert current == [torch.device("cuda", 1)]
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
