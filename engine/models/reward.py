"""Reward models: transformers checkpoints with one output for a prompt and an answer.

They score one text at a time, because some of them read the wrong last token if texts are padded.
Independent of the use of the numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dpoeng.cache.errors import UserError
from dpoeng.engine.data.encoding import encode_response
from dpoeng.engine.data.messages import Message
from dpoeng.engine.data.shapes import PreferencePair
from dpoeng.engine.models.loading import resolve_dtype
from dpoeng.engine.models.sources import ModelSource, read_fields
from dpoeng.engine.models.tokenizer import load_tokenizer


def is_reward_model(source: ModelSource) -> bool:
    """Whether config.json names a model with a head for classes or scores."""
    names = [] if source.gguf else read_fields(source).get("architectures") or []
    return any(str(name).endswith("ForSequenceClassification") for name in names)


@dataclass(frozen=True, slots=True)
class RewardModel:
    """A loaded reward model with its tokenizer."""

    model: Any
    tokenizer: Any

    @torch.no_grad()
    def score(self, prompt: str | Sequence[Message], answer: str) -> float | None:
        """The reward of an answer; None if the text is longer than the model's positions."""
        ids = self._ids(prompt, answer)
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit is not None and len(ids) > limit:
            return None
        logits = self.model(input_ids=torch.tensor([ids], device=self.model.device)).logits
        return float(logits.float()[0, 0])

    def _ids(self, prompt: str | Sequence[Message], answer: str) -> list[int]:
        """Token ids by the chat template if there is one, otherwise of both texts joined."""
        if getattr(self.tokenizer, "chat_template", None):
            turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
            response = [{"role": "assistant", "content": answer}]
            return encode_response(PreferencePair(turns, response, response), self.tokenizer).ids
        text = prompt if isinstance(prompt, str) else "\n".join(str(turn["content"]) for turn in prompt)
        return encode_response(PreferencePair(text, answer, answer), self.tokenizer).ids


def load_reward_model(source: ModelSource, device: torch.device, dtype: str = "auto") -> RewardModel:
    """Loads a reward model, frozen.

    Raises:
        UserError: transformers cannot load it, or it gives more than one number.
    """
    from transformers import AutoModelForSequenceClassification

    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            source.folder,
            dtype=resolve_dtype(source, dtype, device),
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(
            "cannot load the reward model",
            code="judge-model",
            where=source.name,
            expected="a checkpoint for transformers' AutoModelForSequenceClassification",
            found=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            remedy="use another model with --judge",
        ) from error
    if model.config.num_labels != 1:
        raise UserError(
            "the reward model has more than one output",
            code="judge-model",
            where=source.name,
            expected="a reward model with one output (num_labels 1)",
            found=f"num_labels {model.config.num_labels}",
            remedy="use another reward model with --judge",
        )
    return RewardModel(model.to(device).eval().requires_grad_(False), load_tokenizer(source))
