"""Dockerfile, SkyPilot file and launchers: what they run is dpoeng as it is. No registry, cloud or GPU is asked."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
import yaml
from dpoeng_testing import pair_rows, write_jsonl
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from dpoeng.cli.main import dpoeng
from dpoeng.engine.checks.driver import TESTED_CUDA
from dpoeng.engine.config.fields import PrecomputeConfig
from dpoeng.engine.recipes.precompute import precompute_reference

ROOT = Path(__file__).resolve().parents[2]
INSTRUCTIONS = {"FROM", "RUN", "ENV", "COPY", "WORKDIR", "ENTRYPOINT", "CMD"}
RECORDER = """#!{python} -IS
import json, sys
with open({log!r}, "a") as log:
    log.write(json.dumps([sys.argv[0].rpartition("/")[2], *sys.argv[1:]]) + "\\n")
"""


def parse(words: list[str]) -> None:
    """Fails unless dpoeng takes these words, which begin with its name; runs nothing."""
    assert words[0] == "dpoeng", words
    command: click.Command = dpoeng
    rest = words[1:]
    while isinstance(command, click.Group) and rest:
        found = command.get_command(click.Context(command), rest[0])
        assert found is not None, words
        command, rest = found, rest[1:]
    command.make_context("dpoeng", rest)


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions with their arguments; continued lines are joined."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#")).replace("\\\n", " ").splitlines()
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines if line.strip()]


def test_the_dockerfile_is_whole() -> None:
    found = instructions()
    assert {name for name, _ in found} <= INSTRUCTIONS
    assert found[0] == ("FROM", f"nvidia/cuda:{TESTED_CUDA}.1-base-ubuntu24.04")
    for name, rest in found:
        if name == "RUN":
            assert subprocess.run(["bash", "-n", "-c", rest], check=False).returncode == 0, rest
        elif name == "COPY":
            source = rest.split()[0]
            assert (ROOT / source).exists(), source
    requirement = next(
        Requirement(word) for _, rest in found for word in rest.split() if re.fullmatch(r"torch[^/]*", word)
    )
    assert not requirement.specifier, "constraints.txt decides on torch's version"
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert not set(ignored) & {"src", "engine", "cli", "cache", "kernels", "bench", "constraints.txt", "pyproject.toml"}


def test_the_image_runs_valid_commands() -> None:
    words = dict(instructions())
    parse([*json.loads(words["ENTRYPOINT"])])
    assert json.loads(words["CMD"]) == ["--help"]
    files = [ROOT / "Dockerfile", ROOT / "docs" / "requirements.md"]
    lines = [line for file in files for line in re.findall(r"docker run .*", file.read_text(encoding="utf-8"))]
    assert len(lines) == 3
    for line in lines:
        typed = shlex.split(line)
        parse(typed[typed.index("dpoeng") :])


@pytest.fixture
def task() -> dict[str, object]:
    loaded = yaml.safe_load((ROOT / "examples" / "skypilot" / "dpo.yaml").read_text(encoding="utf-8"))
    assert isinstance(loaded, dict)
    return loaded


def test_the_skypilot_file_has_the_fields_of_a_task(task: dict[str, object]) -> None:
    """https://docs.skypilot.co/en/latest/reference/yaml-spec.html"""
    assert set(task) == {"name", "resources", "workdir", "envs", "file_mounts", "setup", "run"}
    assert set(task["resources"]) == {"accelerators", "use_spot", "disk_size"}  # type: ignore[call-overload]
    for part in ("setup", "run"):
        assert subprocess.run(["bash", "-n", "-c", str(task[part])], check=False).returncode == 0


def test_the_skypilot_setup_makes_one_environment_with_a_python_that_is_new_enough(
    task: dict[str, object], tmp_path: Path
) -> None:
    programs = tmp_path / ".local" / "bin"
    programs.mkdir(parents=True)
    log = tmp_path / "calls"
    program = RECORDER.format(python=sys.executable, log=str(log))
    (tmp_path / "program").write_text(program)
    (tmp_path / "program").chmod(0o755)
    made = 'mkdir -p "${@: -1}/bin"; for name in pip dpoeng; do cp ~/program "${@: -1}/bin/$name"; done'
    (programs / "uv").write_text(f'#!/usr/bin/env bash\necho "[\\"uv\\", \\"$4\\"]" >> {log}\n{made}\n')
    (programs / "uv").chmod(0o755)
    for _ in range(2):  # `sky launch` on a machine that is there runs it again
        subprocess.run(["bash", "-c", str(task["setup"])], env={**os.environ, "HOME": str(tmp_path)}, check=True)
    calls = [json.loads(line) for line in log.read_text().splitlines()]
    assert [call[0] for call in calls] == ["uv", "pip", "dpoeng", "pip", "dpoeng"]
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert calls[0][1] in SpecifierSet(wanted)


def test_the_skypilot_job_runs_both_phases_and_keeps_them(task: dict[str, object], tmp_path: Path) -> None:
    """Its own script, with stand-ins for dpoeng and torchrun; what the bucket had comes back first."""
    home, kept = tmp_path / "home", tmp_path / "kept"
    programs = home / "dpoeng" / "bin"
    programs.mkdir(parents=True)
    (kept / "out").mkdir(parents=True)
    (kept / "out" / "checkpoint").write_text("of the run before")
    for name in ("dpoeng", "torchrun"):
        (programs / name).write_text(RECORDER.format(python=sys.executable, log=str(tmp_path / "calls")))
        (programs / name).chmod(0o755)
    envs = {**task["envs"], "KEPT": str(kept), "SKYPILOT_NUM_GPUS_PER_NODE": "2", "HOME": str(home)}  # type: ignore[dict-item]
    done = subprocess.run(["bash", "-c", str(task["run"])], env={**os.environ, **envs}, cwd=tmp_path, check=False)
    assert done.returncode == 0
    first, second = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    parse(first)
    assert second[:4] == ["torchrun", "--nproc-per-node", "2", "--no-python"]
    parse(second[4:])
    assert (home / "work" / "out" / "checkpoint").is_file()
    assert f"{home}/work/refcache" in first
    assert f"{home}/work/refcache" in second


@pytest.mark.slow  # four processes, each with torch
def test_torchrun_and_accelerate_both_start_it(tmp_path: Path, tiny_model: Path) -> None:
    pairs = write_jsonl(tmp_path / "pairs.jsonl", pair_rows(12))
    precompute_reference(PrecomputeConfig(pairs=(pairs,), model=str(tiny_model), cache=tmp_path / "refcache"))
    text = (ROOT / "docs" / "several-gpus.md").read_text(encoding="utf-8")
    lines = re.findall(r"^(?:torchrun --nproc-per-node 2|accelerate) .*", text, re.MULTILINE)
    assert len(lines) == 2
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "dpoeng").write_text(f"#!{sys.executable}\nfrom dpoeng.cli.main import main\nmain()\n")
    (programs / "dpoeng").chmod(0o755)
    path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    found = []
    for number, line in enumerate(lines):
        more = ["--max-steps", "2", "--eval-share", "0", "--output-dir", f"out{number}"]
        subprocess.run([*shlex.split(line), *more], cwd=tmp_path, env={**os.environ, "PATH": path}, check=True)
        record = json.loads((tmp_path / f"out{number}" / "run.json").read_text())
        assert record["processes"] == 2
        found.append((tmp_path / f"out{number}" / "adapter" / "adapter_model.safetensors").read_bytes())
    assert found[0] == found[1]
