"""What several test files share: tiny models and pairs, made on the spot."""

from __future__ import annotations

import contextlib
import hashlib
import json
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

SENTENCES = [
    "The tide rises twice a day because the moon pulls on the sea.",
    "Instruction: name three colours of autumn leaves.\nResponse: red, yellow and brown\nEND",
    "Bread needs flour, water, salt and time; patience does the rest.",
    "A short answer is often better than a long one, and a true one always is.",
    "Instruction: why is the sky blue?\nResponse: short waves are scattered most\nEND",
    "Rivers bend because the outer bank wears away faster than the inner one.",
]


def save_tiny_model(
    folder: Path, tokenizer: Any, *, seed: int = 0, hidden: int = 32, dtype: str = "float32", layers: int = 2
) -> Path:
    """A random Llama, of two layers if not of more, whose log-probs are far from uniform."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=0,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.12)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def pair_rows(count: int) -> list[dict[str, Any]]:
    """Distinct pairs in the user's schema, of various lengths; some prompts come twice."""
    rows = []
    for i in range(count):
        subject = ["tides", "bread", "rivers", "leaves", "the sky"][i % 5]
        prompt = f"Instruction: tell me about {subject}, point {i // 2}.\nResponse:"
        rows.append(
            {
                "prompt": prompt,
                "chosen": f" {SENTENCES[i % 3]} ({i})\nEND",
                "rejected": f" I do not know{' at all' * (i % 4)}, ask again {i}.\nEND",
                "instruction": prompt.split("\n")[0],
                "instruction_type": "qa",
                "negative_type": ["wrong", "evasive"][i % 2],
                "confident": i % 4 != 3,
                "margin": round(0.1 * (i % 7), 2),
            }
        )
    return rows


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tree(root: Path, *folders: str) -> dict[str, str]:
    """A hash of every file below some folders, by name. Not the bytes: a failed comparison would print them all."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in folders or (".",)
        for path in sorted((root / folder).rglob("*"))
        if path.is_file()
    }


@contextlib.contextmanager
def room_for(n_bytes: int) -> Iterator[None]:
    """The system refuses to let any file grow beyond so many bytes: stands for a full disk, below every library."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def resumes_to_the_same_bytes(
    run: Callable[[Path], Any], folder: Path, monkeypatch: pytest.MonkeyPatch, *, killed_at: int
) -> None:
    """A run is killed in a forward of its second step, and then leaves the bytes of an undisturbed one.

    `run`: trains three steps into a folder; `killed_at`: the call of `batch_sums` that ends it, from 1.
    """
    from dpoeng.engine.training import step as step_module

    run(folder / "whole")
    real, calls = step_module.batch_sums, 0

    def dying(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == killed_at:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(step_module, "batch_sums", dying)
    with pytest.raises(KeyboardInterrupt):
        run(folder / "cut")
    monkeypatch.undo()
    assert run(folder / "cut").resumed_from == 1
    for name in ("metrics.jsonl", "adapter/adapter_model.safetensors", "checkpoint-00000003/state.json"):
        assert (folder / "cut" / name).read_bytes() == (folder / "whole" / name).read_bytes(), name


def save_multimodal(model_type: str, folder: Path) -> Path:
    """The tiny multimodal checkpoint of a type, with its towers and a tokenizer, as its config names it."""
    import torch
    from transformers import AutoModelForImageTextToText

    from dpoeng.bench.studies.tiny_models import tiny_config, tiny_tokenizer

    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(tiny_config(model_type)).float()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
