"""Text of the user's is never markup, an emoji or an escape sequence: not in a table, a sentence, a bar or a page."""

from __future__ import annotations

import ast
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from dpoeng_testing import pair_rows, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from dpoeng.cli.main import main
from dpoeng.cli.pages import html
from dpoeng.cli.progress import TerminalProgress
from dpoeng.cli.tables import Marked, Table, facts_table, say, to_text, visible

ROOT = Path(__file__).resolve().parents[2]
# What rich takes for a closing tag, an opening one, an emoji and a colour; and what a terminal obeys.
NASTY = "[/INST] [red] :smile: \x1b[31m\x9b2J\r\u202e"
SHOWN = "[/INST] [red] :smile: \\x1b[31m\\x9b2J\\r\\u202e"
CONTROLS = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]")

texts = st.text(st.characters(codec=None) | st.sampled_from("[]/:\\\x1b\x9b\n"), max_size=40) | st.sampled_from(
    ["[/x]", "[/]", "[bold]", "[link=a]", ":warning:", "\\[x]", "\x1b]8;;http://a\x07", NASTY]
)


def drawn(thing: Any) -> str:
    output = io.StringIO()
    Console(file=output, width=4000, force_terminal=True, color_system="standard").print(thing, soft_wrap=True)
    return re.sub("\x1b\\[[0-9;]*m", "", output.getvalue())  # the colours of rich's own


@given(texts, texts, st.sampled_from(["bold", "error"]))
def test_a_sentence_is_what_was_written(one: str, other: str, style: str) -> None:
    said = drawn(to_text(one, Marked(other, style)))
    assert said == visible(one + other).replace("\t", "    ") + "\n"
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", said)


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=3), texts, texts)
def test_a_table_shows_each_cell_as_it_was_written(rows: list[tuple[str, str]], title: str, note: str) -> None:
    table = Table(rows, ("[/a]", ":b:"), title, [note])
    said = drawn(table)
    for cell in ("[/a]", ":b:", *(cell for row in rows for cell in row), title, note):
        for line in visible(cell).replace("\t", "    ").splitlines():
            assert line.strip() in said
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", said)


class Texts(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@given(texts, texts, texts)
def test_a_page_shows_each_cell_as_it_was_written(one: str, two: str, title: str) -> None:
    page = Texts()
    page.feed(html.table(Table([(f"<b>{one}", Marked(two, "dim"))], ("<i>", ""), title, [f"&{one}"])))
    page.close()
    assert page.tags <= {"div", "table", "tr", "th", "td", "span", "h3", "p"}
    text = "".join(page.texts)
    for shown in (f"<b>{visible(one)}", visible(two), "<i>", visible(title), f"&{visible(one)}"):
        assert shown in text
    assert html.escape('<script>"') == "&lt;script&gt;&quot;"


def test_visible_keeps_what_people_write() -> None:
    assert visible("naïve 日本語 👍\n\ttab") == "naïve 日本語 👍\n\ttab"
    assert visible(NASTY) == SHOWN
    assert visible("\udcff\x00\x7f") == "\\udcff\\x00\\x7f"


def test_notes_and_bars_are_plain_too(capsys: pytest.CaptureFixture[str]) -> None:
    for terminal in (False, True):
        output = io.StringIO()
        progress = TerminalProgress(Console(file=output, width=300, force_terminal=terminal, color_system=None))
        progress.note(NASTY)
        with progress.task(NASTY, 2, "steps") as advance:
            advance(2, NASTY)
        assert output.getvalue().count(SHOWN) >= (3 if terminal else 2)
    say(NASTY)
    say(Marked(NASTY, "error"), NASTY)
    assert capsys.readouterr().out == f"{SHOWN}\n{SHOWN}{SHOWN}\n"


# --------------------------------------------------------------------------- every command


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A folder, a file, columns and values with nasty names; a cache of them and a run."""
    root = tmp_path_factory.mktemp("desk")
    folder = root / NASTY.replace("/", "∕")
    folder.mkdir()
    rows = [
        {NASTY: row["chosen"], "rejected": row["rejected"], "prompt": f"{row['prompt']}{NASTY}",
         "kind": [NASTY, "b[/]"][k % 2], ":smile:": "[/red]"}
        for k, row in enumerate(pair_rows(12))
    ]  # fmt: skip
    write_jsonl(folder / "pairs.jsonl", rows)
    score = ["precompute-ref", str(folder / "pairs.jsonl"), "--model", str(tiny_model), "--cache", str(folder / "c")]
    run = ["train", "--cache", str(folder / "c"), "--output-dir", str(folder / "out"), "--max-steps", "2"]
    for command in ([*score, "--columns", f"chosen={NASTY}"], [*run, "--eval-group-by", "kind,:smile:"]):
        with pytest.raises(SystemExit) as stop:
            main(command)
        assert stop.value.code == 0
    return folder


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("check D/pairs.jsonl --columns COLUMN", [SHOWN, "b[/]", "[/red]"]),
        ("check D/pairs.jsonl --columns COLUMN --html D/page.html", [SHOWN]),
        ("cache info D/c", [SHOWN]),
        ("cache verify D/c", ["sound"]),
        ("cache stats D/c", ["pairs.jsonl"]),
        ("cache stats D/c --html D/stats.html", [SHOWN]),
        ("cache export D/c D/rows.jsonl", [SHOWN]),
        ("cache merge D/d D/c", [SHOWN]),
        ("cache explain D/c", []),
        ("cache gc D/c", []),
        ("eval --cache D/c --adapter D/out --eval-group-by kind", [SHOWN, "b[/]"]),
        ("train --cache D/c --output-dir D/out --max-steps 2 --eval-group-by kind,:smile:", [SHOWN, "b[/]"]),
        ("compare D/out --prompt N --max-new-tokens 2 --text", [SHOWN]),
        ("merge D/out --into D/merged", [SHOWN]),
        ("report D/out", [SHOWN]),
        ("sweep --cache D/c --output-dir D/sweep --vary beta=0.1,0.2 --max-steps 1 --eval-share 0.3", [SHOWN]),
        ("init D/pairs.jsonl --output D/new.yaml", [SHOWN]),
        ("migrate D/train.py --output D/made.yaml", [SHOWN]),
        ("config show --prompt-format {prompt}N --where kind=='b'", [SHOWN]),
        pytest.param(
            "plan --model D/model --gpu 24gb --max-length 64 --html D/plan.html --no-compare",
            [SHOWN],
            marks=pytest.mark.slow,  # it simulates the step
        ),
    ],
    ids=lambda value: value.split(" -")[0] if isinstance(value, str) else "",
)
def test_commands_print_what_the_user_wrote(
    desk: Path, tiny_model: Path, command: str, words: list[str], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("COLUMNS", "2000")
    (desk / "train.py").write_text(f"DPOTrainer({NASTY!r}, ref_model={NASTY + '2'!r}, args=DPOConfig(beta={NASTY!r}))")
    (desk / "model").mkdir(exist_ok=True)
    (desk / "model" / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    stand_ins = {"COLUMN": f"chosen={NASTY}", "N": NASTY}
    arguments = [stand_ins.get(word, word.replace("D/", f"{desk}/").replace("}N", f"}}{NASTY}"))
                 for word in command.split()]  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    said = capsys.readouterr()
    assert stop.value.code == 0, said.err
    assert not CONTROLS.search(said.out.replace("\r\n", "\n"))
    assert not CONTROLS.search(said.err)
    for word in words:
        assert word in said.out.replace("∕", "/"), said.out


@pytest.mark.parametrize("command", [["check", NASTY], ["eval", "--adapter", NASTY], [NASTY], ["cache", "info", NASTY]])
def test_errors_are_plain_too(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(command)
    said = capsys.readouterr().err
    assert stop.value.code not in (0, 1), said
    assert not CONTROLS.search(said), ascii(said)


def test_json_holds_no_control_characters(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["cache", "info", str(desk / "c")], ["compare", str(desk / "out"), "--prompt", NASTY, "--text"]):
        with pytest.raises(SystemExit):
            main([*command, "--json", *(["--max-new-tokens", "1"] if command[0] == "compare" else [])])
        said = capsys.readouterr().out
        assert not CONTROLS.search(said)
        assert "[/INST]" in json.dumps(json.loads(said)) or "∕INST]" in said.replace("\\u2215", "∕")


def test_only_one_module_prints() -> None:
    """A command that calls rich or click.echo itself would bring markup back."""
    allowed = {ROOT / "cli" / name for name in ("main.py", "progress.py", "tables.py")}
    wrong = []
    for path in sorted({*(ROOT / "cli").rglob("*.py")} - allowed):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            if module and module.split(".")[0] == "rich":
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} imports {module}")
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("click.echo", "click.secho", "print"):
                shown = ast.unparse(node.args[0])
                if not shown.startswith("ctx.get_help()"):
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} prints {shown[:60]}")
    assert not wrong, "\n".join(wrong)


def test_facts_are_a_table_without_a_head() -> None:
    assert facts_table([("a", "b")]) == Table([("a", "b")], words=2)
