"""Every command on rows that are no pairs: it works on the rows of the data set, or refuses the kind by its name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from dpoeng_testing import SENTENCES, pair_rows, write_jsonl

from dpoeng.cache.selection.scores import MEASURES
from dpoeng.cli.main import dpoeng, main
from dpoeng.engine.config.fields import TrainConfig

ROWS = 12
LOSS = {"ranked": "plackett_luce", "unpaired": "kto"}


def rows_of(kind: str) -> list[dict[str, Any]]:
    """12 rows: of three scored responses, or of one with a label."""
    if kind == "unpaired":
        return [
            {"prompt": row["prompt"], "completion": row["chosen" if i % 2 else "rejected"], "label": i % 2 == 1}
            for i, row in enumerate(pair_rows(ROWS))
        ]
    return [
        {
            "prompt": f"Instruction: point {i}.\nResponse:",
            "responses": [f" {SENTENCES[(i + k) % 3]} ({i}, {k})\nEND" for k in range(3)],
            "scores": [(i + 2 * k) % 3 for k in range(3)],
        }
        for i in range(ROWS)
    ]


Check = Callable[[Any], Any]
TRAINED = "--max-steps 1 --eval-share 0.4 --lora-r 4 --loss-type LOSS"

# Command line, with KIND and LOSS to fill in -> what its JSON must say, or the code with which it refuses each kind.
CASES: dict[str, Check | dict[str, str]] = {
    "check KIND.jsonl": lambda v: v["pairs"] == ROWS and v["rejected"] == 0,
    "precompute-ref KIND.jsonl --model model --cache KIND": lambda v: (v["rows"], v["computed"]) == (ROWS, 0),
    f"train --cache KIND --output-dir out-KIND {TRAINED}": lambda v: v["already_complete"] and v["evaluation"]["pairs"],
    f"train --cache KIND --output-dir KIND-ordered {TRAINED} --order easy_first --order-by SCORE": lambda v: (
        v["steps"] == 1
    ),
    f"sweep --cache KIND --output-dir KIND-sweep --vary beta=0.1,0.2 {TRAINED}": lambda v: (
        [run["state"] for run in v["runs"]] == ["complete"] * 2 and v["runs"][1]["difference"] is not None
    ),
    f"sweep --cache KIND --output-dir KIND-halved --vary learning_rate=1e-5,1e-3 {TRAINED} --max-steps 2 "
    "--halving-factor 2 --rank-by rewards/chosen": lambda v: (
        [run["state"] for run in v["runs"]] == ["complete", "ended early"]
    ),
    f"sweep --cache KIND --output-dir x --vary beta=0.1,0.2 {TRAINED} --rank-by rewards/accuracies_length_controlled": {
        "ranked": "config-value",
        "unpaired": "config-value",
    },
    "eval --cache KIND --adapter out-KIND": lambda v: v["pairs"] > 0 and "rewards/accuracies" in v["metrics"],
    "compare out-KIND --count 1 --max-new-tokens 2": lambda v: {*v[0]} >= {"prompt", "before", "after"},
    "judge out-KIND --judge rule.py:score --count 2 --max-new-tokens 2": lambda v: v["prompts"] == 2,
    "round out-KIND --judge rule.py:score --reference first --max-new-tokens 3 --keep-cut --max-steps 1": {
        "ranked": "round-start",
        "unpaired": "round-start",
    },
    "export out-KIND --to vllm --into served-KIND": lambda v: v["check"]["mean_diff"] < 1e-4,
    "merge out-KIND --into merged-KIND": lambda v: v["merged"] > 0,
    "watch out-KIND": lambda v: v["state"] == "complete",
    "report out-KIND": lambda v: v["runs"][0]["complete"],
    "cache info KIND": lambda v: v["views"][0]["meta"]["rows"] in LOSS,
    "cache verify KIND --recompute 2": lambda v: v["ok"] and v["recomputed"]["pairs"] == 2,
    "cache stats KIND --html KIND.html": lambda v: v["kind"] in LOSS and v["rows"] == ROWS,
    "cache export KIND KIND-again.parquet": lambda v: v["rows"] == ROWS,
    "cache export KIND x.parquet --for trl": {"ranked": "cache-rows", "unpaired": "cache-rows"},
    "cache import KIND-rows.jsonl --model model --cache KIND-new": lambda v: v["rows"] == ROWS and v["added"] >= ROWS,
    "cache merge KIND-merged KIND": lambda v: len(v[0]["views"]) == 1,
    "select --cache KIND --view KIND --output some-KIND --rule large --count 4": lambda v: (
        (v["rows"], v["rows_before"]) == (4, ROWS)
    ),
    "select --cache KIND --view KIND --output x --rule small --count 4 --by margin": {
        "ranked": "",
        "unpaired": "select-score",
    },
}

NO_ROWS = {
    "doctor": "this machine",
    "quantize": "a model",
    "plan": "a model; its rows are given as numbers",
    "init": "writes names of files and settings for a card",
    "migrate": "another trainer's settings",
    "demo": "its own pairs",
    "config show": "settings",
    "config schema": "settings",
    "push": "the files of a result",
    "cache diff": "two references",
    "cache explain": "references",
    "cache gc": "files",
}
"""Commands that read no rows of a cache or a file, and what they read."""


def leaves(group: click.Group, path: str = "") -> list[str]:
    found = []
    for name in group.list_commands(click.Context(group)):
        command = group.get_command(click.Context(group), name)
        found += leaves(command, f"{path}{name} ") if isinstance(command, click.Group) else [path + name]
    return found


def test_every_command_is_tried_or_reads_no_rows() -> None:
    for name in leaves(dpoeng):
        tried = any(line == name or line.startswith(f"{name} ") for line in CASES)
        assert tried != (name in NO_ROWS or name.startswith("bench ")), name


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """For each kind a file KIND.jsonl, a cache KIND, a run out-KIND and an export KIND-rows.jsonl."""
    root = tmp_path_factory.mktemp("kinds")
    (root / "model").symlink_to(tiny_model)
    (root / "rule.py").write_text("def score(prompt, answer):\n    return len(answer)\n")
    for kind, loss in LOSS.items():
        write_jsonl(root / f"{kind}.jsonl", rows_of(kind))
        for line in (
            f"precompute-ref {root}/{kind}.jsonl --model {root}/model --cache {root}/{kind}",
            f"train --cache {root}/{kind} --output-dir {root}/out-{kind} {TRAINED}".replace("LOSS", loss),
            f"cache export {root}/{kind} {root}/{kind}-rows.jsonl",
        ):
            with pytest.raises(SystemExit) as stop:
                main(line.split())
            assert stop.value.code == 0, line
    return root


@pytest.mark.parametrize("kind", LOSS)
@pytest.mark.parametrize("line", CASES)
def test_it_works_or_refuses_by_name(
    desk: Path, line: str, kind: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(desk)
    expected = CASES[line]
    code = expected[kind] if isinstance(expected, dict) else ""
    words = line.replace("KIND", kind).replace("LOSS", LOSS[kind]).replace("SCORE", MEASURES[kind][-1])
    with pytest.raises(SystemExit) as stop:
        main([*words.split(), "--json"])
    said = capsys.readouterr()
    if code:
        assert f"[{code}]" in said.err
        assert kind in said.err
        assert stop.value.code == 2
        return
    assert stop.value.code == 0, said.err
    value = json.loads(said.out)
    if not isinstance(expected, dict):
        assert expected(value), said.out[:3000]


def test_orders_are_the_scores_of_all_kinds() -> None:
    for name in {score for scores in MEASURES.values() for score in scores}:
        assert TrainConfig(order="easy_first", order_by=name).order_by == name


@pytest.mark.parametrize("kind", LOSS)
def test_the_next_command_trains(
    desk: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an import and a selection propose is a command that works on these rows."""
    monkeypatch.chdir(desk)
    for line in (
        f"cache import {kind}-rows.jsonl --model model --cache {tmp_path}/c",
        f"select --cache {tmp_path}/c --view {kind}-rows --output half --rule random --share 0.5",
    ):
        with pytest.raises(SystemExit, match="0"):
            main(line.split())
        proposed = capsys.readouterr().out.partition("Next: dpoeng ")[2].split()
        with pytest.raises(SystemExit, match="0"):
            main([*proposed, "--output-dir", f"{tmp_path}/{len(line)}", "--max-steps", "1", "--lora-r", "4"])
        capsys.readouterr()


@pytest.mark.parametrize("kind", LOSS)
def test_an_export_is_imported_and_exported_to_the_same_bytes(
    desk: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(desk / f"{kind}-rows.jsonl", "rows.jsonl")
    for line in (
        f"cache import rows.jsonl --model {desk}/model --cache c",
        "cache export c rows.parquet",
        f"cache import rows.parquet --model {desk}/model --cache d --name again",
        "cache export d again.jsonl",
        "cache verify d --recompute 3",
    ):
        with pytest.raises(SystemExit, match="0"):
            main(line.split())
    assert Path("again.jsonl").read_bytes() == Path("rows.jsonl").read_bytes()


WRONG: dict[str, tuple[str, Callable[[list[dict[str, Any]]], Any], str]] = {
    "a score too few": ("ranked", lambda rows: rows[1]["scores"].pop(), "3 responses, 3 log-probs and 2 scores"),
    "none better": ("ranked", lambda rows: rows[1].update(scores=[1, 1, 1]), "none is better than another"),
    "a score that is none": ("ranked", lambda rows: rows[1].update(scores=[1, float("nan"), 2]), "scores [1.0, nan"),
    "no list": ("ranked", lambda rows: rows[1].update(response_ids=7), "int"),
    "a log-prob above 0": ("ranked", lambda rows: rows[1]["ref_token_logps"][2].__setitem__(0, 0.5), "positive"),
    "1,025 responses": ("ranked", lambda rows: rows[1].update(
        {name: values * 1025 for name, values in (("scores", [1]), ("response_ids", [[1]]), ("response_gaps", [[]]),
                                                  ("ref_token_logps", [[-1.0]]))}), "more than the 1,024"),
    "two rows of one source": ("ranked", lambda rows: rows[1].update(source_row=1), "of the row before"),
    "another kind": ("ranked", lambda rows: rows[1].update(scores=[1], response_ids=rows[1]["response_ids"][:2],
                                                           ref_token_logps=rows[1]["ref_token_logps"][:2],
                                                           response_gaps=[[], []]), "unpaired, after ranked"),
    "a label of 2": ("unpaired", lambda rows: rows[1].update(scores=[2]), "scores [2.0]"),
    "no mismatched response": ("unpaired", lambda rows: rows[1]["response_ids"].pop(), "1 responses"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_an_import_that_cannot_be_right_is_refused(
    desk: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, spoil, said = WRONG[name]
    rows = [json.loads(line) for line in (desk / f"{kind}-rows.jsonl").read_text().splitlines()]
    spoil(rows)
    write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(SystemExit, match="3"):
        main(f"cache import {tmp_path}/rows.jsonl --model {desk}/model --cache {tmp_path}/c".split())
    error = capsys.readouterr().err
    assert "[import-row]" in error
    assert "rows.jsonl:2" in error
    assert said in error
    assert not list((tmp_path / "c").rglob("*.view"))
