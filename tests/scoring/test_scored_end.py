"""The last layer over scored positions only: the numbers and gradients of the whole one, in fewer rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from families import SHARED_FAMILIES, VOCAB, make, own_logps, some_groups
from plain_varlen import use_plain_arithmetic

from dpoeng.engine.models.model import CausalLM, decoder_layers, enable_gradient_checkpointing
from dpoeng.engine.scoring import scored_end
from dpoeng.engine.scoring.attention import use_layout
from dpoeng.engine.scoring.choose_layout import choose_layout
from dpoeng.engine.scoring.forward import score_groups
from dpoeng.engine.scoring.layout import Branch, PromptGroup, pack, queries_of
from dpoeng.engine.scoring.scored_end import end_at_scored
from dpoeng.engine.scoring.varlen import texts

pytest.importorskip("torch.nn.attention.varlen", reason="not in the oldest torch that is accepted")


@pytest.fixture(autouse=True, scope="module")
def _arithmetic_for_the_kernel() -> None:
    use_plain_arithmetic()


def group(prompt: int, *branches: Branch) -> PromptGroup:
    return PromptGroup(np.zeros(prompt, np.int32), branches)


def branch(length: int, **more: Any) -> Branch:
    return Branch(np.zeros(length, np.int32), **more)


def test_the_positions_that_predict() -> None:
    """The prompt's end predicts the first token of each response, and the last token predicts nothing."""
    # Row: prompt 0-2, responses 3-6 and 7-8; then a prompt 9 and responses 10 and 11-15, of which 13-15 are scored.
    row = pack([group(3, branch(4), branch(2)), group(1, branch(1), branch(5, start=2))])
    assert row.gather.tolist() == [2, 3, 4, 5, 2, 7, 9, 12, 13, 14]
    queries = queries_of(row)
    assert queries.tolist() == [2, 3, 4, 5, 7, 9, 12, 13, 14]
    asked = texts(row.groups, torch.device("cpu"), queries)
    assert asked.query_offsets.tolist() == [0, 4, 5, 6, 9]
    assert asked.key_rows is not None
    # Keys end with the last query of a text; the response of one token has no text of its own.
    assert asked.key_rows.tolist() == [*range(6), 0, 1, 2, 7, 9, 9, 11, 12, 13, 14]
    assert asked.key_offsets.tolist() == [0, 6, 10, 11, 16]
    assert (asked.longest_query, asked.longest_key) == (4, 6)


def test_a_gap_is_computed_and_a_text_that_nobody_asks_for_is_not() -> None:
    row = pack([group(2, branch(6, gaps=((2, 4),)), branch(1))])
    assert row.gather.tolist() == [1, 2, 5, 6, 1]
    assert queries_of(row).tolist() == [1, 2, 3, 4, 5, 6]
    assert texts(row.groups, torch.device("cpu"), queries_of(row)).query_offsets.tolist() == [0, 6]


def rows_of_last_layer(lm: CausalLM, scored: list[int]) -> None:
    """Notes the rows that the last norm sees."""
    norm = next(m for n, m in lm.backbone.named_modules() if n in ("norm", "ln_f", "final_layer_norm"))
    norm.register_forward_hook(lambda _module, states, _output: scored.append(states[0].shape[1]))


FAMILIES = ["LlamaConfig", "MistralConfig", "Gemma3TextConfig", "Qwen3MoeConfig", "GPTNeoXConfig", "CohereConfig"]


@pytest.mark.parametrize("name", FAMILIES)
def test_log_probs_are_the_models_own(name: str) -> None:
    """Windows, norms behind the attention, experts, one layer for q, k and v, and an MLP beside the attention."""
    lm = make(name, SHARED_FAMILIES[name])
    choose_layout(lm, "shared", "varlen")
    assert lm.scored_end
    rows: list[int] = []
    rows_of_last_layer(lm, rows)
    with torch.inference_mode():
        scored, _ = score_groups(lm, some_groups())
        assert rows == [len(queries_of(pack(some_groups())))]
        truth = own_logps(lm, some_groups())
    torch.testing.assert_close(scored.double(), truth, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["LlamaConfig", "Gemma3TextConfig"])
@pytest.mark.parametrize("recomputed", [False, True])
def test_gradients_are_those_of_the_whole_layer(name: str, recomputed: bool) -> None:
    gradients = []
    for narrow in (False, True):
        lm = make(name, SHARED_FAMILIES[name], torch.float64)
        weights = [p.requires_grad_() for n, p in lm.base.named_parameters() if "_proj" in n or "norm" in n]
        use_layout(lm, "shared")
        lm.attention = "varlen"
        if narrow:
            assert end_at_scored(lm, lambda lm=lm: score_groups(lm, some_groups()))  # type: ignore[misc]
        if recomputed:
            enable_gradient_checkpointing(lm)
        scored, _ = score_groups(lm, some_groups())
        (scored * torch.arange(1, len(scored) + 1)).sum().backward()
        gradients.append([weight.grad for weight in weights])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-6)


def ranked_groups() -> list[PromptGroup]:
    """Six responses that fork at two depths, some scored late or with a gap, one inside another; and a plain pair."""
    rng = np.random.default_rng(5)

    def draw(n: int) -> Any:
        return rng.integers(0, VOCAB, n, dtype=np.int32)

    stem, fork = draw(9), draw(8)
    long = np.concatenate([stem, fork, draw(6)])
    ends = [Branch(long), Branch(np.concatenate([stem, fork, draw(4)]), start=3), Branch(long[:12])]
    ends += [Branch(np.concatenate([stem, draw(9)]), start=1, gaps=((4, 11),)), Branch(draw(7)), Branch(draw(1))]
    return [PromptGroup(draw(10), tuple(ends)), PromptGroup(draw(4), (Branch(draw(5)), Branch(draw(3))))]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("LlamaConfig", torch.float64),
        ("MistralConfig", torch.float64),
        ("MistralConfig", torch.float32),
        ("Qwen3MoeConfig", torch.float32),  # torch has no grouped product in float64
    ],
)
def test_beginnings_that_run_once_with_varlen_and_the_short_end(name: str, dtype: torch.dtype) -> None:
    """All three together, as a GPU runs ranked rows: numbers and gradients are those of separate rows."""
    lm, made = make(name, SHARED_FAMILIES[name], dtype), ranked_groups()
    if dtype == torch.float32:
        choose_layout(lm, "shared", "varlen")
        lm.tree = 2
    else:  # the probe knows no float64
        use_layout(lm, "shared")
        lm.attention, lm.tree = "varlen", 2
        assert end_at_scored(lm, lambda: score_groups(lm, made))
    assert (lm.attention, lm.scored_end) == ("varlen", True)
    row = pack(made, lm.tree)
    assert len(row.input_ids) < sum(one.total_tokens for one in made)
    assert any(span.tree for span in row.groups)
    rows: list[int] = []
    rows_of_last_layer(lm, rows)
    weights = [p.requires_grad_() for n, p in lm.base.named_parameters() if p.dim() > 1 and "embed" not in n]

    def gradients() -> tuple[torch.Tensor, list[torch.Tensor]]:
        logps, _ = score_groups(lm, made)
        loss = (logps * torch.linspace(-1, 1, len(logps))).sum()
        return logps.detach(), list(torch.autograd.grad(loss, weights))

    ours, our_gradients = gradients()
    assert rows == [len(queries_of(row))]
    use_layout(lm, "separate")
    truth, expected = gradients()
    torch.testing.assert_close(ours, truth, atol=1e-6 if dtype == torch.float64 else 2e-5, rtol=0)
    for one, other in zip(our_gradients, expected, strict=True):
        assert (one - other).norm() <= (1e-6 if dtype == torch.float64 else 1e-5) * other.norm() + 1e-6


@pytest.mark.parametrize("name", ["LlamaConfig", "GPT2Config"])
def test_what_does_not_come_out_right_is_left_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong part of the layer; and GPT-2's decoder, which expects as many rows as it was given."""
    lm = make(name, SHARED_FAMILIES[name])
    if name == "LlamaConfig":
        monkeypatch.setattr(scored_end, "_parts", lambda *_: ("self_attn", "q_proj"))
    choose_layout(lm, "shared", "varlen")
    assert (lm.attention, lm.scored_end) == ("varlen", False)
    with torch.inference_mode():
        scored, _ = score_groups(lm, some_groups())
        torch.testing.assert_close(scored.double(), own_logps(lm, some_groups()), atol=2e-5, rtol=0)


def test_other_numbers_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are taken one too early run without an error, and give other log-probs."""
    lm = make("LlamaConfig", {})
    own = scored_end._over_scored

    def shifted(*given: Any, **named: Any) -> Any:
        return own(*given, **named).roll(1, dims=1) if named["dpoeng_plan"].last else own(*given, **named)

    monkeypatch.setattr(scored_end, "_over_scored", shifted)
    choose_layout(lm, "shared", "varlen")
    assert not lm.scored_end


def test_a_layer_without_one_attention_is_left_whole() -> None:
    lm = make("LlamaConfig", {})
    use_layout(lm, "shared")
    layer = decoder_layers(lm.backbone)[-1]
    assert not end_at_scored(lm, lambda: None)
    assert "forward" not in layer.__dict__


def test_a_cpu_computes_the_whole_layer() -> None:
    """Its products may round otherwise for fewer rows, and caches that are there hold its numbers."""
    lm = make("LlamaConfig", {})
    choose_layout(lm)
    assert (lm.attention, lm.scored_end) == ("segments", False)
    assert "forward" not in decoder_layers(lm.backbone)[-1].__dict__
