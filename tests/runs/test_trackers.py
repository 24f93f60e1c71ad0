"""Trackers: written to by a real run and read back; one that is missing or fails never costs a run."""

from __future__ import annotations

import html
import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from dpoeng_testing import pair_rows, write_jsonl
from transformers.integrations.integration_utils import rewrite_logs

from dpoeng.cache.errors import UserError
from dpoeng.engine.config.fields import PrecomputeConfig, TrainConfig
from dpoeng.engine.recipes.phase_two.tracked import held_out_tables
from dpoeng.engine.recipes.precompute import precompute_reference
from dpoeng.engine.recipes.train import train
from dpoeng.engine.runs import trackers as module
from dpoeng.engine.runs.trackers import Trackers, check_trackers, names_in, open_trackers
from dpoeng.engine.runtime.progress import NoProgress


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("trackers")
    file = write_jsonl(folder / "pairs.jsonl", pair_rows(12))
    precompute_reference(PrecomputeConfig(pairs=(file,), model=str(tiny_model), cache=folder / "cache"))
    return folder / "cache"


class Kept:
    """A tracker that keeps its calls."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.lines: list[tuple[int, dict[str, Any]]] = []
        self.settings: dict[str, Any] = {}
        self.tables: dict[str, Any] = {}
        self.finished = False
        self.fails_at = fails_at

    def start(self) -> None:
        pass

    @property
    def tracker(self) -> Any:
        """The library's own object."""
        return SimpleNamespace(define_metric=lambda *_, **__: None, add_text=lambda *_: None)

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.settings = values

    def log(self, values: Mapping[str, Any], step: int) -> None:
        if step == self.fails_at:
            raise ConnectionError("the server is gone")
        self.lines.append((step, dict(values)))

    def log_table(self, name: str, *, columns: list[str], data: list[list[Any]], step: int) -> None:
        self.tables[name] = (columns, data)

    def finish(self) -> None:
        self.finished = True


def test_a_tracker_gets_every_line_of_the_log(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Kept()
    monkeypatch.setattr(module, "_tracker", lambda *_: kept)
    monkeypatch.setattr("dpoeng.engine.recipes.train.check_trackers", lambda names: None)
    train(TrainConfig(cache=cache, output_dir=tmp_path / "out", max_steps=3, report_to=("wandb",)))
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [step for step, _ in kept.lines] == [line["step"] for line in lines]
    for (_, told), line in zip(kept.lines, lines, strict=True):
        numbers = {name: value for name, value in line.items() if isinstance(value, float) and name != "epoch"}
        assert rewrite_logs(numbers).items() <= told.items()
        assert told["train/global_step"] == line["step"]
    assert kept.finished
    assert list(kept.tables) == ["held_out"]
    assert kept.settings["learning_rate"] == 1e-5
    assert kept.settings["report_to"] == '["wandb"]'
    assert "adapter" not in kept.settings


def test_a_failing_tracker_is_dropped_and_the_run_continues(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Notes(NoProgress):
        said: list[str] = []  # noqa: RUF012

        def note(self, text: str) -> None:
            self.said.append(text)

    kept, notes = Kept(fails_at=2), Notes()
    monkeypatch.setattr(module, "_tracker", lambda *_: kept)
    monkeypatch.setattr("dpoeng.engine.recipes.train.check_trackers", lambda names: None)
    summary = train(TrainConfig(cache=cache, output_dir=tmp_path / "out", max_steps=3, report_to=("mlflow",)), notes)
    assert summary.steps == 3
    assert {step for step, _ in kept.lines} == {0, 1}
    assert any("mlflow failed" in note and "the server is gone" in note for note in notes.said)


def test_texts_of_pairs_are_sent_only_when_asked_for(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: dict[int, dict[str, Any]] = {}
    monkeypatch.setattr(module, "_tracker", lambda *_: Kept())
    monkeypatch.setattr("dpoeng.engine.recipes.train.check_trackers", lambda names: None)
    for count in (0, 1):
        monkeypatch.setattr(Trackers, "show", lambda _, step, tables, count=count: sent.update({count: tables}))
        out = tmp_path / str(count)
        train(TrainConfig(cache=cache, output_dir=out, max_steps=2, report_to=("wandb",), report_samples=count))
    assert list(sent[0]) == ["held_out"]
    heads, rows = sent[1]["held_out_pairs"]
    (line, *_) = (out / "held_out.jsonl").read_text().splitlines()
    pair = json.loads(line)
    row = dict(zip(heads, rows[0], strict=True))
    assert row["source"] == pair["source"]
    assert row["reward margin"] == pytest.approx(pair["rewards/margins"], rel=1e-3)
    number = int(pair["source"].rsplit(" ", 1)[-1])
    texts = json.loads((cache.parent / "pairs.jsonl").read_text().splitlines()[number - 1])
    assert row["prompt"].strip() == str(texts["prompt"]).strip()
    assert str(texts["chosen"]).strip() in row["chosen"]
    figures = {name: bounds for name, *bounds in sent[1]["held_out"][1]}
    last = json.loads((out / "evaluations.jsonl").read_text().splitlines()[-1])
    for name, mean in last["metrics"].items():
        whole = [mean, *last["intervals"].get(name, (None, None))]
        assert figures[name] == [value if value is None else pytest.approx(value, rel=1e-3) for value in whole]


def test_a_metric_without_an_interval_leaves_numbers_alone_in_its_columns() -> None:
    """W&B refuses a column of numbers and texts: a correlation over few pairs has no interval."""
    last = {"step": 3, "pairs": 9, "metrics": {"loss": 0.693147, "r": -0.5}, "intervals": {"loss": [0.61, 0.77]}}
    run = SimpleNamespace(
        log=SimpleNamespace(read_evaluations=lambda: [last]),
        config=SimpleNamespace(output_dir=Path("none"), report_samples=0),
    )
    _, rows = held_out_tables(run, lambda: None)["held_out"]  # type: ignore[arg-type]
    assert rows == [("loss", 0.6931, 0.61, 0.77), ("r", -0.5, None, None)]
    assert module._markdown(("m", "v"), [("r", None)]).splitlines()[-1] == "| r |  |"


@pytest.mark.slow  # TensorBoard brings this renderer
def test_a_markdown_table_keeps_texts_as_they_are() -> None:
    import markdown

    texts = ["a|b", "<b>*x*</b>", "two\nlines", "a_b_c `code` [l](u) # h"]
    shown = markdown.markdown(module._markdown(("name",), [(text,) for text in texts]), extensions=["tables"])
    cells = [
        html.unescape(cell.replace("<br>", "\n").replace("<br />", "\n"))
        for cell in re.findall(r"<td>(.*?)</td>", shown, re.DOTALL)
    ]
    assert cells == texts


def test_names_are_those_of_transformers_callbacks() -> None:
    line = {"loss": 0.5, "epoch": 1.0, "rewards/margins": 0.1, "eval_loss": 0.4, "eval_rewards/margins": 0.2}
    assert names_in("tensorboard", line, 3) == rewrite_logs(line)
    assert names_in("wandb", line, 3) == names_in("trackio", line, 3) == {**rewrite_logs(line), "train/global_step": 3}
    assert names_in("mlflow", line, 3) == line  # MLflowCallback.on_log hands them on as they are


def test_values_that_are_not_numbers_stay_in_the_log() -> None:
    kept = Kept()
    Trackers({"tensorboard": kept}).log(1, {"loss": 0.5, "bad": float("nan"), "table": {"a": 1}, "word": "w"})
    assert kept.lines == [(1, {"train/loss": 0.5})]


def test_trackers_move_no_weight(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a run that was started without one continues with one."""
    monkeypatch.setattr(module, "_tracker", lambda *_: Kept())
    monkeypatch.setattr("dpoeng.engine.recipes.train.check_trackers", lambda names: None)
    for name, tracker in (("with", ("wandb",)), ("without", ())):
        train(TrainConfig(cache=cache, output_dir=tmp_path / name, max_steps=2, report_to=tracker))
    adapters = [
        (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("with", "without")
    ]
    assert adapters[0] == adapters[1]
    again = train(TrainConfig(cache=cache, output_dir=tmp_path / "without", max_steps=2, report_to=("wandb",)))
    assert again.already_complete


def test_a_missing_tracker_is_refused_before_anything_is_loaded(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("dpoeng.engine.recipes.policy.load_policy_base", None)
    with pytest.raises(UserError) as caught:
        train(TrainConfig(cache=cache, output_dir=tmp_path / "out", report_to=("trackio",)))
    assert caught.value.code == "tracker-missing"
    assert "pip install trackio" in caught.value.remedy
    assert not (tmp_path / "out").exists()
    check_trackers(())


def test_a_tracker_that_cannot_start_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Kept(), Kept()
    monkeypatch.setattr(second, "start", lambda: (_ for _ in ()).throw(RuntimeError("no login")))
    made = iter([first, second])
    monkeypatch.setattr(module, "_tracker", lambda *_: next(made))
    with pytest.raises(UserError) as caught:
        open_trackers(("tensorboard", "wandb"), run_name="r", output_dir=tmp_path, settings={})
    assert caught.value.code == "tracker-failed"
    assert "no login" in str(caught.value.found)
    assert first.finished


@pytest.mark.parametrize("value", ["none", ["none"], None, ()])
def test_none_means_none(value: Any) -> None:
    assert TrainConfig(report_to=value).report_to == ()
    assert TrainConfig(report_to="wandb").report_to == ("wandb",)  # type: ignore[arg-type]


# --------------------------------------------------------------------------- the packages themselves

PROGRAM = """
import sys
from pathlib import Path
from dpoeng.engine.config.fields import TrainConfig
from dpoeng.engine.recipes.train import train
train(TrainConfig(
    cache=Path(sys.argv[1]), output_dir=Path(sys.argv[2]), max_steps=3, report_to=sys.argv[3], report_samples=1
))
"""


def really(tmp_path: Path, cache: Path, name: str, **environment: str) -> list[dict[str, Any]]:
    """A run with a real tracker, in a separate process, without a network; gives metrics.jsonl."""
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(cache), str(tmp_path / "out"), name]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]


def series(lines: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(line["step"], line[name]) for line in lines if name in line]


@pytest.mark.slow  # needs the `trackers` extra
@pytest.mark.parametrize("metric", ["rewards/margins"])
def test_tensorboard_is_written_and_read_back(tmp_path: Path, cache: Path, metric: str) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines = really(tmp_path, cache, "tensorboard")
    read = EventAccumulator(str(tmp_path / "out" / "runs" / "out")).Reload()
    found = [(event.step, event.value) for event in read.Scalars(f"train/{metric}")]
    assert found == [(step, pytest.approx(value, rel=1e-6)) for step, value in series(lines, metric)]
    texts = {name: read.Tensors(f"{name}/text_summary") for name in ("configuration", "held_out", "held_out_pairs")}
    shown = {name: events[-1].tensor_proto.string_val[0].decode() for name, events in texts.items()}
    assert "| learning\\_rate | 1e-05 |" in shown["configuration"]
    assert "| rewards/margins | " in shown["held_out"]
    assert shown["held_out_pairs"].count("\n") == 2
    assert "pairs.jsonl, row" in shown["held_out_pairs"]


@pytest.mark.slow
def test_mlflow_is_written_and_read_back(tmp_path: Path, cache: Path) -> None:
    store = (tmp_path / "mlruns").as_uri()
    lines = really(tmp_path, cache, "mlflow", MLFLOW_TRACKING_URI=store, MLFLOW_ALLOW_FILE_STORE="true")
    program = (
        "import json, mlflow\n"
        f"client = mlflow.MlflowClient({store!r})\n"
        "(run,) = client.search_runs([client.get_experiment_by_name('dpoeng').experiment_id])\n"
        "points = client.get_metric_history(run.info.run_id, 'loss')\n"
        "print(json.dumps([[[p.step, p.value] for p in points], run.data.params['learning_rate'], run.info.run_name]))"
    )
    shown = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True,
        env={**os.environ, "MLFLOW_ALLOW_FILE_STORE": "true"},
    ).stdout  # fmt: skip
    points, rate, name = json.loads(shown.splitlines()[-1])
    assert [tuple(point) for point in points] == series(lines, "loss")
    assert (float(rate), name) == (1e-5, "out")
    (table,) = (tmp_path / "mlruns").rglob("held_out.md")
    assert "| rewards/margins | " in table.read_text()


@pytest.mark.slow
def test_trackio_is_written_and_read_back(tmp_path: Path, cache: Path) -> None:
    lines = really(tmp_path, cache, "trackio", TRACKIO_DIR=str(tmp_path / "trackio"))
    import sqlite3

    (database,) = (tmp_path / "trackio").glob("dpoeng*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select step, metrics from metrics order by id").fetchall()
        config = json.loads(connection.execute("select config from configs").fetchone()[0])
    found = [(step, held["train/loss"]) for step, text in rows if "train/loss" in (held := json.loads(text))]
    assert found == [(step, pytest.approx(value)) for step, value in series(lines, "loss")]
    assert "allow_val_change" not in config
    assert config["learning_rate"] == 1e-5
    tables = {name: value for _, text in rows for name, value in json.loads(text).items() if name.startswith("held")}
    assert {cells["metric"] for cells in tables["held_out"]["_value"]} >= {"loss", "rewards/margins"}
    assert tables["held_out_pairs"]["_value"][0]["prompt"]


@pytest.mark.slow
def test_wandb_is_written_offline_and_read_back(tmp_path: Path, cache: Path) -> None:
    lines = really(tmp_path, cache, "wandb", WANDB_MODE="offline", WANDB_SILENT="true")
    (file,) = (tmp_path / "out" / "wandb").glob("offline-run-*/run-*.wandb")
    from wandb.proto import wandb_internal_pb2

    found = []
    for data in leveldb_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("history"):
            held = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            if "train/loss" in held:
                found.append((record.history.step.num, held["train/loss"]))
    assert found == [(step, pytest.approx(value)) for step, value in series(lines, "loss")]
    (table,) = file.parent.glob("files/media/table/held_out_[0-9]*.table.json")
    assert "rewards/margins" in [row[0] for row in json.loads(table.read_text())["data"]]


def leveldb_records(data: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format behind seven more bytes.

    https://github.com/google/leveldb/blob/main/doc/log_format.md
    """
    assert data[:4] == b":W&B"
    at, block, record = 7, 32768, b""
    while at + 7 <= len(data):
        if block - at % block < 7:  # too little of the block is left for a header
            at += block - at % block
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        if kind == 0:
            return
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""
