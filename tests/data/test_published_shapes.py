"""Shapes of published data sets: the text of every row is the one that its columns mean, or the row is refused by name.

What is right is what `apply_chat_template` writes of the messages that each row stands for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chat_styles import made_tokenizer, styled_tokenizer

from dpoeng.cache.errors import UserError
from dpoeng.engine.data.pairs import PairFile, read_pairs
from dpoeng.engine.data.readers import expand
from dpoeng.engine.data.tokenization import tokenize_pairs

Message = dict[str, Any]
QUESTION = "Name a colour."
TEXTS: dict[str, Any] = {"chosen": "Red.", "rejected": "Seven."}
TOOL = {
    "type": "function",
    "function": {
        "name": "mix",
        "parameters": {"type": "object", "properties": {"hue": {"type": "string"}}, "required": ["hue"]},
    },
}


def message(role: str, content: str, **more: Any) -> Message:
    return {"role": role, "content": content, **more}


USER = message("user", QUESTION)
SYSTEM = message("system", "Be brief.")
TOLD = {"from": "human", "value": QUESTION}


def read(tmp_path: Path, *rows: dict[str, Any], **options: Any) -> PairFile:
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return read_pairs([path], max_reject_share=1.0, **options)


def refusals(tmp_path: Path, row: dict[str, Any]) -> list[tuple[str, str]]:
    """Reason and detail, beside a row that can be used."""
    found = read(tmp_path, row, {"prompt": "p", **TEXTS}).rejects
    return [(reject.reason, reject.detail) for reject in found]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"system": "Be brief.", "question": QUESTION}, [SYSTEM, USER]),  # Intel/orca_dpo_pairs
        ({"system": "", "question": QUESTION}, [USER]),
        ({"system": None, "input": QUESTION, "generations": ["Red.", "Seven."], "rating": [9, 2]}, [USER]),
        ({"instruction": QUESTION, "input": "", "history": []}, [USER]),
        ({"tools": json.dumps([TOOL]), "question": QUESTION}, [USER]),
        ({"messages": [USER]}, [USER]),
        ({"messages": [USER, message("assistant", "Red.")]}, [USER]),
        ({"messages": [USER, message("assistant", "Seven.")]}, [USER]),
        ({"prompt": [USER], "messages": [USER, message("assistant", "Red.")]}, [USER]),
        ({"system": "Be brief.", "conversations": [TOLD]}, [SYSTEM, USER]),  # LLaMA-Factory
    ],
)
def test_a_row_is_the_conversation_that_it_stands_for(
    tmp_path: Path, row: dict[str, Any], prompt: list[Message]
) -> None:
    tokenizer = styled_tokenizer("qwen3")
    file = read(tmp_path, {**row, **TEXTS})
    (pair,) = tokenize_pairs(file.pairs, tokenizer).pairs
    more = {"tools": [TOOL]} if "tools" in row else {}
    for answer, ids in ((TEXTS["chosen"], pair.ids.chosen_ids), (TEXTS["rejected"], pair.ids.rejected_ids)):
        whole = tokenizer.apply_chat_template([*prompt, message("assistant", answer)], return_dict=False, **more)
        assert [*pair.ids.prompt_ids.tolist(), *ids.tolist()] == whole


def test_an_empty_system_prompt_makes_no_text_of_a_question_among_conversations(tmp_path: Path) -> None:
    rows = [{"system": system, "question": QUESTION, **TEXTS} for system in ("", "Be brief.", None)]
    file = read(tmp_path, *rows)
    assert [pair.prompt for pair in file.pairs] == [[USER], [SYSTEM, USER], [USER]]
    assert file.column_remark() == "question, system prompt and history became a conversation in 3 pairs"
    # Who says how SFT wrapped texts, or that the column is no part of the prompt, has texts in every row.
    assert isinstance(read(tmp_path, rows[0], prompt_format="Q: {prompt}\nA:").pairs[0].prompt, str)
    assert isinstance(read(tmp_path, rows[0], columns={"system": ""}).pairs[0].prompt, str)


@pytest.mark.parametrize("text", ["nan", " NaN", "None"])
def test_a_missing_value_written_as_text_is_not_a_system_prompt(tmp_path: Path, text: str) -> None:
    """As pandas leaves them in CSV. It is refused, not dropped: a row would be trained on another text than SFT saw."""
    rows = [{"system": text, "question": QUESTION, **TEXTS}, {"system": "Be brief.", "question": QUESTION, **TEXTS}]
    file = read(tmp_path, *rows)
    assert [(reject.reason, text.strip() in reject.detail) for reject in file.rejects] == [("wrong-type", True)]
    assert [pair.prompt for pair in file.pairs] == [[SYSTEM, USER]]


def test_a_prompt_beside_a_system_prompt_may_be_declared_a_question(tmp_path: Path) -> None:
    row = {"system": "Be brief.", "prompt": QUESTION, **TEXTS}
    ((reason, detail),) = refusals(tmp_path, row)
    assert reason == "unused-column"
    assert "--columns prompt= --columns question=prompt" in detail
    file = read(tmp_path, row, columns={"prompt": "", "question": "prompt"})
    assert file.pairs[0].prompt == [SYSTEM, USER]


@pytest.mark.parametrize(
    ("row", "reason", "word"),
    [
        ({"prompt": QUESTION, "tools": [TOOL]}, "unused-column", "`tools`"),
        ({"prompt": QUESTION, "chat_template_kwargs": {"enable_thinking": False}}, "unused-column", "`chat_template"),
        (
            {"prompt": "Another?", "messages": [USER, message("assistant", "Blue."), message("user", "Another?")]},
            "unused-column",
            "`messages`",
        ),
        ({"prompt": [USER], "conversations": [message("system", "Rhyme."), USER]}, "unused-column", "`conversations`"),
        ({"messages": [USER, message("assistant", "Blue.")]}, "prompt-mismatch", "not in this row"),
    ],
)
def test_what_would_be_lost_is_refused_by_name(tmp_path: Path, row: dict[str, Any], reason: str, word: str) -> None:
    ((found, detail),) = refusals(tmp_path, {**row, **TEXTS})
    assert found == reason
    assert word in detail


def test_a_conversation_column_may_be_left_out_by_name(tmp_path: Path) -> None:
    row = {"prompt": QUESTION, "messages": [message("user", "Something else.")], **TEXTS}
    assert read(tmp_path, row, columns={"messages": ""}).pairs[0].prompt == QUESTION


def test_openai_preferences_are_read_with_their_tools(tmp_path: Path) -> None:
    row = {
        "input": {"messages": [SYSTEM, USER], "tools": [TOOL], "parallel_tool_calls": True},
        "preferred_output": [message("assistant", "Red.")],
        "non_preferred_output": [message("assistant", "Seven.")],
    }
    columns = {"prompt": "input", "chosen": "preferred_output", "rejected": "non_preferred_output"}
    (pair,) = read(tmp_path, row, columns=columns).pairs
    assert (pair.prompt, pair.tools) == ([SYSTEM, USER], [TOOL])


@pytest.mark.parametrize(
    "header",
    [
        "<|im_start|>assistant<|im_sep|>",
        "<|header_start|>assistant<|header_end|>\n\n",
        "<|start_of_role|>assistant<|end_of_role|>",
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        "<\uff5cAssistant\uff5c>",
        "<|start|>assistant<|channel|>final<|message|>",
    ],
)
def test_answers_begin_behind_the_header_though_they_begin_alike(tmp_path: Path, header: str) -> None:
    begin = "Name a colour,\nplease." + header
    (pair,) = read(tmp_path, {"prompt": "", "chosen": begin + "The red.", "rejected": begin + "The seven."}).pairs
    assert (pair.prompt, pair.chosen, pair.rejected) == (begin, "The red.", "The seven.")


@pytest.mark.parametrize("written", ["Red.<|endoftext|>", "Red.<|endoftext|><|im_end|>\n", "Red."])
def test_no_other_end_token_stands_before_the_end_of_a_turn(tmp_path: Path, written: str) -> None:
    tokenizer = styled_tokenizer("chatml")
    file = read(tmp_path, {"prompt": [USER], "chosen": written, "rejected": "Seven."})
    (pair,) = tokenize_pairs(file.pairs, tokenizer).pairs
    assert tokenizer.decode(pair.ids.chosen_ids) == "Red.<|im_end|>\n"


WORDS = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\nEND\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.mark.parametrize(
    ("written", "scored"), [("Red.\nEND", "Red."), ("Red.\nEND\n", "Red."), ("THE END", "THE END"), ("Red.", "Red.")]
)
def test_an_end_that_is_a_word_on_its_own_line_stands_once(tmp_path: Path, written: str, scored: str) -> None:
    tokenizer = made_tokenizer(WORDS)
    file = read(tmp_path, {"prompt": [USER], "chosen": written, "rejected": "Seven."})
    (pair,) = tokenize_pairs(file.pairs, tokenizer).pairs
    whole = tokenizer.apply_chat_template([USER, message("assistant", scored)], return_dict=False)
    assert [*pair.ids.prompt_ids.tolist(), *pair.ids.chosen_ids.tolist()] == whole


@pytest.mark.parametrize("key", ["weight", "train"])
def test_a_turn_that_is_not_trained_on_is_refused(tmp_path: Path, key: str) -> None:
    chosen = [message("assistant", "Red.", **{key: 0}), USER, message("assistant", "Blue.", **{key: 1})]
    file = read(tmp_path, {"prompt": [USER], "chosen": chosen, "rejected": [message("assistant", "Seven.")]})
    (reject,) = tokenize_pairs(file.pairs, styled_tokenizer("chatml")).rejects
    assert (reject.reason, f"`{key}`" in reject.detail) == ("template-turns", True)
    assert len(tokenize_pairs(file.pairs, styled_tokenizer("chatml"), train_on="last").pairs) == 1


@pytest.mark.parametrize(
    ("names", "code"),
    [
        (["train_prefs-00000-of-00001", "train_sft-00000-of-00001"], "data-splits"),
        (["train-00000-of-00003", "train-00002-of-00003"], "data-missing"),
        (["train-00000-of-00002-0a1b2c3d4e5f6071", "train-00001-of-00002-1a1b2c3d4e5f6071"], None),
        (["train-00000-of-00001"], None),
    ],
)
def test_the_names_of_the_hub_say_which_files_are_one_split(tmp_path: Path, names: list[str], code: str | None) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "dataset_infos.json").write_text("{}")
    for name in names:
        (tmp_path / "data" / f"{name}.parquet").write_bytes(b"")
    if code is None:
        assert len(expand([tmp_path])) == len(names)
        return
    with pytest.raises(UserError) as caught:
        expand([tmp_path])
    assert caught.value.code == code
