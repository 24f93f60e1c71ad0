"""Answers to held-out prompts before and after training: samples.jsonl, which the report shows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from dpoeng.cache.schema import IdArray, ScoredPair
from dpoeng.engine.models.generate import generate
from dpoeng.engine.models.model import CausalLM, set_mode
from dpoeng.engine.runs.folder import SAMPLES_FILE
from dpoeng.engine.runtime.folders import unwritable, write_durably
from dpoeng.engine.training.optimizer import copy_parameters, put_parameters

MAX_NEW_TOKENS = 128


def sample_prompts(rows: Sequence[ScoredPair], count: int) -> list[IdArray]:
    """The first `count` different prompts of some rows."""
    first: dict[bytes, IdArray] = {}
    for row in rows:
        if len(first) == count:
            break
        first.setdefault(row.ids.prompt_ids.tobytes(), row.ids.prompt_ids)
    return list(first.values())


def take_samples(lm: CausalLM, start: Mapping[str, torch.Tensor], prompts: Sequence[IdArray]) -> list[dict[str, str]]:
    """Each prompt with its answers before and after; the likeliest token each time.

    Args:
        lm: the trained policy, with its tokenizer. Over a sharded base all processes call this together.
        start: what its trained parameters were before the first step.
        prompts: token ids, [P] each.
    """
    assert lm.tokenizer is not None, "samples need the tokenizer"
    trained = copy_parameters(lm)
    set_mode(lm, training=False)
    after = generate(lm, prompts, max_new_tokens=MAX_NEW_TOKENS)
    put_parameters(lm, start)
    before = generate(lm, prompts, max_new_tokens=MAX_NEW_TOKENS)
    put_parameters(lm, trained)
    set_mode(lm, training=True)
    texts = lm.tokenizer.batch_decode([ids.tolist() for ids in prompts], skip_special_tokens=True)
    return [
        {"prompt": prompt, "before": old, "after": new} for prompt, old, new in zip(texts, before, after, strict=True)
    ]


def write_samples(output_dir: Path, samples: Sequence[Mapping[str, str]]) -> None:
    """One JSON object a line."""
    lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    try:
        write_durably(output_dir / SAMPLES_FILE, lines.encode())
    except OSError as error:
        raise unwritable(output_dir, error) from error
