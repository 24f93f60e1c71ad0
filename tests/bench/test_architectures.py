"""The study behind docs/models.md: some families here, all of them by the command."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from dpoeng.bench.studies import architectures
from dpoeng.bench.studies.architectures import OK, STAGES, Outcome, outcome_of, page, study, try_architecture
from dpoeng.bench.studies.tiny_models import model_types, save_tiny

# Other names of sizes, stacked experts, latent attention, recurrence, an indexer and padding, dropout
# by the layer's flag, masks of the model's own; the others are slow tests, and the command takes all of them.
FAMILIES = {
    "gpt2": "shared",
    "qwen3_moe": "shared",
    "deepseek_v3": "shared",
    "qwen3_5": "shared",
    "deepseek_v32": "separate",
    "opt": "shared",
    "stablelm": "separate",
}

MORE = (
    "bloom",
    "mpt",
    "gpt_neo",
    "olmo2",
    "mixtral",
    "falcon_h1",
    "recurrent_gemma",
    "granitemoe",
    "phimoe",
    "cohere2",
)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_family_goes_all_the_way(model_type: str) -> None:
    outcome = outcome_of(model_type)
    assert (outcome.kind, outcome.stages) == (FAMILIES[model_type], dict.fromkeys(STAGES, OK))
    assert outcome.difference is not None
    assert outcome.difference < 5e-5


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MORE)
def test_more_families_go_all_the_way(model_type: str) -> None:
    assert outcome_of(model_type).stages == dict.fromkeys(STAGES, OK)


def test_a_failed_stage_is_reported_and_the_others_continue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("no")

    monkeypatch.setattr(architectures, "_merge", fail)
    outcome = Outcome("llama")
    try_architecture("llama", tmp_path, outcome, save_tiny)
    assert outcome.kind == "failed"
    assert outcome.stages["merge"].startswith("ZeroDivisionError: no")
    assert outcome.stages["forecast"] == OK
    text = page([outcome])
    assert "| failed | 1 |" in text
    assert "| llama | shared | merge: ZeroDivisionError: no" in text


def test_an_architecture_that_hangs_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(model_type: str) -> Outcome:
        time.sleep(60 if model_type == "slow" else 0)
        return Outcome(model_type, "not made: quickly")

    monkeypatch.setattr(architectures, "outcome_of", wait)
    told: list[str] = []
    found = study(["slow", "quick"], limit_s=3, tell=lambda one: told.append(one.model_type))
    assert [one.prompt for one in found] == ["failed: no answer in 3 s", "not made: quickly"]
    assert told == ["slow", "quick"]


def test_every_causal_type_is_asked_for() -> None:
    assert {"llama", "gpt2", "qwen3_5", "deepseek_v4", "qwen3_vl"} < set(model_types())
    assert len(model_types()) > 150
