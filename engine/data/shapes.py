"""The shapes in which a pair is written, brought to one: prompt, chosen, rejected; all texts or all messages.

Texts: explicit prompt, or two transcripts whose common beginning is the prompt (as in hh-rlhf). Messages: explicit
prompt, or two conversations whose common beginning is the prompt. docs/data.md shows each. Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dpoeng.engine.data import strict_json
from dpoeng.engine.data.strict_json import RowFault, json_type

Message = dict[str, Any]
Turns = str | list[Message]

FIELDS = ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs")

# What stands before an answer in the transcripts and prompts of common data sets; the answer starts behind it.
ASSISTANT_HEADERS = (
    "\n\nAssistant:",
    "<|im_start|>assistant\n",
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "<|assistant|>\n",
    "<start_of_turn>model\n",
    "[/INST]",
    "### Response:\n",
    "\nASSISTANT:",
    "\nResponse:",
)
# A human turn inside a response: the two sides differ in an earlier turn than the last.
HUMAN_HEADERS = ("\n\nHuman:", "<|im_start|>user", "<|start_header_id|>user", "<|user|>", "<start_of_turn>user")

_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "bing": "assistant", "chatgpt": "assistant"}
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
    """

    prompt: Turns
    chosen: Turns
    rejected: Turns
    source_file: str = ""
    source_row: int = 0
    extra: dict[str, Any] = field(default_factory=dict)
    tools: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Shape:
    """How the columns of a file are to be read.

    Attributes:
        columns: field -> column of the file, where they differ.
        untyped: whether all values are texts (CSV), so that messages stand there as JSON.
        prompt_format: a text with `{prompt}` in it, put around prompts given as texts (not around transcripts).
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    untyped: bool = False
    prompt_format: str | None = None

    def column(self, name: str) -> str:
        """The file's column for one of FIELDS."""
        return self.columns.get(name, name)


def to_pair(row: Mapping[str, Any], shape: Shape, source_file: str, source_row: int) -> PreferencePair:
    """One row as a pair; columns that were not used for it become `extra`.

    Raises:
        RowFault: `missing-field`, `wrong-type`, `bad-messages`, `mixed-shapes`, `no-common-prompt`, `prompt-mismatch`,
            `empty-prompt`, `empty-response`, `same-response`, `bad-template-kwargs`.
    """
    used = {shape.column(name) for name in FIELDS}
    given: Turns | None = None
    if row.get(shape.column("prompt")) is not None:
        given = _turns(row, shape.column("prompt"), shape.untyped)
    elif prompt_from_instruction(row, shape):
        # Alpaca's convention: `input` continues `instruction`.
        more = row.get("input")
        given = f"{row['instruction']}\n{more}" if isinstance(more, str) and more else row["instruction"]
        used |= {"instruction", "input"}
    chosen = _turns(row, shape.column("chosen"), shape.untyped)
    rejected = _turns(row, shape.column("rejected"), shape.untyped)

    prompt: Turns
    if isinstance(chosen, str) and isinstance(rejected, str):
        if isinstance(given, list):
            prompt, chosen, rejected = given, _answer(chosen), _answer(rejected)
        else:
            prompt, chosen, rejected = _split_texts(given, chosen, rejected)
            if given is not None and shape.prompt_format is not None:
                prompt = shape.prompt_format.replace("{prompt}", prompt)
    elif isinstance(chosen, list) and isinstance(rejected, list):
        prompt, chosen, rejected = _split_conversations(given, chosen, rejected)
    else:
        raise RowFault("mixed-shapes", "one response is a text, the other is messages")
    _check_responses(chosen, rejected)
    return PreferencePair(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        source_file=source_file,
        source_row=source_row,
        extra={name: value for name, value in row.items() if name not in used},
        tools=_tools(row.get(shape.column("tools"))),
        chat_template_kwargs=_template_kwargs(row.get(shape.column("chat_template_kwargs"))),
    )


def prompt_from_instruction(row: Mapping[str, Any], shape: Shape) -> bool:
    """Whether a row has no prompt of its own, and its `instruction` is taken for one."""
    return row.get(shape.column("prompt")) is None and isinstance(row.get("instruction"), str)


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


def _turns(row: Mapping[str, Any], column: str, untyped: bool) -> Turns:
    value = row.get(column)
    if value is None:
        raise RowFault("missing-field", f"`{column}` is {'null or empty' if column in row else 'missing'}")
    if untyped and isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            parsed = strict_json.parse(value)
        except RowFault:
            return value
        if isinstance(parsed, list) and parsed and all(isinstance(item, dict) for item in parsed):
            strict_json.check(parsed)
            return [_message(item, column) for item in parsed]
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return [_message(item, column) for item in value]
    raise RowFault("wrong-type", f"`{column}` must be a text or a list of messages, it is {json_type(value)}")


def _message(value: Any, column: str) -> Message:
    """One message with a role and a text; ShareGPT's `from` and `value` and lists of text parts are translated."""
    if not isinstance(value, dict):
        raise RowFault("bad-messages", f"`{column}` holds {json_type(value)} where a message should be")
    message = dict(value)
    if "role" not in message and "from" in message:
        message["role"] = _SHAREGPT_ROLES.get(str(message["from"]), message.pop("from"))
        message.pop("from", None)
        message["content"] = message.pop("value", None)
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise RowFault("bad-messages", f"a message of `{column}` has no `role`")
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        if len(texts) < len(content):
            raise RowFault("not-text", f"a message of `{column}` holds parts that are not text")
        content = "".join(map(str, texts))
    if content is None and message.get("tool_calls"):
        content = ""  # many templates would print None
    if not isinstance(content, str):
        raise RowFault("bad-messages", f"a message of `{column}` has no text as its `content`")
    return {**message, "content": content}


def _answer(text: str) -> list[Message]:
    return [{"role": "assistant", "content": text}]


def _split_texts(prompt: str | None, chosen: str, rejected: str) -> tuple[str, str, str]:
    """Prompt and responses of two texts: the prompt as given, or what two transcripts have in common."""
    if prompt is None:
        cut = _transcript_cut(chosen[: common_length(chosen, rejected)])
        if chosen == rejected or cut is None:
            problem = "are equal" if chosen == rejected else "do not begin as transcripts of one conversation do"
            raise RowFault(
                "same-response" if chosen == rejected else "no-common-prompt",
                f"there is no prompt column, and the two texts {problem}",
            )
        return chosen[:cut], chosen[cut:], rejected[cut:]
    repeated = prompt and chosen.startswith(prompt) and rejected.startswith(prompt)
    if repeated and any(header in prompt for header in ASSISTANT_HEADERS):
        return prompt, chosen[len(prompt) :], rejected[len(prompt) :]
    return prompt, chosen, rejected


def _transcript_cut(common: str) -> int | None:
    """Where the prompt ends in what two transcripts have in common, or None.

    Behind the last header of an answer. Without one, before the last white space, if at least one whole line is in
    common: less is two answers that happen to begin alike.
    """
    ends = [common.rfind(header) + len(header) for header in ASSISTANT_HEADERS if header in common]
    if ends:
        return max(ends)
    if "\n" not in common.lstrip():
        return None
    return len(common.rstrip()) if common[-1].isspace() else max(common.rfind(" "), common.rfind("\n"))


def _split_conversations(
    given: Turns | None, chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """Prompt and responses of two lists of messages, which may or may not repeat the prompt."""
    if not chosen or not rejected:
        raise RowFault("empty-response", "a response has no messages")
    shared = common_length(chosen, rejected)
    if isinstance(given, list):
        if not given:
            raise RowFault("empty-prompt", "the prompt has no messages")
        start = len(given) if chosen[: len(given)] == rejected[: len(given)] == given else 0
        return given, chosen[start:], rejected[start:]
    if isinstance(given, str) and chosen[0]["role"] == "assistant":
        return [{"role": "user", "content": given}], chosen, rejected
    if chosen == rejected:
        raise RowFault("same-response", "the two conversations are equal")
    if shared == 0:
        raise RowFault("no-common-prompt", "the two conversations do not begin with the same message")
    if given is not None and all(message["content"].strip() != given.strip() for message in chosen[:shared]):
        raise RowFault("prompt-mismatch", "the prompt column is not among the messages that the conversations share")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _check_responses(chosen: Turns, rejected: Turns) -> None:
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if isinstance(side, str):
            empty = not side.strip()
        else:
            empty = not any(message["content"].strip() or message.get("tool_calls") for message in side)
        if empty:
            raise RowFault("empty-response", f"`{name}` holds nothing behind the prompt")
        if isinstance(side, list) and side[0]["role"] != "assistant":
            raise RowFault("bad-messages", f"`{name}` goes on from the prompt with a {side[0]['role']!r} message")
    if chosen == rejected:
        raise RowFault("same-response", "chosen and rejected are equal")


def _tools(value: Any) -> list[Any] | None:
    value = _json_text(value)
    if value is not None and not (isinstance(value, list) and all(isinstance(tool, dict) for tool in value)):
        raise RowFault("wrong-type", f"`tools` must be a list of JSON schemas, it is {json_type(value)}")
    return value or None


def _template_kwargs(value: Any) -> dict[str, Any] | None:
    value = _json_text(value)
    if value is not None and not isinstance(value, dict):
        raise RowFault("wrong-type", f"`chat_template_kwargs` must be an object, it is {json_type(value)}")
    taken = sorted(_OURS_IN_TEMPLATES & set(value or {}))
    if taken:
        raise RowFault("bad-template-kwargs", f"`chat_template_kwargs` may not set {', '.join(taken)}")
    return value or None


def _json_text(value: Any) -> Any:
    """A value that some files store as a JSON text."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    parsed = strict_json.parse(value)
    strict_json.check(parsed)
    return parsed
