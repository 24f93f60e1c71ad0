"""The page of `dpoeng bench`: whole, self-contained, and with the numbers of the records."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

from dpoeng.cli.bench.commands import bench
from dpoeng.cli.bench.tables import tables_of
from dpoeng.cli.pages.bench import bench_page
from dpoeng.cli.pages.charts import Curve, bars, line_chart


def svg(figure: str) -> ElementTree.Element:
    found = re.search(r"<svg.*?</svg>", figure, re.DOTALL)
    assert found
    return ElementTree.fromstring(found[0])


def test_bars_are_as_long_as_their_numbers() -> None:
    figure = bars("time", [("ours <fast>", [("head", 1.0), ("rest", 3.0)]), ("theirs", [("rest", 8.0)])], unit="s")
    rects = list(svg(figure).iter("rect"))
    widths = [float(rect.attrib["width"]) for rect in rects]
    assert widths[1] == pytest.approx(3 * widths[0], abs=0.2)
    assert widths[2] == pytest.approx(8 * widths[0], abs=0.5)
    assert float(rects[1].attrib["x"]) == pytest.approx(widths[0], abs=0.1)
    assert rects[1].attrib["fill"] == rects[2].attrib["fill"] != rects[0].attrib["fill"]
    assert [rect[0].text for rect in rects] == ["ours <fast>, head: 1 s", "ours <fast>, rest: 3 s", "theirs, rest: 8 s"]
    assert [text.text for text in svg(figure).iter("text")] == ["ours <fast>", "4", "theirs", "8"]
    assert figure.count('class="key"') == 2
    assert bars("nothing", []).count("<rect") == 0


def test_a_logarithmic_chart_is_straight_for_a_power() -> None:
    chart = svg(line_chart("t", [Curve("a", [(1, 2.0), (10, 20.0), (100, 200.0), (0, 5.0)])], logarithmic=True))
    places = [(float(dot.attrib["cx"]), float(dot.attrib["cy"])) for dot in chart.iter("circle")]
    assert len(places) == 3, "0 has no logarithm"
    (x0, y0), (x1, y1), (x2, y2) = places
    assert (x1 - x0, y1 - y0) == pytest.approx((x2 - x1, y2 - y1), abs=0.2)
    words = [text.text for text in chart.iter("text")]
    assert words == ["1", "10", "100", "1000", "1", "10", "100", "step"]
    assert [dot[0].text for dot in chart.iter("circle")][1] == "a, step 10: 20"


RECORDS = [
    json.loads(line)
    for line in (Path(__file__).parents[2] / "bench/results/kernels-cpu.jsonl").read_text().splitlines()
]


def test_a_page_of_what_the_repository_keeps() -> None:
    record = RECORDS[0]
    shown = bench_page([record])
    assert "Measured on a CPU" in shown
    assert record["commit"] in shown
    for result in record["results"]:
        for way, figure in result["ways"].items():
            assert way in shown
            assert f"{figure['peak_bytes'] / 2**20:,.0f}" in shown
    assert shown.count("<table") == len(tables_of(record))
    assert not re.search(r"(?:src|href)\s*=|https?://|@import|<script", shown), "a page that asks for something else"
    for figure in re.findall(r"<svg.*?</svg>", shown, re.DOTALL):
        ElementTree.fromstring(figure)


def test_options_of_records_belong_behind_the_command() -> None:
    done = CliRunner().invoke(bench, ["--html", "page.html", "kernels", "--aot"])
    assert done.exit_code == 2
    assert "go after the command" in done.output
