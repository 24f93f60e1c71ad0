"""Proves that a rendered text contains every part of its messages: contents, thoughts, calls and tools.

The messages are rendered a second time with a tag instead of each part. If filling the parts into that skeleton
gives the original text, nothing is missing; otherwise each part is searched for. Independent of tokens.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from dpoeng.engine.data.messages import REASONING_KEYS, Message
from dpoeng.engine.data.strict_json import RowFault
from dpoeng.engine.data.structured import parse_structure

Kind = Literal["text", "thought", "call", "tool"]

_TAG = "dpoengpart{}end"
_ANY_TAG = re.compile(r"dpoengpart\d+end")
# Separates a thought from the answer in a text. The template may rewrite these markers.
_MARKERS = re.compile(r"(</?think(?:ing)?>|\[/?THINK\])")


@dataclass(frozen=True, slots=True)
class Part:
    """One piece of a conversation.

    Attributes:
        text: the data's text, stripped of white space at both ends.
        where: its place, in words.
        kind: the kind of part.
        message: index of its message; -1 for a tool.
    """

    text: str
    where: str
    kind: Kind
    message: int


@dataclass(slots=True)
class Tagged:
    """Messages and tools with tags instead of their parts: tag -> part."""

    messages: list[Message]
    tools: list[Any] | None
    parts: dict[str, Part] = field(default_factory=dict)


def prove(
    text: str, messages: Sequence[Message], tools: list[Any] | None, render: Callable[[Tagged], str], place: str
) -> list[Part]:
    """Finds the parts of messages and tools that are missing from a text.

    Args:
        text: the template's output.
        messages: the messages that were rendered.
        tools: the JSON schemas passed to the template.
        render: renders tagged messages in the same way.
        place: the row's name for these messages, for error messages.

    Raises:
        RowFault: `template-drops`, the template writes the arguments of a tool call as source code.
    """
    tagged = _tag(messages, tools, place)
    try:
        skeleton: str | None = render(tagged)
    except RowFault:
        skeleton = None  # the template's output depends on the parts' texts
    missing: list[Part] = []
    if skeleton is not None:
        _refuse_source_code(skeleton, tagged)
        missing = [part for tag, part in tagged.parts.items() if tag not in skeleton]
        if not missing and _fills(skeleton, text, tagged.parts):
            return []
    lost = set(map(id, missing))
    missing += [
        part
        for part in _not_found(text, [part for part in tagged.parts.values() if part.kind != "tool"])
        if id(part) not in lost
    ]
    return missing


def _tag(messages: Sequence[Message], tools: list[Any] | None, place: str) -> Tagged:
    tagged = Tagged([], None)

    def tag(text: str, where: str, kind: Kind, message: int) -> str:
        core = text.strip()
        if not core:
            return text
        name = _TAG.format(len(tagged.parts))
        tagged.parts[name] = Part(core, where, kind, message)
        before = len(text) - len(text.lstrip())
        return text[:before] + name + text[before + len(core) :]

    for number, message in enumerate(messages):
        where = f"{place}, message {number + 1}"
        tagged.messages.append(_tag_message(message, number, where, tag))
    if tools is not None:
        tagged.tools = [_tag_tool(tool, tag) for tool in tools]
    return tagged


_Tagger = Callable[[str, str, Kind, int], str]


def _tag_message(message: Message, number: int, where: str, tag: _Tagger) -> Message:
    tagged = copy.deepcopy(message)
    pieces = _MARKERS.split(message["content"])
    thinking = False
    for i, piece in enumerate(pieces):
        if i % 2:
            thinking = "/" not in piece
        else:
            # a thought may lack its opening marker, which is in the prompt
            thought = thinking or (i + 1 < len(pieces) and "/" in pieces[i + 1])
            pieces[i] = tag(
                piece, f"{where}, {'thought' if thought else 'content'}", "thought" if thought else "text", number
            )
    tagged["content"] = "".join(pieces)
    for key in REASONING_KEYS:
        if isinstance(message.get(key), str):
            tagged[key] = tag(message[key], f"{where}, {key}", "thought", number)
    for call in tagged.get("tool_calls") or []:
        inner = call.get("function", call) if isinstance(call, dict) else None
        if isinstance(inner, dict):
            if isinstance(inner.get("name"), str):
                inner["name"] = tag(inner["name"], f"{where}, name of a tool call", "call", number)
            if "arguments" in inner:
                inner["arguments"] = _tag_arguments(
                    inner["arguments"], f"{where}, arguments of a tool call", number, tag
                )
    return tagged


def _tag_arguments(arguments: Any, where: str, number: int, tag: _Tagger) -> Any:
    if isinstance(arguments, str):
        parsed = parse_structure(arguments)
        if isinstance(parsed, dict):
            return json.dumps(_tag_arguments(parsed, where, number, tag))
        return tag(arguments, where, "call", number)
    if isinstance(arguments, dict):
        return {
            tag(key, where, "call", number): _tag_arguments(value, where, number, tag)
            for key, value in arguments.items()
        }
    if isinstance(arguments, list):
        return [_tag_arguments(item, where, number, tag) for item in arguments]
    return arguments


def _tag_tool(tool: Any, tag: _Tagger) -> Any:
    tagged = copy.deepcopy(tool)
    inner = tagged.get("function", tagged) if isinstance(tagged, dict) else None
    if isinstance(inner, dict):
        name = inner.get("name")
        where = f"tool {name}"
        if isinstance(name, str):
            inner["name"] = tag(name, where, "tool", -1)
        parameters: Any = inner.get("parameters")
        properties = parameters.get("properties") if isinstance(parameters, dict) else None
        if isinstance(properties, dict):
            renamed = {key: tag(key, f"{where}, parameter {key}", "tool", -1) for key in properties}
            parameters["properties"] = {renamed[key]: value for key, value in properties.items()}
            if isinstance(parameters.get("required"), list):
                parameters["required"] = [renamed.get(key, key) for key in parameters["required"]]
    return tagged


def _refuse_source_code(skeleton: str, tagged: Tagged) -> None:
    """Refuses call arguments written as text in text or as a Python dict: models are not trained on these."""
    for tag, part in tagged.parts.items():
        if part.kind != "call" or "arguments" not in part.where:
            continue
        for match in re.finditer(re.escape(tag), skeleton):
            before, behind = skeleton[: match.start()][-2:], skeleton[match.end() :][:2]
            if before.endswith('\\"') or (before.endswith("'") and behind.startswith("':")):
                how = "as a text within a text" if before.endswith('\\"') else "as Python source"
                raise RowFault("template-drops", f"{part.where}: the chat template writes them {how}")


def _fills(skeleton: str, text: str, parts: dict[str, Part]) -> bool:
    """Whether the text is the skeleton with each part in place of its tag, ignoring white space at a part's ends."""
    at, place = 0, 0
    for match in _ANY_TAG.finditer(skeleton):
        fixed = skeleton[place : match.start()]
        if not text.startswith(fixed, at):
            return False
        at += len(fixed)
        written = next((form for form in _ways(parts[match[0]].text) if text.startswith(form, at)), None)
        if written is None:
            return False
        at += len(written)
        place = match.end()
    return text[at:] == skeleton[place:]


def _ways(text: str) -> Iterator[str]:
    """The forms in which a template may write a text: unchanged, or within JSON."""
    yield text
    for ascii_only in (False, True):
        yield json.dumps(text, ensure_ascii=ascii_only)[1:-1]


def _not_found(text: str, parts: Sequence[Part]) -> list[Part]:
    """Parts that do not occur in a text; each occurrence counts once, longest parts first."""
    lost = []
    for part in sorted(parts, key=lambda item: -len(item.text)):
        written = next((form for form in _ways(part.text) if form in text), None)
        if written is None:
            lost.append(part)
        else:
            text = text.replace(written, "\0", 1)
    return lost
