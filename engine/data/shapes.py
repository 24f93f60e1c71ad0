"""Normalises the shapes in which pairs are written: prompt, chosen, rejected; all texts or all messages.

Texts: a prompt column, or two transcripts whose common beginning is the prompt (as in hh-rlhf). Messages: a prompt
column, or two conversations whose common beginning is the prompt. See docs/data.md. Independent of files.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
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

_OF_ALL = ("prompt", "tools", "chat_template_kwargs")
KIND_FIELDS = {
    "pairs": ("chosen", "rejected"),
    "unpaired": ("completion", "label"),
    "ranked": ("responses", "completions", "scores", "ranks"),
}
"""The fields of each kind of rows, besides the common ones."""
_TELLING = {"unpaired": ("completion",), "ranked": ("responses", "completions")}
COLUMN_FIELDS = (*_OF_ALL, *(name for names in KIND_FIELDS.values() for name in names), *PROMPT_COLUMNS)
"""The fields that `--columns` maps."""

TRANSCRIPT = "transcript"
"""`PreferencePair.origin` if the prompt is the common beginning of two texts."""

# More column names for a prompt: if one exists, the common beginning of the texts may not be the prompt.
_MAY_BE_PROMPTS = (
    *("problem", "task", "request", "text", "post", "title", "body", "user", "user_prompt", "user_input"),
    *("prompt_text", "source", "src", "dialogue", "dialog", "conversations", "conversation", "messages"),
)

# Headers before an answer in the transcripts and prompts of common data sets; the answer starts after them.
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
# A human turn inside a response: the two sides differ before the last turn.
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
    """Two responses to one prompt, the first preferred; for an unpaired row, its response and a mismatched one.

    A ranked row has its first two responses as `chosen` and `rejected`, whichever is better, and the rest in `others`.

    Attributes:
        prompt: a text, or messages with `role` and `content`; the responses have the same form.
        chosen: the response without the prompt.
        rejected: the same.
        source_file: as the user named it.
        source_row: from 1: the line in JSON Lines, otherwise the position among the file's rows.
        extra: the row's other columns, as JSON values.
        tools: JSON schemas for the chat template, or None.
        chat_template_kwargs: further arguments of the chat template, or None.
        origin: the field that the prompt was taken from, or `transcript`; empty for messages with a common beginning.
        repeated: whether both responses repeated the prompt, which was removed from them.
        scores: for an unpaired row 1 if its response is desirable and 0 if not; of a ranked row the score of each
            response, more is better; empty for a pair. See `ScoredPair.scores`.
        others: of a ranked row its responses from the third on.
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
    scores: tuple[float, ...] = ()
    others: tuple[Turns, ...] = ()

    @property
    def kind(self) -> str:
        """One of KIND_FIELDS."""
        return ("pairs", "unpaired", "ranked")[min(len(self.scores), 2)]

    @property
    def sides(self) -> tuple[Turns, ...]:
        """All responses that are tokenised with this row."""
        return self.chosen, self.rejected, *self.others

    @property
    def responses(self) -> dict[str, Turns]:
        """The row's own responses: field -> response, without the mismatched one of an unpaired row."""
        if self.kind == "unpaired":
            return {"completion": self.chosen}
        if self.kind == "ranked":
            return {f"response {number}": side for number, side in enumerate(self.sides, 1)}
        return {"chosen": self.chosen, "rejected": self.rejected}


@dataclass(frozen=True, slots=True)
class Shape:
    """How to read the columns of a file.

    Attributes:
        columns: field -> column of the file, if the names differ; an empty name if a field is not to be read.
        untyped: whether all values are texts (CSV).
        prompt_format: a text with `{prompt}` to put around prompts given as texts (not around transcripts).
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    untyped: bool = False
    prompt_format: str | None = None

    def column(self, name: str) -> str:
        """The file's column for one of COLUMN_FIELDS."""
        return self.columns.get(name, name)

    def kind_of(self, names: Collection[str]) -> str:
        """The kind of rows, one of KIND_FIELDS, with these columns: pairs, unless only another kind's are there."""
        if any(self.column(name) in names for name in KIND_FIELDS["pairs"]):
            return "pairs"
        kinds = (kind for kind, fields in _TELLING.items() if any(self.column(name) in names for name in fields))
        return next(kinds, "pairs")


def check_kind(kind: str, first: str) -> None:
    """Raises RowFault if a row's kind differs from the first one's."""
    if kind != first:
        helps = "; --ranked-pairs best makes pairs of ranked rows" if {kind, first} == {"pairs", "ranked"} else ""
        raise RowFault("mixed-rows", f"the first row is one of {first} rows, this one of {kind} rows{helps}")


def fields_of(kind: str) -> tuple[str, ...]:
    """The fields of a kind of rows."""
    return (*_OF_ALL, *KIND_FIELDS[kind])


def to_pair(row: Mapping[str, Any], shape: Shape, source_file: str, source_row: int) -> PreferencePair:
    """Turns one row into a pair; unused columns become `extra`.

    Raises:
        RowFault: `missing-field`, `wrong-type`, `bad-messages`, `mixed-shapes`, `no-common-prompt`, `prompt-mismatch`,
            `empty-prompt`, `empty-response`, `same-response`, `bad-template-kwargs`, `unused-column`, and those of
            `messages_of`.
    """
    sides = {name: turns_of(row, shape.column(name)) for name in KIND_FIELDS["pairs"]}
    pair = to_row(row, shape, sides, source_file, source_row)
    if pair.chosen == pair.rejected:
        raise RowFault("same-response", "chosen and rejected are equal")
    return pair


def to_unpaired(row: Mapping[str, Any], shape: Shape, source_file: str, source_row: int) -> PreferencePair:
    """Turns a row of a response and a label into a pair that still lacks its mismatched response: see `Mismatcher`.

    Raises:
        RowFault: as `to_pair`, and `bad-label`.
    """
    column = shape.column("label")
    raw_label = row.get(column)
    label = (
        _LABELS.get(raw_label.strip().lower() if isinstance(raw_label, str) else raw_label)
        if _is_plain(raw_label)
        else None
    )
    if label is None:
        raise RowFault("bad-label", f"`{column}` must be true or false, it is {raw_label!r:.80}")
    response = turns_of(row, shape.column("completion"))
    pair = to_row(row, shape, {"completion": response}, source_file, source_row)
    if "label" in pair.extra:
        raise RowFault("unused-column", f"`label` is taken from `{column}`, and there is another column of this name")
    # Also keep the label among the columns, where the cache's view reads it.
    return replace(pair, scores=(float(label),), extra=pair.extra | {"label": label})


_LABELS: dict[Any, bool] = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
_LABELS |= {1: True, 0: False}


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | bool | int | float)


def to_row(
    row: Mapping[str, Any], shape: Shape, responses: Mapping[str, Turns], source_file: str, source_row: int
) -> PreferencePair:
    """Prompt and responses of a row, by field; for a single response, `rejected` is empty.

    Raises:
        RowFault: as `to_pair`, but for responses that are equal.
    """
    sides = list(responses.values())
    prompt_columns = read_prompt(row, shape.columns, single_answers=_are_answers(sides))
    texts = [side for side in sides if isinstance(side, str)]
    conversations = [side for side in sides if isinstance(side, list)]
    if not conversations:
        parts = _split_texts(prompt_columns, texts, row)
        if (
            isinstance(parts.prompt, str)
            and prompt_columns.prompt is not None
            and not parts.formatted
            and shape.prompt_format
        ):
            parts.prompt = shape.prompt_format.replace("{prompt}", parts.prompt)
    elif not texts:
        parts = _split_conversations(prompt_columns, conversations)
    else:
        raise RowFault("mixed-shapes", "one response is text, the other is messages")
    parts.prompt = place_prompt(prompt_columns, parts.prompt, shape.prompt_format)
    if isinstance(parts.prompt, list):
        answers = [_as_answer(side) for side in parts.sides]
        parts.sides = list(answers)
        parts.prompt = without_answer(parts.prompt, parts.origin, *answers)
    _check_responses(dict(zip(responses, parts.sides, strict=True)))
    kind = next((kind for kind, names in KIND_FIELDS.items() if set(responses) <= set(names)), None)
    used = {shape.column(name) for name in (_OF_ALL if kind is None else fields_of(kind))} | prompt_columns.used
    check_conversations(row, shape.columns, used, " ".join(map(plain, (parts.prompt, *parts.sides))))
    tools = _tools(row, shape)
    kwargs = _template_kwargs(row.get(shape.column("chat_template_kwargs")))
    if isinstance(parts.prompt, str) and (tools or kwargs):
        column = shape.column("tools" if tools else "chat_template_kwargs")
        raise RowFault("unused-column", f"`{column}` is for the chat template, which a text prompt does not use")
    return PreferencePair(
        prompt=parts.prompt,
        chosen=parts.sides[0],
        rejected=parts.sides[1] if parts.sides[1:] else parts.sides[0][:0],
        others=tuple(parts.sides[2:]),
        source_file=source_file,
        source_row=source_row,
        extra={name: value for name, value in row.items() if name not in used},
        tools=tools,
        chat_template_kwargs=kwargs,
        origin=parts.origin,
        repeated=parts.repeated,
    )


def holds_human_turn(pair: PreferencePair) -> bool:
    """Whether a response contains a further turn of the human, which would be scored as the model's text."""
    for side in pair.responses.values():
        if isinstance(side, list):
            if any(message["role"] == "user" for message in side):
                return True
        elif any(header in side for header in HUMAN_HEADERS):
            return True
    return False


def common_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """The number of equal leading elements of two sequences."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@dataclass(slots=True)
class _Parts:
    """A row's prompt and responses; `formatted` if the prompt is a transcript, which needs no format."""

    prompt: Turns
    sides: list[Turns]
    origin: str
    repeated: bool = False
    formatted: bool = False


def turns_of(row: Mapping[str, Any], column: str) -> Turns:
    """A text or messages in a column; raises RowFault `missing-field`, `wrong-type`, and those of `messages_of`."""
    value = row.get(column)
    if value is None:
        raise RowFault("missing-field", f"`{column}` is {'null or empty' if column in row else 'missing'}")
    messages = messages_of(value, column)
    if messages is None:
        assert isinstance(value, str)
        return value
    return messages


def _are_answers(sides: Sequence[Turns]) -> bool:
    """Whether the responses are single answers, not conversations or transcripts that include their prompt."""
    return all(
        not any(header in side for header in ASSISTANT_HEADERS)
        if isinstance(side, str)
        else bool(side) and side[0]["role"] == "assistant"
        for side in sides
    )


def _as_answer(response: Turns) -> list[Message]:
    return [{"role": "assistant", "content": response}] if isinstance(response, str) else response


def _split_texts(prompt_columns: PromptColumns, sides: Sequence[str], row: Mapping[str, Any]) -> _Parts:
    """Prompt and responses of texts: the given prompt, or the common beginning of transcripts."""
    common = sides[0]
    for side in sides[1:]:
        common = common[: common_length(common, side)]
    if prompt_columns.prompt is None:
        if len(sides) == 1:
            raise RowFault(
                "no-common-prompt", "there is no prompt column, and a single text does not show where its prompt ends"
            )
        ends = _header_ends(common)
        cut = max(ends) if ends else _line_cut(common)
        equal = len(set(sides)) == 1
        if equal or cut is None:
            problem = "are equal" if equal else "do not begin like transcripts of one conversation"
            raise RowFault(
                "same-response" if equal else "no-common-prompt",
                f"no prompt column, and the two texts {problem}",
            )
        other = next((name for name in _MAY_BE_PROMPTS if isinstance(row.get(name), str | list) and row[name]), None)
        if not ends and other is not None and not (isinstance(row[other], str) and row[other] in common):
            raise RowFault(
                "unused-column",
                f"`{other}` may be the prompt, since the texts only begin alike: name it with --columns prompt={other}",
            )
        return _Parts(common[:cut], [side[cut:] for side in sides], TRANSCRIPT, formatted=True)
    prompt = prompt_columns.prompt
    if isinstance(prompt, str):
        if prompt and common.startswith(prompt) and _is_repetition(prompt):
            parts = _Parts(prompt, [side[len(prompt) :] for side in sides], prompt_columns.origin, repeated=True)
            parts.formatted = any(header in prompt for header in ASSISTANT_HEADERS)
            return parts
        # The prompt column has the question, and the responses are whole transcripts with it.
        ends = _header_ends(common)
        if ends and prompt.strip() and prompt.strip() in common[: max(ends)]:
            cut = max(ends)
            return _Parts(
                common[:cut], [side[cut:] for side in sides], prompt_columns.origin, repeated=True, formatted=True
            )
    return _Parts(prompt, list(sides), prompt_columns.origin)


def _is_repetition(prompt: str) -> bool:
    """Whether two responses that begin with this prompt repeat it; one or two words may be a coincidence."""
    return (
        len(prompt.split()) > 2 or "\n" in prompt.strip() or prompt.rstrip().endswith(":") or bool(_header_ends(prompt))
    )


def _header_ends(text: str) -> list[int]:
    """Positions where answers may begin: the end of the last header of each kind."""
    return [text.rfind(header) + len(header) for header in ASSISTANT_HEADERS if header in text]


def _line_cut(common: str) -> int | None:
    """The end of the prompt in the common beginning of two texts without headers, or None.

    It is before the last white space if at least one whole line is common; with less, two answers only begin alike.
    """
    if "\n" not in common.lstrip():
        return None
    return len(common.rstrip()) if common[-1].isspace() else max(common.rfind(" "), common.rfind("\n"))


def _split_conversations(prompt_columns: PromptColumns, sides: Sequence[list[Message]]) -> _Parts:
    """Prompt and responses of lists of messages, which may repeat the prompt."""
    if not all(sides):
        raise RowFault("empty-response", "a response has no messages")
    if prompt_columns.prompt == []:
        raise RowFault("empty-prompt", "the prompt has no messages")
    prompt = prompt_columns.prompt
    if prompt is not None and any(side[0]["role"] == "assistant" for side in sides):
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        return _Parts(prompt, list(sides), prompt_columns.origin)
    first, shortest = sides[0], min(map(len, sides))
    shared = next(
        (i for i in range(shortest) if not all(same_message(first[i], side[i]) for side in sides[1:])), shortest
    )
    if len(sides) == 1:  # a whole conversation: the answer follows the prompt
        shared -= 1
    elif all(len(side) == shared for side in sides):
        raise RowFault("same-response", "the two conversations are equal")
    if shared == 0:
        raise RowFault("no-common-prompt", "the two conversations begin with different messages")
    least = _given_length(prompt, first[:shared])
    # Both sides continue with the assistant; if user turns differ, they belong to the responses.
    while shared > least and any(len(side) > shared and side[shared]["role"] != "assistant" for side in sides):
        shared -= 1
    return _Parts(first[:shared], [side[shared:] for side in sides], prompt_columns.origin)


def _given_length(prompt: Turns | None, shared: list[Message]) -> int:
    """How many of the common messages the prompt column contains.

    Raises:
        RowFault: `prompt-mismatch`, it contains others.
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
    """Whether two messages are equal, ignoring white space at both ends."""
    return same_message({**a, "content": a["content"].strip()}, {**b, "content": b["content"].strip()})


def _check_responses(sides: Mapping[str, Turns]) -> None:
    for name, side in sides.items():
        if isinstance(side, str):
            empty = not side.strip()
        else:
            empty = not any(message["content"].strip() or message.get("tool_calls") for message in side)
        if empty:
            raise RowFault("empty-response", f"`{name}` has nothing after the prompt")
        if isinstance(side, list) and side[0]["role"] != "assistant":
            raise RowFault("bad-messages", f"`{name}` continues the prompt with a {side[0]['role']!r} message")


def _tools(row: Mapping[str, Any], shape: Shape) -> list[Any] | None:
    """The tools of a row; OpenAI's preference format stores them with the messages of the prompt."""
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
    """Parses a value that some files store as text."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    parsed = parse_structure(value)
    if parsed is None:
        raise RowFault("bad-json", f"`{column}` is a text that is neither JSON nor a repr")
    return parsed
