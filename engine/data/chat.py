"""A pair as the two texts that are tokenised, each with the place where its response begins.

Messages go through the tokenizer's chat template, always with the response in place, so that whatever the template adds
(a system prompt, a beginning token) stands there once; texts are joined as they are. Knows nothing of token ids.
"""

from __future__ import annotations

import datetime
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dpoeng.cache.errors import UserError
from dpoeng.engine.data.in_memory import place
from dpoeng.engine.data.shapes import Message, PreferencePair
from dpoeng.engine.data.strict_json import RowFault

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Some templates print today's date; then every pair would be another one tomorrow. This is the date that Llama's own
# templates fall back on. `chat_template_kwargs` may set `date_string` where the template asks for it.
PINNED_DATE = datetime.date(2024, 7, 26)

_CLOCK = re.compile(r"""strftime_now\(\s*(["'])(?P<format>[^"']*)\1\s*\)""")
_ANSWER = "dpoeng answer stands here"


@dataclass(frozen=True, slots=True)
class Side:
    """Prompt and one response as one text.

    Attributes:
        text: what is tokenised.
        boundary: the response's first character.
        from_template: whether a chat template made it, which then also wrote all special tokens.
    """

    text: str
    boundary: int
    from_template: bool


def to_sides(pair: PreferencePair, tokenizer: PreTrainedTokenizerBase) -> tuple[Side, Side]:
    """The chosen and the rejected text of a pair.

    Raises:
        UserError: the pair is messages and the tokenizer has no chat template.
        RowFault: `template-error`, the template refuses the messages; `template-boundary`, it writes the prompt in
            another way once a response follows, so that the response's beginning is not known.
    """
    if isinstance(pair.prompt, str):
        assert isinstance(pair.chosen, str)
        assert isinstance(pair.rejected, str)
        start = len(pair.prompt)
        return Side(pair.prompt + pair.chosen, start, False), Side(pair.prompt + pair.rejected, start, False)
    assert isinstance(pair.chosen, list)
    assert isinstance(pair.rejected, list)
    template = _template(pair, tokenizer)
    opened = _render(pair, tokenizer, template, [], add_generation_prompt=True)
    sides = [_side(pair, tokenizer, template, opened, response) for response in (pair.chosen, pair.rejected)]
    return sides[0], sides[1]


def _side(
    pair: PreferencePair, tokenizer: PreTrainedTokenizerBase, template: str, opened: str, response: list[Message]
) -> Side:
    text = _render(pair, tokenizer, template, _without_end_token(response, tokenizer.eos_token))
    if text.startswith(opened):
        return Side(text, len(opened), True)
    # The opening for an answer is not how answers are written, e.g. it begins a thought that is later left out. A
    # stand-in for the answer shows what the template writes before one.
    header = _render(pair, tokenizer, template, [{"role": "assistant", "content": _ANSWER}])
    header = header[: max(header.rfind(_ANSWER), 0)]
    if header and text.startswith(header):
        return Side(text, len(header), True)
    raise RowFault("template-boundary", "the chat template changes the prompt when a response follows it")


def _template(pair: PreferencePair, tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        template = tokenizer.get_chat_template(tools=pair.tools)
    except (AttributeError, ValueError):
        raise UserError(
            "the pairs are chat messages and the tokenizer has no chat template",
            code="tokenizer-no-template",
            where=place(pair.source_file, pair.source_row),
            expected="a chat_template in tokenizer_config.json or chat_template.jinja beside the model",
            found=f"{type(tokenizer).__name__} without one",
            remedy="copy the template of the SFT model into its folder, or give prompt, chosen and rejected as texts",
            exit_status=3,
        ) from None
    return _CLOCK.sub(lambda match: f'"{PINNED_DATE.strftime(match["format"])}"', str(template))


def _render(
    pair: PreferencePair,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    response: list[Message],
    *,
    add_generation_prompt: bool = False,
) -> str:
    assert isinstance(pair.prompt, list)
    arguments: dict[str, Any] = pair.chat_template_kwargs or {}
    try:
        return str(
            tokenizer.apply_chat_template(
                [*pair.prompt, *response],
                tools=pair.tools,
                chat_template=template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **arguments,
            )
        )
    except ImportError:
        raise
    except Exception as error:  # a template is a program: what it raises is about the messages that it was given
        raise RowFault("template-error", f"{type(error).__name__}: {error}"[:300]) from None


def _without_end_token(response: list[Message], end: str | None) -> list[Message]:
    """The response without an end token in its last text: the template writes it."""
    if not end or not response[-1]["content"].rstrip().endswith(end):
        return response
    content = response[-1]["content"].rstrip()
    while content.endswith(end):
        content = content.removesuffix(end).rstrip()
    return [*response[:-1], {**response[-1], "content": content}]
