"""Columns that belong to the prompt: question, instruction and input, system prompt, earlier turns, images.

Each is used by its convention (Alpaca, ShareGPT, orca pairs), or the row is refused and the column named: a model that
was trained with a system prompt behaves differently without it. Independent of responses and files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dpoeng.engine.data.messages import Message, as_message, messages_of, same_message
from dpoeng.engine.data.strict_json import RowFault, json_type
from dpoeng.engine.data.structured import Base64, parse_structure

QUESTIONS = ("instruction", "question", "query", "input")
"""Columns used as the prompt if there is no `prompt`; the first with a value is taken."""
CONVERSATIONS = ("conversations", "conversation", "messages")
"""Columns of messages used as the prompt if there is no `prompt` and the responses are single answers."""
SYSTEMS = ("system", "system_prompt")

_MISSING = frozenset(("nan", "none", "null", "<na>", "n/a"))
"""Texts that pandas and others write for a missing value; none of them is a system prompt."""
HISTORY = "history"
CONTEXTS = ("context", "passage", "document", "documents")
MEDIA = ("images", "image", "videos", "video", "audios", "audio")
PROMPT_COLUMNS = (*QUESTIONS, *CONVERSATIONS, *SYSTEMS, HISTORY, *CONTEXTS, *MEDIA)
"""`--columns NAME=COLUMN` maps these, too; with nothing after the `=`, the column is not part of the prompt."""


@dataclass(slots=True)
class PromptColumns:
    """The prompt columns of one row.

    Attributes:
        prompt: a text, messages, or None if no column has it.
        origin: the field that it was taken from.
        system: the system prompt, or empty.
        history: earlier turns.
        converses: whether the file has columns that only conversations have (system prompt, earlier turns, tools), even
            if empty: then a question is a user's message in every row.
        others: column -> its text, for columns that the prompt must contain.
        used: columns that the pair is made of.
    """

    prompt: str | list[Message] | None
    origin: str
    system: str = ""
    history: list[Message] = field(default_factory=list)
    converses: bool = False
    others: dict[str, Any] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)


def read_prompt(row: Mapping[str, Any], columns: Mapping[str, str], *, single_answers: bool) -> PromptColumns:
    """Reads a row's prompt and the columns that belong to it.

    Args:
        row: column -> value.
        columns: field -> column, if the names differ; an empty name means that the field is absent.
        single_answers: whether the responses are single answers, so that a conversation column is their prompt.

    Raises:
        RowFault: a column's value does not fit its name.
    """

    def value(name: str) -> Any:
        return row.get(columns.get(name, name)) or None

    def column(name: str) -> str:
        return columns.get(name, name)

    found = PromptColumns(None, "", used={column("prompt")})
    found.converses = any(column(name) in row for name in (*SYSTEMS, HISTORY, "tools"))
    prompt_value = row.get(column("prompt"))
    if prompt_value is not None and (prompt_value != "" or single_answers):
        found.prompt, found.origin = _turns(prompt_value, column("prompt")), "prompt"
    else:
        questions = [name for name in QUESTIONS if isinstance(value(name), str)]
        talks = [name for name in CONVERSATIONS if single_answers and isinstance(value(name), str | list)]
        if questions:
            found.prompt, found.origin = _turns(value(questions[0]), column(questions[0])), questions[0]
            found.used.add(column(questions[0]))
            if questions[:1] == ["instruction"] and "input" in questions:  # Alpaca: `input` continues `instruction`
                found.used.add(column("input"))
                if isinstance(found.prompt, str):
                    found.prompt = f"{found.prompt}\n{value('input')}"
        elif talks and (messages := messages_of(value(talks[0]), column(talks[0]))) is not None:
            found.prompt, found.origin = messages, talks[0]
            found.used.add(column(talks[0]))
    for name in SYSTEMS:
        text = value(name)
        if text is None or (isinstance(text, str) and not text.strip()):
            continue
        if not isinstance(text, str) or isinstance(text, Base64):
            raise RowFault("wrong-type", f"`{column(name)}` must be a text, it is {json_type(text)}")
        if text.strip().lower() in _MISSING:
            raise RowFault(
                "wrong-type",
                f"`{column(name)}` contains the text {text.strip()!r}, which programs write for a missing value",
            )
        found.system = text
        found.used.add(column(name))
    if value(HISTORY) is not None:
        found.history = _history(value(HISTORY), column(HISTORY))
        found.used.add(column(HISTORY))
    beside = (*QUESTIONS[2:], *CONTEXTS, *MEDIA) if found.origin == "prompt" else (*QUESTIONS, *CONTEXTS, *MEDIA)
    for name in beside:
        if column(name) not in found.used and value(name) is not None and isinstance(value(name), str | list | dict):
            found.others[column(name)] = value(name)
    return found


def place_prompt(found: PromptColumns, prompt: str | list[Message], prompt_format: str | None) -> str | list[Message]:
    """The prompt with its system prompt and earlier turns; a question with either becomes a conversation.

    Args:
        found: the result of `read_prompt`.
        prompt: the prompt alone.
        prompt_format: the text that SFT put around prompts; with it, no conversation is made.

    Raises:
        RowFault: `unused-column`, a column does not fit into the prompt.
    """
    whole = plain(prompt)
    for column, value in found.others.items():
        if not isinstance(value, str) or " ".join(value.split()) not in whole:
            raise _unused(column, "the prompt contains none of it")
    is_question = found.origin in QUESTIONS and isinstance(prompt, str) and prompt_format is None
    if not found.system and not found.history and not (is_question and found.converses):
        return prompt
    if isinstance(prompt, str):
        if not is_question:
            if " ".join(found.system.split()) in whole and plain(found.history) in whole:
                return prompt
            name = "system" if found.system else HISTORY
            raise _unused(
                name,
                "a prompt given as text cannot include it: give the prompt as messages, or declare it a "
                "question with --columns prompt= --columns question=prompt",
            )
        prompt = [{"role": "user", "content": prompt}]
    begin = 0
    while begin < len(prompt) and prompt[begin]["role"] in ("system", "developer"):
        begin += 1
    first, rest = list(prompt[:begin]), list(prompt[begin:])
    if found.system and plain(first) != " ".join(found.system.split()):
        if first:
            raise _unused("system", "the conversation begins with another system prompt")
        first = [{"role": "system", "content": found.system}]
    if found.history and plain(found.history) not in whole:
        if len(rest) != 1:
            raise _unused(HISTORY, "the prompt is already a conversation, without these turns")
        rest = [*found.history, *rest]
    return [*first, *rest]


def without_answer(prompt: list[Message], origin: str, *answers: Sequence[Message]) -> list[Message]:
    """A conversation column without a final answer that equals a response.

    Raises:
        RowFault: `prompt-mismatch`, it ends with another answer: the responses may follow it or replace it.
    """
    if origin not in CONVERSATIONS or not prompt or prompt[-1]["role"] != "assistant" or prompt[-1].get("tool_calls"):
        return prompt
    if len(prompt) > 1 and any(same_message(prompt[-1], side[0]) for side in answers):
        return prompt[:-1]
    raise RowFault(
        "prompt-mismatch",
        f"`{origin}` ends with an answer that is not in this row; --columns prompt={origin} lets the responses "
        "continue that message",
    )


def check_conversations(row: Mapping[str, Any], columns: Mapping[str, str], used: set[str], texts: str) -> None:
    """Rejects a row if an unused conversation column contains a different question.

    Args:
        row: column -> value.
        columns: field -> column, if the names differ.
        used: columns that the pair is made of.
        texts: prompt and responses, normalised by `plain`.

    Raises:
        RowFault: `unused-column`, earlier turns or a system prompt would be lost.
    """
    for name in CONVERSATIONS:
        column = columns.get(name, name)
        value = row.get(column)
        if column in used or not isinstance(value, str | list) or not value:
            continue
        try:
            messages = messages_of(value, column) or []
        except RowFault:
            continue  # not a conversation
        lost = next(
            (message for message in messages if message["role"] != "assistant" and plain([message]) not in texts), None
        )
        if lost is not None:
            raise _unused(column, f"it has turns that are missing from the prompt ({lost['content']!r:.60})")


def _turns(value: Any, column: str) -> str | list[Message]:
    if isinstance(value, dict) and isinstance(value.get("messages"), list | str):
        value = value["messages"]  # OpenAI's preference format
    messages = messages_of(value, column)
    return value if messages is None else messages


def _history(value: Any, column: str) -> list[Message]:
    """Earlier turns: pairs of question and answer, or messages."""
    if isinstance(value, str):
        value = parse_structure(value)
    if isinstance(value, list) and all(isinstance(turn, list) and len(turn) == 2 for turn in value):
        texts = [text for turn in value for text in turn]
        if all(isinstance(text, str) for text in texts):
            roles = ("user", "assistant") * len(value)
            return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        return [as_message(turn, column) for turn in value]
    raise _unused(column, "earlier turns are read as pairs of texts or as messages")


def plain(turns: str | Sequence[Message]) -> str:
    """The texts of a prompt, with normalised white space."""
    texts = [turns] if isinstance(turns, str) else [turn["content"] for turn in turns]
    return " ".join(" ".join(texts).split())


def _unused(column: str, why: str) -> RowFault:
    return RowFault("unused-column", f"`{column}` belongs to the prompt and is not used: {why}")
