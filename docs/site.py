"""Hooks of mkdocs: the root's documents become pages, links that leave the site become text, commands stay whole."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
FROM_ROOT = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
INLINE_CODE = re.compile(r"(?<!</span>)<code>([^<]*)</code>")  # a block's <code> follows an empty span
TABLE_CODE = re.compile(r"<code>([^<]*)</code>(?=(?:(?!<table|</table>).)*</table>)", re.DOTALL)
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages of the root, and gives every page not named in mkdocs.yml a place in it."""
    for source, page in FROM_ROOT.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    named = set(re.findall(r"[\w-]+\.md", str(config.nav)))
    others = sorted(file.src_uri for file in files.documentation_pages() if file.src_uri not in named)
    if others:
        config.nav.append({"More": others})
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links as they are right in the repository, as they are right in the site."""
    if page.file.src_uri == "index.md":
        page.meta["hide"] = ["toc"]  # room for the picture and for commands of 120 characters
    folder = ROOT if page.file.src_uri in FROM_ROOT.values() else ROOT / "docs"

    def rewritten(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        path = (folder / target).resolve()
        name = FROM_ROOT.get(path.name) if path.parent == ROOT else path.name if path.parent == ROOT / "docs" else None
        return f"[{text}]({name}{anchor})" if name and files.get_file_from_path(name) else text

    return LINK.sub(rewritten, markdown)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Keeps words of commands whole: all words of code in a table, options elsewhere. site.css does not break spans.

    `a\\|b` in a table, as GitHub wants it there, becomes `a|b`.
    """

    def in_table(match: re.Match[str]) -> str:
        return _spans(match[1].replace("\\|", "|"), "")

    def elsewhere(match: re.Match[str]) -> str:
        return _spans(match[1], "-")

    return INLINE_CODE.sub(elsewhere, TABLE_CODE.sub(in_table, html))


def _spans(code: str, beginning: str) -> str:
    """Inline code with a span around each word that begins so."""
    words = (f"<span>{word}</span>" if word.startswith(beginning) else word for word in code.split())
    return f"<code>{' '.join(words)}</code>"
