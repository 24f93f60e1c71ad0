"""The shapes in which a pair is written, brought to one: prompt, chosen, rejected; all texts or all messages.

Texts: explicit prompt, or two transcripts whose common beginning is the prompt (as in hh-rlhf). Messages: explicit
prompt, or two conversations whose common beginning is the prompt. docs/data.md shows each. Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dpoeng.engine.data.messages import Message, messages_of, same_message
from dpoeng.engine.data.prompts import (
    PROMPT_COLUMNS,
    PromptColumns,
    check_conversations,
    place_prompt,
    plain,
    read_prompt,
    without_answer,
)
from dpoeng.engine.data.strict_json import RowFault, json_type
from dpoeng.engine.data.structured import parse_structure

Turns = str | list[Message]

FIELDS = ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs")
COLUMN_FIELDS = (*FIELDS, *PROMPT_COLUMNS)
"""What `--columns` maps."""

TRANSCRIPT = "transcript"
"""`PreferencePair.origin` where the prompt is what two texts have in common."""

# Further names of columns that may hold a prompt: beside one of them, a common beginning proves nothing.
_MAY_BE_PROMPTS = (
    *("problem", "task", "request", "text", "post", "title", "body", "user", "user_prompt", "user_input"),
    *("prompt_text", "source", "src", "dialogue", "dialog", "conversations", "conversation", "messages"),
)

# What stands before an answer in the transcripts and prompts of common data sets; the answer starts behind it.
ASSISTANT_HEADERS = (
    "\n\nAssistant:",
    "<|im_start|>assistant\n",
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "<|assistant|>\n",
    "<start_of_turn>model\n",
    "<|im_start|>assistant<|im_sep|>",
    "<|header_start|>assistant<|header_end|>\n\n",
    "<|start_of_role|>assistant<|end_of_role|>",
    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
    "<\uff5cAssistant\uff5c>",
    "<|start|>assistant",
    "<|start|>assistant<|channel|>final<|message|>",
    "[/INST]",
    "### Response:\n",
    "\nASSISTANT:",
    "\nResponse:",
)
# A human turn inside a response: the two sides differ in an earlier turn than the last.
HUMAN_HEADERS = (
    *("\n\nHuman:", "<|im_start|>user", "<|start_header_id|>user", "<|user|>", "<start_of_turn>user"),
    *("<|header_start|>user", "<|start_of_role|>user", "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>", "<|start|>user"),
    "<\uff5cUser\uff5c>",
)

_OURS_IN_TEMPLATES = frozenset(
    {"conversation", "tools", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize"}
    | {"padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"}
    | {"tokenizer_kwargs", "messages", "sanitize_control_tokens"}
)


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """Two responses to one prompt, the first preferred.

    Attributes:
        prompt: a text, or messages with `role` and `content`; the responses are of the same kind.
        chosen: the response alone, without the prompt.
        rejected: the same.
        source_file: as the user named it.
        source_row: from 1: the line in JSON Lines, else the position among the file's rows.
        extra: the row's other columns, values that JSON can hold.
        tools: JSON schemas for the chat template, or None.
        chat_template_kwargs: further arguments of the chat template, or None.
        origin: the field that the prompt was taken from, or `transcript`; empty for messages that begin alike.
        repeated: whether both responses repeated the prompt, and stand here without it.
    """

    prompt: Turns
    chosen: Turns
    rejected: Turns
    source_file: str = ""
    source_row: int = 0
    extra: dict[str, Any] = field(default_factory=dict)
    tools: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    origin: str = "prompt"
    repeated: bool = False


@dataclass(frozen=True, slots=True)
class Shape:
    """How the columns of a file are to be read.

    Attributes:
        columns: field -> column of the file, where they differ; an empty one where a field is not to be read.
        untyped: whether all values are texts (CSV).
        prompt_format: a text with `{prompt}` in it, put around prompts given as texts (not around transcripts).
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    untyped: bool = False
    prompt_format: str | None = None

    def column(self, name: str) -> str:
        """The file's column for one of FIELDS."""
        return self.columns.get(name, name)


def to_pair(row: Mapping[str, Any], shape: Shape, source_file: str, source_row: int) -> PreferencePair:
    """Turn one row into a pair; unused columns become `extra`.

    Raises:
        RowFault: `missing-field`, `wrong-type`, `bad-messages`, `mixed-shapes`, `no-common-prompt`, `prompt-mismatch`,
            `empty-prompt`, `empty-response`, `same-response`, `bad-template-kwargs`, `unused-column`, and those of
            `messages_of`.
    """
    chosen, rejected = _turns(row, shape.column("chosen")), _turns(row, shape.column("rejected"))
    given = read_prompt(row, shape.columns, single_answers=_are_answers(chosen, rejected))
    if isinstance(chosen, str) and isinstance(rejected, str):
        parts = _split_texts(given, chosen, rejected, row)
        if isinstance(parts.prompt, str) and given.prompt is not None and not parts.formatted and shape.prompt_format:
            parts.prompt = shape.prompt_format.replace("{prompt}", parts.prompt)
    elif isinstance(chosen, list) and isinstance(rejected, list):
        parts = _split_conversations(given, chosen, rejected)
    else:
        raise RowFault("mixed-shapes", "one response is text, the other is messages")
    parts.prompt = place_prompt(given, parts.prompt, shape.prompt_format)
    if isinstance(parts.prompt, list):
        parts.chosen, parts.rejected = _as_answer(parts.chosen), _as_answer(parts.rejected)
        parts.prompt = without_answer(parts.prompt, parts.origin, parts.chosen, parts.rejected)
    _check_responses(parts.chosen, parts.rejected)
    used = {shape.column(name) for name in FIELDS} | given.used
    check_conversations(row, shape.columns, used, " ".join(map(plain, (parts.prompt, parts.chosen, parts.rejected))))
    tools = _tools(row, shape)
    kwargs = _template_kwargs(row.get(shape.column("chat_template_kwargs")))
    if isinstance(parts.prompt, str) and (tools or kwargs):
        column = shape.column("tools" if tools else "chat_template_kwargs")
        raise RowFault("unused-column", f"`{column}` is for the chat template, which a text prompt does not use")
    return PreferencePair(
        prompt=parts.prompt,
        chosen=parts.chosen,
        rejected=parts.rejected,
        source_file=source_file,
        source_row=source_row,
        extra={name: value for name, value in row.items() if name not in used},
        tools=tools,
        chat_template_kwargs=kwargs,
        origin=parts.origin,
        repeated=parts.repeated,
    )


def holds_human_turn(pair: PreferencePair) -> bool:
    """Whether a response holds a further turn of the human, which would be scored as if the model had said it."""
    for side in (pair.chosen, pair.rejected):
        if isinstance(side, list):
            if any(message["role"] == "user" for message in side):
                return True
        elif any(header in side for header in HUMAN_HEADERS):
            return True
    return False


def common_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many leading elements two sequences have in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@dataclass(slots=True)
class _Parts:
    """A row's prompt and responses; `formatted` where the prompt is a transcript, which has its wrapping already."""

    prompt: Turns
    chosen: Turns
    rejected: Turns
    origin: str
    repeated: bool = False
    formatted: bool = False


def _turns(row: Mapping[str, Any], column: str) -> Turns:
    value = row.get(column)
    if value is None:
        raise RowFault("missing-field", f"`{column}` is {'null or empty' if column in row else 'missing'}")
    messages = messages_of(value, column)
    if messages is None:
        assert isinstance(value, str)
        return value
    return messages


def _are_answers(chosen: Turns, rejected: Turns) -> bool:
    """Whether the responses are answers alone, and no conversations or transcripts that hold their prompt."""
    return all(
        not any(header in side for header in ASSISTANT_HEADERS)
        if isinstance(side, str)
        else bool(side) and side[0]["role"] == "assistant"
        for side in (chosen, rejected)
    )


def _as_answer(response: Turns) -> list[Message]:
    return [{"role": "assistant", "content": response}] if isinstance(response, str) else response


def _split_texts(given: PromptColumns, chosen: str, rejected: str, row: Mapping[str, Any]) -> _Parts:
    """Prompt and responses of two texts: the prompt as given, or what two transcripts have in common."""
    common = chosen[: common_length(chosen, rejected)]
    if given.prompt is None:
        ends = _header_ends(common)
        cut = max(ends) if ends else _line_cut(common)
        if chosen == rejected or cut is None:
            problem = "are equal" if chosen == rejected else "do not begin as transcripts of one conversation do"
            raise RowFault(
                "same-response" if chosen == rejected else "no-common-prompt",
                f"there is no prompt column, and the two texts {problem}",
            )
        other = next((name for name in _MAY_BE_PROMPTS if isinstance(row.get(name), str | list) and row[name]), None)
        if not ends and other is not None and not (isinstance(row[other], str) and row[other] in common):
            raise RowFault(
                "unused-column",
                f"`{other}` may be the prompt, and the texts merely begin alike: name it with --columns prompt={other}",
            )
        return _Parts(chosen[:cut], chosen[cut:], rejected[cut:], TRANSCRIPT, formatted=True)
    prompt = given.prompt
    if isinstance(prompt, str):
        if prompt and common.startswith(prompt) and _is_repetition(prompt):
            parts = _Parts(prompt, chosen[len(prompt) :], rejected[len(prompt) :], given.origin, repeated=True)
            parts.formatted = any(header in prompt for header in ASSISTANT_HEADERS)
            return parts
        # The question in the prompt column, and whole transcripts of it as responses.
        ends = _header_ends(common)
        if ends and prompt.strip() and prompt.strip() in common[: max(ends)]:
            cut = max(ends)
            return _Parts(chosen[:cut], chosen[cut:], rejected[cut:], given.origin, repeated=True, formatted=True)
    return _Parts(prompt, chosen, rejected, given.origin)


def _is_repetition(prompt: str) -> bool:
    """Whether two responses that both begin with this prompt repeat it; one or two words may well begin both."""
    return (
        len(prompt.split()) > 2 or "\n" in prompt.strip() or prompt.rstrip().endswith(":") or bool(_header_ends(prompt))
    )


def _header_ends(text: str) -> list[int]:
    """Behind which characters answers may begin: the end of the last header of each kind."""
    return [text.rfind(header) + len(header) for header in ASSISTANT_HEADERS if header in text]


def _line_cut(common: str) -> int | None:
    """Return where the prompt ends in the common beginning of two texts without a header, or None.

    Before the last white space, if at least one whole line is in common: less is two answers that merely begin alike.
    """
    if "\n" not in common.lstrip():
        return None
    return len(common.rstrip()) if common[-1].isspace() else max(common.rfind(" "), common.rfind("\n"))


def _split_conversations(given: PromptColumns, chosen: list[Message], rejected: list[Message]) -> _Parts:
    """Prompt and responses of two lists of messages, which may or may not repeat the prompt."""
    if not chosen or not rejected:
        raise RowFault("empty-response", "a response has no messages")
    if given.prompt == []:
        raise RowFault("empty-prompt", "the prompt has no messages")
    prompt = given.prompt
    if prompt is not None and "assistant" in (chosen[0]["role"], rejected[0]["role"]):
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        return _Parts(prompt, chosen, rejected, given.origin)
    shared = next(
        (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if not same_message(a, b)),
        min(len(chosen), len(rejected)),
    )
    if shared == len(chosen) == len(rejected):
        raise RowFault("same-response", "the two conversations are equal")
    if shared == 0:
        raise RowFault("no-common-prompt", "the two conversations begin with different messages")
    least = _given_length(prompt, chosen[:shared])
    # Both sides go on with the assistant; a differing turn of the user belongs to the responses.
    while shared > least and any(
        len(side) > shared and side[shared]["role"] != "assistant" for side in (chosen, rejected)
    ):
        shared -= 1
    return _Parts(chosen[:shared], chosen[shared:], rejected[shared:], given.origin)


def _given_length(prompt: Turns | None, shared: list[Message]) -> int:
    """How many of the shared messages the prompt column names.

    Raises:
        RowFault: `prompt-mismatch`, it names others.
    """
    if isinstance(prompt, list):
        if len(prompt) <= len(shared) and all(map(_alike, prompt, shared)):
            return len(prompt)
        system = [message for message in prompt if message["role"] == "system"]
        if (
            prompt[len(system) :]
            and len(prompt) - len(system) <= len(shared)
            and all(map(_alike, prompt[len(system) :], shared))
        ):
            raise RowFault("prompt-mismatch", "the prompt column has a system prompt that the conversations lack")
    elif prompt is None or any(message["content"].strip() == prompt.strip() for message in shared):
        return 1
    raise RowFault("prompt-mismatch", "the prompt column is not part of the conversations' shared beginning")


def _alike(a: Message, b: Message) -> bool:
    """Whether two messages say the same, white space at the ends aside."""
    return same_message({**a, "content": a["content"].strip()}, {**b, "content": b["content"].strip()})


def _check_responses(chosen: Turns, rejected: Turns) -> None:
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if isinstance(side, str):
            empty = not side.strip()
        else:
            empty = not any(message["content"].strip() or message.get("tool_calls") for message in side)
        if empty:
            raise RowFault("empty-response", f"`{name}` holds nothing after the prompt")
        if isinstance(side, list) and side[0]["role"] != "assistant":
            raise RowFault("bad-messages", f"`{name}` goes on from the prompt with a {side[0]['role']!r} message")
    if chosen == rejected:
        raise RowFault("same-response", "chosen and rejected are equal")


def _tools(row: Mapping[str, Any], shape: Shape) -> list[Any] | None:
    """The tools of a row, which OpenAI's preference format keeps with the messages of the prompt."""
    value = row.get(shape.column("tools"))
    prompt = row.get(shape.column("prompt"))
    if value is None and isinstance(prompt, dict):
        value = prompt.get("tools")
    value = _structure(value, "tools")
    if isinstance(value, list):
        value = [(parse_structure(tool) or tool) if isinstance(tool, str) else tool for tool in value]
    if value is not None and not (isinstance(value, list) and all(isinstance(tool, dict) for tool in value)):
        raise RowFault("wrong-type", f"`tools` must be a list of JSON schemas, it is {json_type(value)}")
    return value or None


def _template_kwargs(value: Any) -> dict[str, Any] | None:
    value = _structure(value, "chat_template_kwargs")
    if value is not None and not isinstance(value, dict):
        raise RowFault("wrong-type", f"`chat_template_kwargs` must be an object, it is {json_type(value)}")
    taken = sorted(_OURS_IN_TEMPLATES & set(value or {}))
    if taken:
        raise RowFault("bad-template-kwargs", f"`chat_template_kwargs` may not set {', '.join(taken)}")
    return value or None


def _structure(value: Any, column: str) -> Any:
    """A value that some files store as text."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    parsed = parse_structure(value)
    if parsed is None:
        raise RowFault("bad-json", f"`{column}` is a text that is neither JSON nor a repr")
    return parsed
