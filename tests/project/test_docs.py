"""The documents are true: every block of commands or code in them is run, every command and option in a line exists.

Stand-ins: `Qwen/Qwen2.5-32B` and every other model that is named is a tiny random Llama, `my-sft-lora` a LoRA on it, so
that the commands run here in seconds; devices and quantisation are as written. What torchrun would start several times
is run once (tests/reference/test_shards.py runs several), and SLURM_ARRAY_TASK_ID is 1. A block that cannot be run
stands behind `<!-- not run: why -->`. Blocks of a document run in its order, in one folder that holds `pairs.jsonl`.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from dpoeng_testing import pair_rows, write_jsonl

from dpoeng.cli.main import COMMANDS, dpoeng, main
from dpoeng.engine.data.pairs import read_pairs
from dpoeng.engine.data.where import parse_condition

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MODELS = ("Qwen/Qwen2.5-32B-Instruct", "Qwen/Qwen2.5-32B", "HuggingFaceTB/SmolLM2-135M-Instruct", "sft-model")
ADAPTERS = ("my-sft-lora", "sft-lora")
KINDS = {"sh", "python", "yaml", "json", "jsonl", "where", "text"}

BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<why>[^>]+?) -->\n\n?)?^```(?P<kind>\S*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True, slots=True)
class Block:
    document: Path
    line: int
    kind: str
    text: str
    why_not: str | None

    def __str__(self) -> str:
        return f"{self.document.relative_to(ROOT)}:{self.line}"


def blocks(document: Path) -> list[Block]:
    text = document.read_text(encoding="utf-8")
    found = []
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("text"))
        found.append(Block(document, line, match["kind"], match["text"], match["why"]))
    return found


def commands(text: str) -> list[str]:
    """The commands of a shell block: continued lines joined, comments dropped, `&&` split."""
    joined = re.sub(r"\\\n\s*", " ", text)
    lines = [re.sub(r"(^|\s)#.*$", "", line).strip() for line in joined.splitlines()]
    return [part.strip() for line in lines if line for part in line.split("&&")]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_block_says_what_it_is(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert len(re.findall(r"^```", text, re.MULTILINE)) == 2 * len(blocks(document)), "a block is not closed"
    for block in blocks(document):
        assert block.kind in KINDS, f"{block}: name the language, or `text` for what is no code"
        assert block.why_not is None or len(block.why_not) > 15, f"{block}: say why it is not run"
        if block.kind == "text":
            first = block.text.strip().splitlines()[0]
            assert not re.match(r"(pip|python|make|import|from) ", first), f"{block} is code: name its language"


def run_shell(block: Block, stand_ins: dict[str, str]) -> None:
    for command in commands(block.text):
        words = [stand_ins.get(word, os.path.expandvars(word)) for word in shlex.split(command)]
        if words[0] == "torchrun":
            words = words[words.index("dpoeng") :]
        if words[0] == "dpoeng":
            with pytest.raises(SystemExit) as stop:
                main(words[1:])
            assert stop.value.code == 0, f"{block}: {command}"
        elif words[0] == "make":
            targets = [word for word in words[1:] if "=" not in word]
            made = subprocess.run(["make", "-n", *targets], cwd=ROOT, capture_output=True, text=True, check=False)
            assert made.returncode == 0, f"{block}: {command}: {made.stderr}"
        elif words[:2] == ["pip", "install"]:
            check_install(block, words[2:])
        else:
            done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{block}: {command}: {done.stderr}"


def check_install(block: Block, words: list[str]) -> None:
    """Installing is not repeated here: what is named must be there."""
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for word in words:
        if match := re.search(r"\[([\w,]+)\]", word):
            assert set(match[1].split(",")) <= set(extras), f"{block}: {word}"
        if word.endswith(".txt"):
            assert (ROOT / word).is_file(), f"{block}: {word}"


def run_block(block: Block, stand_ins: dict[str, str]) -> None:
    match block.kind:
        case "sh":
            run_shell(block, stand_ins)
        case "python":
            code = block.text
            for name, value in stand_ins.items():
                code = re.sub(rf"([\"']){re.escape(name)}\1", repr(value), code)
            exec(compile(code, str(block), "exec"), {"__name__": "__main__"})
        case "yaml":
            check_yaml(block)
        case "json":
            for line in block.text.splitlines() if block.text.count("\n{") else [block.text]:
                json.loads(line)
        case "jsonl":
            path = Path("block.jsonl")
            path.write_text(block.text, encoding="utf-8")
            assert not read_pairs([path]).rejects, str(block)
        case "where":
            for line in block.text.splitlines():
                parse_condition(line)


def check_yaml(block: Block) -> None:
    from dpoeng.engine.config.fields import PrecomputeConfig, TrainConfig
    from dpoeng.engine.config.files import load_config

    held = yaml.safe_load(block.text)
    assert isinstance(held, dict), str(block)
    path = Path("block.yaml")
    path.write_text(block.text, encoding="utf-8")
    for cls in (PrecomputeConfig, TrainConfig):
        load_config(cls, {}, path)


# Each command of memory.md simulates whole steps: its own tests run the same in smaller, and `make test-slow` the page.
SLOW = {"memory.md"}
RUN = [
    pytest.param(document, marks=pytest.mark.slow if document.name in SLOW else ())
    for document in DOCUMENTS
    if any(block.kind != "text" and not block.why_not for block in blocks(document))
]


@pytest.mark.parametrize("document", RUN, ids=lambda path: path.name)
def test_every_block_runs(
    document: Path, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from dpoeng.engine.checks import probes
    from dpoeng.engine.recipes import doctor

    tiny, adapter = stand_in_model(tmp_path, tokenizer)
    # In this process: importing the libraries in four others takes a minute.
    monkeypatch.setattr(doctor, "run_probe", lambda name: {"ok": True, **probes.PROBES[name]()})
    stand_ins = {**dict.fromkeys(MODELS, str(tiny)), **dict.fromkeys(ADAPTERS, str(adapter))}
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    write_jsonl(folder / "pairs.jsonl", pair_rows(24))
    write_jsonl(folder / "held-out.jsonl", pair_rows(32)[26:])
    ran = 0
    for block in blocks(document):
        if block.kind != "text" and block.why_not is None:
            run_block(block, stand_ins)
            ran += 1
    capsys.readouterr()
    assert ran


def stand_in_model(folder: Path, tokenizer: Any) -> tuple[Path, Path]:
    """A Llama of width 64 (8-bit layers want multiples of 16) and a LoRA on it."""
    import torch
    from dpoeng_testing import save_tiny_model
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    tiny = save_tiny_model(folder / "tiny", tokenizer, hidden=64)
    torch.manual_seed(5)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny),
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder / "adapter")
    return tiny, folder / "adapter"


def resolve(words: list[str]) -> click.Command:
    """The command that the words begin with."""
    command: click.Command = dpoeng
    for word in words:
        if not isinstance(command, click.Group):
            break
        found = command.get_command(click.Context(command), word)
        if found is None:
            raise KeyError(word)
        command = found
    return command


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_in_a_line_exists(document: Path) -> None:
    text = BLOCK.sub("", document.read_text(encoding="utf-8"))
    known: set[str] = set()
    stack: list[click.Command] = [dpoeng]
    while stack:
        command = stack.pop()
        known |= {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        if isinstance(command, click.Group):
            stack += [member for name in command.commands or command.list_commands(click.Context(command))
                      if (member := command.get_command(click.Context(command), name))]  # fmt: skip
    known |= {"--help", "--debug", "--version"}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for code in re.findall(r"`([^`\n]+)`", text):
        words = code.replace("...", "").split()
        if "|" in code or code in FOREIGN:
            continue
        if words[:1] == ["dpoeng"] and len(words) > 1 and not words[1].startswith("-"):
            command = resolve(words[1:])
            own = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
            for word in words[1:]:
                if word.startswith("--") and word.split("=")[0] not in {*own, "--help", "--debug"}:
                    raise AssertionError(f"{document.name}: `{code}` has no option {word}")
        elif words[:1] == ["make"] and len(words) > 1:
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), f"{document.name}: `{code}`"
        elif words and re.fullmatch(r"--[a-z][a-z-]+", words[0]) and words[0] not in known:
            raise AssertionError(f"{document.name}: `{code}` is an option of no command")


FOREIGN = {"dpoeng reference"}  # a row of a table in docs/bench.md


def anchor(heading: str) -> str:
    """As GitHub and mkdocs make it."""
    return re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", heading).lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "CHANGELOG.md"], ids=lambda path: path.name)
def test_every_link_leads_somewhere(document: Path) -> None:
    text = BLOCK.sub("", document.read_text(encoding="utf-8"))
    for target in re.findall(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            assert re.fullmatch(r"https?://[\w.-]+\.\w+(/[^\s]*)?", target), target
            continue
        path, _, place = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        assert file.exists(), f"{document.name} links to {target}"
        if place:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert place in {anchor(heading) for heading in headings}, f"{document.name} links to {target}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 900


def test_every_command_is_in_the_table() -> None:
    table = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    missing = [name for name in COMMANDS if f"`dpoeng {name}" not in table]
    assert not missing, f"docs/commands.md lacks {missing}"


@pytest.mark.slow  # needs the `docs` extra
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    import sys

    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = {path.parent.name for path in tmp_path.glob("*/index.html")}
    assert pages >= {path.stem for path in (ROOT / "docs").glob("*.md")}
    index = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "precompute-ref" in index
    assert 'data-md-type="toc" hidden' in index, "the home page has room for its picture"
    commands = (tmp_path / "commands" / "index.html").read_text(encoding="utf-8")
    cells = "".join(re.findall(r"<td>(.*?)</td>", commands, re.DOTALL))
    assert "<code><span>dpoeng</span> <span>config</span> <span>show|schema</span></code>" in cells
    assert not re.search(r"<code>(?!<span>)", cells), "each word of a command in a table stays whole"
    fetched = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?:[^"]+)"', index)
    assert [url for url in fetched if "canonical" not in url] == [], "the site asks no other machine for anything"
