"""Random conversations through random templates: the text holds every part, or the row is refused and counted."""

from __future__ import annotations

import json
from typing import Any

from chat_styles import STYLES, made_tokenizer, styled_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpoeng.engine.data.rejects import REASONS
from dpoeng.engine.data.shapes import Shape, to_pair
from dpoeng.engine.data.strict_json import RowFault
from dpoeng.engine.data.tokenization import tokenize_pairs

WORDS = st.sampled_from(
    [
        "red",
        "4",
        "Hi",
        "l'été, déjà",
        "سلام",
        "你好，世界",
        "नमस्ते",
        "👍🏽 ok",
        'say "no"',
        "a\nb",
        " spaced ",
        "{x: 1}",
        "</s>",
        "<b>",
    ]
)
TEXTS = st.lists(WORDS, min_size=1, max_size=3).map(" ".join)
PARTS = st.one_of(
    TEXTS,
    TEXTS.map(lambda text: [{"type": "text", "text": text}, {"type": "text", "text": None}]),
)
THOUGHTS = st.one_of(st.none(), st.none(), st.none(), st.sampled_from(["two and two", "let me see:\n1. go"]))


@st.composite
def answers(draw: Any) -> dict[str, Any]:
    message: dict[str, Any] = {draw(st.sampled_from(["role", "from"])): draw(st.sampled_from(["assistant", "gpt"]))}
    message["content"] = draw(PARTS)
    thought = draw(THOUGHTS)
    if thought is not None:
        if draw(st.booleans()):
            message["reasoning_content"] = thought
        elif isinstance(message["content"], str):
            message["content"] = f"<think>\n{thought}\n</think>\n\n{message['content']}"
    if draw(st.integers(0, 9)) == 0:
        arguments: Any = {"city": draw(WORDS), "days": draw(st.integers(0, 9))}
        arguments = json.dumps(arguments) if draw(st.booleans()) else arguments
        message["tool_calls"] = [{"type": "function", "function": {"name": "get_weather", "arguments": arguments}}]
    return message


@st.composite
def rows(draw: Any) -> dict[str, Any]:
    prompt: list[dict[str, Any]] = []
    if draw(st.booleans()):
        prompt.append({"role": draw(st.sampled_from(["system", "developer", "System"])), "content": draw(PARTS)})
    for _ in range(draw(st.integers(0, 2))):
        prompt += [{"role": draw(st.sampled_from(["user", "human"])), "content": draw(PARTS)}, draw(answers())]
    prompt.append({"role": draw(st.sampled_from(["user", "User", "tool", "observation"])), "content": draw(PARTS)})
    row: dict[str, Any] = {"prompt": prompt}
    for side in ("chosen", "rejected"):
        turns = [draw(answers())]
        if draw(st.integers(0, 3)) == 0:
            turns += [{"role": draw(st.sampled_from(["user", "tool"])), "content": draw(PARTS)}, draw(answers())]
        row[side] = turns
    if draw(st.integers(0, 3)) == 0:
        row["tools"] = [
            {
                "type": "function",
                "function": {
                    "name": "get_weather",
                    "description": "the weather",
                    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
                },
            }
        ]
    return row


TEMPLATES = st.one_of(
    st.sampled_from(STYLES).map(styled_tokenizer),
    # Templates with holes: a role that is not written, a content that is cut, tools that nobody sees.
    st.tuples(
        st.sampled_from(["user assistant", "user assistant system", "user assistant system tool developer"]),
        st.sampled_from(["m.content", "m.content | trim", "m.content[:4]", "m.content | upper", "m.content | tojson"]),
        st.sampled_from(
            ["", "{{ m.reasoning_content }}", "{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}"]
        ),
        st.booleans(),
    ).map(
        lambda drawn: made_tokenizer(
            "{% if tools %}"
            + ("{{ tools | tojson }}" if drawn[3] else "")
            + "{% endif %}{% for m in messages %}{% if m.role in '"
            + drawn[0]
            + "'.split() %}<|im_start|>{{ m.role }}\n{{ "
            + drawn[1]
            + " }}"
            + drawn[2]
            + "<|im_end|>\n{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        )
    ),
)


def parts_of(message: dict[str, Any]) -> list[tuple[str, bool]]:
    """Every text of a message, and whether it is a thought."""
    content = message["content"]
    found = []
    if "</think>" in content:
        thought, content = content.split("</think>")
        found.append((thought.replace("<think>", ""), True))
    found.append((content, False))
    if "reasoning_content" in message:
        found.append((message["reasoning_content"], True))
    for call in message.get("tool_calls", []):
        arguments = call["function"]["arguments"]
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        found += [(call["function"]["name"], False), *((str(value), False) for value in arguments.values())]
    return [(text.strip(), thought) for text, thought in found if text.strip()]


def holds(text: str, part: str) -> bool:
    return any(way in text for way in (part, json.dumps(part)[1:-1], json.dumps(part, ensure_ascii=False)[1:-1]))


@given(row=rows(), tokenizer=TEMPLATES)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_text_holds_every_part_or_the_row_is_refused(row: dict[str, Any], tokenizer: Any) -> None:
    try:
        pair = to_pair(row, Shape(), "file", 1)
    except RowFault as fault:
        refused = fault.reason
    else:
        refused = ""
    assert refused in ("", *REASONS)
    if refused:
        return
    data = tokenize_pairs([pair], tokenizer, max_length=None)
    assert len(data.pairs) + len(data.rejects) == 1
    if data.rejects:
        assert data.rejects[0].reason in REASONS
        return
    ids, thoughts = data.pairs[0].ids, data.pairs[0].thoughts
    assert isinstance(pair.prompt, list)
    for response, own in ((pair.chosen, ids.chosen_ids), (pair.rejected, ids.rejected_ids)):
        text = tokenizer.decode([*ids.prompt_ids, *own], clean_up_tokenization_spaces=False)
        for message in (*pair.prompt, *response):  # type: ignore[misc]
            assert isinstance(message, dict)
            for part, is_thought in parts_of(message):
                ends = (" ".join(part.split("</s>")).strip(), part.removesuffix("</s>").strip())
                assert any(holds(text, one) for one in (part, *ends)) or (is_thought and thoughts), part
        if pair.tools:
            assert "get_weather" in text
            assert "city" in text
        # Every character of the last answer is scored, and no marker of a turn that is not the assistant's.
        assert len(own) > 0
