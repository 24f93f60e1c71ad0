"""One self-contained HTML page: its style, tables, and plots as inline SVG. No script, no font, no network.

Every text is escaped unless it is `Html`. Knows nothing of what is shown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from html import escape as html_escape
from pathlib import Path

from dpoeng.cli.tables import Cell, Marked, Table, visible
from dpoeng.engine.runtime.outputs import GENERATOR, PAGE, writing

Point = tuple[float, float]

_STYLE = Path(__file__).with_name("page.css")

_WIDTH, _HEIGHT = 440, 190

_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 8, 8, 20  # margins of a plot, for the numbers beside its axes

_COLOURS = ("--c0", "--c1", "--c2", "--c3", "--c4", "--c5")

SMOOTHED_FROM = 60
"""Curves of more points than this are drawn faint under their running mean."""


class Html(str):
    """A text that is HTML already and is not escaped again."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of a chart.

    Attributes:
        points: (x, y), x ascending.
        dots: every point is marked; for few points.
        exact: never drawn faint under a running mean.
        colour: of the palette; default: by the curve's place in the chart.
    """

    name: str
    points: Sequence[Point]
    dots: bool = False
    exact: bool = False
    colour: int | None = None


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
    """Text for HTML and its attributes; control characters are shown as escapes."""
    return html_escape(visible(value))


def text(value: Cell) -> Html:
    """Escaped, unless it is `Html`; marked text carries its style as a class."""
    if isinstance(value, Marked):
        return Html(f'<span class="{escape(value.style)}">{escape(value.text)}</span>')
    return value if isinstance(value, Html) else Html(escape(value))


def heading(words: str) -> Html:
    """A section begins."""
    return Html(f"<h2>{text(words)}</h2>")


def paragraph(words: str, kind: str = "") -> Html:
    """A sentence; `kind` is a class of the style: dim, bad, good."""
    return Html(f'<p class="{kind}">{text(words)}</p>' if kind else f"<p>{text(words)}</p>")


def tag(level: str) -> Html:
    """A level (error, warning, info, ok) as a coloured word; the word says it too, for readers who see no colour."""
    return Html(f'<span class="tag {level}">{escape(level)}</span>')


def pre(words: str) -> Html:
    """A text with its line breaks."""
    return Html(f"<pre>{text(words)}</pre>")


def details(summary: str, inner: str) -> Html:
    """Something to unfold; `inner` is HTML."""
    return Html(f"<details><summary>{text(summary)}</summary>{inner}</details>")


def cards(facts: Iterable[tuple[str, str]]) -> Html:
    """The few figures that matter most: label and value."""
    inner = "".join(f'<div class="card"><b>{text(value)}</b><span>{text(name)}</span></div>' for name, value in facts)
    return Html(f'<div class="cards">{inner}</div>')


def table(shown: Table) -> Html:
    """A table with its title and notes; where all columns hold words, they are set to the left and may break."""

    def line(cells: Sequence[Cell], name: str) -> str:
        return "<tr>" + "".join(f"<{name}>{text(cell)}</{name}>" for cell in cells) + "</tr>"

    body = (line(shown.columns, "th") if shown.columns else "") + "".join(line(row, "td") for row in shown.rows)
    words = shown.words >= (len(shown.columns) or 2)
    title = f"<h3>{text(shown.title)}</h3>" if shown.title else ""
    notes = "".join(paragraph(text(note), "dim") for note in shown.notes)
    return Html(f'{title}<div class="wide"><table{" class=text" if words else ""}>{body}</table></div>{notes}')


def plots(figures: Iterable[str]) -> Html:
    """Figures side by side where there is room."""
    return Html(f'<div class="plots">{"".join(figures)}</div>')


def number(value: float) -> str:
    """Four digits, or a whole number with separators."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def histogram(name: str, unit: str, edges: Sequence[float], counts: Sequence[int]) -> Html:
    """A bar chart: `counts` [n] between `edges` [n + 1]; each bar carries its range and count as a tooltip."""
    low, high, top, floor = edges[0], edges[-1], max(*counts, 1), _HEIGHT - _BOTTOM
    step = _WIDTH / len(counts)
    bars = [
        f'<rect class="bar" x="{k * step:.1f}" y="{floor * (1 - count / top):.1f}" width="{max(step - 1, 1):.1f}" '
        f'height="{floor * count / top:.1f}"><title>{number(edges[k])} to {number(edges[k + 1])}: {count:,}'
        "</title></rect>"
        for k, count in enumerate(counts)
        if count
    ]
    if low < 0 < high:
        zero = _WIDTH * -low / (high - low)
        bars.append(f'<line class="zero" x1="{zero:.1f}" x2="{zero:.1f}" y1="0" y2="{floor}"/>')
    return _figure(
        Html(f"{escape(name)} <span class=dim>({escape(unit)})</span>"),
        f"histogram of {name}",
        "".join(bars) + f'<line class="axis" x1="0" x2="{_WIDTH}" y1="{floor}" y2="{floor}"/>'
        f'<text x="0" y="{_HEIGHT - 5}">{number(low)}</text>'
        f'<text x="{_WIDTH}" y="{_HEIGHT - 5}" text-anchor="end">{number(high)}</text>',
    )


def bars(name: str, rows: Sequence[tuple[str, Sequence[tuple[str, float]]]], *, unit: str = "") -> Html:
    """Bars from the left, one below the other: (label, its parts by name, which stand end to end and are added up)."""
    parts = list(dict.fromkeys(part for _, row in rows for part, _ in row))
    colours = {part: _colour(k) for k, part in enumerate(parts)}
    top = max((sum(value for _, value in row) for _, row in rows), default=0.0) or 1.0
    room = _WIDTH - 70  # beside the longest bar stands its number
    drawn = []
    for k, (label, row) in enumerate(rows):
        at, left = 34 * k, 0.0
        drawn.append(f'<text x="0" y="{at + 12}">{escape(label)}</text>')
        for part, value in row:
            wide = room * value / top
            told = f"{escape(label)}{f', {escape(part)}' if part else ''}: {number(value)} {escape(unit)}"
            drawn.append(
                f'<rect x="{left:.1f}" y="{at + 16}" width="{wide:.1f}" height="12" fill="{colours[part]}">'
                f"<title>{told}</title></rect>"
            )
            left += wide
        drawn.append(f'<text x="{left + 6:.1f}" y="{at + 26}">{number(sum(value for _, value in row))}</text>')
    caption = _caption(name, unit, list(colours.items()))
    return _figure(caption, name, "".join(drawn), 34 * len(rows))


def interval_chart(name: str, rows: Sequence[tuple[str, float, float, float]], *, unit: str = "") -> Html:
    """A dot and its interval a row, (label, value, low, high), one below the other, with a line at 0."""
    low = min(0.0, *(row[2] for row in rows))
    high = max(0.0, *(row[3] for row in rows))
    ticks = _ticks(low, high)
    left, right, floor = 8, _WIDTH - 8, 32 * len(rows) + 8

    def across(value: float) -> float:
        return left + (value - ticks[0]) / (ticks[-1] - ticks[0]) * (right - left)

    drawn = []
    for tick in ticks:
        at = across(tick)
        anchor = "start" if tick == ticks[0] else "end" if tick == ticks[-1] else "middle"
        kind = "zero" if tick == 0 else "axis"
        drawn.append(f'<line class="{kind}" x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="{floor}"/>')
        drawn.append(f'<text x="{at:.1f}" y="{floor + 14}" text-anchor="{anchor}">{_tick(tick, ticks)}</text>')
    for k, (label, value, lowest, highest) in enumerate(rows):
        at = 32 * k + 24
        told = f"{escape(label)}: {number(value)}, {number(lowest)} to {number(highest)}"
        drawn.append(f'<text x="{left}" y="{at - 10}">{escape(label)}</text>')
        drawn.append(
            f'<path class="curve" stroke="{_colour(0)}" d="M{across(lowest):.1f} {at}L{across(highest):.1f} {at}"/>'
            f'<circle cx="{across(value):.1f}" cy="{at}" r="3.5" fill="{_colour(0)}"><title>{told}</title></circle>'
        )
    return _figure(_caption(name, unit, []), name, "".join(drawn), floor + 20)


def line_chart(
    name: str, curves: Sequence[Curve], *, unit: str = "", x_name: str = "step", logarithmic: bool = False
) -> Html:
    """Curves over a common x; points that are no finite number are left out of a curve, which has a gap there.

    With `logarithmic` both axes are; what is not above 0 then is no number.
    """
    colours = [_colour(k if curve.colour is None else curve.colour) for k, curve in enumerate(curves)]
    firsts = {colour: curve.name for curve, colour in reversed(list(zip(curves, colours, strict=True)))}
    caption = _caption(name, unit, [(firsts[colour], colour) for colour in dict.fromkeys(colours)])
    if logarithmic:
        curves = [replace(curve, points=[(_log10(x), _log10(y)) for x, y in curve.points]) for curve in curves]
    finite = [(x, y) for curve in curves for x, y in curve.points if math.isfinite(x + y)]
    if not finite:
        return _figure(caption, name, f'<text x="{_LEFT}" y="{_TOP + 20}">no values</text>')
    x_low, x_high = min(x for x, _ in finite), max(x for x, _ in finite)
    low, high = min(y for _, y in finite), max(y for _, y in finite)
    ticks = [float(k) for k in range(math.floor(low), math.floor(high) + 2)] if logarithmic else _ticks(low, high)
    y_low, y_high = ticks[0], ticks[-1]

    def place(x: float, y: float) -> Point:
        across = (x - x_low) / (x_high - x_low) if x_high > x_low else 0.5
        up = (y - y_low) / (y_high - y_low)
        return _LEFT + across * (_WIDTH - _LEFT - _RIGHT), _TOP + (1 - up) * (_HEIGHT - _TOP - _BOTTOM)

    def told(value: float) -> str:
        return number(10**value if logarithmic else value)

    drawn = []
    for tick in ticks:
        _, at = place(x_low, tick)
        kind = "zero" if tick == 0 and y_low < 0 and not logarithmic else "axis"
        words = f"{10**tick:g}" if logarithmic else _tick(tick, ticks)
        drawn.append(f'<line class="{kind}" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        drawn.append(f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{words}</text>')
    drawn.append(f'<text x="{_LEFT}" y="{_HEIGHT - 4}">{told(x_low)}</text>')
    if x_high > x_low:
        drawn.append(
            f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 4}" text-anchor="end">{escape(x_name)} {told(x_high)}</text>'
        )
    for curve, colour in zip(curves, colours, strict=True):
        smooth = len(curve.points) > SMOOTHED_FROM and not curve.dots and not curve.exact
        path = _path(curve.points, place)
        drawn.append(
            f'<path class="curve{" faint" if smooth else " dots" if curve.dots else ""}" stroke="{colour}" d="{path}"/>'
        )
        if smooth:
            drawn.append(f'<path class="curve" stroke="{colour}" d="{_path(_running_mean(curve.points), place)}"/>')
        few = curve.dots or len(curve.points) <= 12
        for x, y in curve.points if len(curve.points) <= 400 else ():
            if math.isfinite(x + y):
                left, up = place(x, y)
                drawn.append(
                    f'<circle cx="{left:.1f}" cy="{up:.1f}" r="{2.6 if few else 5}" fill="{colour}" '
                    f'fill-opacity="{1 if few else 0}"><title>{escape(curve.name)}, {escape(x_name)} {told(x)}: '
                    f"{told(y)}</title></circle>"
                )
    return _figure(caption, name, "".join(drawn))


def _colour(place: int) -> str:
    return f"var({_COLOURS[place % len(_COLOURS)]})"


def _log10(value: float) -> float:
    return math.log10(value) if value > 0 else math.nan


def _caption(name: str, unit: str, keys: Sequence[tuple[str, str]]) -> Html:
    """A figure's name, and which colour is what where there is more than one."""
    shown = "".join(
        f'<span class="key"><i style="background: {colour}"></i>{escape(key)}</span> '
        for key, colour in keys
        if len(keys) > 1
    )
    return Html(f"<b>{escape(name)}</b>{f' <span class=dim>({escape(unit)})</span>' if unit else ''} {shown}")


def _figure(caption: Html, label: str, inner: str, height: int = _HEIGHT) -> Html:
    return Html(
        f'<figure><figcaption>{caption}</figcaption><svg viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'aria-label="{escape(label)}">{inner}</svg></figure>'
    )


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from at most `low` to at least `high`, four to seven of them."""
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
        spread = abs(high) * 0.1 or 1.0
        low, high = low - spread, high + spread
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [k * step for k in range(first, last + 1)]


def _tick(value: float, ticks: Sequence[float]) -> str:
    """A tick with as many decimals as tell neighbours apart."""
    step = ticks[1] - ticks[0]
    if value == 0:
        return "0"
    if abs(ticks[-1]) < 1e-3 and abs(ticks[0]) < 1e-3:
        return f"{value:.1e}".replace("e-0", "e-")
    decimals = next(count for count in range(12) if math.isclose(round(step, count), step, rel_tol=1e-6))
    return f"{value:,.{decimals}f}"


def _path(points: Sequence[Point], place: Callable[[float, float], Point]) -> str:
    """An SVG path; a point that is no number lifts the pen."""
    commands, pen = [], "M"
    for x, y in points:
        if not math.isfinite(x + y):
            pen = "M"
            continue
        left, up = place(x, y)
        commands.append(f"{pen}{left:.1f} {up:.1f}")
        pen = "L"
    return "".join(commands)


def _running_mean(points: Sequence[Point]) -> list[Point]:
    """The mean over a window of a twentieth of the points, centred, narrower at the ends."""
    half = max(1, len(points) // 40)
    smooth = []
    for k, (x, _) in enumerate(points):
        window = [y for _, y in points[max(0, k - half) : k + half + 1] if math.isfinite(y)]
        smooth.append((x, sum(window) / len(window) if window else math.nan))
    return smooth


def write_page(path: Path, page: str, *, inputs: Iterable[Path] = (), force: bool = False) -> None:
    """Writes a page whole or not at all; see `engine/runtime/outputs.py` for what it replaces.

    Raises:
        UserError: something else stands there, or the file cannot be written.
    """
    with writing(path, PAGE, inputs=inputs, force=force) as temporary:
        temporary.write_text(page, encoding="utf-8")
