"""The command line as a user meets it: help, both phases, and mistakes that end in one readable message."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from dpoeng_testing import pair_rows, save_tiny_model, write_jsonl

from dpoeng.cli.main import COMMANDS, dpoeng, main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs a command line in an empty folder -> (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert isinstance(stop.value.code, int)
        return stop.value.code, captured.out, captured.err

    return call


def test_help_answers_at_once_and_loads_nothing_heavy() -> None:
    """The best of three, since the machine may be busy; and no heavy import whatever the machine."""
    program = "import sys; from dpoeng.cli.main import main\ntry: main(['--help'])\nfinally: print(*sys.modules)"
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - began)
    assert "precompute-ref" in done.stdout
    loaded = set(done.stdout.split())
    assert not loaded & {"torch", "transformers", "peft", "pyarrow", "numpy", "pydantic", "rich"}
    assert min(seconds) < 0.5


def leaf_commands(group: click.Group, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], click.Command]]:
    found: list[tuple[tuple[str, ...], click.Command]] = []
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None, f"{name} is listed but cannot be loaded"
        if isinstance(command, click.Group):
            found += leaf_commands(command, (*path, name))
        else:
            found.append(((*path, name), command))
    return found


def test_every_command_has_help_with_an_example() -> None:
    commands = leaf_commands(dpoeng)
    assert {path[0] for path, _ in commands} == set(COMMANDS)
    for path, command in commands:
        text = command.get_help(click.Context(command, info_name=" ".join(("dpoeng", *path))))
        assert "Example" in text, path
        assert f"dpoeng {' '.join(path)}" in text.split("Example")[1], path
        for parameter in command.params:
            assert isinstance(parameter, click.Argument) or getattr(parameter, "help", None), (path, parameter.name)


def test_version(run: Run) -> None:
    status, out, _ = run("--version")
    assert status == 0
    assert out.startswith("dpoeng 0.")


def test_both_phases_with_a_config_file(run: Run, tmp_path: Path, tiny_model: Path) -> None:
    write_jsonl(tmp_path / "pairs.jsonl", pair_rows(16))
    (tmp_path / "dpoeng.yaml").write_text(f"model: {tiny_model}\nmax_steps: 3\nlearning_rate: 0.001\n")
    status, out, err = run("precompute-ref", "pairs.jsonl", "--where", "confident", "--max-length", "200")
    assert status == 0, err
    assert "12 in view 'pairs': 12 computed, 0 reused" in out
    assert "4 rows by --where" in out
    assert "dpoeng train --cache refcache" in out
    status, out, err = run("train", "--output-dir", "out", "--no-use-rslora")
    assert status == 0, err
    assert "the policy matches the cache on" in out
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
    status, out, err = run("train", "--output-dir", "out", "--no-use-rslora")
    assert status == 0
    assert "already complete (3 steps)" in out


def test_what_to_do_next_is_a_command_that_a_shell_takes(run: Run, tmp_path: Path, tiny_model: Path) -> None:
    """With a second view the first command would be refused; a folder may have spaces and brackets in its name."""
    cache = tmp_path / "my [red] cache"
    for name, rows in (("pairs", pair_rows(6)), ("more", pair_rows(12)[6:])):
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
        status, out, err = run("precompute-ref", f"{name}.jsonl", "--model", tiny_model, "--cache", cache)
        assert status == 0, err
        line = out.rsplit("Next: ", 1)[1].strip()
        view = ["--view", name] if name == "more" else []
        assert shlex.split(line) == ["dpoeng", "train", "--cache", str(cache), *view]
    status, _, err = run(*shlex.split(line)[1:], "--max-steps", "1")
    assert status == 0, err


def test_verify_by_recomputing(run: Run, small_cache: Path, tmp_path: Path, tokenizer: object) -> None:
    status, out, err = run("cache", "verify", small_cache, "--recompute", "3")
    assert status == 0, err
    assert "3 pairs scored again: mean difference" in out
    assert "they are this model's log-probs" in out
    other = save_tiny_model(tmp_path / "other", tokenizer, seed=1)
    status, out, _ = run("cache", "verify", small_cache, "--recompute", "3", "--model", other)
    assert status == 4
    assert "not this model's log-probs" in out


def test_bad_rows_are_counted_and_listed(run: Run, tmp_path: Path, tiny_model: Path) -> None:
    rows = [*pair_rows(10), {"prompt": "p", "chosen": "same", "rejected": "same"}]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    status, out, _ = run("precompute-ref", "pairs.jsonl", "--model", tiny_model, "--max-reject-share", "0.2")
    assert status == 0
    assert "1 row, listed in refcache/rejects/pairs.jsonl" in out
    assert '"row": 11' in (tmp_path / "refcache/rejects/pairs.jsonl").read_text().replace("source_row", "row")
    status, _, err = run("precompute-ref", "pairs.jsonl", "--model", tiny_model)
    assert status == 3
    assert "remedy:" in err


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["precompute-ref"], 2, ["no pairs given", "pairs.jsonl --model"]),
        (["precompute-ref", "pairs.jsonl"], 2, ["no model given", "dpoeng.yaml"]),
        (["precompute-ref", "pairs.jsonl", "--model", "nowhere"], 2, ["no model at nowhere"]),
        (["precompute-ref", "none.jsonl", "--model", "MODEL"], None, ["none.jsonl"]),
        (["precompute-ref", "pairs.jsonl", "--model", "pairs.jsonl"], 2, ["not a GGUF"]),
        (["precompute-ref", "pairs.jsonl", "--model", "MODEL", "--adapter", "MODEL"], 2, ["no peft adapter"]),
        (["precompute-ref", "pairs.jsonl", "--model", "MODEL", "--max-length", "1"], 2, ["--max-length", "2"]),
        (["precompute-ref", "pairs.jsonl", "--model", "MODEL", "--device", "cuda"], 5, ["no usable CUDA device"]),
        (["precompute-ref", "pairs.jsonl", "--model", "MODEL", "--columns", "chosen"], 2, ["NAME=COLUMN"]),
        (["precompute-ref", "pairs.jsonl", "--modle", "MODEL"], 2, ["--model"]),
        (["train", "--cache", "nowhere"], 4, ["nowhere"]),
        (["train", "--beta", "0"], 2, ["--beta", "greater than 0"]),
        (["train", "--lr-scheduler-type", "cosin", "--cache", "CACHE"], 2, ["'cosin' is not one of", "'cosine'"]),
        (["train", "--lora-target-modules", "query", "--cache", "CACHE"], 2, ["missing in this model", "q_proj"]),
        (["train", "--view", "other", "--cache", "CACHE"], 2, ["no view 'other'", "pairs"]),
        (["trian"], 2, ["No such command 'trian'"]),
    ],
)
def test_mistakes(
    run: Run,
    tmp_path: Path,
    tiny_model: Path,
    small_cache: Path,
    arguments: list[str],
    status: int | None,
    words: list[str],
) -> None:
    write_jsonl(tmp_path / "pairs.jsonl", pair_rows(4))
    names = {"MODEL": str(tiny_model), "CACHE": str(small_cache)}
    found, _, err = run(*(names.get(argument, argument) for argument in arguments))
    assert found == status if status is not None else found in (2, 3), err
    for word in words:
        assert word in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "refcache").exists()


@pytest.fixture(scope="module")
def small_cache(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    from dpoeng.engine.config.fields import PrecomputeConfig
    from dpoeng.engine.recipes.precompute import precompute_reference

    folder = tmp_path_factory.mktemp("cli")
    file = write_jsonl(folder / "pairs.jsonl", pair_rows(4))
    precompute_reference(PrecomputeConfig(pairs=(file,), model=str(tiny_model), cache=folder / "cache"))
    return folder / "cache"


def test_a_tokenizer_of_another_model(run: Run, tmp_path: Path, tokenizer: object, tiny_model: Path) -> None:
    import json

    model = save_tiny_model(tmp_path / "small", tokenizer)
    config = json.loads((model / "config.json").read_text())
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:300].contiguous()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": 300}))
    write_jsonl(tmp_path / "pairs.jsonl", pair_rows(4))
    status, _, err = run("precompute-ref", "pairs.jsonl", "--model", model)
    assert status == 2
    assert "ids below 300" in err


def test_a_pickled_checkpoint_is_refused(run: Run, tmp_path: Path, tiny_model: Path) -> None:
    import shutil

    model = shutil.copytree(tiny_model, tmp_path / "pickled")
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    write_jsonl(tmp_path / "pairs.jsonl", pair_rows(4))
    status, _, err = run("precompute-ref", "pairs.jsonl", "--model", model)
    assert status == 2
    assert "pytorch_model.bin" in err
    assert "save_pretrained" in err


@pytest.mark.parametrize("group", [[], ["cache"], ["config"]])
def test_a_group_alone_shows_its_help(run: Run, group: list[str]) -> None:
    status, out, err = run(*group)
    assert (status, err) == (0, "")
    assert out == run(*group, "--help")[1]
