"""Situations from public bug reports: the right ids, or a refusal that says what is wrong.

The inputs are in cases/, the templates in templates/. What is right is worked out by `apply_chat_template` on the
prompt and on prompt + response, or stands here as the text that must be scored.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chat_styles import STYLES, made_tokenizer, styled_tokenizer

from dpoeng.cache.errors import UserError
from dpoeng.cache.schema import PairIds
from dpoeng.engine.checks.shown import show_tokens
from dpoeng.engine.data.pairs import PairFile, read_pairs
from dpoeng.engine.data.tokenization import TokenizedData, tokenize_pairs

CASES = Path(__file__).parent / "cases"
Message = dict[str, Any]


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> Message:
    return {"role": "assistant", "content": text, **more}


def system(text: str) -> Message:
    return {"role": "system", "content": text}


def read(name: str, **options: Any) -> PairFile:
    return read_pairs([CASES / name], max_reject_share=1.0, **options)


def tokens_of(name: str, style: str, **options: Any) -> tuple[PairFile, TokenizedData]:
    file = read(name)
    return file, tokenize_pairs(file.pairs, styled_tokenizer(style), **options)


def rejects(file: PairFile, data: TokenizedData | None = None) -> dict[int, tuple[str, str]]:
    """Row -> reason and detail."""
    found = [*file.rejects, *(data.rejects if data is not None else [])]
    return {reject.source_row: (reject.reason, reject.detail) for reject in found}


def check_ids(
    ids: PairIds, tokenizer: Any, prompt: list[Message], sides: tuple[list[Message], list[Message]], **more: Any
) -> None:
    """The pair is what transformers writes of prompt + response, and begins to be scored behind its opening."""
    opened = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False, **more)
    for response, own, start in (
        (sides[0], ids.chosen_ids, ids.chosen_start),
        (sides[1], ids.rejected_ids, ids.rejected_start),
    ):
        whole = tokenizer.apply_chat_template([*prompt, *response], return_dict=False, **more)
        assert [*ids.prompt_ids.tolist(), *own.tolist()] == whole
        assert whole[: len(opened)] == opened
        assert len(ids.prompt_ids) + start == len(opened)


def scored(ids: PairIds, tokenizer: Any) -> tuple[str, str]:
    """What is scored of either side, its pieces between bars."""
    shown = show_tokens("", ids, tokenizer)
    sides = ("|".join(piece.text for piece in side if piece.scored) for side in (shown.chosen, shown.rejected))
    first, second = sides
    return first, second


PROMPT = [user("Name a colour.")]
SIDES = ([assistant("Red.")], [assistant("Seven.")])
# No opening for an answer that a written answer begins with: see the tests of these styles.
PLAIN_STYLES = [
    style for style in STYLES if style not in ("no_generation_prompt", "deepseek_r1", "qwq", "chatml_marked")
]


@pytest.mark.parametrize("style", PLAIN_STYLES)
def test_every_style_is_what_transformers_writes(style: str) -> None:
    tokenizer = styled_tokenizer(style)
    # Gemma 2 refuses a system prompt; Mistral's leaves it out once an answer follows, which dpoeng refuses.
    prompts = [PROMPT] if style in ("gemma2", "mistral") else [PROMPT, [system("Be brief."), *PROMPT]]
    rows = [{"prompt": prompt, "chosen": SIDES[0], "rejected": SIDES[1]} for prompt in prompts]
    data = tokenize_pairs(pairs_of(rows), tokenizer)
    if style == "harmony":  # it prints the day, which dpoeng holds still
        assert "Current date: 2024-07-26" in tokenizer.decode(data.pairs[0].ids.prompt_ids)
        tokenizer = made_tokenizer(
            str(tokenizer.chat_template).replace('strftime_now("%Y-%m-%d")', '"2024-07-26"'), None, "<|return|>"
        )
    more = {"date_string": "26 Jul 2024"} if style == "llama3" else {}
    for prompt, pair in zip(prompts, data.pairs, strict=True):
        check_ids(pair.ids, tokenizer, prompt, SIDES, **more)


def pairs_of(rows: list[dict[str, Any]]) -> Any:
    from dpoeng.engine.data.shapes import Shape, to_pair

    return [to_pair(row, Shape(), "file", i) for i, row in enumerate(rows, 1)]


@pytest.mark.parametrize("style", [style for style in STYLES if style not in ("chatml", "no_generation_prompt")])
def test_a_template_that_marks_or_not_scores_the_same_answer(style: str) -> None:
    tokenizer = styled_tokenizer(style)
    (pair,) = tokenize_pairs(pairs_of([{"prompt": PROMPT, "chosen": SIDES[0], "rejected": SIDES[1]}]), tokenizer).pairs
    chosen, rejected = scored(pair.ids, tokenizer)
    assert chosen.split("<|")[0].split("<")[0].strip() in ("Red.", "", "think>")  # what precedes may be a thought
    assert chosen.replace("Red.", "Seven.") == rejected


# ----------------------------------------------------------------------------------- columns


def test_01_a_system_column_stands_before_the_messages() -> None:
    file, data = tokens_of("01-system-column/chat.jsonl", "chatml")
    tokenizer = styled_tokenizer("chatml")
    rows = [json.loads(line) for line in (CASES / "01-system-column/chat.jsonl").read_text().splitlines()]
    for row, pair in zip(rows, data.pairs, strict=True):
        check_ids(pair.ids, tokenizer, [system(row["system"]), *row["prompt"]], (row["chosen"], row["rejected"]))
    assert not rejects(file, data)


@pytest.mark.parametrize(
    ("name", "column"), [("01-system-column/text.jsonl", "system"), ("11-images/p.jsonl", "image")]
)
def test_01_11_a_column_without_a_place_is_refused_by_name(name: str, column: str) -> None:
    with pytest.raises(UserError) as caught:
        read(name)
    assert caught.value.code == "data-empty"
    assert "2 rejected" in str(caught.value.found)
    found = [row for row in _stream(name) if hasattr(row, "reason")]
    assert {row.reason for row in found} == {"unused-column"}
    assert all(f"`{column}" in row.detail for row in found)


def _stream(name: str) -> list[Any]:
    from dpoeng.engine.data.pairs import PairStream

    return list(PairStream([CASES / name]))


def test_a_column_may_be_left_out_by_name() -> None:
    file = read("01-system-column/text.jsonl", columns={"system": ""})
    assert file.pairs[0].prompt == "Instruction: Name a colour.\nResponse:"
    assert file.pairs[0].extra == {"system": "You are a pirate. Speak like one."}


def test_02_history_system_and_instruction_are_one_conversation() -> None:
    file, data = tokens_of("02-alpaca-history/p.jsonl", "chatml")
    prompt = [
        system("Answer briefly."),
        user("What is the largest city of France?"),
        assistant("Paris."),
        user("And the second largest?"),
    ]
    sides = ([assistant("Marseille.")], [assistant("Blue.")])
    check_ids(data.pairs[0].ids, styled_tokenizer("chatml"), prompt, sides)
    assert file.column_remark() == "question, system prompt and history became a conversation in 2 pairs"


@pytest.mark.parametrize("column", ["question", "query", "input", "instruction"])
def test_a_question_is_the_prompt_though_the_answers_begin_alike(column: str, tmp_path: Path) -> None:
    row = {column: "What is 2+2?", "chosen": "Let me see.\nIt is 4", "rejected": "Let me see.\nIt is 5"}
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (pair,) = read_pairs([path]).pairs
    assert (pair.prompt, pair.chosen) == ("What is 2+2?", "Let me see.\nIt is 4")
    assert f"prompt taken from `{column}`" in read_pairs([path]).column_remark()


@pytest.mark.parametrize(
    ("more", "column"),
    [
        ({"question": "q?", "context": "Paris is a city."}, "context"),
        ({"prompt": "q?", "history": [["a", "b"]]}, "history"),
        ({"prompt": "q?", "system_prompt": "Be kind."}, "system"),
        ({"prompt": "q?", "input": "more"}, "input"),
        ({"prompt": "q?", "images": ["a.png"]}, "images"),
        ({"prompt": [user("q?")], "video": "a.mp4"}, "video"),
        ({"problem": "What?"}, "problem"),
    ],
)
def test_what_belongs_to_the_prompt_and_has_no_place_is_refused(
    more: dict[str, Any], column: str, tmp_path: Path
) -> None:
    sides = {"chosen": "Let me see.\nA red one.", "rejected": "Let me see.\nA blue one."}
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({**more, **sides}) + "\n" + json.dumps({"prompt": "p", **sides}) + "\n")
    found = read_pairs([path], max_reject_share=1.0)
    assert [(reject.reason, f"`{column}" in reject.detail) for reject in found.rejects] == [("unused-column", True)]


def test_a_guessed_transcript_is_reported_with_an_example(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"chosen": "Q: 2+2?\nA: four", "rejected": "Q: 2+2?\nA: five"}) + "\n")
    remark = read_pairs([path]).column_remark()
    assert "guessed from the common beginning" in remark
    assert f"{path}:1 ends 'Q: 2+2?\\nA:'" in remark


# ----------------------------------------------------------------------------------- shapes


def test_04_a_prompt_that_both_responses_repeat_stands_once() -> None:
    file = read("04-prompt-repeated/p.jsonl")
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in file.pairs] == [
        ("Question: Name a colour.\nAnswer:", " Red.", " Seven."),
        ("Question: Name a city.\nAnswer:", " Paris.", " Blue."),
    ]
    assert "repeated their prompt in 2 pairs" in file.column_remark()
    (pair,) = read("04-prompt-repeated/chat.jsonl").pairs
    assert pair.prompt == "<|im_start|>user\nName a colour.<|im_end|>\n<|im_start|>assistant\n"
    assert (pair.chosen, pair.rejected) == ("Red.<|im_end|>", "Seven.<|im_end|>")
    # The end already exists, though the end token is another one.
    tokenizer = styled_tokenizer("chatml", eos="<|endoftext|>")
    (tokens,) = tokenize_pairs([pair], tokenizer).pairs
    assert tokens.ids.chosen_ids.tolist() == tokenizer("Red.<|im_end|>")["input_ids"]


STORED = [
    "06-messages-as-text/" + name
    for name in (
        *("json_string.jsonl", "json_indent.jsonl", "json_string.parquet", "json_feature.parquet"),
        *("json_list_feature.parquet", "json_feature_disk", "pandas.csv", "numpy.csv", "datasets.csv"),
    )
]


@pytest.mark.parametrize("name", STORED)
def test_06_messages_are_messages_however_they_are_stored(name: str) -> None:
    file = read(name)
    answers = [("Red.", "Seven."), ("Paris.", "Blue."), ("Hello!", "No.")]
    questions = ["Name a colour.", "Name a city.", "Say hello."]
    for question, answer, pair in zip(questions, answers, file.pairs, strict=True):
        assert pair.prompt == [user(question)]
        assert (pair.chosen, pair.rejected) == tuple([assistant(text)] for text in answer)


@pytest.mark.parametrize(
    "text",
    [
        "[{'role': 'user', 'content': 'a' 'b'}]",
        "[{'role': 'user', 'content': open('x')}]",
        '[{"role": "user", "content": ',
    ],
)
def test_messages_that_cannot_be_parsed_are_refused_and_nothing_is_run(text: str, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": text, "chosen": "a", "rejected": "b"}) + "\n")
    found = next(iter(_rows(path)))
    assert found.reason == "messages-as-text"


def _rows(path: Path) -> Any:
    from dpoeng.engine.data.pairs import PairStream

    return PairStream([path])


def test_07_roles_are_translated_or_refused(tmp_path: Path) -> None:
    for name in ("07-role-names/p.jsonl", "07-role-names/gpt.jsonl"):
        for pair in read(name).pairs:
            roles = [message["role"] for side in (pair.prompt, pair.chosen, pair.rejected) for message in side]
            assert set(roles) <= {"user", "assistant", "tool"}
    path = tmp_path / "p.jsonl"
    path.write_text(
        json.dumps({"prompt": [{"role": "narrator", "content": "x"}], "chosen": "a", "rejected": "b"}) + "\n"
    )
    assert next(iter(_rows(path))).reason == "unknown-role"


def test_23_25_the_prompt_is_all_that_both_conversations_share() -> None:
    for name in ("23-first-user-prompt/list.jsonl", "23-first-user-prompt/str.jsonl"):
        (pair,) = read(name).pairs
        assert pair.prompt == [user("Hi"), assistant("Hello."), user("Name a colour.")]
        assert (pair.chosen, pair.rejected) == SIDES
    for name in ("25-message-metadata/p.jsonl", "25-message-metadata/prompt.jsonl"):
        for pair in read(name).pairs:
            assert [message["content"] for message in (*pair.prompt, *pair.chosen, *pair.rejected)] == [
                "Hi",
                "Hello.",
                "Go.",
            ]


def test_26_a_part_without_text_is_nothing() -> None:
    file = read("26-null-part/p.jsonl")
    assert [pair.prompt[0]["content"] for pair in file.pairs] == ["Hi", "Part one.Part two."]
    assert rejects(file) == {2: ("bad-messages", "a message of `prompt` has no text as its `content`")}


# ----------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("name", "rows"),
    [("27-folders/disk", 2), ("27-folders/cached", 2), ("27-folders/mapped", 2), ("27-folders/dict/train", None)],
)
def test_27_a_saved_dataset_is_the_files_that_it_lists(name: str, rows: int | None) -> None:
    file = read(name)
    assert [Path(path).name for path in file.files] == ["data-00000-of-00001.arrow"]
    assert rows is None or file.pairs[0].prompt == "Instruction: Name a colour.\nResponse:"


@pytest.mark.parametrize("name", ["dict", "hub", "splits"])
def test_27_splits_are_not_mixed(name: str) -> None:
    with pytest.raises(UserError) as caught:
        read(f"27-folders/{name}")
    assert caught.value.code == "data-splits"
    assert "train" in str(caught.value.found)
    assert "test" in str(caught.value.found)


@pytest.mark.parametrize(
    "name", ["binary.parquet", "half.parquet", "kinds.parquet", "pandas.parquet", "polars.parquet", "polars.feather"]
)
def test_28_text_columns_of_any_type_are_text(name: str) -> None:
    found = {(pair.prompt, pair.chosen, pair.rejected) for pair in read(f"28-binary-parquet/{name}").pairs}
    assert found == {
        ("Instruction: Name a colour.\nResponse:", " Red.", " Seven."),
        ("Instruction: Name a city.\nResponse:", " Paris.", " Blue."),
    }


def test_28_bytes_that_are_not_text_are_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "p.parquet"
    columns = {"prompt": ["p", "p"], "chosen": pa.array([b"\xff\xfe", b"ok"]), "rejected": ["b", "b"]}
    pq.write_table(pa.table(columns), path)
    found = read_pairs([path], max_reject_share=1.0)
    assert [(reject.source_row, reject.reason) for reject in found.rejects] == [(1, "bad-utf8")]
    assert found.pairs[0].chosen == "ok"


def test_32_scores_as_text_are_compared_as_numbers() -> None:
    file = read("32-scores-as-text/p.jsonl", where="score_chosen > score_rejected")
    assert [(pair.source_row, file.filtered) for pair in file.pairs] == [(2, 1)]


# ----------------------------------------------------------------------------------- templates


def test_09_what_the_template_does_not_write_is_refused_by_row_and_part() -> None:
    file, data = tokens_of("09-template-drops/tools.jsonl", "chatml")
    found = rejects(file, data)
    assert {row: reason for row, (reason, _) in found.items()} == dict.fromkeys((1, 2, 3, 4), "template-drops")
    assert "tool get_weather" in found[1][1]
    assert found[2][1].startswith("prompt, message 2, name of a tool call")
    assert found[3][1].startswith("chosen, message 1, name of a tool call")
    assert found[4][1].startswith("chosen, message 1, reasoning_content")


@pytest.mark.parametrize("style", ["qwen3", "harmony"])
def test_09_what_the_template_writes_is_used(style: str) -> None:
    file, data = tokens_of("09-template-drops/tools.jsonl", style)
    assert rejects(file, data) == {}
    whole = [styled_tokenizer(style).decode([*pair.ids.prompt_ids, *pair.ids.chosen_ids]) for pair in data.pairs]
    assert [
        words in text
        for text, words in zip(whole, ["get_weather", "sunny", '{"city": "Lyon"}', "Two and two"], strict=True)
    ] == [True] * 4


def call(arguments: Any) -> Message:
    return assistant("", tool_calls=[{"type": "function", "function": {"name": "get_weather", "arguments": arguments}}])


@pytest.mark.parametrize("arguments", [{"city": "Lyon"}, '{"city": "Lyon"}', '"{\\"city\\": \\"Lyon\\"}"'])
@pytest.mark.parametrize("style", ["qwen3", "llama3", "llama4", "harmony", "mistral"])
def test_arguments_of_calls_are_written_once_encoded(style: str, arguments: Any) -> None:
    row = {"prompt": [user("Weather?")], "chosen": [call(arguments)], "rejected": [assistant("No.")]}
    data = tokenize_pairs(pairs_of([row]), styled_tokenizer(style))
    assert data.rejects == []
    assert '{"city": "Lyon"}' in styled_tokenizer(style).decode(data.pairs[0].ids.chosen_ids)


def test_arguments_that_are_written_as_source_are_refused() -> None:
    # prints a dict as Python does, and takes no text
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{% for c in m.tool_calls or [] %}"
        "{{ c.function.name }} {{ dict(c.function.arguments) }}{% endfor %}<|im_end|>{% endfor %}"
    )
    row = {"prompt": [user("Weather?")], "chosen": [call({"city": "Lyon"})], "rejected": [assistant("No.")]}
    data = tokenize_pairs(pairs_of([row]), made_tokenizer(template))
    assert [reject.reason for reject in data.rejects] == ["template-drops"]
    assert "as Python source" in data.rejects[0].detail


def test_a_system_prompt_that_is_lost_once_an_answer_follows_is_refused() -> None:
    row = {"prompt": [system("Be brief."), *PROMPT], "chosen": SIDES[0], "rejected": SIDES[1]}
    data = tokenize_pairs(pairs_of([row]), styled_tokenizer("mistral"))
    assert [(reject.reason, reject.detail.split(":")[0]) for reject in data.rejects] == [
        ("template-drops", "prompt, message 1, content")
    ]


def test_a_misspelt_argument_of_the_template_is_refused() -> None:
    row = {
        "prompt": PROMPT,
        "chosen": SIDES[0],
        "rejected": SIDES[1],
        "chat_template_kwargs": {"enable_thinkng": False},
    }
    data = tokenize_pairs(pairs_of([row]), styled_tokenizer("qwen3"))
    assert [reject.reason for reject in data.rejects] == ["template-drops"]
    assert "did you mean enable_thinking?" in data.rejects[0].detail


@pytest.mark.parametrize("eos", [None, "<|endoftext|>"])
def test_10_the_turn_ends_once_and_alike_whatever_the_end_token_is(eos: str | None) -> None:
    tokenizer = styled_tokenizer("chatml", eos=eos)
    data = tokenize_pairs(read("10-turn-end-written/p.jsonl").pairs, tokenizer)
    assert [scored(pair.ids, tokenizer) for pair in data.pairs] == [
        ("Red.<|im_end|>\n", "Seven.<|im_end|>\n"),
        ("Paris.<|im_end|>\n", "Blue.<|im_end|>\n"),
    ]


def test_13_special_tokens_that_take_white_space_stay_in_the_prompt() -> None:
    tokenizer = styled_tokenizer("phi3", swallows=True)
    file = read("13-phi3-rstrip/p.jsonl")
    data = tokenize_pairs(file.pairs, tokenizer)
    for source, pair in zip(file.pairs, data.pairs, strict=True):
        check_ids(pair.ids, tokenizer, source.prompt, (source.chosen, source.rejected))  # type: ignore[arg-type]
    assert [pair.swallowed for pair in data.pairs] == [True, True, False]
    assert data.counts.swallowed == 2


def test_15_a_refusing_template_is_reported_by_reason() -> None:
    file, data = tokens_of("15-gemma-system/p.jsonl", "gemma2")
    assert [reason for reason, _ in rejects(file, data).values()] == ["template-error"] * 2
    file, data = tokens_of("15-gemma-system/ok.jsonl", "gemma2")
    assert scored(data.pairs[0].ids, styled_tokenizer("gemma2")) == (
        "Red.<end_of_turn>\n",
        "Seven 👍🏽.<end_of_turn>\n",
    )


@pytest.mark.parametrize("style", ["chatml", "llama3", "phi3", "phi4", "zephyr", "llama4", "qwen3"])
def test_16_an_answer_continues_the_turn_that_the_prompt_begins(style: str) -> None:
    tokenizer = styled_tokenizer(style)
    file, data = tokens_of("16-prefill/p.jsonl", style)
    prompt: Any = file.pairs[0].prompt
    ids = data.pairs[0].ids
    opened = tokenizer.apply_chat_template(
        prompt, continue_final_message=True, return_dict=False, date_string="26 Jul 2024"
    )
    whole = tokenizer.apply_chat_template(
        [prompt[0], assistant("Sure, it is red.")], return_dict=False, date_string="26 Jul 2024"
    )
    assert [*ids.prompt_ids.tolist(), *ids.chosen_ids.tolist()] == whole
    assert ids.prompt_ids.tolist() == opened
    assert scored(ids, tokenizer)[0].startswith(" red.")


def test_17_a_header_is_not_scored_where_the_template_opens_no_answer() -> None:
    tokenizer = styled_tokenizer("no_generation_prompt")
    _, data = tokens_of("17-no-generation-prompt/p.jsonl", "no_generation_prompt")
    assert scored(data.pairs[0].ids, tokenizer) == ("Red.<|im_end|>\n", "Seven.<|im_end|>\n")
    assert tokenizer.decode(data.pairs[0].ids.prompt_ids).endswith("<|im_start|>assistant\n")


THOUGHT = "<think>\nTwo and two.\n</think>\n\n4<|im_end|>\n"
QWEN3 = {
    1: (THOUGHT, "<think>\n\n</think>\n\n5<|im_end|>\n"),
    2: (THOUGHT, "<think>\nGuess.\n</think>\n\n5<|im_end|>\n"),
    3: ("4<|im_end|>\n", "5<|im_end|>\n"),
    5: ("<think>\n\n</think>\n\n4<|im_end|>\n", "<think>\nhm\n</think>\n\n5<|im_end|>\n"),
    6: (
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>\n'
        "|<think>\n\n</think>\n\nSunny.<|im_end|>\n",
        "<think>\n\n</think>\n\nNo idea.<|im_end|>\n",
    ),
    7: tuple(
        f'<think>\n\n</think>\n\n<tool_call>\n{{"name": "get_weather", "arguments": {{"city": "{city}"}}}}\n'
        "</tool_call><|im_end|>\n"
        for city in ("Lyon", "Paris")
    ),
    8: tuple(f"Hello<|im_end|>\n|<think>\n\n</think>\n\n{digit}<|im_end|>\n" for digit in "45"),
}


def test_33_thoughts_calls_and_turns() -> None:
    tokenizer = styled_tokenizer("qwen3")
    file, data = tokens_of("33-thinking/qwen3.jsonl", "qwen3")
    assert {pair.source_row: scored(pair.ids, tokenizer) for pair in data.pairs} == QWEN3
    # An opening that says that nothing was thought, and a thought behind it.
    assert {row: reason for row, (reason, _) in rejects(file, data).items()} == {4: "template-boundary"}
    assert (data.counts.thoughts, data.counts.turns) == (1, 2)
    by_row = {pair.source_row: pair.ids for pair in data.pairs}
    for source in file.pairs:
        if source.source_row in by_row and source.source_row != 8:
            ids = by_row[source.source_row]
            more = {"tools": source.tools, **(source.chat_template_kwargs or {})}
            check_ids(ids, tokenizer, source.prompt, (source.chosen, source.rejected), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["qwq", "r1"])
def test_33_a_thought_that_the_template_cuts_out_of_the_answer_is_refused(name: str) -> None:
    file, data = tokens_of(f"33-thinking/{name}.jsonl", {"qwq": "qwq", "r1": "deepseek_r1"}[name])
    found = rejects(file, data)
    assert {reason for reason, _ in found.values()} == {"template-drops"}
    assert set(found) == {1, 2, 3, 4, 5}
    assert "chosen, message 1, thought" in found[1][1]
    assert "'enable_thinking'" in found[3][1]


TURNS = {
    "prompt": [user("Hi")],
    "chosen": [assistant("Hello"), user("2+2?"), assistant("4")],
    "rejected": [assistant("Hello"), user("2+2?"), assistant("5")],
}


@pytest.mark.parametrize(
    ("style", "train_on", "chosen"),
    [
        ("chatml", "assistant", "Hello<|im_end|>\n|4<|im_end|>\n"),
        ("chatml", "last", "4<|im_end|>\n"),
        ("chatml", "all", "Hello<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"),
        ("chatml_marked", "assistant", "Hello<|im_end|>|4<|im_end|>"),
        ("chatml_marked", "last", "4<|im_end|>"),
        ("llama3", "assistant", "Hello<|eot_id|>|4<|eot_id|>"),
        ("llama4", "assistant", "Hello<|eot|>|4<|eot|>"),
        ("gemma3", "assistant", "Hello<end_of_turn>\n|4<end_of_turn>\n"),
        ("mistral", "assistant", " Hello</s>| 4</s>"),
        ("zephyr", "assistant", "Hello</s>\n|4</s>\n"),
        ("phi4", "assistant", "Hello<|im_end|>|4<|im_end|>"),
        ("command_r", "last", "4<|END_OF_TURN_TOKEN|>"),
        ("no_generation_prompt", "assistant", "Hello<|im_end|>\n|4<|im_end|>\n"),
    ],
)
def test_scored_are_the_assistants_own_tokens(style: str, train_on: Any, chosen: str) -> None:
    tokenizer = styled_tokenizer(style)
    data = tokenize_pairs(pairs_of([TURNS]), tokenizer, train_on=train_on)
    assert data.rejects == []
    assert scored(data.pairs[0].ids, tokenizer)[0] == chosen


@pytest.mark.parametrize("style", ["phi3", "harmony"])
def test_ambiguous_turns_are_refused(style: str) -> None:
    # Both write the end of the last turn otherwise than the end of those before it.
    data = tokenize_pairs(pairs_of([TURNS]), styled_tokenizer(style))
    assert [reject.reason for reject in data.rejects] == ["template-turns"]


# Tags with and without `-`, on separate lines and in the middle of one.
MARKED = {
    "in one line": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    ),
    "with white space taken": (
        "{%- for m in messages -%}\n  {{- '<|im_start|>' + m.role + '\n' -}}\n"
        "  {%- if m.role == 'assistant' -%}\n"
        "    {%- generation -%}\n      {{ m.content }}<|im_end|>\n    {%- endgeneration -%}\n"
        "  {%- else -%}\n    {{ m.content }}<|im_end|>\n  {%- endif -%}\n  {{ '\n' }}\n{%- endfor -%}"
    ),
    "with white space left": (
        "{% for m in messages %}\n<|im_start|>{{ m.role }}\n\n{% if m.role == 'assistant' %}\n"
        "    {% generation %}\n{% set text = m.content %}{{ text }}<|im_end|>\n    {% endgeneration %}\n"
        "{% else %}\n{{ m.content }}<|im_end|>\n{% endif %}\n{% endfor %}"
    ),
}


@pytest.mark.parametrize("name", [None, *MARKED])
def test_marks_are_transformers_own(name: str | None) -> None:
    opening = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    tokenizer = made_tokenizer(MARKED[name] + opening) if name else styled_tokenizer("chatml_marked")
    (pair,) = tokenize_pairs(pairs_of([TURNS]), tokenizer).pairs
    own = tokenizer.apply_chat_template(
        [*TURNS["prompt"], *TURNS["chosen"]], return_dict=True, return_assistant_tokens_mask=True
    )
    ids = pair.ids
    whole = [*ids.prompt_ids.tolist(), *ids.chosen_ids.tolist()]
    assert own["input_ids"][: len(whole)] == whole
    mask = [0] * len(own["input_ids"])
    for at in range(ids.chosen_start, len(ids.chosen_ids)):
        mask[len(ids.prompt_ids) + at] = int(not any(begin <= at < end for begin, end in ids.chosen_gaps))
    assert mask == own["assistant_masks"]


# ----------------------------------------------------------------------------------- limits


def test_a_cut_prompt_keeps_a_beginning_token_only_where_the_tokenizer_gave_it() -> None:
    from tokenizers import processors

    rows = [{"prompt": "<s>one two three four five", "chosen": " a", "rejected": " b"}]
    adds = made_tokenizer(None, "<s>", "</s>")
    bos = adds.bos_token_id
    (pair,) = tokenize_pairs(pairs_of(rows), adds, max_prompt_length=4).pairs
    assert bos not in pair.ids.prompt_ids.tolist()  # the data had it, the tokenizer never adds one
    adds.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    (pair,) = tokenize_pairs(pairs_of(rows), adds, max_prompt_length=4).pairs
    assert pair.ids.prompt_ids.tolist()[0] == bos
    assert pair.ids.prompt_ids.tolist().count(bos) == 1


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("length", range(30, 64, 3))
def test_truncation_leaves_scored_tokens_at_the_end(mode: Any, length: int) -> None:
    data = tokenize_pairs(pairs_of([TURNS]), styled_tokenizer("chatml"), max_length=length, truncation_mode=mode)
    for pair in data.pairs:
        ids = pair.ids
        assert len(ids.prompt_ids) + max(len(ids.chosen_ids), len(ids.rejected_ids)) <= length
        for tokens, gaps in ((ids.chosen_ids, ids.chosen_gaps), (ids.rejected_ids, ids.rejected_gaps)):
            assert all(end < len(tokens) for _, end in gaps)
