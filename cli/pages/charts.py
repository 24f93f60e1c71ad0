"""Charts as inline SVG: histograms, bars, intervals and curves. Axes have round numbers and a name.

Independent of the data shown. Widths and positions are in SVG units; a page scales the chart to its column.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dpoeng.cache.words import counted, number
from dpoeng.cli.pages.html import Html, escape

Point = tuple[float, float]

_WIDTH, _HEIGHT = 440, 206

_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 12, 8, 36  # margins for the axes' numbers and names

_COLOURS = ("--c0", "--c1", "--c2", "--c3", "--c4", "--c5")

CURVES = len(_COLOURS)
"""Maximum number of curves, because more would share colours."""

SMOOTHED_FROM = 60
"""Curves with more points than this are drawn faint, below their running mean."""


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of a chart.

    Attributes:
        points: (x, y), x ascending.
        dots: mark every point; for few points.
        exact: never draw it faint below a running mean.
        colour: index in the palette; by default the curve's index in the chart.
        window: points of the running mean, 1 for none; by default a twentieth of a long curve.
    """

    name: str
    points: Sequence[Point]
    dots: bool = False
    exact: bool = False
    colour: int | None = None
    window: int | None = None


@dataclass(frozen=True, slots=True)
class _Frame:
    """The scale of a chart: x from `left` to `right`, y up to `floor`."""

    x: tuple[float, float]
    y: tuple[float, float]
    left: float = _LEFT
    right: float = _WIDTH - _RIGHT
    floor: float = _HEIGHT - _BOTTOM

    def across(self, x: float) -> float:
        low, high = self.x
        return self.left + ((x - low) / (high - low) if high > low else 0.5) * (self.right - self.left)

    def up(self, y: float) -> float:
        low, high = self.y
        return self.floor - (y - low) / (high - low) * (self.floor - _TOP)


def histogram(
    name: str, unit: str, edges: Sequence[float], counts: Sequence[int], *, of: str = "pair", whole: bool = False
) -> Html:
    """A bar chart: `counts` [n] between `edges` [n + 1]; each bar's tooltip has its range and count.

    With `whole` the values are whole numbers, and a bar's upper edge belongs to the next bar.
    """
    ticks = _whole_ticks(0, max(*counts, 1))
    shift = 0.5 if whole and edges[1] - edges[0] == 1 else 0.0  # centre the bar of a single number on it
    frame = _Frame((edges[0] - shift, edges[-1] - shift), (0, ticks[-1]))
    drawn = [_y_axis(frame, ticks), _x_axis(frame, unit, whole=whole)]
    for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
        if count:
            left, right, top = frame.across(low - shift), frame.across(high - shift), frame.up(count)
            last = high - 1 if whole else high
            tooltip = number(low) if whole and last == low else f"{number(low)} to {number(last)}"
            drawn.append(
                f'<rect class="bar" x="{left:.1f}" y="{top:.1f}" width="{max(right - left - 1, 1):.1f}" '
                f'height="{frame.floor - top:.1f}"><title>{tooltip}: {counted(count, escape(of))}</title></rect>'
            )
    if edges[0] < 0 < edges[-1]:
        zero = frame.across(0)
        drawn.append(f'<line class="zero" x1="{zero:.1f}" x2="{zero:.1f}" y1="{_TOP}" y2="{frame.floor}"/>')
    return _figure(_caption(name, "", []), f"histogram of {name}", "".join(drawn) + _y_name(f"{of}s", frame.floor))


def bars(name: str, rows: Sequence[tuple[str, Sequence[tuple[str, float]]]], *, unit: str = "") -> Html:
    """Horizontal bars, one below the other: (label, its parts by name, which are stacked and added up)."""
    parts = list(dict.fromkeys(part for _, row in rows for part, _ in row))
    colours = {part: _colour(k) for k, part in enumerate(parts)}
    top = max((sum(value for _, value in row) for _, row in rows), default=0.0) or 1.0
    room = _WIDTH - 70  # leave space for the number next to the longest bar
    drawn = []
    for k, (label, row) in enumerate(rows):
        at, left = 34 * k, 0.0
        drawn.append(f'<text x="0" y="{at + 12}">{escape(label)}</text>')
        for part, value in row:
            wide = room * value / top
            tooltip = f"{escape(label)}{f', {escape(part)}' if part else ''}: {number(value)} {escape(unit)}"
            drawn.append(
                f'<rect x="{left:.1f}" y="{at + 16}" width="{wide:.1f}" height="12" fill="{colours[part]}">'
                f"<title>{tooltip}</title></rect>"
            )
            left += wide
        drawn.append(f'<text x="{left + 6:.1f}" y="{at + 26}">{number(sum(value for _, value in row))}</text>')
    caption = _caption(name, unit, list(colours.items()))
    return _figure(caption, name, "".join(drawn), 34 * len(rows))


def interval_chart(name: str, rows: Sequence[tuple[str, float, float, float]], *, unit: str = "") -> Html:
    """A dot and its interval per row, (label, value, low, high), with a line at 0."""
    ticks = _ticks(min(0.0, *(row[2] for row in rows)), max(0.0, *(row[3] for row in rows)))
    floor = 32 * len(rows) + 8
    frame = _Frame((ticks[0], ticks[-1]), (0, 1), left=8, right=_WIDTH - 8, floor=floor)
    drawn = []
    for tick in ticks:
        at = frame.across(tick)
        kind = "zero" if tick == 0 else "axis"
        drawn.append(f'<line class="{kind}" x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="{floor}"/>')
        drawn.append(_x_number(frame, tick, _tick(tick, ticks)))
    for k, (label, value, lowest, highest) in enumerate(rows):
        at = 32 * k + 24
        tooltip = f"{escape(label)}: {number(value)}, {number(lowest)} to {number(highest)}"
        drawn.append(f'<text x="{frame.left}" y="{at - 10}">{escape(label)}</text>')
        drawn.append(
            f'<path class="curve" stroke="{_colour(0)}" '
            f'd="M{frame.across(lowest):.1f} {at}L{frame.across(highest):.1f} {at}"/>'
            f'<circle cx="{frame.across(value):.1f}" cy="{at}" r="3.5" fill="{_colour(0)}"><title>{tooltip}</title>'
            "</circle>"
        )
    return _figure(_caption(name, unit, []), name, "".join(drawn), floor + 20)


def line_chart(
    name: str,
    curves: Sequence[Curve],
    *,
    unit: str = "",
    x_name: str = "step",
    x_range: tuple[float, float] | None = None,
    logarithmic: bool = False,
) -> Html:
    """Curves over a common x; a point that is not finite is a gap in its curve.

    With `logarithmic` both axes are logarithmic, and values that are not above 0 are gaps.
    """
    colours = [_colour(k if curve.colour is None else curve.colour) for k, curve in enumerate(curves)]
    firsts = {colour: curve.name for curve, colour in reversed(list(zip(curves, colours, strict=True)))}
    caption = _caption(name, unit, [(firsts[colour], colour) for colour in dict.fromkeys(colours)])
    if logarithmic:
        curves = [replace(curve, points=[(_log10(x), _log10(y)) for x, y in curve.points]) for curve in curves]
    finite = [(x, y) for curve in curves for x, y in curve.points if math.isfinite(x + y)]
    if not finite:
        return _figure(caption, name, f'<text x="{_LEFT}" y="{_TOP + 20}">no values</text>')
    across = x_range or (min(x for x, _ in finite), max(x for x, _ in finite))
    low, high = min(y for _, y in finite), max(y for _, y in finite)
    ticks = [float(k) for k in range(math.floor(low), math.floor(high) + 2)] if logarithmic else _ticks(low, high)
    frame = _Frame(across, (ticks[0], ticks[-1]))
    whole = all(float(x).is_integer() for x, _ in finite) and not logarithmic
    drawn = [_y_axis(frame, ticks, logarithmic), _x_axis(frame, x_name, logarithmic, whole=whole)]
    drawn += [_drawn(curve, colour, frame, x_name, logarithmic) for curve, colour in zip(curves, colours, strict=True)]
    return _figure(caption, name, "".join(drawn))


def _drawn(curve: Curve, colour: str, frame: _Frame, x_name: str, logarithmic: bool) -> str:
    """A curve, its running mean, and its points with tooltips."""
    window = curve.window or (max(1, len(curve.points) // 20) if len(curve.points) > SMOOTHED_FROM else 1)
    smooth = window > 1 and not curve.dots and not curve.exact
    kind = " faint" if smooth else " dots" if curve.dots else ""
    drawn = [f'<path class="curve{kind}" stroke="{colour}" d="{_path(curve.points, frame)}"/>']
    if smooth:
        mean = running_mean(curve.points, window)
        drawn.append(f'<path class="curve" stroke="{colour}" d="{_path(mean, frame)}"/>')
    few = curve.dots or len(curve.points) <= 12
    for x, y in curve.points if len(curve.points) <= 400 else ():
        if math.isfinite(x + y):
            reading, at = (number(10**value if logarithmic else value) for value in (y, x))
            drawn.append(
                f'<circle cx="{frame.across(x):.1f}" cy="{frame.up(y):.1f}" r="{2.6 if few else 5}" fill="{colour}" '
                f'fill-opacity="{1 if few else 0}"><title>{escape(curve.name)}, '
                f"{escape(x_name)} {at}: {reading}</title></circle>"
            )
    return "".join(drawn)


def running_mean(points: Sequence[Point], window: int) -> list[Point]:
    """The centred mean over `window` points, fewer at the ends; ignores values that are not finite."""
    half = max(1, window // 2)
    smooth = []
    for k, (x, _) in enumerate(points):
        near = [y for _, y in points[max(0, k - half) : k + half + 1] if math.isfinite(y)]
        smooth.append((x, sum(near) / len(near) if near else math.nan))
    return smooth


# --------------------------------------------------------------------------- axes


def _y_axis(frame: _Frame, ticks: Sequence[float], logarithmic: bool = False) -> str:
    drawn = []
    for tick in ticks:
        at = frame.up(tick)
        kind = "zero" if tick == 0 and frame.y[0] < 0 and not logarithmic else "axis"
        words = f"{10**tick:g}" if logarithmic else _tick(tick, ticks)
        drawn.append(f'<text x="{frame.left - 6}" y="{at + 4:.1f}" text-anchor="end">{words}</text>')
        drawn.append(f'<line class="{kind}" x1="{frame.left}" x2="{frame.right}" y1="{at:.1f}" y2="{at:.1f}"/>')
    return "".join(drawn)


def _x_axis(frame: _Frame, name: str, logarithmic: bool = False, *, whole: bool = False) -> str:
    """Round numbers below the axis if at least two lie within it, else its ends; and its name."""
    low, high = frame.x
    if logarithmic:
        ticks = [float(k) for k in range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1)]
    else:
        ticks = [tick for tick in (_whole_ticks if whole else _ticks)(low, high) if low <= tick <= high]
    if len(ticks) < 2:
        ticks = [low, high] if high > low else [low]
        words = [number(10**tick if logarithmic else tick) for tick in ticks]
    else:
        words = [number(10**tick) if logarithmic else _tick(tick, ticks) for tick in ticks]
    drawn = [_x_number(frame, tick, word) for tick, word in zip(ticks, words, strict=True)]
    middle = (frame.left + frame.right) / 2
    return (
        "".join(drawn)
        + f'<text class="name" x="{middle}" y="{frame.floor + 31}" text-anchor="middle">{escape(name)}</text>'
    )


def _x_number(frame: _Frame, value: float, words: str) -> str:
    at = frame.across(value)
    half = 3.2 * len(words)  # about half its width, to keep numbers at the edges inside the picture
    anchor = "start" if at - half < 0 else "end" if at + half > _WIDTH else "middle"
    return f'<text x="{at:.1f}" y="{frame.floor + 16}" text-anchor="{anchor}">{words}</text>'


def _y_name(name: str, floor: float) -> str:
    at = (_TOP + floor) / 2
    return (
        f'<text class="name" transform="translate(10 {at:.1f}) rotate(-90)" text-anchor="middle">{escape(name)}</text>'
    )


def _ticks(low: float, high: float) -> list[float]:
    """Four to seven round numbers from at most `low` to at least `high`."""
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
        spread = abs(high) * 0.1 or 1.0
        low, high = low - spread, high + spread
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    return _multiples(step, low, high)


def _whole_ticks(low: float, high: float) -> list[float]:
    """The same for whole numbers."""
    ticks = _ticks(low, high)
    step = max(1.0, ticks[1] - ticks[0])
    return ticks if step.is_integer() and step > 1 else _multiples(math.ceil(step), low, high)


def _multiples(step: float, low: float, high: float) -> list[float]:
    first = math.floor(low / step + 1e-9)
    last = max(math.ceil(high / step - 1e-9), first + 1)
    return [k * step for k in range(first, last + 1)]


def _tick(value: float, ticks: Sequence[float]) -> str:
    """A tick with enough decimals to distinguish neighbours."""
    step = ticks[1] - ticks[0]
    if value == 0:
        return "0"
    if abs(ticks[-1]) < 1e-3 and abs(ticks[0]) < 1e-3:
        return f"{value:.1e}".replace("e-0", "e-")
    decimals = next(count for count in range(12) if math.isclose(round(step, count), step, rel_tol=1e-6))
    return f"{value:,.{decimals}f}"


# --------------------------------------------------------------------------- parts


def _colour(place: int) -> str:
    return f"var({_COLOURS[place % len(_COLOURS)]})"


def _log10(value: float) -> float:
    return math.log10(value) if value > 0 else math.nan


def _caption(name: str, unit: str, keys: Sequence[tuple[str, str]]) -> Html:
    """A figure's name, with a legend if it has several colours."""
    legend = "".join(
        f'<span class="key"><i style="background: {colour}"></i>{escape(key)}</span> '
        for key, colour in keys
        if len(keys) > 1
    )
    return Html(f"<b>{escape(name)}</b>{f' <span class=dim>({escape(unit)})</span>' if unit else ''} {legend}")


def _figure(caption: Html, label: str, inner: str, height: int = _HEIGHT) -> Html:
    return Html(
        f'<figure><figcaption>{caption}</figcaption><svg viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'aria-label="{escape(label)}">{inner}</svg></figure>'
    )


def _path(points: Sequence[Point], frame: _Frame) -> str:
    """An SVG path; a point that is not finite leaves a gap."""
    commands, pen = [], "M"
    for x, y in points:
        if not math.isfinite(x + y):
            pen = "M"
            continue
        commands.append(f"{pen}{frame.across(x):.1f} {frame.up(y):.1f}")
        pen = "L"
    return "".join(commands)
