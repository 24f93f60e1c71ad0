"""`dpoeng report`: a real run as a page, and what it does with runs that are cut short, damaged or odd."""

from __future__ import annotations

import html
import json
import math
import os
import re
import shutil
import struct
import subprocess
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from dpoeng_testing import pair_rows, write_jsonl

from dpoeng.cache.analytics import histogram as histogram_of
from dpoeng.cache.errors import UserError
from dpoeng.cli.main import main
from dpoeng.cli.pages.charts import Curve, histogram, line_chart
from dpoeng.cli.pages.html import page, paragraph, plots, table
from dpoeng.cli.pages.run import report_page
from dpoeng.cli.pages.runs import runs_page
from dpoeng.cli.tables import Table
from dpoeng.engine.config.fields import PrecomputeConfig, TrainConfig
from dpoeng.engine.recipes.precompute import precompute_reference
from dpoeng.engine.recipes.train import train
from dpoeng.engine.runs.metrics import MetricsLog
from dpoeng.engine.runs.reading import read_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A run of six steps with two evaluations."""
    root = tmp_path_factory.mktemp("report")
    pairs = write_jsonl(root / "pairs.jsonl", pair_rows(16))
    precompute_reference(PrecomputeConfig(pairs=(pairs,), model=str(tiny_model), cache=root / "cache"))
    out = root / "out"
    train(TrainConfig(cache=root / "cache", output_dir=out, max_steps=6, beta=0.25, learning_rate=1e-3, eval_steps=3))
    return out


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "out", ignore=shutil.ignore_patterns("checkpoint-*"))


def svgs(text: str) -> dict[str, ElementTree.Element]:
    drawings = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]
    return {drawing.attrib["aria-label"]: drawing for drawing in drawings}


class Asks(HTMLParser):
    """Collects whatever would make a browser ask the network or run a program."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, name: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [key for key, _ in attrs if key in ("src", "href", "data", "xlink:href") or key.startswith("on")]
        self.found += [name] if name in ("script", "link", "iframe", "img") else []


def test_the_page_of_a_run(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["report", str(out)])
    assert stop.value.code == 0
    assert "6 steps, complete" in capsys.readouterr().out
    text = (out / "report.html").read_text()
    asks = Asks()
    asks.feed(text)
    assert asks.found == []
    assert "url(" not in text
    assert "@import" not in text
    run = read_run(out)
    drawn = svgs(text)
    assert set(drawn) >= {
        *("loss", "reward accuracy", "reward margin", "rewards", "log-probs", "gradient norm", "learning rate"),
        "time of a step",
    }
    # Every point of the log is in the chart with its value.
    shown = [str(circle.findtext("title")) for circle in drawn["loss"].iter("circle")]
    logged = [("training", line, "loss") for line in run.metrics if "loss" in line]
    logged += [("held out", line, "eval_loss") for line in run.metrics if "eval_loss" in line]
    assert shown == [f"{name}, step {line['step']}: {line[key]:.4g}" for name, line, key in logged]
    assert len(shown) == 6 + 3
    for words in (run.record["reference"]["spec"], run.record["identity"]["pairs"], run.record["versions"]["torch"]):
        assert words in text
    changed = text.split("<h2>Configuration</h2>")[1].split("<details>")[0]
    assert "<td>beta</td><td>0.25</td>" in changed
    assert "lora_r" not in changed
    assert "from peft import PeftModel" in text
    assert text.index("0.6931") > 0


def test_warnings_samples_and_unknown_metrics_are_shown_and_escaped(out: Path) -> None:
    remarks = [{"code": "displacement", "seen": "chosen fell <b>too</b>", "remedy": "raise beta"}]
    (out / "advice.json").write_text(json.dumps(remarks))
    (out / "samples.jsonl").write_text(json.dumps({"prompt": "<script>", "before": "a", "after": "b"}) + "\n")
    with (out / "metrics.jsonl").open("a") as file:
        file.write(
            json.dumps({"step": 6, "eval_kl/chosen": 0.5, "entropy": 2.0, "eval_categories": {"wrong": 1}}) + "\n"
        )
    text = report_page(read_run(out))
    assert "chosen fell &lt;b&gt;too&lt;/b&gt;" in text
    assert "raise beta" in text
    assert "<summary>&lt;script&gt;</summary>" in text
    assert {"KL to the reference", "entropy"} <= set(svgs(text))
    assert "eval_categories" not in text
    assert "The last evaluation" in text
    assert re.search(r"<td>[-\d.e]+ to [-\d.e]+</td>", text), "the intervals of evaluations.jsonl"


def test_a_judgement_is_shown_and_told_if_the_run_was_trained_further(out: Path) -> None:
    assert "judged" not in report_page(read_run(out))
    figures = {
        **{"trained": "out/adapter", "judge": "<rule>", "wins": 12, "losses": 8, "ties": 2, "same": 1, "cut": [0, 3]},
        **{"win_rate": 0.591, "win_rate_interval": [0.39, 0.77], "length_controlled": None, "contradictions": 1},
        **{"length_controlled_interval": None, "first_share": 0.55, "before_tokens": 9.0, "after_tokens": 11.0},
        **{"asked": 42, "kept": 0},
    }
    lines = [
        {"prompt": f"<p> {number}", "before": "old words", "after": "new words", "better": "after", "why": ""}
        for number in range(22)
    ]
    (out / "judge").mkdir()
    (out / "judge" / "judgement.json").write_text(json.dumps(figures))
    (out / "judge" / "judged.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = report_page(read_run(out))
    assert "0.591, 95 % interval 0.390 to 0.770 (n = 22)" in text
    assert "<summary>better after: &lt;p&gt; 0</summary>" in text
    assert "new words" in text
    assert text.count("<summary>better after") == 20
    assert "The first 20 of 22 prompts" in text
    assert "earlier policy" not in text
    os.utime(out / "judge" / "judgement.json", (0, 0))  # written before the adapter
    assert "earlier policy" in report_page(read_run(out))
    (out / "judge" / "judgement.json").write_text("{")
    with pytest.raises(UserError) as caught:
        read_run(out)
    assert caught.value.code == "run-damaged"
    assert "dpoeng judge" in caught.value.remedy


def test_a_run_that_is_still_going(out: Path) -> None:
    shutil.rmtree(out / "adapter")
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[:3]) + lines[3][:20])
    (out / "timings.jsonl").unlink()
    run = read_run(out)
    assert (run.steps(), run.complete) == (2, False)
    assert "not complete: 2 steps so far" in report_page(run)
    (out / "metrics.jsonl").unlink()
    assert "0</b><span>steps" in report_page(read_run(out))


def test_a_folder_without_a_run_is_refused(out: Path, tmp_path: Path) -> None:
    def code(folder: Path) -> str:
        with pytest.raises(UserError) as caught:
            read_run(folder)
        assert caught.value.remedy
        return caught.value.code

    assert code(tmp_path / "nowhere") == "run-not-found"
    assert code(tmp_path) == "run-not-found"
    (out / "metrics.jsonl").write_text('{"step": 1}\nnot json\n')
    assert code(out) == "run-damaged"
    for line in (
        '{"step": null}',
        '{"step": true}',
        '{"loss": 1}',
        f'{{"step": 1, "loss": {"9" * 400}}}',
        "[" * 99_999,
    ):
        (out / "metrics.jsonl").write_text(line + "\n")
        assert code(out) == "run-damaged", line[:30]
    (out / "metrics.jsonl").unlink()
    record = json.loads((out / "run.json").read_text())
    for damage in ("[]", json.dumps({**record, "config": None}), json.dumps({**record, "reference": 3}), "[" * 99_999):
        (out / "run.json").write_text(damage)
        assert code(out) == "run-damaged", damage[:30]


def test_a_page_that_cannot_be_written_is_explained(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["report", str(out), "--html", str(out / "none" / "page.html")])
    assert stop.value.code == 5
    assert "[page-unwritable]" in capsys.readouterr().err


def coordinates(drawing: ElementTree.Element) -> list[tuple[float, float]]:
    """Of the first curve."""
    path = next(path.attrib["d"] for path in drawing.iter("path"))
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.-]+) ([\d.-]+)", path)]


def test_points_of_a_chart_stand_where_their_values_are() -> None:
    chart = svgs(line_chart("t", [Curve("a", [(0, 0.0), (5, 0.5), (10, 1.0)])]))["t"]
    first, middle, last = coordinates(chart)
    assert middle == pytest.approx(((first[0] + last[0]) / 2, (first[1] + last[1]) / 2), abs=0.11)
    lines = {float(line.attrib["y1"]) for line in chart.iter("line")}
    assert {first[1], last[1]} <= lines, "0 and 1 lie on ticks"
    assert last[1] < first[1], "upwards is more"


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.0, 1.0], ["0", "0.25", "0.50", "0.75", "1.00"]),
        ([-130.0, -95.0], ["-130", "-120", "-110", "-100", "-90"]),
        ([0.0, 1e-5], ["0", "2.5e-6", "5.0e-6", "7.5e-6", "1.0e-5"]),
        ([3.0, 3.0], ["2.6", "2.8", "3.0", "3.2", "3.4"]),
        ([0.0], ["-1.0", "-0.5", "0", "0.5", "1.0"]),
        ([math.nan, math.inf, 2.0, 6.0], ["2", "3", "4", "5", "6"]),
    ],
)
def test_ticks_are_round_and_hold_all_values(values: list[float], ticks: list[str]) -> None:
    chart = svgs(line_chart("t", [Curve("a", list(enumerate(values)))]))["t"]
    texts = [str(text.text) for text in chart.iter("text")]
    assert texts[: len(ticks)] == ticks
    assert all(8 <= y <= 170 for _, y in coordinates(chart))


def test_a_gap_in_a_curve_stays_a_gap_and_missing_values_are_reported() -> None:
    chart = svgs(line_chart("t", [Curve("a", [(0, 1.0), (1, math.nan), (2, 2.0), (3, 1.0)])]))["t"]
    assert next(path.attrib["d"] for path in chart.iter("path")).count("M") == 2
    assert "no values" in line_chart("t", [Curve("a", [(0, math.nan)])])


def test_long_curves_get_their_running_mean() -> None:
    points = [(float(x), float(x % 2)) for x in range(200)]
    chart = svgs(line_chart("t", [Curve("a", points)]))["t"]
    faint, mean = list(chart.iter("path"))
    assert "faint" in faint.attrib["class"]
    heights = [float(y) for _, y in re.findall(r"[ML]([\d.-]+) ([\d.-]+)", mean.attrib["d"])]
    middle = heights[20:-20]
    assert max(middle) - min(middle) < 20, "the mean of 0 and 1 in turn lies near one half"
    assert len(list(svgs(line_chart("t", [Curve("a", points, exact=True)]))["t"].iter("path"))) == 1


# --------------------------------------------------------------------------- in a browser


def pixels(path: Path) -> tuple[int, int, bytes]:
    """(width, height, rows of RGB or RGBA) of a PNG as Chromium writes it: 8 bits, not interlaced."""
    data = path.read_bytes()
    position, packed, width, height, channels = 8, b"", 0, 0, 3
    while position < len(data):
        length, kind = struct.unpack(">I4s", data[position : position + 8])
        body = data[position + 8 : position + 8 + length]
        if kind == b"IHDR":
            width, height, _, colour = struct.unpack(">IIBB", body[:10])
            channels = {2: 3, 6: 4}[colour]
        elif kind == b"IDAT":
            packed += body
        position += 12 + length
    raw, stride = zlib.decompress(packed), width * channels
    rows, before = bytearray(), bytearray(stride)
    for row in range(height):
        start = row * (stride + 1)
        kind, line = raw[start], bytearray(raw[start + 1 : start + 1 + stride])
        for i in range(stride):
            left = line[i - channels] if i >= channels else 0
            corner = before[i - channels] if i >= channels else 0
            if kind == 1:
                line[i] = (line[i] + left) & 255
            elif kind == 2:
                line[i] = (line[i] + before[i]) & 255
            elif kind == 3:
                line[i] = (line[i] + (left + before[i]) // 2) & 255
            elif kind == 4:
                guess = left + before[i] - corner
                near = min((left, before[i], corner), key=lambda value: abs(guess - value))
                line[i] = (line[i] + near) & 255
        rows += line
        before = line
    return width, height, bytes(rows)


@pytest.mark.slow  # needs Chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_draws_the_page(out: Path, tmp_path: Path, scheme: str) -> None:
    chromium = next((path for name in ("chromium", "google-chrome", "chrome") if (path := shutil.which(name))), None)
    assert chromium, "install chromium to run this test"
    (out / "report.html").write_text(report_page(read_run(out)))
    picture = tmp_path / f"report-{scheme}.png"
    command = [
        *(chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=500,900"),
        *(
            "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--screenshot={picture}",
            f"--user-data-dir={tmp_path / 'profile'}",
        ),
        *(("--force-dark-mode", "--blink-settings=preferredColorScheme=0") if scheme == "dark" else ()),
        (out / "report.html").as_uri(),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    width, height, raw = pixels(picture)
    channels = len(raw) // (width * height)
    colours = {raw[i : i + 3] for i in range(0, len(raw), channels)}
    assert raw[:3] == {"light": b"\xff\xff\xff", "dark": b"\x14\x17\x1a"}[scheme], "the page's own background"
    ink = {"light": b"\x1c\x20\x24", "dark": b"\xec\xee\xf0"}[scheme]
    curve = {"light": b"\x2f\x6f\xd0", "dark": b"\x6f\xa8\xf5"}[scheme]
    assert {ink, curve} <= colours, "text and curves are drawn in the scheme's colours"


@pytest.mark.slow  # needs Chromium
def test_a_telephone_shows_long_names_without_sideways_scrolling(tmp_path: Path) -> None:
    """In a frame, since Chromium makes no window under 500 pixels."""
    chromium = next((path for name in ("chromium", "google-chrome", "chrome") if (path := shutil.which(name))), None)
    assert chromium, "install chromium to run this test"
    curves = [Curve("peak of a step, layers recomputed, simulated: 0.89", [(1.0, 1.0), (2.0, 2.0)]) for _ in range(2)]
    chart = line_chart("cost by pairs in the cache, with exponents", curves, unit="bytes")
    inner = page("Plan for /models/an-organisation/SmolLM2-135M-Instruct-bcc81830-float32", [plots([chart])])
    told = "document.title = 'wide ' + this.contentDocument.documentElement.scrollWidth"
    frame = (
        f'<iframe style="border:0;width:390px;height:2000px" onload="{told}" srcdoc="{html.escape(inner)}"></iframe>'
    )
    (tmp_path / "frame.html").write_text(f"<!doctype html><title></title>{frame}")
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [*command, "--dump-dom", (tmp_path / "frame.html").as_uri()], check=True, capture_output=True, timeout=120
    )
    assert "<title>wide 390</title>" in done.stdout.decode()


def test_runs_share_charts_and_differing_settings_are_listed(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second run is the first with another beta and one step more on its record; its log stands as it was."""
    one, other = tmp_path / "a" / "out", tmp_path / "b" / "out"
    for folder in (one, other):
        shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    record = json.loads((other / "run.json").read_text())
    (other / "run.json").write_text(json.dumps({**record, "config": {**record["config"], "beta": 0.5}}))
    with (other / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 7, "loss": 0.125}) + "\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["report", "a/out", "b/out", "--smoothing", "1"])
    assert stop.value.code == 0
    assert "a/out: 6 steps, complete: runs.html\nb/out: 7 steps" in capsys.readouterr().out
    text = (tmp_path / "runs.html").read_text()
    loss = svgs(text)["loss"]
    shown = [str(circle.findtext("title")) for circle in loss.iter("circle")]
    assert {name.split(",")[0] for name in shown} == {"a/out", "b/out"}
    assert "b/out, step 7: 0.125" in shown
    assert len(shown) == 2 * (6 + 3) + 1
    assert len({path.attrib["stroke"] for path in loss.iter("path")}) == 2
    settings = text.split("<h2>Settings that differ</h2>")[1].split("<h2>")[0]
    assert re.findall("<td>(.*?)</td>", settings) == ["beta", "0.25", "0.5"]
    assert "the same held-out pairs" in text
    (other / "run.json").write_text(json.dumps({**record, "identity": {**record["identity"], "eval_pairs": "0" * 32}}))
    assert "not comparable" in runs_page([read_run(one), read_run(other)])
    with pytest.raises(SystemExit) as stop:
        main(["report", *["a/out"] * 7])
    assert stop.value.code == 2


def test_a_page_has_no_empty_tables(out: Path) -> None:
    record = json.loads((out / "run.json").read_text())
    kept = {name: record[name] for name in ("command", "config", "reference", "identity", "model", "adapter_mode")}
    (out / "run.json").write_text(json.dumps({**kept, "reference": {}}))
    for name in ("metrics.jsonl", "evaluations.jsonl", "timings.jsonl"):
        (out / name).unlink()
    text = report_page(read_run(out))
    assert not re.search(r"<table[^>]*>(<tr>(<th>[^<]*</th>)*</tr>)?</table>", text)
    for title in ("Curves", "First and last", "Evaluations", "Versions"):
        assert f"<h2>{title}</h2>" not in text
    assert table(Table([], ("a", "b"), "title", ["note"])) == ""


def test_a_histogram_has_counts_and_whole_numbers_on_its_axes() -> None:
    values = np.array([25, 26, 26, 28] * 5)
    edges, counts = histogram_of(values, 25.0, 28.0, whole=True)
    assert (edges, counts) == ((25, 26, 27, 28, 29), (5, 10, 0, 5))
    chart = svgs(histogram("prompt", "tokens", edges, counts, whole=True))["histogram of prompt"]
    texts = [str(text.text) for text in chart.iter("text")]
    assert texts == ["0", "3", "6", "9", "12", "25", "26", "27", "28", "tokens", "pairs"]
    assert [bar.findtext("title") for bar in chart.iter("rect")] == ["25: 5 pairs", "26: 10 pairs", "28: 5 pairs"]


@pytest.mark.parametrize(
    ("low", "high", "whole", "step"),
    [(0, 2000, True, 100), (1, 39, True, 1), (1, 45, True, 2), (1, 30, True, 1), (7, 7, True, 1),
     (-66.9, 58.6, False, 5), (-0.355, 0.0148, False, 0.01), (3.5, 3.5, False, None)],
)  # fmt: skip
def test_edges_of_a_histogram_are_round_and_lose_nothing(low: float, high: float, whole: bool, step: float) -> None:
    values = np.linspace(low, high, 101)
    values = np.concatenate([np.rint(values) if whole else values, [low - 100, high + 100]])
    edges, counts = histogram_of(values, low, high, whole=whole)
    assert sum(counts) == len(values)
    assert edges[0] <= low
    assert edges[-1] > high or (not whole and edges[-1] >= high)
    assert len(counts) <= 41
    if step is not None:
        widths = {round(width, 9) for width in np.diff(edges)}
        assert widths == {step}
        assert all(abs(edge / step - round(edge / step)) < 1e-9 for edge in edges)


def test_pages_escape_what_they_are_given() -> None:
    text: Any = page("<t>", [paragraph("<p>&"), table(Table([("<td>",)], ("<h>",)))], "<s>")
    assert "<t>" not in text
    assert "&lt;p&gt;&amp;" in text
    assert "&lt;td&gt;" in text
    assert "&lt;s&gt;" in text


def test_a_damaged_log_is_mended_by_its_remedy(tmp_path: Path) -> None:
    """The line is named; with it gone the log is read. Damage behind the step that is gone back to is cut off."""
    log = MetricsLog(tmp_path)
    for step in (1, 2, 3):
        log.write(step, step / 3, {"loss": 1.0})
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    for broken in (b"{\n", b"\xff\n", b"[]\n", b'{"loss": 1}\n'):
        path.write_bytes(lines[0] + broken + lines[1])
        for use in (log.read, lambda: log.rewind(2)):
            with pytest.raises(UserError, match="damaged") as caught:
                use()
            assert caught.value.where == f"{path}:2"
        path.write_bytes(lines[0] + lines[1])
        assert [line["step"] for line in log.read()] == [1, 2]
        path.write_bytes(b"".join([lines[0], lines[1], broken, lines[2]]))
        log.rewind(2)
        assert path.read_bytes() == lines[0] + lines[1]
