"""Help shows what people use and the values that options take; shells complete commands, options, values and files."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import click
import pytest

from dpoeng.cli.main import dpoeng
from dpoeng.engine.data.where import GRAMMAR, parse_condition


def help_of(*path: str, option: str = "--help") -> str:
    from click.testing import CliRunner

    done = CliRunner().invoke(dpoeng, [*path, option])
    assert done.exit_code == 0
    return done.output


def options_in(text: str) -> list[str]:
    return re.findall(r"^  (?:-h, )?(--[a-z][a-z0-9-]*)", text, re.MULTILINE)


@pytest.mark.parametrize(
    "path", [("train",), ("precompute-ref",), ("sweep",), ("eval",), ("check",), ("config", "show")]
)
def test_help_fits_and_help_all_has_every_option(path: tuple[str, ...]) -> None:
    short, whole = options_in(help_of(*path)), options_in(help_of(*path, option="--help-all"))
    command: click.Command = dpoeng
    for name in path:
        assert isinstance(command, click.Group)
        command = command.get_command(click.Context(command), name) or command
    every = {p.opts[0] for p in command.params if isinstance(p, click.Option)} | {"--help"}
    assert set(whole) == every
    assert set(short) < every
    assert len(short) <= 28
    left_out = int(re.findall(r"(\d+) more options: dpoeng .* --help-all", help_of(*path))[0])
    assert left_out == len(whole) - len(short)


def test_train_shows_what_people_use() -> None:
    short = options_in(help_of("train"))
    assert len(short) <= 26
    for usual in (
        "cache",
        "output-dir",
        "learning-rate",
        "beta",
        "loss-type",
        "lora-r",
        "num-train-epochs",
        "report-to",
    ):
        assert f"--{usual}" in short
    assert "--adam-epsilon" not in short


def test_metavars_tell_the_values() -> None:
    text = help_of("train", option="--help-all")
    for words in (
        "--report-to [tensorboard|wandb|mlflow|trackio][,...]",
        "--init-lora-weights [true|false|",
        "--loss-weights NUMBER[,NUMBER...]",
        "--device auto|cpu|cuda|cuda:N",
        "--dtype [auto|float32|bfloat16|float16]",
    ):
        assert words in text


@pytest.mark.parametrize("command", ["precompute-ref", "check"])
def test_the_grammar_of_where_is_in_the_help(command: str) -> None:
    for line in GRAMMAR.splitlines():
        assert line in help_of(command)


def test_every_condition_of_the_grammar_is_understood() -> None:
    conditions = [re.split(r"\s{3,}", line.strip())[0] for line in GRAMMAR.splitlines()[:5]]
    row = {"confident": True, "margin": 0.7, "kind": "qa", "meta": {"score": 1}, "score-chosen": "9"}
    assert [parse_condition(one).evaluate(row) for one in conditions] == [True, False, True, True, True]


# --------------------------------------------------------------------------- completion


def completed(line: str, shell: str = "bash") -> tuple[list[str], set[str]]:
    """What a shell is offered after a line, and the modules that were imported for it."""
    words = line.split(" ")
    environment = {**os.environ, "_DPOENG_COMPLETE": f"{shell}_complete", "COMP_WORDS": line}
    environment["COMP_CWORD"] = words[-1] if shell == "fish" else str(len(words) - 1)
    program = (
        "import sys, atexit; from dpoeng.cli.main import main\n"
        "atexit.register(lambda: print(*sys.modules, file=sys.stderr)); main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    return done.stdout.splitlines(), set(done.stderr.split())


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("dpoeng prec", ["plain,precompute-ref"]),
        ("dpoeng cache ver", ["plain,verify"]),
        ("dpoeng train --learning", ["plain,--learning-rate"]),
        ("dpoeng train --adapter-mode st", ["plain,stack"]),
        ("dpoeng train --report-to wandb,t", ["plain,wandb,tensorboard", "plain,wandb,trackio"]),
        ("dpoeng train --cache ref", ["file,ref"]),
        ("dpoeng precompute-ref pai", ["file,pai"]),
        ("dpoeng precompute-ref --model sft", ["file,sft"]),
    ],
)
def test_a_shell_is_offered_what_fits(line: str, offered: list[str]) -> None:
    found, loaded = completed(line)
    assert found == offered
    assert not loaded & {"torch", "transformers", "pyarrow", "numpy", "rich"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_its_script(shell: str) -> None:
    program = "from dpoeng.cli.main import main; main()"
    environment = {**os.environ, "_DPOENG_COMPLETE": f"{shell}_source"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert f"_DPOENG_COMPLETE={shell}_complete" in done.stdout, done.stderr


def test_zsh_and_fish_are_offered_commands_with_what_they_do() -> None:
    found, _ = completed("dpoeng quan", "zsh")
    assert found[:2] == ["plain", "quantize"]
    assert "8 or 4 bits" in found[2]
    found, _ = completed("dpoeng quan", "fish")
    assert "quantize" in found[0] or "quantize" in "".join(found)
