"""Chat templates: where the answer begins, what stands once, and what the day must not change."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from dpoeng.cache.errors import UserError
from dpoeng.engine.data.chat import to_sides
from dpoeng.engine.data.shapes import PreferencePair
from dpoeng.engine.data.tokenization import TokenizedData, tokenize_pairs

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As in DeepSeek-R1: the opening starts a thought, which a written answer has lost.
THINKING = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|user|>{{ message['content'] }}{% else %}"
    "<|assistant|>{{ message['content'].split('</think>')[-1] }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
# As in Qwen3: a written answer has an empty thought, the opening has none unless thinking is off.
EMPTY_THOUGHT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# As in Mistral: something is put before the last user message, which here depends on what follows.
SHIFTING = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{% if loop.last %}[LAST]{% endif %}"
    "[INST]{{ message['content'] }}[/INST]{% else %}{{ message['content'] }}<|im_end|>{% endif %}{% endfor %}"
)
# A prompt is written otherwise when an answer follows, and otherwise again by what the answer says.
HOPELESS = (
    "{{ messages | length }}{{ messages[-1]['content'] | length }}"
    "{% for message in messages %}: {{ message['content'] }}{% endfor %}"
)


def chat_tokenizer(template: str | None = CHATML, *, add_bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE with ChatML's special tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[AddedToken(token, special=True) for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["system\nBe kind.", "user\nhello there", "assistant\nhello, friend"] * 5, trainer)
    if add_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<|im_end|>")
    tokenizer.chat_template = template
    return tokenizer


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text}]


def pair(prompt: Any = None, chosen: str = "hello, friend", rejected: str = "go", **more: Any) -> PreferencePair:
    return PreferencePair(prompt or [user("hello there")], answer(chosen), answer(rejected), "f", 1, **more)


def tokenize(tokenizer: Any, *pairs: PreferencePair, **options: Any) -> TokenizedData:
    return tokenize_pairs(pairs, tokenizer, **options)


def decoded(tokenizer: PreTrainedTokenizerFast, data: TokenizedData) -> tuple[str, str, str]:
    ids = data.pairs[0].ids
    prompt, chosen, rejected = (tokenizer.decode(part) for part in (ids.prompt_ids, ids.chosen_ids, ids.rejected_ids))
    return prompt, chosen, rejected


def test_the_template_makes_prompt_and_responses() -> None:
    tokenizer = chat_tokenizer()
    data = tokenize(tokenizer, pair())
    assert decoded(tokenizer, data) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nhello there<|im_end|>\n<|im_start|>assistant\n",
        "hello, friend<|im_end|>\n",
        "go<|im_end|>\n",
    )
    own = tokenizer.apply_chat_template([user("hello there"), *answer("go")], return_dict=False)
    ids = data.pairs[0].ids
    assert [*ids.prompt_ids, *ids.rejected_ids] == own
    assert (data.counts.merged, data.counts.truncated) == (0, 0)


def test_a_system_prompt_stands_once_whether_given_or_added() -> None:
    tokenizer = chat_tokenizer()
    for prompt in ([user("hello there")], [{"role": "system", "content": "Be kind."}, user("hello there")]):
        text = decoded(tokenizer, tokenize(tokenizer, pair(prompt)))[0]
        assert text.count("system") == text.count("Be kind.") == 1


@pytest.mark.parametrize("ending", ["", "<|im_end|>", "<|im_end|>\n", " <|im_end|><|im_end|>"])
def test_an_end_token_in_the_message_is_not_doubled(ending: str) -> None:
    tokenizer = chat_tokenizer()
    data = tokenize(tokenizer, pair(chosen=f"hello{ending}"))
    assert decoded(tokenizer, data)[1] == "hello<|im_end|>\n"


@pytest.mark.parametrize("add_bos", [False, True])
def test_a_beginning_token_stands_once_where_the_template_writes_it(add_bos: bool) -> None:
    tokenizer = chat_tokenizer("{{ bos_token }}" + CHATML, add_bos=add_bos)
    assert tokenize(tokenizer, pair()).pairs[0].ids.prompt_ids.tolist().count(tokenizer.bos_token_id) == 1
    tokenizer = chat_tokenizer(CHATML, add_bos=add_bos)  # a template that writes none means none
    assert tokenizer.bos_token_id not in tokenize(tokenizer, pair()).pairs[0].ids.prompt_ids.tolist()


def test_an_opening_that_written_answers_do_not_have() -> None:
    tokenizer = chat_tokenizer(THINKING)
    data = tokenize(tokenizer, pair(chosen="yes", rejected="no"))
    assert decoded(tokenizer, data) == ("<s><|user|>hello there<|assistant|>", "yes<|im_end|>", "no<|im_end|>")


@pytest.mark.parametrize("thinking", [True, False])
def test_an_empty_thought_is_scored_only_if_the_model_has_to_say_it(thinking: bool) -> None:
    tokenizer = chat_tokenizer(EMPTY_THOUGHT)
    data = tokenize(tokenizer, pair(chat_template_kwargs=None if thinking else {"enable_thinking": False}))
    thought = "<think>\n\n</think>\n\n"
    prompt, chosen, rejected = decoded(tokenizer, data)
    assert prompt.endswith("assistant\n" if thinking else "assistant\n" + thought)
    assert (chosen, rejected) == (
        (thought + "hello, friend<|im_end|>\n", thought + "go<|im_end|>\n")
        if thinking
        else ("hello, friend<|im_end|>\n", "go<|im_end|>\n")
    )


def test_a_prompt_that_changes_once_answered_is_taken_as_it_is_then() -> None:
    tokenizer = chat_tokenizer(SHIFTING)
    data = tokenize(tokenizer, pair())
    assert decoded(tokenizer, data) == ("[INST]hello there[/INST]", "hello, friend<|im_end|>", "go<|im_end|>")


def test_a_template_whose_answers_cannot_be_found_rejects_the_row() -> None:
    data = tokenize(chat_tokenizer(HOPELESS), pair())
    assert [(reject.source_row, reject.reason) for reject in data.rejects] == [(1, "template-boundary")]


def test_a_refusing_template_rejects_only_the_row() -> None:
    tokenizer = chat_tokenizer(
        "{% if messages[0]['content'] == 'bad' %}{{ raise_exception('no such role') }}{% endif %}" + CHATML
    )
    data = tokenize(tokenizer, pair([user("bad")]), pair())
    assert [reject.reason for reject in data.rejects] == ["template-error"]
    assert "no such role" in data.rejects[0].detail
    assert len(data.pairs) == 1
    assert decoded(tokenizer, data)[1] == "hello, friend<|im_end|>\n"


def test_messages_without_a_template_stop_the_run() -> None:
    with pytest.raises(UserError) as caught:
        tokenize(chat_tokenizer(None), pair())
    assert caught.value.code == "tokenizer-no-template"
    assert caught.value.where == "f:1"


def test_tools_and_arguments_reach_the_template() -> None:
    tokenizer = chat_tokenizer("{{ tools[0]['name'] }} {{ mood }}\n" + CHATML)
    text = to_sides(pair(tools=[{"name": "search"}], chat_template_kwargs={"mood": "calm"}), tokenizer)[0].text
    assert text.startswith("search calm\n")


def test_today_does_not_matter() -> None:
    # Llama 3.1's way to ask for the date; with the real date every pair would miss the cache tomorrow.
    llama = (
        "{% if not date_string is defined %}{% if strftime_now is defined %}"
        "{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{% endif %}Today: {{ date_string }}\n"
    )
    assert to_sides(pair(), chat_tokenizer(llama + CHATML))[0].text.startswith("Today: 26 Jul 2024\n")
    plain = '{{ strftime_now( "%Y-%m-%d" ) }}\n'
    assert to_sides(pair(), chat_tokenizer(plain + CHATML))[0].text.startswith("2024-07-26\n")
    told = pair(chat_template_kwargs={"date_string": "1 May 2025"})
    assert to_sides(told, chat_tokenizer(llama + CHATML))[0].text.startswith("Today: 1 May 2025\n")


def test_fault_51_an_edited_template_changes_only_the_pairs_that_it_touches() -> None:
    with_system = pair([{"role": "system", "content": "Be brief."}, user("hello there")])
    before = tokenize(chat_tokenizer(), pair(), with_system).pairs
    after = tokenize(chat_tokenizer(CHATML.replace("Be kind.", "Be good.")), pair(), with_system).pairs
    assert [a.ids.same_as(b.ids) for a, b in zip(before, after, strict=True)] == [False, True]


def test_texts_and_messages_may_stand_in_one_file() -> None:
    tokenizer = chat_tokenizer(add_bos=True)
    text = PreferencePair("hello there", " yes", " no", "f", 2)
    data = tokenize(tokenizer, pair(), text, pair())
    assert [tokenized.source_row for tokenized in data.pairs] == [1, 2, 1]
    assert [int(tokenized.ids.prompt_ids[0]) for tokenized in data.pairs] == [1, 0, 1]  # <|im_start|>, <s>
    assert data.counts.duplicates == 1
