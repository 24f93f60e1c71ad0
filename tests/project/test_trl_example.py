"""The example for those who stay with TRL runs under the TRL that it names, and the page on its errors is true."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from dpoeng_testing import pair_rows, write_jsonl

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.peers


@pytest.mark.parametrize("with_adapter", [True, False])
def test_the_example_trains(tmp_path: Path, tiny_model: Path, sft_adapter: Path, with_adapter: bool) -> None:
    write_jsonl(tmp_path / "pairs.jsonl", pair_rows(24))
    command = [sys.executable, "-W", "ignore", str(ROOT / "examples" / "trl_dpo_1_16.py"), "--model", str(tiny_model)]
    command += ["--pairs", "pairs.jsonl", "--output-dir", "out", "--max-steps", "3"]
    command += ["--adapter", str(sft_adapter)] if with_adapter else []
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    states = sorted(tmp_path.glob("out/checkpoint-*/trainer_state.json"))
    first = json.loads(states[-1].read_text())["log_history"][0]
    # With its dropout switched off the policy starts at the reference, also where that is the SFT adapter.
    assert first["loss"] == pytest.approx(0.6931, abs=2e-4)


def test_the_three_calls_fail_as_the_document_says(tmp_path: Path) -> None:
    script = ROOT / "docs" / "trl_errors.py"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    shown = json.loads(done.stdout.splitlines()[-1])
    page = (ROOT / "docs" / "trl.md").read_text(encoding="utf-8")
    assert shown["trl"] == "1.16.0"
    for call in ("DPOConfig(evaluation_strategy)", "beta", "TrainingArguments"):
        message = shown[call].split(": ", 1)[1]
        assert message in page, message
    assert shown["DPOConfig"] == "accepted"
