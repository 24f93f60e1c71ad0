"""The same bytes as before the move into wings: a cache and an adapter, against those of commit ef7649b.

Twice: by digests that were recorded from that commit on one machine, with the demo's model and pairs; and by running
that commit, where the git history has it, beside the code of today on a tiny model. Sums of float32 depend on the
processor and on the libraries that multiply, so recorded bytes are compared on the recorded machine only. On another
machine that test compares the recorded log-probs within rounding instead, and says so.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import golden_run
import pytest
from dpoeng_testing import pair_rows, write_jsonl

from dpoeng.cache.reader import View

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "ef7649b"
RECORD: dict[str, Any] = json.loads(Path(__file__).with_name("golden.json").read_text(encoding="utf-8"))
# Log-probs of whole responses, in nats: two processors differ by less than 1e-3 in sums near -150.
ROUNDING = 5e-3


def demo_pairs(folder: Path) -> Path:
    """The demo's first pairs, as many as the record was made of."""
    lines = (ROOT / "src/dpoeng/cli/demo_pairs.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    file = folder / "pairs.jsonl"
    file.write_text("".join(lines[: RECORD["pairs"]]), encoding="utf-8")
    return file


def sums(folder: Path) -> list[list[float]]:
    """Chosen and rejected log-prob of each pair in the cache, in nats."""
    view = View.open(folder / "cache", None)
    return [[view[row].chosen_sum, view[row].rejected_sum] for row in range(len(view))]


def test_the_record_is_complete() -> None:
    """On whatever machine: it says where, with what and from what its digests were made."""
    assert RECORD["commit"].startswith(COMMIT)
    made, here = RECORD["machine"], golden_run.machine()
    assert made.keys() == here.keys()
    assert made["threads"] == golden_run.THREADS
    assert all(made["processor"].values())
    assert made["flags"]
    assert made["versions"].keys() == here["versions"].keys()
    assert {Path(name).parts[0] for name in RECORD["digests"]} == {"cache", "out"}
    assert "out/adapter/adapter_model.safetensors" in RECORD["digests"]
    assert len(RECORD["sums"]) == RECORD["pairs"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_demos_cache_and_adapter_are_those_of_the_record(tmp_path: Path, demo_model: Path) -> None:
    found = golden_run.run(demo_model, demo_pairs(tmp_path), tmp_path, RECORD["options"])
    assert found.keys() - names_by_content(found) == RECORD["digests"].keys() - names_by_content(RECORD["digests"])
    for (chosen, rejected), before in zip(sums(tmp_path), RECORD["sums"], strict=True):
        assert [chosen, rejected] == pytest.approx(before, abs=ROUNDING)
    if golden_run.machine() == RECORD["machine"]:
        assert found == RECORD["digests"]
    else:  # other bits are right here; the test below still compares bytes with the old commit's
        assert len(found) == len(RECORD["digests"])


def names_by_content(digests: dict[str, str]) -> set[str]:
    """The files that are named by the hash of their bytes: on another machine these have other names."""
    return {name for name in digests if name.startswith("cache/objects/")}


def history_has_commit() -> bool:
    command = ["git", "cat-file", "-e", f"{COMMIT}^{{commit}}"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not history_has_commit(), reason=f"no {COMMIT} in this history (a shallow clone, or no clone)")
def test_both_phases_leave_the_bytes_of_the_old_commit(tmp_path: Path, tiny_model: Path) -> None:
    """Everywhere: the old commit's code and today's, on the same machine, model, pairs and threads."""
    code = tmp_path / "code"
    packed = subprocess.run(["git", "archive", COMMIT], cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=BytesIO(packed)) as archive:
        archive.extractall(code, filter="fully_trusted")  # the project's own files; its links lead within
    # Else an installed dpoeng, which has this file, would win over a folder without it.
    (code / ".typing" / "dpoeng" / "__init__.py").touch()
    pairs = write_jsonl(tmp_path / "pairs.jsonl", pair_rows(14))
    options = {"learning-rate": "2e-3", "max-steps": "2", "eval-share": "0.1", "lora-dropout": "0.1"}
    words = [str(tiny_model), str(pairs), str(tmp_path / "old"), *(f"{k}={v}" for k, v in options.items())]
    script = ROOT / "tests" / "support" / "golden_run.py"
    old = subprocess.Popen(
        [sys.executable, "-W", "ignore", str(script), *words],
        env={**os.environ, "PYTHONPATH": str(code / ".typing")},
        stdout=subprocess.PIPE,
        text=True,
    )
    new = golden_run.run(tiny_model, pairs, tmp_path / "new", options)
    printed, _ = old.communicate(timeout=600)
    assert old.returncode == 0, printed
    answer = json.loads(printed[printed.rindex("\n{") :])
    assert answer["code"] == str(code / ".typing" / "dpoeng"), "another dpoeng was run"
    assert answer["digests"] == new
    assert len(new) == 3
    config = json.loads((tmp_path / "new" / "out" / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["target_modules"] == sorted(config["target_modules"]), "in an order that no hash seed changes"
