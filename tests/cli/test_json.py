"""`--json`: of every command that ends in a table, one JSON value on stdout and nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from dpoeng_testing import pair_rows, write_jsonl

from dpoeng.cli.main import dpoeng, main
from dpoeng.cli.tables import as_data

WITHOUT = {
    "config schema": "prints JSON anyway",
    "demo": "shows other commands",
}
"""Commands without --json, and why."""


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Pairs, a model, a cache of them and a run, with fixed names."""
    root = tmp_path_factory.mktemp("desk")
    write_jsonl(root / "pairs.jsonl", [*pair_rows(12), {"prompt": "p", "chosen": "same", "rejected": "same"}])
    (root / "model").symlink_to(tiny_model)
    (root / "rule.py").write_text("def score(prompt, answer):\n    return len(answer)\n")
    (root / "train.py").write_text("DPOTrainer('m', args=DPOConfig(beta=0.2, learning_rate=1e-5))")
    score = f"precompute-ref {root}/pairs.jsonl --model {root}/model --cache {root}/c --max-reject-share 0.2"
    for command in (score, f"train --cache {root}/c --output-dir {root}/out --max-steps 2 --eval-share 0.3"):
        with pytest.raises(SystemExit) as stop:
            main(command.split())
        assert stop.value.code == 0
    return root


Check = Callable[[Any], bool]

# command line -> what must be in its answer
CASES: dict[str, Check] = {
    "precompute-ref pairs.jsonl --model model --cache c --max-reject-share 0.2": lambda v: (
        (v["pairs"], v["computed"], v["reused"]) == (12, 0, 12)
        and v["lengths"]["prompt"]["count"] == 12
        and [row["reason"] for row in v["rejected"]] == ["same-response"]
    ),
    "train --cache c --output-dir out --max-steps 2 --eval-share 0.3": lambda v: (
        v["already_complete"] and v["steps"] == 2 and v["result"] == "out/adapter" and v["evaluation"]["pairs"] > 0
    ),
    "sweep --cache c --output-dir sweep --vary beta=0.1,0.2 --max-steps 1 --eval-share 0.3": lambda v: (
        [run["state"] for run in v["runs"]] == ["complete"] * 2 and v["rank_by"] == "rewards/accuracies"
    ),
    "eval --cache c --adapter out": lambda v: v["pairs"] > 0 and v["metrics"],
    "compare out --count 1 --max-new-tokens 2": lambda v: {*v[0]} >= {"prompt", "before", "after"},
    "judge out --judge rule.py:score --count 2 --max-new-tokens 2": lambda v: (
        v["prompts"] == 2 and v["wins"] + v["losses"] + v["ties"] == 2 and v["folder"] == "out/judge"
    ),
    "round out --judge rule.py:score --reference first --max-new-tokens 3 --keep-cut --max-steps 1": lambda v: (
        [one["number"] for one in v] == [1] and v[0]["pairs"] > 0 and v[0]["result"].endswith("run/adapter")
    ),
    "check pairs.jsonl --max-reject-share 0.2": lambda v: v["pairs"] == 12 and v["findings"],
    "check --loss-type sigmoid": lambda v: v == [{"loss": "sigmoid", "ok": True, "seen": [], "error": None}],
    "doctor": lambda v: {check["status"] for check in v["checks"]} <= {"ok", "info", "warning", "error"},
    "merge out --into merged": lambda v: v["merged"] > 0 and v["folder"] == "merged",
    "export out --to vllm --into served": lambda v: v["rank"] == 16 and v["check"]["mean_diff"] < 1e-4,
    "quantize model --into small": lambda v: 0 < v["after"] < v["before"],
    "init pairs.jsonl --output new.yaml": lambda v: v["output"] == "new.yaml" and "pairs" in v["fields"],
    "migrate train.py --output made.yaml": lambda v: v["lines"]["beta"]["value"] == 0.2,
    "config show --beta 0.3": lambda v: v["train"]["beta"] == {"value": 0.3, "origin": "--beta"},
    "watch out": lambda v: v["state"] == "complete" and v["step"] == v["total_steps"] == 2,
    "report out": lambda v: (
        v
        == {
            "page": "out/report.html",
            "runs": [{"folder": "out", "steps": 2, "complete": True}],
        }
    ),
    "cache info c": lambda v: v["references"][0]["rows"] == 12,
    "cache verify c --recompute 2": lambda v: v["ok"] and v["recomputed"]["pairs"] == 2,
    "cache stats c": lambda v: v["pairs"] == 12,
    "cache diff c c": lambda v: v["old"] == v["new"] and v["changes"] == [],
    "cache explain c": lambda v: v["nearest"] is None,
    "cache export c rows.jsonl": lambda v: v["rows"] == 12,
    "cache import rows.jsonl --model model --cache d": lambda v: (v["rows"], v["added"]) == (12, 12),
    "cache merge e c": lambda v: v[0]["source"] == "c" and len(v[0]["views"]) == 1,
    "cache gc c": lambda v: v["removed"] is False,
    "select --cache c --output some --rule large --count 4": lambda v: v["rows"] == 4 and v["rows_before"] == 12,
    "bench checks": lambda v: all(check["ok"] is (check["value"] <= check["limit"]) for check in v),
    "bench cache --pairs 200 --weight-bytes 100000": lambda v: v[0]["kind"] == "cache",
    "bench step --model model --batch-size 1 --prompt 8 --chosen 8 --rejected 8": lambda v: v[0]["kind"] == "step",
    "plan --model model --gpu 24gb --max-length 64 --no-compare": lambda v: v["cards"][0]["fits"] is True,
    "bench offload --model model --pairs 2 --tokens 4 --steps 1 --record steps.jsonl": lambda v: (
        v[0]["kind"] == "offload"
    ),
    "bench phases --repeats 1 --steps 1 --layers 1 --width 64 --batch-size 1": lambda v: v[0]["kind"] == "phases",
}
SLOW = {"bench", "plan", "doctor", "quantize", "sweep"}
# Their --json is the one of the commands above, and they take minutes.
TOO_LONG = {f"bench {name}" for name in ("memory", "compare", "kernels", "sharing", "quality", "scale")}
ELSEWHERE = {"push"}  # tests/recipes/test_hub.py has a hub for it


def leaves(group: click.Group, path: str = "") -> dict[str, click.Command]:
    found: dict[str, click.Command] = {}
    for name in group.list_commands(click.Context(group)):
        command = group.get_command(click.Context(group), name)
        assert command is not None
        found |= leaves(command, f"{name} ") if isinstance(command, click.Group) else {path + name: command}
    return found


def test_every_command_has_it_and_is_tried() -> None:
    for name, command in leaves(dpoeng).items():
        option = next((one for one in command.params if "--json" in one.opts), None)
        assert (option is None) == (name in WITHOUT), name
        tried = any(case == name or case.startswith(f"{name} ") for case in CASES)
        assert tried or name in WITHOUT or name in TOO_LONG | ELSEWHERE, name
        if option is not None:
            assert isinstance(option, click.Option)
            assert option.is_flag, name


@pytest.mark.parametrize(
    "line", [pytest.param(case, marks=[pytest.mark.slow] if case.split()[0] in SLOW else []) for case in CASES]
)
def test_stdout_is_one_json_value(
    desk: Path, line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(desk)
    with pytest.raises(SystemExit) as stop:
        main([*line.split(), "--json"])
    said = capsys.readouterr()
    assert stop.value.code == 0 or line == "doctor", said.err

    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    value = json.loads(said.out, parse_constant=no_constant)
    assert CASES[line](value), said.out[:3000]


def test_the_exit_status_does_not_depend_on_it(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a damaged cache, and of references that differ; errors stand on stderr, and stdout is empty."""
    for words in ("cache info nowhere", "train --cache nowhere", "report nowhere"):
        found = []
        for more in ([], ["--json"]):
            with pytest.raises(SystemExit) as stop:
                main([*words.split(), *more])
            said = capsys.readouterr()
            assert (said.out, "error: " in said.err) == ("", True)
            found.append(stop.value.code)
        assert found[0] == found[1] != 0


@dataclass
class Found:
    path: Path
    values: dict[str, float]


def test_values_as_data() -> None:
    found = Found(Path("a/b"), {"x": math.nan, "y": 0.5})
    assert as_data([found, (1, True, None), {2}]) == [
        {"path": "a/b", "values": {"x": None, "y": 0.5}},
        [1, True, None],
        [2],
    ]
    assert as_data({"array": np.array([1.5, math.inf]), "count": np.int64(3)}) == {"array": [1.5, None], "count": 3}
    with pytest.raises(TypeError, match="object has no form"):
        as_data(object())
