"""Tokenizers with chat templates in the style of published models; the templates are in tests/data/templates."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEMPLATES = Path(__file__).resolve().parents[1] / "data" / "templates"

STYLES = tuple(sorted(path.stem for path in TEMPLATES.glob("*.jinja")))

_MARKERS = re.compile(r"<\|[A-Za-z_]+\|>|</?(?:start_of_turn|end_of_turn)>|\[/?(?:INST|AVAILABLE_TOOLS|TOOL_RESULTS)\]")
_SENTENCES = [
    "Name a colour, please. Red is a colour. Seven is a number.",
    "The weather in Paris is sunny, and 21 degrees. <think>\nTwo and two.\n</think>\n\n4",
    '{"name": "get_weather", "arguments": {"city": "Paris"}} Today Date: 26 Jul 2024',
]

# (beginning token, end token) where they are not these of ChatML models
_ENDS: dict[str, tuple[str | None, str]] = {
    "llama3": ("<|begin_of_text|>", "<|eot_id|>"),
    "llama4": ("<|begin_of_text|>", "<|eot|>"),
    "gemma2": ("<bos>", "<eos>"),
    "gemma3": ("<bos>", "<eos>"),
    "mistral": ("<s>", "</s>"),
    "zephyr": ("<s>", "</s>"),
    "phi3": ("<s>", "<|endoftext|>"),
    "deepseek_r1": ("<bos>", "<eos>"),
    "harmony": (None, "<|return|>"),
    "command_r": ("<bos>", "<|END_OF_TURN_TOKEN|>"),
}


@functools.cache
def styled_tokenizer(style: str, *, eos: str | None = None, swallows: bool = False) -> PreTrainedTokenizerFast:
    """A small byte-level BPE with the template and special tokens of a style.

    Args:
        style: one of STYLES.
        eos: another end token than the style's.
        swallows: whether special tokens take the white space behind them, as Phi 3's do.
    """
    template = (TEMPLATES / f"{style}.jinja").read_text(encoding="utf-8")
    return made_tokenizer(template, *_ENDS.get(style, (None, "<|im_end|>")), eos=eos, swallows=swallows)


def made_tokenizer(
    template: str | None,
    bos: str | None = None,
    end: str = "<|im_end|>",
    *,
    eos: str | None = None,
    swallows: bool = False,
) -> PreTrainedTokenizerFast:
    """A tokenizer whose special tokens are the markers of a template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = dict.fromkeys(["<|endoftext|>", "<|im_start|>", "<|im_end|>", end, *_MARKERS.findall(template or "")])
    special |= dict.fromkeys([bos] if bos else [])
    trainer = trainers.BpeTrainer(
        vocab_size=256 + len(special) + 80,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_SENTENCES, trainer)
    if swallows:
        backend.add_special_tokens(
            [AddedToken(token, special=True, normalized=False, rstrip=True) for token in special]
        )
    more: dict[str, Any] = {"bos_token": bos} if bos else {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos or end, **more)
    tokenizer.chat_template = template
    return tokenizer
