"""A simulated step attends as a GPU would: varlen FlashAttention, its buffers, and a last layer of scored positions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from model_fields import fields
from plain_varlen import use_plain_arithmetic

from dpoeng.bench.memory import training_run
from dpoeng.engine.config.fields import TrainConfig
from dpoeng.engine.memory import simulate
from dpoeng.engine.memory.simulate import Pair, Setup, build, trace_forward, trace_step
from dpoeng.engine.memory.stand_ins import handlers, kernels_of
from dpoeng.engine.memory.tracker import MemoryTracker
from dpoeng.engine.models.loading import load_model
from dpoeng.engine.models.sources import find_model
from dpoeng.engine.scoring.attention import AttentionPlan, shared_prompt_attention, use_layout
from dpoeng.engine.scoring.forward import score_groups
from dpoeng.engine.scoring.layout import pack, row_group
from dpoeng.engine.scoring.scored_end import end_at_scored
from dpoeng.engine.training.step import train_step

pytest.importorskip("torch.nn.attention.varlen", reason="not in the oldest torch that is accepted")

HEADS, GROUPS, SIZE, P, C, R = 4, 2, 16, 40, 30, 20


def setup_of(model: dict[str, Any], dtype: torch.dtype = torch.bfloat16, **settings: Any) -> Setup:
    config = TrainConfig.model_validate({"gradient_checkpointing": True, "lora_r": 2, **settings})
    return Setup(model=model, dtype=dtype, quantization="none", config=config)


@pytest.mark.parametrize("deterministic", [False, True])
def test_one_attention_counted_by_hand(deterministic: bool) -> None:
    """[prompt | chosen] and [prompt | rejected]: the prompt's keys once more for the second."""
    row = pack([row_group(Pair(P, C, R).scored())])
    tokens, keys = P + C + R, P + C + P + R
    q, k, v = (
        torch.empty(1, n, tokens, SIZE, dtype=torch.bfloat16, device="meta", requires_grad=True)
        for n in (HEADS, GROUPS, GROUPS)
    )
    tracker = MemoryTracker("meta", handlers=handlers("cuda", deterministic=deterministic))
    tracker.hold([q, k, v], "inputs")
    inputs = tracker.live_bytes
    with kernels_of("cuda"), tracker:
        out, _ = shared_prompt_attention(
            torch.nn.Identity(), q, k, v, None, dpoeng_plan=AttentionPlan(row.groups, "varlen")
        )
        kept = tracker.live_bytes - inputs
        # bfloat16: the output, queries side by side, gathered keys and values; float32 sums; offsets and rows; a state.
        queries = 2 * tokens * HEADS * SIZE
        gathered = 2 * 2 * keys * GROUPS * SIZE
        assert kept == 2 * queries + gathered + 4 * HEADS * tokens + (2 * 3 * 4 + 8 * keys) + 16
        pull = torch.empty_like(out)
        torch.autograd.backward(out, pull)
    rows, sums = tokens + 2 * 128, -(-160 // (2 * HEADS)) if deterministic else 1
    wide = 32  # a head of 16 is summed in 32 columns
    inside = 4 * rows * HEADS * (sums * wide + 1) + 2 * 2 * keys * HEADS * SIZE
    results = queries + gathered
    at = next(i for i, n in enumerate(tracker.samples) if n == max(tracker.samples))
    assert tracker.phases[at] == "backward"
    upstream = queries + 4 * HEADS * tokens + 16  # the gradient of the output; autograd's zeros for the other results
    assert max(tracker.samples) == inputs + kept + upstream + inside + results


@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_simulated_peak_is_that_of_real_tensors(tmp_path: Path, checkpointing: bool) -> None:
    """The same step through varlen with a short last layer, on real tensors with a stand-in for the kernel."""
    from transformers import AutoConfig, AutoModelForCausalLM

    use_plain_arithmetic()
    torch.manual_seed(0)
    small = fields("qwen2", vocab_size=64)  # memory inside the head's kernel is not seen on real tensors
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**small), dtype=torch.float32).save_pretrained(tmp_path)
    config = TrainConfig.model_validate(
        {
            "gradient_checkpointing": checkpointing,
            "attention": "varlen",
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 1,
        }
    )
    pairs = [Pair(64, 96, 96), Pair(64, 40, 70)]
    model = json.loads((tmp_path / "config.json").read_text())
    setup = Setup(model, torch.float32, "none", config, kernels="cpu", accumulates=False)
    assert build(setup).scored_end
    predicted = trace_step(setup, pairs).peak().n_bytes

    lm = load_model(
        find_model(str(tmp_path)), quantization="none", dtype="float32", device=torch.device("cpu"), tokenizer=False
    )
    use_layout(lm, "shared")
    lm.attention = "varlen"
    groups = [row_group(pair.scored()) for pair in pairs]
    assert end_at_scored(lm, lambda: score_groups(lm, groups))
    with training_run(lm, [pair.scored() for pair in pairs], config) as run:
        train_step(run, 0)
        tracker = MemoryTracker("cpu")
        states = [value for state in run.optimizer.state.values() for value in state.values()]
        tracker.hold([*lm.model.parameters(), *lm.model.buffers(), *states], "held")
        with tracker:
            train_step(run, 1)
        measured = tracker.peak().n_bytes
    assert predicted == pytest.approx(measured, rel=0.02)


def test_the_last_layer_takes_less_where_few_positions_are_scored() -> None:
    model = fields("llama", hidden_size=64, intermediate_size=512)
    setup = setup_of(model, gradient_checkpointing=False)
    lm = build(setup)
    assert (lm.attention, lm.scored_end) == ("varlen", True)
    long_prompt = [Pair(200, 8, 8)]
    narrow = trace_step(setup, long_prompt).peak().n_bytes
    whole = trace_step(setup_of(model, gradient_checkpointing=False, attention="segments"), long_prompt).peak().n_bytes
    # The MLP of the last layer keeps two inputs of 512 columns for each position that it computes.
    assert whole - narrow > 2 * 2 * 512 * 180


@pytest.mark.parametrize(
    ("model", "dtype", "settings", "expected"),
    [
        (fields("llama"), torch.bfloat16, {}, "varlen"),
        (fields("llama"), torch.float32, {}, "segments"),  # the kernel multiplies 16 bits
        (fields("llama"), torch.bfloat16, {"attention": "segments"}, "segments"),
        (fields("gemma2"), torch.bfloat16, {}, "segments"),  # soft-capped scores
        (fields("qwen3", head_dim=320), torch.bfloat16, {}, "segments"),
        (fields("qwen3", head_dim=20), torch.bfloat16, {}, "segments"),
        (fields("qwen3", head_dim=256), torch.bfloat16, {}, "varlen"),
    ],
)
def test_it_attends_as_a_card_would(
    model: dict[str, Any], dtype: torch.dtype, settings: dict[str, Any], expected: str
) -> None:
    setup = setup_of(model, dtype, **settings)
    assert build(setup).attention == expected
    assert trace_forward(setup, [Pair(5, 4, 3)], policy=False).peak().n_bytes > 0


def test_a_card_before_ampere_has_neither_flash_attention_nor_the_fused_head() -> None:
    setup = setup_of(fields("llama", vocab_size=20000), torch.float16)
    old = replace(setup, ampere=False)
    assert (build(setup).attention, build(old).attention) == ("varlen", "segments")
    new_peak, old_peak = (trace_forward(some, [Pair(5, 400, 300)], policy=False).peak() for some in (setup, old))
    # The rows of both responses in one chunk of float32 logits.
    assert old_peak.n_bytes - new_peak.n_bytes > 0.9 * 4 * 700 * 20000


def test_layer_by_layer_it_ends_short_too() -> None:
    lm = build(replace(setup_of(fields("llama")), by_layer=True))
    assert lm.by_layer is not None
    assert (lm.attention, lm.scored_end) == ("varlen", True)


def test_the_attention_is_determined_once_for_all_depths(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = setup_of(fields("llama", num_hidden_layers=6))
    monkeypatch.setattr(simulate, "_chosen", {})
    probes = []
    score = simulate.score_groups
    monkeypatch.setattr(simulate, "score_groups", lambda lm, groups: probes.append(lm) or score(lm, groups))
    built = [build(setup.with_layers(range(depth))) for depth in (3, 4, 6)]
    assert len({id(lm) for lm in probes}) == 1
    assert {(lm.attention, lm.scored_end) for lm in built} == {("varlen", True)}
    assert list(simulate._chosen.values()) == [("varlen", ("self_attn", "o_proj"))]
    float32 = build(replace(setup, dtype=torch.float32).with_layers(range(3)))
    assert (float32.attention, float32.scored_end) == ("segments", False)
    in_segments = build(setup_of(fields("llama", num_hidden_layers=6), attention="segments").with_layers(range(3)))
    assert (in_segments.attention, in_segments.scored_end) == ("segments", False)


def test_layers_of_two_kinds_end_in_two_ways() -> None:
    """A model of one recurrent layer has no attention whose result it could use again; four layers end in one."""
    from dpoeng.bench.studies.tiny_models import tiny_config

    model = tiny_config("qwen3_5_text").to_dict()
    kinds = model["layer_types"]
    setup = setup_of(model)
    ends = {depth: build(replace(setup, chosen=tuple(range(depth)))).scored_end for depth in range(1, len(kinds) + 1)}
    assert ends == {depth: kind == "full_attention" for depth, kind in enumerate(kinds, 1)}
    assert set(ends.values()) == {True, False}
