"""Normalises messages of data sets: `role`, `content`, and the other fields that a chat template may read.

Roles are translated under `role` and under `from`; a role that no chat template knows is refused. Independent of files,
columns and templates.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dpoeng.engine.data.strict_json import RowFault, json_type
from dpoeng.engine.data.structured import Base64, parse_structure

Message = dict[str, Any]

# Speaker names in public data sets (ShareGPT, OASST, Anthropic, Vicuna, Gemma, LLaMA-Factory, OpenAI) -> the names that
# chat templates know.
ROLES: dict[str, str] = {
    "user": "user",
    **dict.fromkeys(("human", "prompter", "customer", "client", "questioner", "instruction", "human_0"), "user"),
    "assistant": "assistant",
    **dict.fromkeys(
        ("gpt", "ai", "bot", "model", "chatgpt", "bing", "bard", "claude", "chatbot", "agent"), "assistant"
    ),
    **dict.fromkeys(("system", "system_prompt"), "system"),
    "developer": "developer",
    "tool": "tool",
    **dict.fromkeys(
        ("observation", "function", "function_response", "tool_response", "tool_result", "ipython"), "tool"
    ),
}
CALL_ROLES = frozenset({"function_call", "tool_call", "tool_calls"})

REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
"""Fields with a message's thought. transformers passes each to the template under all names."""
LOSS_KEYS = ("weight", "train", "training", "loss")
"""Fields that say whether to train on a message (OpenAI, Mistral, Axolotl, ms-swift): 0 and false mean no."""

# Fields that a chat template could write. Messages are compared without others, such as ids and time stamps.
_MEANT = ("role", "content", "name", "tool_calls", *REASONING_KEYS)
_LOOKS_LIKE_MESSAGES = re.compile(r"""\s*(array\()?\[?\s*\{\s*["'](role|from|content|value)["']\s*:""")


def messages_of(value: Any, column: str) -> list[Message] | None:
    """The messages in a column's value, in any stored form; None if it is plain text.

    Raises:
        RowFault: `messages-as-text`, a text that looks like messages but cannot be parsed; `bad-messages`,
            `not-text`, `unknown-role`, `wrong-type`, `bad-utf8`.
    """
    if isinstance(value, Base64):
        raise RowFault("bad-utf8", f"`{column}` contains bytes that are not UTF-8")
    if isinstance(value, str):
        parsed = parse_structure(value)
        if not _are_messages(parsed):
            if parsed is None and _LOOKS_LIKE_MESSAGES.match(value):
                raise RowFault(
                    "messages-as-text", f"`{column}` contains messages as a text that is neither JSON nor a repr"
                )
            return None
        value = parsed
    if isinstance(value, dict) and ("role" in value or "from" in value):
        value = [value]
    if not isinstance(value, list):
        raise RowFault("wrong-type", f"`{column}` must be a text or a list of messages, it is {json_type(value)}")
    return [as_message(item, column) for item in value]


def as_message(value: Any, column: str) -> Message:
    """One message with a role and a text.

    Raises:
        RowFault: see `messages_of`.
    """
    if isinstance(value, str):
        value = parse_structure(value) or value
    if not isinstance(value, dict):
        raise RowFault("bad-messages", f"`{column}` contains {json_type(value)} instead of a message")
    # Ignore keys without a value: tables give every message the keys of all messages.
    message = {name: item for name, item in value.items() if item is not None}
    if "role" not in message and "from" in message:
        message["role"] = message.pop("from")
    if "content" not in message and "value" in message:
        message["content"] = message.pop("value")
    if isinstance(message.get("tool_calls"), str):
        message["tool_calls"] = parse_structure(message["tool_calls"])
    if not message.get("tool_calls"):
        message.pop("tool_calls", None)
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise RowFault("bad-messages", f"a message of `{column}` has no `role`")
    content = _content(message.get("content"), column)
    if role.casefold() in CALL_ROLES:
        return {"role": "assistant", "content": "", "tool_calls": _calls(content, column)}
    known = ROLES.get(role.strip().casefold())
    if known is None:
        raise RowFault(
            "unknown-role", f"a message of `{column}` has the role {role!r:.40}, which no chat template knows"
        )
    if content is None and message.get("tool_calls"):
        content = ""  # many templates would print None
    if content is None:
        raise RowFault("bad-messages", f"a message of `{column}` has no text as its `content`")
    return {**message, "role": known, "content": content}


def essence(message: Mapping[str, Any]) -> Message:
    """The parts of a message that a template can write, without ids and time stamps."""
    return {name: message[name] for name in _MEANT if message.get(name) not in (None, "", [])}


def same_message(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two messages have the same meaning."""
    return essence(a) == essence(b)


def _content(content: Any, column: str) -> str | None:
    """The text of a message; parts without text (`text: null`) are ignored."""
    if isinstance(content, Base64):
        raise RowFault("bad-utf8", f"a message of `{column}` contains bytes that are not UTF-8")
    if isinstance(content, list):
        parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
        if any(not isinstance(part, dict) or part.get("type", "text") != "text" for part in parts):
            raise RowFault("not-text", f"a message of `{column}` contains parts that are not text")
        texts = [part["text"] for part in parts if part.get("text") is not None]
        if not all(isinstance(text, str) for text in texts):
            raise RowFault("not-text", f"a message of `{column}` contains parts that are not text")
        return "".join(texts) if texts or not parts else None
    return content if isinstance(content, str) else None


def _calls(content: str | None, column: str) -> list[dict[str, Any]]:
    """Tool calls stored as JSON in a turn's content (LLaMA-Factory's `function_call`)."""
    parsed = parse_structure(content) if content is not None else None
    calls = parsed if isinstance(parsed, list) else [parsed]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise RowFault("bad-messages", f"a tool call of `{column}` is not an object with `name` and `arguments`")
    return [{"type": "function", "function": call} for call in calls]


def _are_messages(value: Any) -> bool:
    if isinstance(value, dict):
        return ("role" in value and "content" in value) or ("from" in value and "value" in value)
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, dict) and ("role" in item or "from" in item) for item in value)
    )
