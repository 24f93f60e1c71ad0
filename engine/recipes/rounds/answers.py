"""Answers of a policy, local or on a server, stored by policy, prompt and sampling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dpoeng.cache.schema import IdArray
from dpoeng.engine.config.fields import TrainConfig
from dpoeng.engine.models.generate import sample
from dpoeng.engine.models.model import CausalLM
from dpoeng.engine.models.sources import adapter_config, find_adapter, find_model
from dpoeng.engine.recipes.evaluate import Trained
from dpoeng.engine.reference.identity import weights_identity
from dpoeng.engine.runs.kept import Kept, content_key
from dpoeng.engine.runtime.progress import Progress


@dataclass(frozen=True, slots=True)
class Sampling:
    """Settings of the sampling.

    Attributes:
        count: answers per prompt.
        max_new_tokens, stop, temperature, top_p, repetition_penalty, seed: see `generate.sample`.
        batch_size: prompts continued at once; only for local models.
    """

    count: int = 1
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    batch_size: int = 8

    def identity(self) -> dict[str, Any]:
        """All settings but the batch, which changes answers only by rounding and chance."""
        return {name: value for name, value in asdict(self).items() if name != "batch_size"}


def are_answers(value: Any, *numbers: str) -> bool:
    """Whether a stored value is the answers to a prompt, each with these numbers."""
    return bool(isinstance(value, list) and value) and all(
        isinstance(one, dict)
        and isinstance(one.get("text"), str)
        and isinstance(one.get("ended"), bool)
        and all(type(one.get(name)) is int for name in numbers)
        for one in value
    )


def policy_identity(trained: Trained | None, config: TrainConfig, spec: str) -> dict[str, Any]:
    """The identity of a policy: the reference, overrides of its parts, and the trained weights.

    Args:
        trained: None for the policy before training.
        config: config of its run.
        spec: the reference's digest.
    """
    base = {"model": weights_identity(find_model(config.model))} if config.model else {}
    found: dict[str, Any] = {"reference": spec, "dtype": config.dtype, "quantization": config.quantization, **base}
    if trained is not None and trained.mode == "full":
        found["trained"] = weights_identity(find_model(str(trained.folder)))
    elif trained is not None:
        source = find_adapter(str(trained.folder))
        found |= {"trained": weights_identity(source), "adapter": adapter_config(source), "mode": trained.mode}
    return found


def answer_keys(policy: Mapping[str, Any], sampling: Sampling, prompts: Sequence[IdArray]) -> list[str]:
    """The storage keys of the answers to some prompts."""
    return [content_key(dict(policy), sampling.identity(), prompt.tolist()) for prompt in prompts]


def answer_here(
    lm: CausalLM, prompts: Sequence[IdArray], keys: Sequence[str], sampling: Sampling, kept: Kept, progress: Progress
) -> None:
    """Continues the prompts without stored answers, and stores `[{text, ended, tokens}]` for each.

    Batches do not depend on the stored answers, and their random draws only on their prompts: so answers after an
    interruption equal those of an undisturbed run.
    """
    size = sampling.batch_size
    batches = [range(first, min(first + size, len(prompts))) for first in range(0, len(prompts), size)]
    missing = [batch for batch in batches if any(kept.get(keys[place]) is None for place in batch)]
    if not missing:
        return
    done = len(prompts) - sum(map(len, missing))
    with progress.task("answering prompts", len(prompts), "prompts", done) as advance:
        for batch in missing:
            found = sample(
                lm,
                [prompts[place] for place in batch],
                count=sampling.count,
                max_new_tokens=sampling.max_new_tokens,
                stop=sampling.stop,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                repetition_penalty=sampling.repetition_penalty,
                seed=int(content_key(sampling.seed, *(keys[place] for place in batch))[:15], 16),
            )
            for place, answers in zip(batch, found, strict=True):
                tokens = [len(lm.tokenizer(one.text, add_special_tokens=False)["input_ids"]) for one in answers]
                kept.put(keys[place], [{**asdict(one), "tokens": n} for one, n in zip(answers, tokens, strict=True)])
            advance(len(batch), "")
