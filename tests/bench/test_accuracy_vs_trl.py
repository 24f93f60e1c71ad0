"""`bench/studies/accuracy_vs_trl`: its arithmetic by hand; and (with TRL) the whole on a tiny model."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from dpoeng_testing import pair_rows, write_jsonl
from rich.console import Console

from dpoeng.bench.studies import accuracy_vs_trl as bench


def _values(rewards: list[float], prefers: list[float]) -> bench.Values:
    margins = np.array(rewards)
    return {
        "rewards/accuracies": (margins > 0).astype(np.float64),
        "rewards/margins": margins,
        "prefers chosen": np.array(prefers),
    }


def test_means_differences_and_verdicts_by_hand() -> None:
    """Four prompts; the programs disagree on the last pair alone."""
    found = bench.summarise(
        np.array([1.0, -1.0, -1.0, 0.0]),
        {
            "dpoeng": _values([0.5, 0.5, -0.5, 0.5], [1, 1, 0, 1]),
            "trl adapter off": _values([0.5, 0.5, -0.5, -0.5], [1, 1, 0, 1]),
        },
        [b"a", b"b", b"c", b"d"],
        np.array([1.0, -1.0, 1.0, -1.0]),
    )
    assert found["held_out_pairs"] == 4
    assert found["before"]["prefers chosen"]["mean"] == 0.25
    assert found["after"]["dpoeng"]["rewards/accuracies"]["mean"] == 0.75
    assert found["after"]["trl adapter off"]["rewards/margins"]["mean"] == 0.0
    assert found["difference"]["rewards/accuracies"]["mean"] == 0.25
    assert found["difference"]["rewards/margins"]["mean"] == 0.25
    assert found["difference"]["prefers chosen"] == {"mean": 0.0, "interval": (0.0, 0.0)}
    low, high = found["difference"]["rewards/accuracies"]["interval"]
    assert -0.5 < low < 0.0 < high <= 1.0  # of 4 pairs: a bootstrap would say that it is no less than 0
    assert found["same_verdict"] == 0.75


def test_a_missing_peer_is_an_error_that_says_so(tmp_path: Path, tiny_model: Path) -> None:
    pairs = write_jsonl(tmp_path / "pairs.jsonl", pair_rows(8))
    nowhere = str(tmp_path / "nowhere")
    command = ["--model", str(tiny_model), "--pairs", str(pairs), "--peer-python", nowhere]
    command += ["--work", str(tmp_path / "work")]
    done = CliRunner().invoke(bench.main, command)
    assert done.exit_code == 1
    assert "TRL is not installed" in done.output


@pytest.mark.peers
@pytest.mark.timeout(900)
@pytest.mark.parametrize("quantization", ["none", "8bit"])
def test_both_programs_learn_the_same(tmp_path: Path, tiny_model: Path, quantization: str) -> None:
    """In float32 the adapters give the same margins; over 8 bits TRL keeps its LoRA in bfloat16, and they are near."""
    pairs = write_jsonl(tmp_path / "pairs.jsonl", pair_rows(24))
    kept = tmp_path / "kept.jsonl"
    command = (
        f"--model {tiny_model} --pairs {pairs} --work {tmp_path / 'work'} --quantization {quantization} "
        f"--learning-rate 5e-3 --record {kept}"
    )
    done = CliRunner().invoke(bench.main, command.split(), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    record = json.loads(kept.read_text())
    assert record["train_pairs"] + record["held_out_pairs"] == 24
    assert record["steps"] == record["train_pairs"] // 4
    near = 1e-4 if quantization == "none" else 0.1
    margin = record["after"]["dpoeng"]["rewards/margins"]["mean"]
    assert margin > 0.01, "it has learnt something"
    assert abs(record["difference"]["rewards/margins"]["mean"]) < near * margin
    assert record["loss_difference"] < near
    shown = io.StringIO()
    Console(width=160, file=shown).print(bench.table(record))
    assert "dpoeng less TRL" in shown.getvalue()
