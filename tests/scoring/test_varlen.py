"""FlashAttention over texts of different lengths: the texts, and the numbers, with torch's own operator around them.

The operator's kernel is for GPUs. Here plain arithmetic takes its place behind the same operator, forward and backward,
so that what dpoeng hands it (offsets, gathered keys, windows, grouped heads) is proven; the kernel itself is PyTorch's.
"""

from __future__ import annotations

import pytest
import torch
from families import SHARED_FAMILIES, make, own_logps, some_groups
from plain_varlen import use_plain_arithmetic

from dpoeng.cache.errors import UserError
from dpoeng.engine.scoring.attention import use_layout
from dpoeng.engine.scoring.choose_layout import choose_layout, ways_to_attend
from dpoeng.engine.scoring.forward import score_groups
from dpoeng.engine.scoring.layout import GroupSpan
from dpoeng.engine.scoring.varlen import texts

pytest.importorskip("torch.nn.attention.varlen", reason="not in the oldest torch that is accepted")


@pytest.fixture(autouse=True, scope="module")
def _arithmetic_for_the_kernel() -> None:
    use_plain_arithmetic()


def test_the_texts_of_a_row() -> None:
    """[prompt | first branch] as it lies there, then the prompt's keys once more for each further branch."""
    row = texts([GroupSpan(0, 2, ((2, 3), (3, 5))), GroupSpan(5, 6, ((6, 7),))], torch.device("cpu"))
    assert row.query_offsets.tolist() == [0, 3, 5, 7]
    assert row.key_offsets.tolist() == [0, 3, 7, 9]
    assert row.key_rows is not None
    assert row.key_rows.tolist() == [0, 1, 2, 0, 1, 3, 4, 5, 6]
    assert (row.longest_query, row.longest_key) == (3, 4)


def test_rows_without_a_shared_prompt_are_their_own_keys() -> None:
    row = texts([GroupSpan(0, 0, ((0, 4),)), GroupSpan(4, 6, ((6, 9),))], torch.device("cpu"))
    assert row.key_rows is None
    assert row.query_offsets.tolist() == row.key_offsets.tolist() == [0, 4, 9]


@pytest.mark.parametrize("name", ["LlamaConfig", "MistralConfig", "Gemma3TextConfig", "Qwen3Config", "GPT2Config"])
def test_varlen_equals_separate_forwards(name: str) -> None:
    lm = make(name, SHARED_FAMILIES[name])
    choose_layout(lm, "shared", "varlen")
    assert (lm.layout, lm.attention) == ("shared", "varlen")
    assert lm.layout_reason.endswith("attention: varlen")
    with torch.inference_mode():
        scored, _ = score_groups(lm, some_groups())
        truth = own_logps(lm, some_groups())
    torch.testing.assert_close(scored.double(), truth, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["LlamaConfig", "MistralConfig"])
def test_gradients_equal_those_of_segments(name: str) -> None:
    gradients = []
    for way in ("segments", "varlen"):
        lm = make(name, SHARED_FAMILIES[name], torch.float64)
        weights = [p.requires_grad_() for n, p in lm.base.named_parameters() if "_proj" in n]
        use_layout(lm, "shared")
        lm.attention = way  # type: ignore[assignment]
        scored, _ = score_groups(lm, some_groups())
        (scored * torch.arange(1, len(scored) + 1)).sum().backward()
        gradients.append([weight.grad for weight in weights])
    assert len(gradients[0]) >= 14
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-6)
        assert float(ours.abs().max()) > 0


@pytest.mark.parametrize(("name", "lacks"), [("Gemma2Config", "soft-capped"), ("GptOssConfig", "sinks")])
def test_what_the_kernel_does_not_have(name: str, lacks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for it is refused; left to itself dpoeng goes segment by segment, and says why."""
    lm = make(name, SHARED_FAMILIES[name])
    with pytest.raises(UserError) as caught:
        choose_layout(lm, "auto", "varlen")
    assert caught.value.code == "attention-unsupported"
    assert lacks in str(caught.value.found)
    monkeypatch.setattr("dpoeng.engine.scoring.choose_layout.ways_to_attend", lambda *_: ("varlen", "segments"))
    choose_layout(lm)
    assert (lm.layout, lm.attention) == ("shared", "segments")
    assert lacks in lm.layout_reason


def test_which_ways_are_tried() -> None:
    half, single = torch.bfloat16, torch.float32
    assert ways_to_attend("auto", "cuda", half) == ("varlen", "segments")
    assert ways_to_attend("auto", "cuda", single) == ("segments",)  # the kernel takes 16 bits only
    assert ways_to_attend("auto", "cpu", half) == ("segments",)
    assert ways_to_attend("segments", "cuda", half) == ("segments",)
