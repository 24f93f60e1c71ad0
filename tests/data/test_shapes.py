"""The shapes of a pair: what is prompt, what is response, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dpoeng.cache.errors import UserError
from dpoeng.engine.data.pairs import read_pairs
from dpoeng.engine.data.shapes import PreferencePair, Shape, to_pair
from dpoeng.engine.data.strict_json import RowFault


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def pair_of(row: dict[str, Any], **shape: Any) -> PreferencePair:
    return to_pair(row, Shape(**shape), "file", 1)


def parts(row: dict[str, Any], **shape: Any) -> tuple[Any, Any, Any]:
    pair = pair_of(row, **shape)
    return pair.prompt, pair.chosen, pair.rejected


def test_texts_stay_as_they_are() -> None:
    row = {"prompt": " p ", "chosen": " a\n", "rejected": "b "}
    assert parts(row) == (" p ", " a\n", "b ")


def test_the_schema_with_instruction() -> None:
    row = {
        "instruction": "Name a colour.",
        "chosen": "Red",
        "rejected": "Seven",
        "confident": True,
        "margin": 1.5,
        "instruction_type": "qa",
        "negative_type": "wrong",
    }
    pair = pair_of(row)
    assert (pair.prompt, pair.chosen, pair.rejected) == ("Name a colour.", "Red", "Seven")
    assert pair.extra == {"confident": True, "margin": 1.5, "instruction_type": "qa", "negative_type": "wrong"}


def test_a_prompt_wins_over_the_instruction_which_is_then_kept() -> None:
    row = {"instruction": "i", "prompt": "Instruction: i\nResponse:", "chosen": " a\nEND", "rejected": " b\nEND"}
    pair = pair_of(row)
    assert pair.prompt == "Instruction: i\nResponse:"
    assert pair.extra == {"instruction": "i"}


def test_input_continues_the_instruction() -> None:
    row = {"instruction": "Translate.", "input": "Haus", "chosen": "house", "rejected": "mouse"}
    assert parts(row)[0] == "Translate.\nHaus"
    assert parts({**row, "input": ""})[0] == "Translate."


def test_a_format_is_put_around_prompts_that_are_texts() -> None:
    shape = {"prompt_format": "Instruction: {prompt}\nResponse:"}
    row = {"instruction": "say {prompt}", "chosen": " a", "rejected": " b"}
    assert parts(row, **shape)[0] == "Instruction: say {prompt}\nResponse:"
    messages = {"prompt": [user("hi")], "chosen": "a", "rejected": "b"}
    assert parts(messages, **shape)[0] == [user("hi")]
    assert parts({"chosen": HH + " a", "rejected": HH + " b"}, **shape)[0] == HH


def test_a_format_without_a_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not contain"):
        read_pairs([tmp_path / "a.jsonl"], prompt_format="Instruction:")


HH = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: a joke\n\nAssistant:"


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        (HH + " Knock knock.", HH + " No.", HH),
        # a common first word belongs to the responses
        (HH + " I am a joke.", HH + " I am no joke.", HH),
        # no header of an answer, but a common line
        ("Q: 2+2?\nA: four", "Q: 2+2?\nA: five", "Q: 2+2?\nA:"),
        ("Q: 2+2?\nA: four", "Q: 2+2?\nB: five", "Q: 2+2?"),
        (
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes",
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyellow",
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
        ),
        ("[INST] hi [/INST] yes", "[INST] hi [/INST] no", "[INST] hi [/INST]"),
        ("Instruction: hi\nResponse: yes\nEND", "Instruction: hi\nResponse: no\nEND", "Instruction: hi\nResponse:"),
    ],
)
def test_transcripts_share_their_beginning(chosen: str, rejected: str, prompt: str) -> None:
    assert parts({"chosen": chosen, "rejected": rejected}) == (prompt, chosen[len(prompt) :], rejected[len(prompt) :])


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [("The answer is 4", "The answer is 5"), ("yes", "no"), ("", "b"), ("\nyes", "\nno"), ("a\n b", "c\n d")],
)
def test_answers_with_a_common_beginning_are_not_transcripts(chosen: str, rejected: str) -> None:
    with pytest.raises(RowFault) as caught:
        parts({"chosen": chosen, "rejected": rejected})
    assert caught.value.reason == "no-common-prompt"


def test_a_transcript_that_is_the_beginning_of_the_other_has_no_response() -> None:
    with pytest.raises(RowFault) as caught:
        parts({"chosen": HH, "rejected": HH + " No."})
    assert caught.value.reason == "empty-response"


def test_transcripts_beside_their_prompt_do_not_repeat_it() -> None:
    assert parts({"prompt": HH, "chosen": HH + " a", "rejected": HH + " b"}) == (HH, " a", " b")
    # but a prompt of ordinary words may well begin both answers
    assert parts({"prompt": "I", "chosen": "I am", "rejected": "I was"}) == ("I", "I am", "I was")


def test_messages_with_an_explicit_prompt() -> None:
    prompt = [system("s"), user("hi")]
    row = {"prompt": prompt, "chosen": [assistant("a")], "rejected": [assistant("b")]}
    assert parts(row) == (prompt, [assistant("a")], [assistant("b")])
    assert parts({**row, "chosen": "a", "rejected": "b"}) == (prompt, [assistant("a")], [assistant("b")])


def test_messages_with_the_prompt_in_their_common_beginning() -> None:
    shared = [user("hi"), assistant("hello"), user("a joke")]
    row = {"chosen": [*shared, assistant("a")], "rejected": [*shared, assistant("b")]}
    assert parts(row) == (shared, [assistant("a")], [assistant("b")])
    # as in UltraFeedback, where the prompt also stands in its own column
    assert parts({**row, "prompt": "a joke"}) == (shared, [assistant("a")], [assistant("b")])
    assert parts({**row, "prompt": shared}) == (shared, [assistant("a")], [assistant("b")])


def test_a_text_prompt_before_answers_as_messages() -> None:
    row = {"prompt": "hi", "chosen": [assistant("a")], "rejected": [assistant("b")]}
    assert parts(row) == ([user("hi")], [assistant("a")], [assistant("b")])


def test_sharegpt_names_and_text_parts_are_translated() -> None:
    row = {
        "prompt": [{"from": "system", "value": "s"}, {"from": "human", "value": "hi"}],
        "chosen": [{"from": "gpt", "value": "a"}],
        "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]}],
    }
    assert parts(row) == ([system("s"), user("hi")], [assistant("a")], [assistant("bc")])


def test_tools_and_template_arguments_travel_with_the_row() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    row = {
        "prompt": [user("hi")],
        "chosen": [call],
        "rejected": [assistant("no")],
        "tools": json.dumps(tools),
        "chat_template_kwargs": {"enable_thinking": False},
    }
    pair = pair_of(row)
    assert (pair.tools, pair.chat_template_kwargs, pair.extra) == (tools, {"enable_thinking": False}, {})
    assert pair.chosen == [{**call, "content": ""}]
    assert pair_of({**row, "tools": [], "chat_template_kwargs": None}).tools is None


CHAT = {"prompt": [user("hi")], "chosen": [assistant("a")], "rejected": [assistant("b")]}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prompt": None}, "no-common-prompt"),
        ({"prompt": []}, "empty-prompt"),
        ({"prompt": "hi", "chosen": []}, "empty-response"),
        ({"chosen": [assistant("")]}, "empty-response"),
        ({"chosen": "a"}, "mixed-shapes"),
        ({"rejected": [assistant("a")]}, "same-response"),
        ({"chosen": [user("a")]}, "bad-messages"),
        ({"chosen": ["a"]}, "bad-messages"),
        ({"chosen": [{"content": "a"}]}, "bad-messages"),
        ({"chosen": [{"role": "assistant"}]}, "bad-messages"),
        ({"chosen": [{"role": 3, "content": "a"}]}, "bad-messages"),
        ({"chosen": [{"role": "assistant", "content": {"a": 1}}]}, "bad-messages"),
        ({"prompt": [{"role": "user", "content": [{"type": "image", "image": "x"}]}]}, "not-text"),
        (
            {"prompt": "x", "chosen": [user("y"), assistant("a")], "rejected": [user("y"), assistant("b")]},
            "prompt-mismatch",
        ),
        ({"prompt": None, "chosen": [user("y")], "rejected": [user("y")]}, "same-response"),
        ({"prompt": None, "chosen": [user("y"), assistant("a")], "rejected": [user("y")]}, "empty-response"),
        ({"tools": "{"}, "bad-json"),
        ({"tools": {"a": 1}}, "wrong-type"),
        ({"tools": ["f"]}, "wrong-type"),
        ({"chat_template_kwargs": [1]}, "wrong-type"),
        ({"chat_template_kwargs": {"add_generation_prompt": True}}, "bad-template-kwargs"),
    ],
)
def test_messages_that_cannot_be_used(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowFault) as caught:
        parts({**CHAT, **changes})
    assert caught.value.reason == reason


def test_a_human_turn_inside_a_response_is_counted(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        CHAT,
        {**CHAT, "rejected": [assistant("b"), user("why?"), assistant("so")]},
        {"prompt": HH, "chosen": " a", "rejected": " b\n\nHuman: why?\n\nAssistant: so"},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_pairs([path]).multi_turn == 1  # of the texts; in messages only the assistant's turns are scored
