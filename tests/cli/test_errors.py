"""Wrong inputs as users meet them: one readable message with a remedy, the right exit status, nothing half-written."""

from __future__ import annotations

import ast
import errno
import functools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from dpoeng_testing import pair_rows, write_jsonl
from error_page import EXAMPLE, MEANINGS, REMEDIES, ROOT, argument, codes, error_calls, render, statuses
from wrong_inputs import ALL, ROWS, SCORE, Desk, Wrong, raising

from dpoeng.cache.errors import UserError
from dpoeng.cli.main import as_user_error, main
from dpoeng.cli.main import dpoeng as cli
from dpoeng.engine.config.arguments import as_arguments
from dpoeng.engine.config.fields import PrecomputeConfig, TrainConfig
from dpoeng.engine.config.plan import PlanConfig
from dpoeng.engine.recipes.precompute import precompute_reference
from dpoeng.engine.recipes.train import train
from dpoeng.engine.runs.folder import ADAPTER_FOLDER

PAGE = ROOT / "docs" / "errors.md"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, sft_adapter: Path) -> dict[str, Path]:
    """What wrong inputs are made of: two caches and a finished run."""
    root = tmp_path_factory.mktemp("sound")
    file = write_jsonl(root / "pairs.jsonl", pair_rows(6))
    for name, adapter in (("cache", None), ("sft_cache", str(sft_adapter))):
        config = PrecomputeConfig(pairs=(file,), model=str(tiny_model), adapter=adapter, cache=root / name)
        precompute_reference(config)
    train(TrainConfig(cache=root / "cache", output_dir=root / "run", max_steps=2))
    return {"cache": root / "cache", "sft_cache": root / "sft_cache", "run": root / "run"}


@pytest.fixture
def desk(
    tmp_path: Path, tiny_model: Path, sft_adapter: Path, sound: dict[str, Path], tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> Desk:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    write_jsonl(tmp_path / "pairs.jsonl", pair_rows(6))
    return Desk(tmp_path, tiny_model, sft_adapter, **sound, tokenizer=tokenizer, patch=monkeypatch)


def names(desk: Desk) -> dict[str, str]:
    (spec,) = (path.stem for path in (desk.cache / "specs").glob("*.json"))
    return {
        "MODEL": str(desk.model),
        "ADAPTER": str(desk.adapter),
        "CACHE": str(desk.cache),
        "SFT": str(desk.sft_cache),
        "RUN": str(desk.run),
        "SPEC": spec,
    }


def report(desk: Desk, wrong: Wrong, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit status and what was said."""
    wrong.prepare(desk)
    capsys.readouterr()
    if wrong.act is not None:
        try:
            wrong.act(desk)
        except Exception as error:
            reported = as_user_error(error)
            return reported.exit_status, f"error: {reported.text()}\n"
        raise AssertionError("nothing was wrong")
    given = names(desk)
    with pytest.raises(SystemExit) as stop:
        main([given.get(word, word) for word in shlex.split(wrong.command)])
    assert isinstance(stop.value.code, int)
    return stop.value.code, capsys.readouterr().err


def options_of_fields(message: str) -> list[str]:
    """Fields that are written as options outside a command; in Python they are arguments."""
    prose = re.sub(r"`[^`]*`|'[^'\n]*'|\b(dpoeng|torchrun) .*", "", message)
    fields = {*TrainConfig.model_fields, *PrecomputeConfig.model_fields, *PlanConfig.model_fields, "vary", "rank_by"}
    named = [name.replace("-", "_") for name in re.findall(r"--([a-z][a-z-]*)", prose)]
    return [name for name in named if name in fields or name.removeprefix("no_") in fields]


@functools.cache
def commands() -> dict[str, set[str]]:
    """Every command, `cache verify` among them -> its options."""
    found: dict[str, set[str]] = {}
    root = click.Context(cli)
    for name in cli.list_commands(root):
        command = cli.get_command(root, name)
        assert command is not None
        parts = {name: command}
        if isinstance(command, click.Group):
            inner = click.Context(command)
            parts |= {
                f"{name} {sub}": command.get_command(inner, sub) or command for sub in command.list_commands(inner)
            }
        for words, part in parts.items():
            found[words] = {o for p in part.params for o in (*p.opts, *p.secondary_opts)} | {"--help", "--debug"}
    return found


def misnamed(remedy: str) -> list[str]:
    """Commands and options that a remedy names and that are not there, and packages that no index has."""
    known = commands()
    every = {"--nproc-per-node", "--no-python", "--array"}.union(*known.values())  # torchrun's and sbatch's
    wrong = [name for name in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*\b", remedy) if name not in every]
    wrong += [name for name in ("huggingface-cli", "'dpoeng[") if name in remedy]
    for line in re.findall(r"`(dpoeng [^`]*)`", remedy):
        words = line.split()[1:]
        group = any(n.startswith(f"{words[0]} ") for n in known) and len(words) > 1
        name = " ".join(words[:2]) if group else words[0]
        name = name if name in known else ""
        wrong += [line] if not name else []
        wrong += [o for o in words if o.startswith("--") and name and o.split("=")[0] not in known[name]]
    return wrong


def test_a_remedy_that_names_what_is_not_there_is_found() -> None:
    assert misnamed("run `dpoeng cache verify CACHE --recompute 4`, or raise --max-length") == []
    assert misnamed("`dpoeng cache chek`, `dpoeng train --max-prompt 3`, --lm-int8, pip install 'dpoeng[gguf]'") == [
        "--max-prompt",
        "--lm-int8",
        "'dpoeng[",
        "dpoeng cache chek",
        "--max-prompt",
    ]


def test_every_remedy_in_the_sources_names_what_is_there() -> None:
    """Also those that no wrong input reaches; what is computed is left out."""
    found = []
    for where, call in error_calls():
        node = argument(call, "remedy")
        parts = ast.walk(node) if node else ()
        texts = [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]
        found += [(where, name) for text in texts for name in misnamed(text)]
    assert found == []


def tree(folder: Path) -> dict[str, bytes]:
    found = {path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()}
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.mark.parametrize("wrong", ALL, ids=lambda wrong: wrong.name.replace(" ", "-"))
def test_a_wrong_input_is_one_readable_message(desk: Desk, wrong: Wrong, capsys: pytest.CaptureFixture[str]) -> None:
    kept = {name: tree(folder) for name, folder in (("cache", desk.cache), ("run", desk.run), ("model", desk.model))}
    status, said = report(desk, wrong, capsys)
    assert said.count("error: ") == 1, said
    message = said[said.index("error: ") :]
    assert f"[{wrong.code}]" in message.splitlines()[0], message
    assert status == wrong.status, message
    assert "  remedy:   " in message
    assert "Traceback" not in said
    assert misnamed(message[message.index("  remedy:   ") :]) == []
    assert len(message.splitlines()) <= 12, message
    for word in wrong.words:
        assert word in message, f"{word!r} is not in\n{message}"
    assert status in statuses(codes()[wrong.code])
    assert options_of_fields(as_arguments(message)) == [], as_arguments(message)
    # Nothing half-written: what was sound is as it was, nothing temporary is left, no adapter appears.
    for name, before in kept.items():
        assert tree(getattr(desk, name)) == before
    left = [path for path in desk.folder.rglob("*") if path.name.endswith(".tmp") or path.parent.name == "tmp"]
    assert left == []
    assert not (desk.folder / "out" / ADAPTER_FOLDER).exists() or wrong.code in (
        "resume-changed",
        "run-damaged",
        "checkpoint-damaged",
    )


@pytest.mark.parametrize(("name", "row", "reason"), ROWS, ids=[name.replace(" ", "-") for name, _, _ in ROWS])
def test_a_wrong_row_is_found_by_check(
    desk: Desk, capsys: pytest.CaptureFixture[str], name: str, row: Any, reason: str
) -> None:
    write_rows(desk, [row])
    with pytest.raises(SystemExit) as stop:
        main(["check", "pairs.jsonl", "--max-reject-share", "0.5", "--model", str(desk.model), "--max-length", "120"])
    said = capsys.readouterr().out
    assert stop.value.code == 0, said
    assert f"[{reason}]" in said
    assert "pairs.jsonl:7" in said


def write_rows(desk: Desk, rows: list[Any]) -> None:
    file = write_jsonl(desk.folder / "pairs.jsonl", pair_rows(6))
    with file.open("ab") as stream:
        for row in rows:
            if isinstance(row, bytes):
                stream.write(row)
            else:
                stream.write(write_jsonl(desk.folder / "one", [row]).read_bytes())


def test_all_wrong_rows_are_left_out_by_phase_one_and_listed(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    """Faults 1 to 14 through the command line, in one file, with a byte-order mark, CRLF and U+2028 beside them."""
    import json

    write_rows(desk, [row for _, row, _ in ROWS])
    file = desk.folder / "pairs.jsonl"
    strange = json.dumps({**pair_rows(7)[6], "prompt": "a\u2028b\u0085c:"}, ensure_ascii=False).encode() + b"\r\n"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes() + strange + b'{"prompt": "cut')
    command = [*shlex.split(SCORE.replace("MODEL", str(desk.model))), "--max-length", "120"]
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 3
    assert "[data-rejects]" in capsys.readouterr().err
    assert not (desk.folder / "refcache").exists(), "nothing is written before the rows are judged"
    with pytest.raises(SystemExit) as stop:
        main([*command, "--max-reject-share", "0.9"])
    assert stop.value.code == 0
    rejects = (desk.folder / "refcache/rejects/pairs.jsonl").read_text(encoding="utf-8")
    listed = [json.loads(line) for line in rejects.splitlines()]
    found = {record["source_row"]: record["reason"] for record in listed}
    expected = {7 + k: reason for k, (_, _, reason) in enumerate(ROWS)}
    assert found == {**expected, 7 + len(ROWS) + 1: "cut-line"}
    assert "7 in view 'pairs': 7 computed" in capsys.readouterr().out


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    assert isinstance(stop.value.code, int)
    return stop.value.code


def test_repetitions_and_a_huge_line_through_the_command_line(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    """Faults 15 to 18: merged boundary, duplicate, contradiction, a line longer than may be held."""
    rows = pair_rows(6)
    swapped = {**rows[1], "chosen": rows[1]["rejected"], "rejected": rows[1]["chosen"]}
    merged = {"prompt": "tell me about bread: ", "chosen": "short waves", "rejected": "short sky"}
    desk.rows(*rows, rows[0], swapped, merged, {**rows[2], "prompt": "x" * 9000})
    desk.patch.setattr("dpoeng.engine.data.readers.MAX_LINE_BYTES", 5000)
    assert run("check", "pairs.jsonl", "--model", str(desk.model), "--max-reject-share", "0.2") == 0
    said = capsys.readouterr().out
    for code, line in (("duplicate", 7), ("contradiction", 8), ("boundary-merged", 9), ("line-too-long", 10)):
        assert f"[{code}]" in said, said
        assert f"pairs.jsonl:{line} " in said
    command = shlex.split(SCORE.replace("MODEL", str(desk.model)))
    assert run(*command, "--max-reject-share", "0.2") == 0
    said = capsys.readouterr().out
    assert "9 in view 'pairs': 8 computed" in said
    assert "duplicates" in said
    assert "contradictions" in said


def test_a_complete_cache_that_is_read_only_serves_both_phases(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault 79: every change below the cache fails."""
    for name in ("create", "link", "rename", "unlink"):
        raising(errno.EROFS, f"dpoeng.cache.files.Disk.{name}")(desk)
    (desk.folder / "pairs.jsonl").unlink()
    (desk.folder / "pairs.jsonl").symlink_to(desk.cache.parent / "pairs.jsonl")
    command = shlex.split(SCORE.replace("MODEL", str(desk.model)))
    assert run(*command, "--cache", str(desk.cache)) == 0, capsys.readouterr().err
    assert "0 computed, 6 reused" in capsys.readouterr().out
    assert run("train", "--cache", str(desk.cache), "--max-steps", "1") == 0, capsys.readouterr().err


def test_any_locale_and_encoding_of_the_terminal(desk: Desk) -> None:
    """Fault 82: a message with letters that the terminal does not have is no crash, and says the same."""
    (desk.folder / "pärs.jsonl").write_text("[")
    command = [sys.executable, "-c", "from dpoeng.cli.main import main; main()", "check", "pärs.jsonl"]
    plain = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONHASHSEED": "7"}
    done = subprocess.run(command, env=plain, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert "p\\xe4rs.jsonl:1" in done.stdout
    assert "[too-many-rejects]" in done.stdout


# --------------------------------------------------------------------------- the messages as a whole


def test_every_code_has_a_wrong_input_and_a_meaning() -> None:
    found = set(codes())
    assert found - set(MEANINGS) == set(), "give these codes a meaning in tests/support/error_page.py"
    assert set(MEANINGS) - found == set(), "no source raises these codes any more"
    assert found - {wrong.code for wrong in ALL} == set(), "each needs a wrong input in tests/support/wrong_inputs.py"


def test_every_message_is_of_one_form() -> None:
    """A sentence that begins small and has no full stop; a code `area-problem`; a remedy."""
    for where, call in error_calls():
        given = {keyword.arg for keyword in call.keywords}
        if call.args and isinstance(call.args[0], ast.Name):
            continue  # a class that hands its message on
        assert "remedy" in given, f"{where}: what shall the user do?"
        text = "".join(
            str(part.value) if isinstance(part, ast.Constant) else "x"
            for part in (call.args[0].values if isinstance(call.args[0], ast.JoinedStr) else [call.args[0]])
        )
        assert not re.match(r"[A-Z][a-z]", text), f"{where}: {text}"
        assert not text.endswith("."), f"{where}: {text}"
    for code in codes():
        assert re.fullmatch(r"[a-z]+(-[a-z0-9]+)*", code)


def test_the_page_is_that_of_the_sources() -> None:
    """DPOENG_WRITE_DOCS=1 writes the page."""
    page = render()
    if os.environ.get("DPOENG_WRITE_DOCS"):
        PAGE.write_text(page, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == page, "run make docs-errors"
    rows = re.findall(r"^\| `([a-z0-9-]+)` \| [\d, ]+ \| [^|]+ \| [^|]+ \|$", page, re.MULTILINE)
    assert sorted(rows) == sorted(MEANINGS), "a cell is empty or holds a line break, or a code has no area"
    assert set(REMEDIES) <= set(MEANINGS)


def test_the_example_of_the_page_is_a_real_message(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    command, message = EXAMPLE.split("\n", 1)
    with pytest.raises(SystemExit):
        main(shlex.split(command.removeprefix("$ dpoeng ")))
    assert capsys.readouterr().err == message


def test_debug_shows_the_traceback_wherever_it_stands(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["--debug", "check", "none.jsonl"], ["check", "none.jsonl", "--debug"]):
        with pytest.raises(SystemExit) as stop:
            main(command)
        assert stop.value.code == 3
        said = capsys.readouterr().err
        assert "Traceback" in said
        assert said.rstrip().splitlines()[-1].startswith("  remedy:")


def test_an_internal_error_is_a_message_too(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("flux capacitor")

    desk.patch.setattr("dpoeng.engine.recipes.check.check_pairs", broken)
    with pytest.raises(SystemExit) as stop:
        main(["check", "pairs.jsonl"])
    said = capsys.readouterr().err
    assert stop.value.code == 1
    assert "[internal-error]" in said
    assert "RuntimeError: flux capacitor" in said
    assert "test_errors.py" in said
    assert "Traceback" not in said


def test_an_error_says_all_that_it_knows() -> None:
    said = str(UserError("m", code="a-b", where="w", expected="e", found="f", remedy="r"))
    assert said.splitlines() == ["m [a-b]", "  where:    w", "  expected: e", "  found:    f", "  remedy:   r"]


@pytest.mark.parametrize(
    "command",
    [
        "check pairs.jsonl",
        "config schema",
        *(pytest.param(command, marks=pytest.mark.slow) for command in ("check pairs.jsonl --json", "train --help")),
    ],
)
def test_a_closed_output_pipe_ends_quietly(desk: Desk, command: str) -> None:
    """As a tool that SIGPIPE ends; what is printed goes through click in some commands, through rich in others."""
    program = f"{shlex.quote(sys.executable)} -c 'from dpoeng.cli.main import main; main()' {command}"
    done = subprocess.run(
        ["bash", "-c", f"{program} | exec true; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    ("variables", "red", "on_terminal"),
    [
        ({}, True, True),
        pytest.param({}, False, False, marks=pytest.mark.slow),
        ({"NO_COLOR": "1"}, False, True),
        pytest.param({"NO_COLOR": ""}, True, True, marks=pytest.mark.slow),
        pytest.param({"TERM": "dumb"}, False, True, marks=pytest.mark.slow),
        ({"FORCE_COLOR": "1"}, True, False),
        pytest.param({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False, False, marks=pytest.mark.slow),
    ],
)
def test_an_error_is_red_where_that_is_wanted(
    desk: Desk, variables: dict[str, str], red: bool, on_terminal: bool
) -> None:
    """The conventions of https://no-color.org and https://force-color.org, on a real terminal."""
    import pty

    ours, theirs = pty.openpty()
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    done = subprocess.run(
        [sys.executable, "-c", "from dpoeng.cli.main import main; main()", "check", "none.jsonl"],
        env={**kept, "TERM": "xterm-256color", **variables},
        stderr=theirs if on_terminal else subprocess.PIPE,
        check=False,
    )
    os.close(theirs)
    said = os.read(ours, 10_000) if on_terminal else done.stderr
    os.close(ours)
    assert done.returncode == 3
    assert b"no such file" in said
    assert (b"31m" in said) == red
