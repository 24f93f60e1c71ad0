"""`make gpu-evidence`, tried on a CPU with tiny sizes: every stage runs, and one that fails hides no other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from dpoeng.bench.evidence import __main__ as evidence
from dpoeng.bench.evidence import stages
from dpoeng.bench.evidence.stages import STAGES, Place

HERE = Place(torch.device("cpu"), small=True)


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_sees_what_it_should(name: str) -> None:
    found = STAGES[name][0](HERE)
    assert found["ok"], found
    json.dumps(found, allow_nan=False)
    assert len(found) > 1


def test_a_wrong_kernel_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from dpoeng.engine.models.fused import install
    from dpoeng.kernels import token_logps

    right = token_logps.token_logps
    monkeypatch.setattr(token_logps, "token_logps", lambda *args, **named: right(*args, **named) * 1.2)
    assert not stages.head(HERE)["ok"]
    monkeypatch.setattr(install, "gated", lambda gate, up: gate * up)
    assert stages.layers(HERE)["disagrees"] == "a gated activation differs from PyTorch's on this GPU"


def test_errors_and_timeouts_are_a_line_and_the_rest_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(command: list[str], **_: Any) -> Any:
        assert "--small" in command, "a CPU would take hours for the sizes of a GPU"
        name = command[command.index("--stage") + 1]
        if name == "head":
            raise evidence.subprocess.TimeoutExpired(command, 120)
        ran = "false" if name == "suite" else "true"
        status, out = (1, "") if name == "rows" else (0, f'noise\n{{"ok": true, "seen": 0.123456, "ran": {ran}}}\n')
        return evidence.subprocess.CompletedProcess(command, status, out, "CUDA error: an illegal memory access")

    monkeypatch.setattr(evidence.subprocess, "run", answer)
    monkeypatch.setattr(evidence, "stamp", lambda *_: {"device": "cpu", "settings": {"small": True, "device": "cpu"},
                                                       "versions": {}, "commit": "c+", "date": "d"})  # fmt: skip
    done = CliRunner().invoke(evidence.main, ["--output", str(tmp_path), "--device", "cpu"])
    assert done.exit_code == 1
    lines = [json.loads(line) for line in (tmp_path / "evidence.jsonl").read_text().splitlines()]
    by_stage = {line["stage"]: line for line in lines[1:]}
    assert list(by_stage) == list(STAGES)
    assert by_stage["head"]["ended"] == "not done after 120 s"
    assert by_stage["rows"]["stderr"] == ["CUDA error: an illegal memory access"]
    assert [name for name, line in by_stage.items() if not line["ok"]] == ["head", "rows"]
    page = (tmp_path / "evidence.md").read_text()
    assert "| rows | NO |" in page
    assert "| suite | not run |" in page
    assert "No GPU's kernel ran" in page
    assert "Commit c with uncommitted changes" in page
    assert '"seen": 0.1235' in page
    assert "figures mean nothing" in page
    again = CliRunner().invoke(evidence.main, ["--output", str(tmp_path)])
    assert "already exists" in again.output
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "evidence.md").write_text("mine")
    refused = CliRunner().invoke(evidence.main, ["--output", str(tmp_path / "other")])
    assert "already exists" in refused.output
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["evidence.md"]
