"""examples/sft_then_dpo.sh: an SFT adapter, then DPO from it in 8 bits in the three ways, each loaded elsewhere."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from dpoeng_testing import pair_rows, write_jsonl

from dpoeng.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
WAYS = ("stack", "continue", "merged")

# Stands for python and dpoeng: writes down how it was called, so that the test does it in its own process, where torch
# and transformers are imported once.
RECORDER = """#!{python} -IS
import json, sys
with open({log!r}, "a") as log:
    log.write(json.dumps([*sys.argv, sys.stdin.read() if sys.argv[1:2] == ["-"] else ""]) + "\\n")
"""


def calls_of(script: str, arguments: list[str], work: Path) -> list[tuple[str, list[str], str]]:
    """What an example runs: the program (python or dpoeng), its arguments, its stdin."""
    log = work / "calls"
    for name in ("python", "dpoeng"):
        (work / name).write_text(RECORDER.format(python=sys.executable, log=str(log)))
        (work / name).chmod(0o755)
    subprocess.run(
        ["bash", str(ROOT / "examples" / script), *arguments],
        env={**os.environ, "PYTHON": str(work / "python"), "DPOENG": str(work / "dpoeng"), "STEPS": "6"},
        check=True,
    )
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [(Path(program).name, words, stdin) for program, *words, stdin in lines]


def perform(program: str, words: list[str], stdin: str, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sys, "argv", [program, *words] if program == "dpoeng" else words)
    if program == "dpoeng":
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 0, words
    elif words[0] == "-":
        exec(stdin, {"__name__": "__main__"})
    else:
        runpy.run_path(words[0], run_name="__main__")


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("sft-then-dpo")
    pairs = write_jsonl(folder / "pairs.jsonl", pair_rows(16))
    calls = calls_of("sft_then_dpo.sh", [str(tiny_model), str(pairs), str(folder / "out")], folder)
    assert [words[0] for program, words, _ in calls if program == "dpoeng"] == [
        "precompute-ref", "train", "train", "merge", "precompute-ref", "train",
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for call in calls:
            perform(*call, patch)
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
