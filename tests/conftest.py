"""Shared fixtures: a tiny model with a real tokenizer, and pairs for it. Nothing here is downloaded."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dpoeng_testing import SENTENCES, pair_rows, save_tiny_model, write_jsonl

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The models are tiny: a second thread would only spin. Torch reads this when it is imported, which is why nothing here
# imports it: tests of what needs no torch run without it. The processes that tests start have the same number, since it
# is part of what a cache records about the machine.
os.environ["OMP_NUM_THREADS"] = "1"
# On a GPU torch looks at this at its first product, which may be a test's own.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


# Tests of these files start processes. One worker runs them all, since the server that processes are forked from
# (tests/support/processes.py) takes ten seconds to get ready.
STARTING_PROCESSES = {
    "tests/models/test_gguf.py",
    "tests/recipes/test_processes.py",
    "tests/recipes/test_ranks.py",
    "tests/reference/test_shards.py",
    "tests/training/test_full_ranks.py",
}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """What `--dist loadfile` divides: files, of which those that start processes count as one."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "processes" if file in STARTING_PROCESSES else file

    return Files(config, log)


@pytest.fixture(autouse=True, scope="module")
def _loaded_libraries_are_no_garbage() -> Iterator[None]:
    """What was loaded before a file's tests is left out of garbage collections, which take half a second each with it.

    Memory is released by a collection, and tests of that do it by the dozen. What a file's own tests make is collected.
    """
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _own_cache_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Remembered weight digests of tests never meet the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "xdg"))


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A byte-level BPE tokenizer with an end token and a ChatML template, trained on a few sentences."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES * 3, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    made.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return made


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """The tiny model's folder."""
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny", tokenizer)


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    """24 pairs."""
    return write_jsonl(tmp_path / "pairs.jsonl", pair_rows(24))


@pytest.fixture(scope="session")
def sft_adapter(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A LoRA that moves the tiny model's log-probs by whole nats."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(5)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model),
        LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    folder = tmp_path_factory.mktemp("sft") / "adapter"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """SmolLM2-135M-Instruct, of which the user's cache folder keeps one copy for the demo and for slow tests.

    A session's fixture is made before a test's cache home is put in place of the user's.
    """
    from dpoeng.engine.recipes.demo import converted_model

    return converted_model()
