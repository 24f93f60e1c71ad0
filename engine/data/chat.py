"""Renders a pair as the two texts to tokenise, with the start of each response and the parts to score.

Messages go through the tokenizer's chat template, always together with the response, so that what the template adds (a
system prompt, a beginning token) appears once. Texts are joined unchanged. The template's output is checked for what it
leaves out and for where the assistant speaks. Independent of token ids.
"""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from dpoeng.cache.errors import UserError
from dpoeng.engine.data.in_memory import place
from dpoeng.engine.data.messages import LOSS_KEYS, Message
from dpoeng.engine.data.proof import Part, Tagged, prove
from dpoeng.engine.data.rendering import Rendered, Renderer, Spans, make_renderer, names_read, within_limits
from dpoeng.engine.data.shapes import PreferencePair
from dpoeng.engine.data.strict_json import RowFault
from dpoeng.engine.data.structured import parse_structure

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TrainOn = Literal["assistant", "last", "all"]

# Tokens that end a turn in published templates. They also end a text if the tokenizer knows them.
END_TEXTS = (
    *("</s>", "<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<eos>", "<|end|>", "<|end_of_text|>"),
    *("<|eom_id|>", "<|return|>", "<|eot|>", "<|END_OF_TURN_TOKEN|>"),
)

_ANSWER = "dpoeng answer stands here"


@dataclass(frozen=True, slots=True)
class Side:
    """Prompt and one response as one text.

    Attributes:
        text: the text to tokenise.
        boundary: index of the response's first character.
        from_template: whether a chat template wrote the text, including all special tokens.
        scored: [begin, end) of the assistant's parts of the response, in characters; None for all of it.
        thoughts: number of thoughts of earlier turns that the template leaves out by design.
    """

    text: str
    boundary: int
    from_template: bool
    scored: Spans | None = None
    thoughts: int = 0


def to_sides(pair: PreferencePair, tokenizer: PreTrainedTokenizerBase, train_on: TrainOn = "assistant") -> list[Side]:
    """The text of each response of a row: of a pair chosen and rejected.

    Raises:
        UserError: the pair is messages and the tokenizer has no chat template, or the template does not end.
        RowFault: `template-error`, the template refuses the messages; `template-drops`, it leaves out a part of them;
            `template-boundary`, the response's start cannot be found; `template-turns`, the assistant's parts cannot
            be found.
    """
    if isinstance(pair.prompt, str):
        start = len(pair.prompt)
        return [Side(pair.prompt + side, start, False) for side in pair.sides if isinstance(side, str)]
    names = ["chosen", "rejected"] if pair.kind != "ranked" else list(pair.responses)
    messages = [side for side in pair.sides if isinstance(side, list)]
    with within_limits(place(pair.source_file, pair.source_row)):
        writer = _Writer.of(pair, tokenizer)
        return [writer.side(side, name, train_on) for side, name in zip(messages, names, strict=True)]


@dataclass(frozen=True, slots=True)
class _Writer:
    """The chat template applied to one prompt.

    Attributes:
        render: the template.
        prompt: messages before the response, without a message that the response continues.
        prefill: the prompt's part of the assistant's message, or empty.
        opened: the prompt with the template's opening for an answer; None if the template has none.
        end: the text that the template writes after an answer.
        ends: texts that count as that end if a message contains them.
    """

    render: Renderer
    prompt: list[Message]
    prefill: str
    opened: str | None
    end: str
    ends: tuple[str, ...]

    @staticmethod
    def of(pair: PreferencePair, tokenizer: PreTrainedTokenizerBase) -> _Writer:
        """The template of a tokenizer, applied to the prompt of a pair.

        Raises:
            UserError: the tokenizer has no template.
            RowFault: the template refuses the prompt, or ignores an argument.
        """
        assert isinstance(pair.prompt, list)
        try:
            render = make_renderer(tokenizer, pair.tools, pair.chat_template_kwargs)
        except ValueError:
            raise _no_template(pair, tokenizer) from None
        _check_arguments(render)
        prompt, prefill = list(pair.prompt), ""
        if prompt[-1]["role"] == "assistant" and not prompt[-1].get("tool_calls"):
            prefill = prompt.pop()["content"]
        stand_in = render([*prompt, {"role": "assistant", "content": prefill + _ANSWER}])
        end = stand_in[stand_in.rfind(_ANSWER) + len(_ANSWER) :] if _ANSWER in stand_in else ""
        ends = _written_ends(end, tokenizer, [pair.prompt, *pair.sides])
        prompt = [_without_end(message, ends) for message in prompt]
        return _Writer(render, prompt, prefill, _opening(render, prompt) if not prefill else None, end, ends)

    def side(self, response: list[Message], name: str, train_on: TrainOn) -> Side:
        """The text of one response.

        Raises:
            RowFault: see `to_sides`.
        """
        response = [_without_end(message, self.ends) for message in response]
        if self.prefill:
            response = [{**response[0], "content": self.prefill + response[0]["content"]}, *response[1:]]
        messages, lost, written = self._write([*self.prompt, *response])
        response = messages[len(self.prompt) :]
        thoughts = self._judge(lost, messages, name)
        boundary = self._start(written.text, response, 0)
        if boundary is None:
            raise RowFault("template-boundary", "the chat template changes the prompt when a response follows it")
        return Side(written.text, boundary, True, self._scored(written, response, boundary, train_on), thoughts)

    def _write(self, messages: list[Message]) -> tuple[list[Message], list[Part], Rendered]:
        """Renders with the form of call arguments (object or text) that the template writes completely."""
        forms = [[_unquoted_arguments(message) for message in messages]]
        if any("arguments" in _inner(call) for message in messages for call in message.get("tool_calls") or []):
            forms.append([_other_arguments(message) for message in forms[0]])
        fault: RowFault | None = None
        best: tuple[list[Message], list[Part], Rendered] | None = None
        for form in forms:
            try:
                written = self.render.with_marks(form)
                lost = prove(written.text, form, self.render.tools, self._tagged, "")
            except RowFault as found:
                fault = fault or found
                continue
            if best is None or len(lost) < len(best[1]):
                best = form, lost, written
            if not lost:
                break
        if best is None:
            assert fault is not None
            raise fault
        return best

    def _tagged(self, tagged: Tagged) -> str:
        return self.render(tagged.messages, tools=tagged.tools)

    def _judge(self, lost: list[Part], messages: list[Message], name: str) -> int:
        """Counts thoughts of earlier turns that are left out.

        Raises:
            RowFault: `template-drops`, something else is left out.
        """
        last_user = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
        thoughts = 0
        for part in lost:
            if part.kind == "thought" and part.message < last_user:
                thoughts += 1
                continue
            begin = len(self.prompt)
            where = part.where
            if part.message >= 0:
                of = ("prompt", part.message) if part.message < begin else (name, part.message - begin)
                where = f"{of[0]}, message {of[1] + 1}" + where.split(f"message {part.message + 1}", 1)[-1]
            raise RowFault("template-drops", f"{where}: the chat template does not write {part.text!r:.80}")
        return thoughts

    def _start(self, text: str, response: list[Message], turn: int) -> int | None:
        """The first character of a response's turn, after everything that the template writes before an answer."""
        before = [*self.prompt, *response[:turn]]
        opened = self.opened if turn == 0 else _opening(self.render, before)
        if opened is not None and text.startswith(opened):
            return len(opened)
        # The opening for an answer can differ from how answers are written, e.g. it begins a thought that is later left
        # out, or the template has none. A stand-in for the answer shows what the template writes before one.
        prefill = self.prefill if turn == 0 else ""
        stand_in: Message = {"role": "assistant", "content": prefill + _ANSWER}
        for behind in ((), response[turn + 1 :]):
            written = self.render([*before, stand_in, *behind])
            header = written[: max(written.rfind(_ANSWER), 0)]
            if opened is None and not prefill:
                # Only white space, as in Mistral's templates: the model itself writes it before an answer in words.
                plain = _plain(self.render, before)
                if plain and text.startswith(plain) and header.startswith(plain) and not header[len(plain) :].strip():
                    return len(plain)
            if header and text.startswith(header):
                return len(header)
        return None

    def _scored(self, written: Rendered, response: list[Message], boundary: int, train_on: TrainOn) -> Spans | None:
        """The assistant's parts of the response; None for all of it.

        Raises:
            RowFault: `template-turns`, the parts cannot be determined reliably.
        """
        text = written.text
        turns = [i for i, message in enumerate(response) if message["role"] == "assistant"]
        if train_on == "all":
            return None
        if train_on == "last":
            turns = turns[-1:]
        if unmeant := [i for i in turns if any(response[i].get(name) in (0, False) for name in LOSS_KEYS)]:
            name = next(name for name in LOSS_KEYS if response[unmeant[0]].get(name) in (0, False))
            raise RowFault("template-turns", f"message {unmeant[0] + 1} is marked as not trained on (`{name}`)")
        if self.render.marks:
            begin = self._turn_start(text, response, turns[0], boundary) if train_on == "last" else boundary
            clipped = [(max(first, begin), last) for first, last in written.marked if last > begin]
            if not clipped:
                raise RowFault("template-turns", "the chat template marks no part of the response as the assistant's")
            return tuple(clipped)
        if turns == [0] and len(response) == 1:
            return None
        return tuple(self._turn(text, response, turn, boundary) for turn in turns)

    def _turn_start(self, text: str, response: list[Message], turn: int, boundary: int) -> int:
        start = boundary if turn == 0 else self._start(text, response, turn)
        if start is None:
            raise RowFault("template-turns", f"the beginning of message {turn + 1} is not in the template's output")
        return start

    def _turn(self, text: str, response: list[Message], turn: int, boundary: int) -> tuple[int, int]:
        """Locates an assistant's turn by rendering the conversation up to it.

        Raises:
            RowFault: `template-turns`, the pieces do not add up to the whole text.
        """
        begin = self._turn_start(text, response, turn, boundary)
        if turn == len(response) - 1:
            return begin, len(text)
        until = self.render([*self.prompt, *response[: turn + 1]])
        if len(until) > begin and text.startswith(until):
            return begin, len(until)
        # The template writes the last message differently, e.g. with an empty thought. Then find the beginning of the
        # next message; the turn ends at the only end marker before it.
        follower = {**response[turn + 1], "content": _ANSWER}
        follower.pop("tool_calls", None)
        rendered = self.render([*self.prompt, *response[: turn + 1], follower, *response[turn + 2 :]])
        rendered = rendered[: max(rendered.rfind(_ANSWER), 0)]
        piece = rendered[begin:]
        if text.startswith(rendered) and self.end and piece.count(self.end) == 1:
            return begin, begin + piece.index(self.end) + len(self.end)
        raise RowFault("template-turns", f"the end of message {turn + 1} is not in the template's output")


def _plain(render: Renderer, messages: Sequence[Message]) -> str:
    try:
        return render(messages)
    except RowFault:
        return ""  # as in `_opening`


def _opening(render: Renderer, messages: Sequence[Message]) -> str | None:
    """The messages with the template's opening for an answer; None if the template has no opening."""
    try:
        opened, plain = render(messages, opened=True), render(messages)
    except RowFault:
        return None  # e.g. a template that requires an answer after every question
    return opened if opened != plain else None


def _no_template(pair: PreferencePair, tokenizer: PreTrainedTokenizerBase) -> UserError:
    return UserError(
        "the pairs are chat messages, but the tokenizer has no chat template",
        code="tokenizer-no-template",
        where=place(pair.source_file, pair.source_row),
        expected="a chat_template in tokenizer_config.json or chat_template.jinja beside the model",
        found=f"{type(tokenizer).__name__} without one",
        remedy="copy the template of the SFT model into its folder, name it with --tokenizer, or give prompt, chosen "
        "and rejected as texts",
        exit_status=3,
    )


def _check_arguments(render: Renderer) -> None:
    """Raises if the template does not read an argument that `chat_template_kwargs` sets."""
    if not render.arguments:
        return
    known = names_read(render.template)
    for name in render.arguments:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            raise RowFault("template-drops", f"chat_template_kwargs: the chat template does not read {name!r}{hint}")


def _written_ends(end: str, tokenizer: PreTrainedTokenizerBase, turns: Sequence[Any]) -> tuple[str, ...]:
    """Texts that mark the end of a turn if a message contains them; the template writes the end again.

    They are the template's own end and other end tokens that the tokenizer knows, such as the base model's.
    """
    if not end.strip():
        return ()
    texts = {end.strip(), *end.split(), tokenizer.eos_token}
    closing = (message["content"].rstrip() for messages in turns for message in messages)
    if any(content.endswith(END_TEXTS) for content in closing):
        texts |= set(map(str, tokenizer.get_added_vocab())) & set(END_TEXTS)
    endings = {text for text in texts if text and not text.isalnum()}
    if end[0].isspace():
        endings.add(end.rstrip())  # a word such as END ends a turn only on a separate line
    return tuple(endings)


def _without_end(message: Message, ends: Sequence[str]) -> Message:
    """An assistant's message without a trailing end of turn."""
    content = message["content"]
    if message["role"] != "assistant" or not any(content.rstrip().endswith(end) for end in ends):
        return message
    content = content.rstrip()
    while end := next((end for end in ends if content.endswith(end)), None):
        content = content.removesuffix(end).rstrip()
    return {**message, "content": content}


def _inner(call: Any) -> dict[str, Any]:
    inner = call.get("function", call) if isinstance(call, dict) else None
    return inner if isinstance(inner, dict) else {}


def _other_arguments(message: Message) -> Message:
    """The message with the arguments of its calls as objects instead of texts, or texts instead of objects.

    OpenAI stores them as text, which templates with `tojson` would write as a text within a text.
    """
    if not message.get("tool_calls"):
        return message
    message = copy.deepcopy(message)
    for call in message["tool_calls"]:
        inner = _inner(call)
        arguments = inner.get("arguments")
        if isinstance(arguments, str):
            parsed = parse_structure(arguments)
            inner["arguments"] = parsed if isinstance(parsed, dict) else arguments
        elif isinstance(arguments, dict):
            inner["arguments"] = json.dumps(arguments, ensure_ascii=False)
    return message


def _unquoted_arguments(message: Message) -> Message:
    """The message with call arguments encoded at most once: some files contain JSON of JSON."""
    if not message.get("tool_calls"):
        return message
    message = copy.deepcopy(message)
    for inner in map(_inner, message["tool_calls"]):
        while isinstance(arguments := inner.get("arguments"), str):
            try:
                within = json.loads(arguments)
            except ValueError:
                break
            if not isinstance(within, str):
                break
            inner["arguments"] = within
    return message
