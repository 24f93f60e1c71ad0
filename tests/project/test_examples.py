"""examples/sft_then_dpo.sh: an SFT adapter, then DPO from it in 8 bits in the three ways, each loaded elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from dpoeng_testing import pair_rows, write_jsonl

ROOT = Path(__file__).resolve().parents[2]
WAYS = ("stack", "continue", "merged")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("sft-then-dpo")
    pairs = write_jsonl(folder / "pairs.jsonl", pair_rows(16))
    done = subprocess.run(
        ["bash", str(ROOT / "examples" / "sft_then_dpo.sh"), str(tiny_model), str(pairs), str(folder / "out")],
        env={
            **os.environ,
            "PYTHON": sys.executable,
            "DPOENG": f"{Path(sys.executable).parent / 'dpoeng'}",
            "STEPS": "6",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return folder / "out"


@pytest.mark.parametrize("way", WAYS)
def test_the_policy_starts_at_its_reference_and_learns(result: Path, way: str) -> None:
    run = json.loads((result / way / "run.json").read_text())
    assert run["parity"]["max_diff"] < 1e-3
    lines = [json.loads(line) for line in (result / way / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "grad_norm" in line]
    assert len(steps) == 6
    assert steps[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert steps[-1]["rewards/margins"] > 0


@pytest.mark.parametrize("way", WAYS)
def test_the_result_loads_with_transformers_and_peft(
    result: Path, tiny_model: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(result / way)
    names: dict[str, Any] = {}
    exec("\n".join(json.loads(Path("run.json").read_text())["load"]), names)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    ids = torch.arange(30)[None]
    with torch.inference_mode():
        trained, untrained = (model.eval()(ids).logits.float() for model in (names["model"], base))
    assert float((trained - untrained).abs().max()) > 1e-3


def test_the_merged_checkpoint_is_plain(result: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(result / "stack-merged")
    assert getattr(model.config, "quantization_config", None) is None
