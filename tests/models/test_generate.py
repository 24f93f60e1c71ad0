"""Generation: the likeliest token each time, whatever else is in the batch, and the model left as it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dpoeng.engine.models.adapters import add_policy_adapter, as_reference
from dpoeng.engine.models.generate import cut_at, generate, sample
from dpoeng.engine.models.loading import load_model
from dpoeng.engine.models.model import CausalLM, set_mode
from dpoeng.engine.models.sources import find_model
from dpoeng.engine.scoring.choose_layout import choose_layout

PROMPTS = [np.arange(10, 10 + n, dtype=np.int32) for n in (3, 7, 5)]


@pytest.fixture
def lm(tiny_model: Path) -> CausalLM:
    """The tiny model as both phases leave it: frozen, with the attention of the shared layout."""
    loaded = load_model(
        find_model(str(tiny_model)), quantization="none", dtype="float32", device=torch.device("cpu"), tokenizer=True
    )
    set_mode(loaded, training=False)
    choose_layout(loaded)
    assert loaded.layout == "shared"
    return loaded


@torch.no_grad()
def by_hand(tiny_model: Path, prompt: np.ndarray, count: int, penalty: float = 1.0) -> list[int]:
    """Greedy decoding by whole forwards, without any cache, until the end token."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    ids = torch.tensor(prompt[None].astype(np.int64))
    made: list[int] = []
    while len(made) < count:
        scores = model(ids).logits[0, -1]
        seen = ids[0].unique()
        scores[seen] = torch.where(scores[seen] > 0, scores[seen] / penalty, scores[seen] * penalty)
        token = int(scores.argmax())
        made.append(token)
        if token == model.config.eos_token_id:
            break
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    return made


def test_samples_are_the_models_own_whatever_its_generation_config_recommends(lm: CausalLM) -> None:
    drawn = sample(lm, PROMPTS[:1], count=8, max_new_tokens=4, temperature=1.0, seed=1)
    recommended = {"do_sample": True, "top_k": 1, "top_p": 0.01, "min_p": 1.0, "temperature": 0.01}
    lm.base.generation_config.update(**recommended, repetition_penalty=3.0)
    assert sample(lm, PROMPTS[:1], count=8, max_new_tokens=4, temperature=1.0, seed=1) == drawn
    assert len({one.text for one in drawn[0]}) > 1


def test_greedy_text_is_that_of_whole_forwards_and_independent_of_the_batch(lm: CausalLM, tiny_model: Path) -> None:
    texts = generate(lm, PROMPTS, max_new_tokens=12)
    for prompt, text in zip(PROMPTS, texts, strict=True):
        assert text == lm.tokenizer.decode(by_hand(tiny_model, prompt, 12), skip_special_tokens=True)
        assert generate(lm, [prompt], max_new_tokens=12) == [text]
    assert len(set(texts)) == 3


def test_a_repetition_penalty_divides_the_scores_of_what_occurred(lm: CausalLM, tiny_model: Path) -> None:
    (text,) = generate(lm, PROMPTS[:1], max_new_tokens=12, repetition_penalty=3.0)
    assert text == lm.tokenizer.decode(by_hand(tiny_model, PROMPTS[0], 12, penalty=3.0), skip_special_tokens=True)
    assert [text] != generate(lm, PROMPTS[:1], max_new_tokens=12)


def test_the_model_is_left_as_it_was(lm: CausalLM) -> None:
    before = (lm.base.config._attn_implementation, lm.base.config.use_cache, lm.layout, torch.random.get_rng_state())
    generate(lm, PROMPTS, max_new_tokens=3, temperature=1.0)
    after = (lm.base.config._attn_implementation, lm.base.config.use_cache, lm.layout, torch.random.get_rng_state())
    assert before[:3] == after[:3]
    assert torch.equal(before[3], after[3])


def test_a_stop_text_ends_each_continuation_where_it_appears(lm: CausalLM) -> None:
    full = generate(lm, PROMPTS, max_new_tokens=16)
    stop = full[0][4:6]
    assert stop
    stopped = generate(lm, PROMPTS, max_new_tokens=16, stop=[stop])
    assert stopped == [cut_at(text, [stop]) for text in full]
    assert len(stopped[0]) <= 4


@pytest.mark.parametrize(
    ("text", "stop", "want"),
    [
        ("abc", [], "abc"),
        ("abc", ["x"], "abc"),
        ("a\nEND b\nEND", ["\nEND"], "a"),
        ("one two three", ["three", "two"], "one "),  # the earliest in the text, not the first in the list
        ("END", ["END"], ""),
    ],
)
def test_cutting(text: str, stop: list[str], want: str) -> None:
    assert cut_at(text, stop) == want


def test_draws_depend_on_the_seed_alone(lm: CausalLM) -> None:
    torch.manual_seed(1)
    first = generate(lm, PROMPTS, max_new_tokens=12, temperature=1.5, seed=3)
    torch.manual_seed(2)
    assert generate(lm, PROMPTS, max_new_tokens=12, temperature=1.5, seed=3) == first
    assert generate(lm, PROMPTS, max_new_tokens=12, temperature=1.5, seed=4) != first


def test_the_adapter_speaks_and_is_silent_when_switched_off(lm: CausalLM) -> None:
    plain = generate(lm, PROMPTS, max_new_tokens=8)
    lora = {"r": 4, "lora_alpha": 64, "target_modules": "all-linear", "init_lora_weights": False}
    torch.manual_seed(0)
    adapted = add_policy_adapter(lm, "new", None, lora)
    set_mode(adapted, training=False)
    assert generate(adapted, PROMPTS, max_new_tokens=8) != plain
    with as_reference(adapted, "new"):
        assert generate(adapted, PROMPTS, max_new_tokens=8) == plain


def test_mistakes(lm: CausalLM) -> None:
    assert generate(lm, []) == []
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        generate(lm, [PROMPTS[0], np.array([], dtype=np.int32)])
    lm.tokenizer = None
    with pytest.raises(ValueError, match="tokenizer"):
        generate(lm, PROMPTS)
