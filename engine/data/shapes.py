"""The shapes in which a pair is written, brought to one: prompt, chosen, rejected; all texts or all messages.

Texts: explicit prompt, or two transcripts whose common beginning is the prompt (as in hh-rlhf). Messages: explicit
prompt, or two conversations whose common beginning is the prompt. docs/data.md shows each. Knows nothing of files.
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
"""The fields that rows of each kind have beside those of all. Ranked rows become pairs, see `kinds.ranked`."""
_TELLING = {"unpaired": ("completion",), "ranked": ("responses", "completions")}
COLUMN_FIELDS = (*_OF_ALL, *(name for names in KIND_FIELDS.values() for name in names), *PROMPT_COLUMNS)
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
    """Two responses to one prompt, the first preferred; or, of an unpaired row, its response and a mismatched one.

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
        scores: of an unpaired row 1 if its response is desirable and 0 if not; else empty. See `ScoredPair.scores`.
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

    @property
    def kind(self) -> str:
        """One of KIND_FIELDS."""
        return "unpaired" if len(self.scores) == 1 else "pairs"

    @property
    def responses(self) -> dict[str, Turns]:
        """What the row itself holds: field -> response; the mismatched one of an unpaired row is another row's."""
        if self.kind == "unpaired":
            return {"completion": self.chosen}
        return {"chosen": self.chosen, "rejected": self.rejected}


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
        """The file's column for one of COLUMN_FIELDS."""
        return self.columns.get(name, name)

    def kind_of(self, names: Collection[str]) -> str:
        """Which of KIND_FIELDS a file's columns make: pairs, unless they lack what all pairs have and others do not."""
        if any(self.column(name) in names for name in KIND_FIELDS["pairs"]):
            return "pairs"
        told = (kind for kind, fields in _TELLING.items() if any(self.column(name) in names for name in fields))
        return next(told, "pairs")


def check_kind(kind: str, first: str) -> None:
    """Raises RowFault where a row is of another kind than the first one."""
    if kind != first:
        raise RowFault("mixed-rows", f"the first row is one of {first} rows, this one of {kind} rows")


def fields_of(kind: str) -> tuple[str, ...]:
    """The fields that a row of a kind is made of."""
    return (*_OF_ALL, *KIND_FIELDS[kind])


def to_pair(row: Mapping[str, Any], shape: Shape, source_file: str, source_row: int) -> PreferencePair:
    """Turn one row into a pair; unused columns become `extra`.

    Raises:
        RowFault: `missing-field`, `wrong-type`, `bad-messages`, `mixed-shapes`, `no-common-prompt`, `prompt-mismatch`,
            `empty-prompt`, `empty-response`, `same-response`, `bad-template-kwargs`, `unused-column`, and those of
            `messages_of`.
    """
    sides = {name: _turns(row, shape.column(name)) for name in KIND_FIELDS["pairs"]}
    pair = _to_row(row, shape, sides, source_file, source_row)
    if pair.chosen == pair.rejected:
        raise RowFault("same-response", "chosen and rejected are equal")
    return pair


def to_unpaired(row: Mapping[str, Any], shape: Shape, source_file: str, source_row: int) -> PreferencePair:
    """One row of a response and a label, as a pair that still lacks its mismatched response: see `mismatch`.

    Raises:
        RowFault: as `to_pair`; `bad-label`.
    """
    column = shape.column("label")
    given = row.get(column)
    label = _LABELS.get(given.strip().lower() if isinstance(given, str) else given) if _is_plain(given) else None
    if label is None:
        raise RowFault("bad-label", f"`{column}` must be true or false, it is {given!r:.80}")
    response = _turns(row, shape.column("completion"))
    pair = _to_row(row, shape, {"completion": response}, source_file, source_row)
    if "label" in pair.extra:
        raise RowFault("unused-column", f"`label` is taken from `{column}`, and there is another column of this name")
    # The label is kept among the columns too, where the cache's view finds it.
    return replace(pair, scores=(float(label),), extra=pair.extra | {"label": label})


_LABELS: dict[Any, bool] = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
_LABELS |= {1: True, 0: False}


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | bool | int | float)


def _to_row(
    row: Mapping[str, Any], shape: Shape, responses: Mapping[str, Turns], source_file: str, source_row: int
) -> PreferencePair:
    """Prompt and responses of a row, by the names of their fields; of one alone, `rejected` is empty."""
    sides = list(responses.values())
    given = read_prompt(row, shape.columns, single_answers=_are_answers(sides))
    texts = [side for side in sides if isinstance(side, str)]
    conversations = [side for side in sides if isinstance(side, list)]
    if not conversations:
        parts = _split_texts(given, texts, row)
        if isinstance(parts.prompt, str) and given.prompt is not None and not parts.formatted and shape.prompt_format:
            parts.prompt = shape.prompt_format.replace("{prompt}", parts.prompt)
    elif not texts:
        parts = _split_conversations(given, conversations)
    else:
        raise RowFault("mixed-shapes", "one response is text, the other is messages")
    parts.prompt = place_prompt(given, parts.prompt, shape.prompt_format)
    if isinstance(parts.prompt, list):
        answers = [_as_answer(side) for side in parts.sides]
        parts.sides = list(answers)
        parts.prompt = without_answer(parts.prompt, parts.origin, *answers)
    _check_responses(dict(zip(responses, parts.sides, strict=True)))
    kind = next(kind for kind, names in KIND_FIELDS.items() if set(responses) <= set(names))
    used = {shape.column(name) for name in fields_of(kind)} | given.used
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
    for side in pair.responses.values():
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
    sides: list[Turns]
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


def _are_answers(sides: Sequence[Turns]) -> bool:
    """Whether the responses are answers alone, and no conversations or transcripts that hold their prompt."""
    return all(
        not any(header in side for header in ASSISTANT_HEADERS)
        if isinstance(side, str)
        else bool(side) and side[0]["role"] == "assistant"
        for side in sides
    )


def _as_answer(response: Turns) -> list[Message]:
    return [{"role": "assistant", "content": response}] if isinstance(response, str) else response


def _split_texts(given: PromptColumns, sides: Sequence[str], row: Mapping[str, Any]) -> _Parts:
    """Prompt and responses of texts: the prompt as given, or what several transcripts have in common."""
    common = sides[0]
    for side in sides[1:]:
        common = common[: common_length(common, side)]
    if given.prompt is None:
        if len(sides) == 1:
            raise RowFault("no-common-prompt", "there is no prompt column, and one text alone does not show its prompt")
        ends = _header_ends(common)
        cut = max(ends) if ends else _line_cut(common)
        equal = len(set(sides)) == 1
        if equal or cut is None:
            problem = "are equal" if equal else "do not begin as transcripts of one conversation do"
            raise RowFault(
                "same-response" if equal else "no-common-prompt",
                f"no prompt column, and the two texts {problem}",
            )
        other = next((name for name in _MAY_BE_PROMPTS if isinstance(row.get(name), str | list) and row[name]), None)
        if not ends and other is not None and not (isinstance(row[other], str) and row[other] in common):
            raise RowFault(
                "unused-column",
                f"`{other}` may be the prompt, and the texts merely begin alike: name it with --columns prompt={other}",
            )
        return _Parts(common[:cut], [side[cut:] for side in sides], TRANSCRIPT, formatted=True)
    prompt = given.prompt
    if isinstance(prompt, str):
        if prompt and common.startswith(prompt) and _is_repetition(prompt):
            parts = _Parts(prompt, [side[len(prompt) :] for side in sides], given.origin, repeated=True)
            parts.formatted = any(header in prompt for header in ASSISTANT_HEADERS)
            return parts
        # The question in the prompt column, and whole transcripts of it as responses.
        ends = _header_ends(common)
        if ends and prompt.strip() and prompt.strip() in common[: max(ends)]:
            cut = max(ends)
            return _Parts(common[:cut], [side[cut:] for side in sides], given.origin, repeated=True, formatted=True)
    return _Parts(prompt, list(sides), given.origin)


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


def _split_conversations(given: PromptColumns, sides: Sequence[list[Message]]) -> _Parts:
    """Prompt and responses of lists of messages, which may or may not repeat the prompt."""
    if not all(sides):
        raise RowFault("empty-response", "a response has no messages")
    if given.prompt == []:
        raise RowFault("empty-prompt", "the prompt has no messages")
    prompt = given.prompt
    if prompt is not None and any(side[0]["role"] == "assistant" for side in sides):
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        return _Parts(prompt, list(sides), given.origin)
    first, shortest = sides[0], min(map(len, sides))
    shared = next(
        (i for i in range(shortest) if not all(same_message(first[i], side[i]) for side in sides[1:])), shortest
    )
    if len(sides) == 1:  # a whole conversation: the answer is what goes on from the prompt
        shared -= 1
    elif all(len(side) == shared for side in sides):
        raise RowFault("same-response", "the two conversations are equal")
    if shared == 0:
        raise RowFault("no-common-prompt", "the two conversations begin with different messages")
    least = _given_length(prompt, first[:shared])
    # Both sides go on with the assistant; a differing turn of the user belongs to the responses.
    while shared > least and any(len(side) > shared and side[shared]["role"] != "assistant" for side in sides):
        shared -= 1
    return _Parts(first[:shared], [side[shared:] for side in sides], given.origin)


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


def _check_responses(sides: Mapping[str, Turns]) -> None:
    for name, side in sides.items():
        if isinstance(side, str):
            empty = not side.strip()
        else:
            empty = not any(message["content"].strip() or message.get("tool_calls") for message in side)
        if empty:
            raise RowFault("empty-response", f"`{name}` holds nothing after the prompt")
        if isinstance(side, list) and side[0]["role"] != "assistant":
            raise RowFault("bad-messages", f"`{name}` continues the prompt with a {side[0]['role']!r} message")


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
