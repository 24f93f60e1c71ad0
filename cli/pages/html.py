"""One self-contained HTML page: its style, texts and tables. No script, no font, no network; `charts.py` draws.

Every text is escaped unless it is `Html`. Independent of the contents.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape as html_escape
from pathlib import Path

from dpoeng.cli.tables import Cell, Marked, Table, visible
from dpoeng.engine.runtime.outputs import GENERATOR, PAGE, writing

_STYLE = Path(__file__).with_name("page.css")


class Html(str):
    """A text that is HTML already and must not be escaped again."""

    __slots__ = ()


def page(title: str, parts: Iterable[str], subtitle: str = "") -> str:
    """The whole document; `parts` are HTML."""
    style = _STYLE.read_text(encoding="utf-8")
    below = f'<p class="dim">{escape(subtitle)}</p>' if subtitle else ""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{GENERATOR}'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body>\n<h1>{escape(title)}</h1>{below}\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def escape(value: str) -> str:
    """Text for HTML and its attributes; control characters are shown escaped."""
    return html_escape(visible(value))


def text(value: Cell) -> Html:
    """Escapes a cell unless it is `Html`; emphasised text gets its style as a class."""
    if isinstance(value, Marked):
        return Html(f'<span class="{escape(value.style)}">{escape(value.text)}</span>')
    return value if isinstance(value, Html) else Html(escape(value))


def heading(words: str) -> Html:
    """The heading of a section."""
    return Html(f"<h2>{text(words)}</h2>")


def section(title: str, *parts: str) -> list[str]:
    """A heading and its parts, if there are any."""
    nonempty = [part for part in parts if part]
    return [heading(title), *nonempty] if nonempty else []


def paragraph(words: str, kind: str = "") -> Html:
    """A paragraph; `kind` is a class of the style: dim, bad, good."""
    return Html(f'<p class="{kind}">{text(words)}</p>' if kind else f"<p>{text(words)}</p>")


def tag(level: str) -> Html:
    """A level (error, warning, info, ok) as a coloured word, readable without colour."""
    return Html(f'<span class="tag {level}">{escape(level)}</span>')


def pre(words: str) -> Html:
    """A text with its line breaks."""
    return Html(f"<pre>{text(words)}</pre>")


def details(summary: str, inner: str) -> Html:
    """A collapsed part; `inner` is HTML."""
    return Html(f"<details><summary>{text(summary)}</summary>{inner}</details>")


def cards(facts: Iterable[tuple[str, str]]) -> Html:
    """The most important figures: label and value."""
    inner = "".join(f'<div class="card"><b>{text(value)}</b><span>{text(name)}</span></div>' for name, value in facts)
    return Html(f'<div class="cards">{inner}</div>')


def table(shown: Table) -> Html:
    """A table with its title and notes; if all columns are words, they are left-aligned and may wrap.

    A table without rows is empty.
    """
    if not shown.rows:
        return Html("")

    def line(cells: Sequence[Cell], name: str) -> str:
        return "<tr>" + "".join(f"<{name}>{text(cell)}</{name}>" for cell in cells) + "</tr>"

    body = (line(shown.columns, "th") if shown.columns else "") + "".join(line(row, "td") for row in shown.rows)
    words = shown.words >= (len(shown.columns) or 2)
    title = f"<h3>{text(shown.title)}</h3>" if shown.title else ""
    notes = "".join(paragraph(text(note), "dim") for note in shown.notes)
    return Html(f'{title}<div class="wide"><table{" class=text" if words else ""}>{body}</table></div>{notes}')


def plots(figures: Iterable[str]) -> Html:
    """Figures next to each other if there is space."""
    return Html(f'<div class="plots">{"".join(figures)}</div>')


def write_page(path: Path, page: str, *, inputs: Iterable[Path] = (), force: bool = False) -> None:
    """Writes a page atomically; see `engine/runtime/outputs.py` for what it may replace.

    Raises:
        UserError: another file has this name, or the file cannot be written.
    """
    with writing(path, PAGE, inputs=inputs, force=force) as temporary:
        temporary.write_text(page, encoding="utf-8")
