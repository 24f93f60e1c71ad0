"""Where trainers put templates beside an adapter: each is read as transformers reads it, and goes into the result."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from chat_styles import TEMPLATES, styled_tokenizer

from dpoeng.cache.errors import UserError
from dpoeng.engine.models.sources import copy_beside, find_tokenizer
from dpoeng.engine.models.tokenizer import choose_tokenizer, copy_tokenizer, load_chosen, load_tokenizer

PLAIN, TOOLS = ((TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8") for name in ("chatml", "qwen3"))
NAMED = [{"name": "default", "template": PLAIN}, {"name": "tool_use", "template": TOOLS}]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    styled_tokenizer("zephyr").save_pretrained(folder)
    (folder / "config.json").write_text("{}")
    return folder


def put(folder: Path, where: str, held: Any) -> None:
    """A template as one of the files that may hold it."""
    folder.mkdir(parents=True, exist_ok=True)
    if where == "additional":
        (folder / "chat_template.jinja").write_text(PLAIN, encoding="utf-8")
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text(TOOLS, encoding="utf-8")
        return
    file = folder / where
    fields = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**fields, "chat_template": held}), encoding="utf-8")


@pytest.mark.parametrize("own_vocabulary", [True, False])
@pytest.mark.parametrize(
    ("where", "held"),
    [
        ("tokenizer_config.json", PLAIN),
        ("tokenizer_config.json", NAMED),
        ("chat_template.json", PLAIN),
        ("chat_template.json", NAMED),
        ("additional", None),
    ],
)
def test_templates_are_read_wherever_they_stand(
    base: Path, tmp_path: Path, where: str, held: Any, own_vocabulary: bool
) -> None:
    adapter, into = tmp_path / "adapter", tmp_path / "into"
    if own_vocabulary:
        styled_tokenizer("chatml").save_pretrained(adapter)
        (adapter / "chat_template.jinja").unlink()
    put(adapter, where, held)
    choice = choose_tokenizer(find_tokenizer(str(base)), str(adapter), None)
    tokenizer = load_chosen(choice)
    shutil.copytree(base, into)
    copy_tokenizer(choice, into)
    for found in (tokenizer, load_tokenizer(find_tokenizer(str(into)))):
        assert found.get_chat_template() == PLAIN
        assert found.get_chat_template(tools=[{}]) == (PLAIN if held == PLAIN else TOOLS)
        assert found.get_vocab() == tokenizer.get_vocab()


def test_a_folder_that_holds_no_template_leaves_the_models_own(base: Path, tmp_path: Path) -> None:
    for held in ({"chat_template": None}, {"note": "chat_template"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(held))
        choice = choose_tokenizer(find_tokenizer(str(base)), str(tmp_path), None)
        assert choice.template is None
        assert load_chosen(choice).chat_template == load_tokenizer(find_tokenizer(str(base))).chat_template


def test_what_is_no_template_is_refused(base: Path, tmp_path: Path) -> None:
    (tmp_path / "chat_template.json").write_text('{"chat_template": [{"name": "default"}]}')
    with pytest.raises(UserError) as caught:
        choose_tokenizer(find_tokenizer(str(base)), str(tmp_path), None)
    assert caught.value.code == "tokenizer-missing"


def test_a_checkpoint_keeps_all_templates_of_its_base(tmp_path: Path) -> None:
    put(tmp_path / "base", "additional", None)
    into = tmp_path / "into"
    into.mkdir()
    copy_beside(find_tokenizer(str(tmp_path / "base")), into)
    assert (into / "additional_chat_templates" / "tool_use.jinja").read_text(encoding="utf-8") == TOOLS
