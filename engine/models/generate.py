"""Generates text from a loaded model, for the demo and for comparisons of adapters.

Prompts are token ids, so that the model gets exactly what it was trained on. Independent of templates, files and the
origin of prompts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dpoeng.engine.models.model import CausalLM
from dpoeng.engine.models.multimodal.towers import set_attention


@dataclass(frozen=True, slots=True)
class Answer:
    """A continuation, without special tokens; `ended` if the model ended it, and no limit of tokens did."""

    text: str
    ended: bool


def generate(
    lm: CausalLM,
    prompts: Sequence[npt.NDArray[np.int32]],
    *,
    max_new_tokens: int = 64,
    stop: Sequence[str] = (),
    temperature: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
) -> list[str]:
    """One continuation of each prompt as text, in the order of the prompts; arguments as in `sample`."""
    found = sample(
        lm,
        prompts,
        max_new_tokens=max_new_tokens,
        stop=stop,
        temperature=temperature,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    return [answer.text for (answer,) in found]


@torch.no_grad()
def sample(
    lm: CausalLM,
    prompts: Sequence[npt.NDArray[np.int32]],
    *,
    count: int = 1,
    max_new_tokens: int = 64,
    stop: Sequence[str] = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
) -> list[list[Answer]]:
    """Continues prompts, all in one batch.

    Args:
        lm: a model with its tokenizer, in the adapter state that the caller has set.
        prompts: token ids, [P] each, not empty.
        count: continuations per prompt; more than one are sampled, so `temperature` must be above 0.
        max_new_tokens: maximum number of new tokens.
        stop: texts that end a continuation; they are cut off. End-of-sequence always ends it.
        temperature: 0 takes the most likely token each time; above 0, tokens are sampled.
        top_p: sample from the most likely tokens that together have this probability.
        repetition_penalty: divides the scores of tokens that already occurred, https://arxiv.org/abs/1909.05858; 1
            turns it off. Without it, small models repeat themselves at temperature 0.
        seed: seed of the sampling; torch's global generator is left unchanged.

    Returns:
        `count` continuations of each prompt, in the order of the prompts.
    """
    if lm.tokenizer is None:
        raise ValueError("generating needs the tokenizer: load the model with tokenizer=True")
    if not prompts:
        return []
    # The device that transformers takes for the model's: the host, if the embedding is kept there.
    ids, mask = _pad_left(prompts, pad_id=_pad_id(lm), device=lm.base.device)
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0, "min_p": 0.0}
    drawing = [lm.device] if lm.device.type == "cuda" else []  # not the other GPUs, of which torch would warn
    with _ordinary_attention(lm), torch.random.fork_rng(drawing):
        torch.manual_seed(seed)
        output = lm.base.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            num_return_sequences=count,
            use_cache=True,
            repetition_penalty=repetition_penalty,
            pad_token_id=_pad_id(lm),
            stopping_criteria=[_StopAt(lm.tokenizer, stop, ids.shape[1])] if stop else None,
            **sampling,
        )[:, ids.shape[1] :]
    texts = lm.tokenizer.batch_decode(output, skip_special_tokens=True)
    ends = torch.tensor(_end_ids(lm), device=output.device, dtype=output.dtype)
    ended = torch.isin(output, ends).any(dim=1).tolist()
    answers = [
        Answer(cut_at(text, stop), done or any(word in text for word in stop))
        for text, done in zip(texts, ended, strict=True)
    ]
    return [answers[first : first + count] for first in range(0, len(answers), count)]


def _end_ids(lm: CausalLM) -> list[int]:
    """The tokens at which transformers ends a continuation."""
    found = lm.base.generation_config.eos_token_id
    return [] if found is None else [found] if isinstance(found, int) else list(found)


def cut_at(text: str, stop: Sequence[str]) -> str:
    """The text before the first stop text, or all of it."""
    return text[: min((position for word in stop if (position := text.find(word)) >= 0), default=len(text))]


class _StopAt:
    """Tells for each row whether its continuation contains a stop text. transformers calls it after each token."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], prompt_length: int) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        texts = self._tokenizer.batch_decode(input_ids[:, self._prompt_length :])
        return torch.tensor([any(word in text for word in self._stop) for text in texts], device=input_ids.device)


@contextlib.contextmanager
def _ordinary_attention(lm: CausalLM) -> Iterator[None]:
    """Switches to the architecture's own attention, which has a key-value cache; restores the layout's afterwards."""
    before = lm.base.config._attn_implementation
    set_attention(lm.base, lm.native_attention)
    try:
        yield
    finally:
        set_attention(lm.base, before)


def _pad_left(
    prompts: Sequence[npt.NDArray[np.int32]], *, pad_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask, both [B, longest], aligned at the end, where generation continues."""
    longest = max(len(prompt) for prompt in prompts)
    ids = np.full((len(prompts), longest), pad_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {row} has no tokens")
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


def _pad_id(lm: CausalLM) -> int:
    """Any id will do, since padded positions are masked."""
    for candidate in (lm.tokenizer.pad_token_id, lm.tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0
