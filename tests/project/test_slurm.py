"""examples/slurm: their options are sbatch's, and what they run trains; a stand-in for srun starts it, no cluster."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from dpoeng_testing import pair_rows, write_jsonl

from dpoeng.cli.main import main

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "slurm"
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.sbatch"))

# Of sbatch(1), with the form of their values.
OPTIONS = {
    "job-name": r"[\w-]+",
    "nodes": r"\d+",
    "ntasks-per-node": r"\d+",
    "gpus-per-node": r"\d+",
    "cpus-per-task": r"\d+",
    "array": r"1-\d+",
    "time": r"\d\d:\d\d:\d\d",
    "signal": r"USR1@\d+",  # without B: it goes to the processes of srun, not to the script
    "requeue": "",
    "open-mode": "append",
    "output": r"%x-%[jA](-%a)?\.log",
}

SRUN = """#!/usr/bin/env bash
for ((i = 0; i < ${SLURM_NTASKS:-1}; i++)); do
    SLURM_PROCID=$i SLURM_LOCALID=$i "$@" || status=$?
done
exit "${status:-0}"
"""

RECORDER = """#!{python} -IS
import json, os, sys
ranks = {{name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR") if name in os.environ}}
with open("calls", "a") as log:
    log.write(json.dumps([os.path.basename(sys.argv[0]), sys.argv[1:], ranks]) + "\\n")
if sys.argv[1:2] == ["show"]:
    print("node7")
sys.exit(int(os.environ["STATUS"]) if "dpoeng" in sys.argv[0] else 0)
"""


def options_of(script: str) -> dict[str, str]:
    lines = (FOLDER / script).read_text(encoding="utf-8").splitlines()
    words = [line.removeprefix("#SBATCH --").partition("=") for line in lines if line.startswith("#SBATCH")]
    return {name: value for name, _, value in words}


def run_script(script: str, folder: Path, *, status: int = 0, **variables: str) -> tuple[int, list[Any]]:
    """The script as Slurm's batch shell runs it -> (its status, what it called)."""
    (folder / "bin").mkdir(exist_ok=True)
    for name in ("srun", "scontrol", "dpoeng"):
        program = folder / "bin" / name
        program.write_text(SRUN if name == "srun" else RECORDER.format(python=sys.executable))
        program.chmod(0o755)
    (folder / "calls").unlink(missing_ok=True)
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    given = {"SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_CPUS_PER_TASK": "8", "SLURM_NTASKS": "1"}
    environment = {**os.environ, **given, **variables, "PATH": path, "STATUS": str(status)}
    done = subprocess.run(["bash", str(FOLDER / script)], cwd=folder, env=environment, check=False)
    return done.returncode, [json.loads(line) for line in (folder / "calls").read_text().splitlines()]


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_options_are_those_of_sbatch(script: str) -> None:
    options = options_of(script)
    assert {"signal", "requeue", "open-mode", "time"} <= set(options)
    for name, value in options.items():
        assert re.fullmatch(OPTIONS[name], value), f"--{name}={value}"
    if "nodes" in options:  # a process a GPU
        assert options["ntasks-per-node"] == options["gpus-per-node"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_job_that_was_stopped_is_queued_again_and_no_other(script: str, tmp_path: Path) -> None:
    array = {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "4"} if "array" in script else {}
    for status, again in ((0, 0), (5, 0), (138, 1)):
        code, calls = run_script(script, tmp_path, status=status, **array)
        assert code == status
        assert sum(words == ["requeue", "42"] for _, words, _ in calls) == again


def test_each_process_gets_its_rank(tmp_path: Path) -> None:
    _, calls = run_script("train_several_nodes.sbatch", tmp_path, SLURM_NTASKS="3")
    ranks = [ranks for program, _, ranks in calls if program == "dpoeng"]
    assert ranks == [
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "3", "MASTER_ADDR": "node7"} for rank in range(3)
    ]


def test_a_job_of_the_array_that_is_submitted_again_alone_has_its_own_part(tmp_path: Path) -> None:
    assert options_of("precompute_array.sbatch")["array"] == "1-4"
    for count in ("4", "1"):  # sbatch --array=2
        array = {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": count}
        _, calls = run_script("precompute_array.sbatch", tmp_path, **array)
        assert calls[0][1][-2:] == ["--shard", "2/4"]


def test_the_array_and_then_the_training_run(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their very commands, one process each, over the whole array."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "pairs.jsonl", pair_rows(16))
    Path("sft-model").symlink_to(tiny_model)
    commands = []
    for task in ("1", "2", "3", "4"):
        array = {"SLURM_ARRAY_TASK_ID": task, "SLURM_ARRAY_TASK_COUNT": "4"}
        commands += run_script("precompute_array.sbatch", tmp_path, **array)[1]
    commands += run_script("train_one_node.sbatch", tmp_path)[1]
    for _, words, ranks in [call for call in commands if call[0] == "dpoeng"]:
        for name, value in ranks.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 0
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
