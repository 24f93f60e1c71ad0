"""`dpoeng bench quality` and `dpoeng bench scale` on tiny models, and their arithmetic by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from dpoeng_testing import pair_rows, write_jsonl

from dpoeng.bench.studies import halving, plan_time, quality
from dpoeng.bench.studies.halving import HalvingSettings
from dpoeng.bench.studies.quality import QualitySettings, bench_quality, run_way, split_pairs, summarise, with_intervals
from dpoeng.bench.studies.scale import power_law
from dpoeng.bench.studies.selection import SelectionSettings, selection_study, table
from dpoeng.cache.errors import UserError
from dpoeng.cache.reader import View
from dpoeng.cache.words import MIB
from dpoeng.cli.bench.commands import bench
from dpoeng.cli.bench.tables import quality_tables
from dpoeng.cli.pages.bench import bench_page

# --------------------------------------------------------------------------- scale


def test_an_exponent_by_hand() -> None:
    """Of 3 x^2 exactly; and of three points whose slope and error are worked out: y = 1, 2, 2 at x = 0, 1, 2 (logs).

    Slope (2 - 1) / 2, residuals -1/6, 1/3, -1/6, their squares 1/6 over one degree of freedom and a spread of 2.
    """
    exact = power_law([1, 10, 100, 1000], [3.0, 300.0, 3e4, 3e6])
    assert (exact.value, exact.factor, exact.last) == pytest.approx((2.0, 3.0, 2.0))
    assert exact.standard_error == pytest.approx(0.0, abs=1e-7)
    found = power_law([1, math.e, math.e**2], [math.e, math.e**2, math.e**2])
    assert (found.value, found.standard_error, found.last) == pytest.approx((0.5, math.sqrt(1 / 12), 0.0), abs=1e-9)


@pytest.mark.slow
def test_the_scale_command(tmp_path: Path, tiny_model: Path) -> None:
    kept, page = tmp_path / "kept.jsonl", tmp_path / "page.html"
    arguments = (
        f"scale --model {tiny_model} --pairs 1e2,2e2,4e2 --lengths 16,32,64 --simulated-lengths 64,128,256 "
        f"--vocabularies 512,1024,2048 --repeats 2 --device cpu --record {kept} --html {page}"
    )
    done = CliRunner().invoke(bench, arguments.split())
    assert done.exit_code == 0, done.output
    record = json.loads(kept.read_text())
    curves = {curve["name"]: curve for curve in record["curves"]}
    assert curves["commit to the cache"]["sizes"] == [100, 200, 400]
    assert 0.9 < curves["size on disk"]["exponent"]["value"] < 1.1
    assert [len(values) for values in curves["training step"]["values"]] == [2, 2, 2]
    assert curves["training step"]["medians"][2] > curves["reference pass"]["medians"][2] > 0
    simulated = [name for name, curve in curves.items() if curve["simulated"]]
    assert simulated == ["peak of a step", "peak of a step, layers recomputed"]
    less, more = (curves[name]["medians"][-1] for name in reversed(simulated))
    assert less < more
    assert curves["peak of the head"]["medians"][2] > 0
    for shown in ("cost by vocabulary", "exponent", "(simulated)"):
        assert shown in done.output
    assert "cost by pairs in the cache" in page.read_text()


@pytest.mark.parametrize("sizes", ["1e2,1e3", "8,4,16", "a,b,c", "10,10,10", "1,2,3"])
def test_sizes_that_no_line_goes_through(sizes: str) -> None:
    done = CliRunner().invoke(bench, ["scale", "--pairs", sizes])
    assert done.exit_code == 2
    assert "Invalid value for '--pairs'" in done.output


# --------------------------------------------------------------------------- quality


def settings(tmp_path: Path, model: Path, **changes: Any) -> QualitySettings:
    pairs = write_jsonl(tmp_path / "pairs.jsonl", pair_rows(24))
    ways = ("float32", "4bit, bfloat16 reference")
    told = QualitySettings(str(model), (pairs,), tmp_path / "work", ways=ways, batch_size=8, device="cpu")
    return replace(told, **changes)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs in this process; separate processes are tested with `bench compare`."""
    seen: list[str] = []

    def here(python: str, module: str, job: dict[str, Any], folder: Path, *, name: str) -> dict[str, Any]:
        assert module == "dpoeng.bench.studies.quality"
        assert Path(job["output_dir"]).parent == folder.resolve()
        seen.append(name)
        found: dict[str, Any] = json.loads(json.dumps(run_way(json.loads(json.dumps(job)))))
        return found

    monkeypatch.setattr(quality, "run_module", here)
    return seen


@pytest.mark.slow
def test_ways_are_compared_on_the_same_pairs(tmp_path: Path, tiny_model: Path, runs: list[str]) -> None:
    record = bench_quality(settings(tmp_path, tiny_model, learning_rate=5e-3, epochs=3.0))
    json.dumps(record, allow_nan=False)
    first, other = record["results"]
    assert runs == ["float32, seed 0", "4bit, bfloat16 reference, seed 0"]
    assert record["failed"] == {}
    assert first["pairs"] == other["pairs"] >= 6
    assert first["trained"] == first["float32"], "its own precision is float32"
    assert first["float32"]["rewards/margins"]["mean"] > 0.05, "it has learnt something"
    assert first["difference"]["rewards/margins"] == {"mean": 0.0, "interval": [0.0, 0.0]} or first["difference"][
        "rewards/margins"
    ] == {"mean": 0.0, "interval": (0.0, 0.0)}
    assert other["trained"] != other["float32"]
    assert first["parity"][0] < 1e-5 < other["parity"][0] < 1
    for name in ("rewards/accuracies", "rewards/margins"):
        difference = other["float32"][name]["mean"] - first["float32"][name]["mean"]
        assert other["difference"][name]["mean"] == pytest.approx(difference, abs=1e-12)
        low, high = other["difference"][name]["interval"]
        assert low <= difference <= high
    shown = bench_page([record])
    for words in ("accuracy, as trained", "margin, in float32", "4bit, bfloat16 reference"):
        assert words in shown


def test_held_out_pairs_are_not_trained_on_and_the_same_for_all(tmp_path: Path, tiny_model: Path) -> None:
    asked = settings(tmp_path, tiny_model)
    train_file, held_out = split_pairs(asked.pairs, asked.pairs_count, asked.held_out, tmp_path)
    sides = [[json.loads(line)["prompt"] for line in path.read_text().splitlines()] for path in (train_file, held_out)]
    assert sorted(map(len, sides), reverse=True) == [len(sides[0]), len(sides[1])]
    assert sum(map(len, sides)) == 24
    assert not set(sides[0]) & set(sides[1])
    one_prompt = write_jsonl(tmp_path / "one.jsonl", [{**row, "prompt": "same"} for row in pair_rows(4)])
    with pytest.raises(UserError, match="too few pairs"):
        split_pairs([one_prompt], asked.pairs_count, asked.held_out, tmp_path)


def test_other_settings_do_not_continue_a_run(tmp_path: Path, tiny_model: Path, runs: list[str]) -> None:
    """A run of another learning rate has a separate folder; the cache is shared."""
    few: dict[str, Any] = {"ways": ("float32",), "epochs": 0.5}
    one = bench_quality(settings(tmp_path, tiny_model, **few))
    two = bench_quality(settings(tmp_path, tiny_model, learning_rate=1e-2, **few))
    assert one["results"][0]["float32"] != two["results"][0]["float32"]
    assert len(list((tmp_path / "work").glob("float32-0-*"))) == 2
    assert len(list((tmp_path / "work").glob("refcache/specs/*"))) <= 1


VALUES = {"rewards/accuracies": [1.0, 0.0], "rewards/margins": [0.5, -0.1]}


def test_a_way_that_fails_is_named_and_the_first_is_not_spared(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(python: str, module: str, job: dict[str, Any], folder: Path, *, name: str) -> Any:
        if job["way"] != "float32":
            raise UserError("it failed", code="bench-peer-failed", found="no 4 bits here", remedy="none")
        return {
            "prompts": ["00", "01"], "longer": [1, -1], "steps": 2, "seconds": 1.0, "parity": 0.0,
            **{frame: dict(VALUES) for frame in ("trained", "float32")},
        }  # fmt: skip

    monkeypatch.setattr(quality, "run_module", failing)
    record = bench_quality(settings(tmp_path, tiny_model))
    assert [result["way"] for result in record["results"]] == ["float32"]
    assert record["failed"] == {"4bit, bfloat16 reference": "no 4 bits here"}
    assert any("no 4 bits here" in str(row) for table in quality_tables(record) for row in table.rows)
    with pytest.raises(UserError, match="it failed"):
        bench_quality(settings(tmp_path, tiny_model, ways=("4bit", "float32")))


def test_one_seed_has_the_intervals_of_an_evaluation() -> None:
    """Wilson's, where a bootstrap of three right answers says 1 to 1; and Agresti and Min's of a paired difference."""
    right = {"rewards/accuracies": np.ones(3), "rewards/margins": np.array([0.1, 0.2, 0.3])}
    longer, prompts = np.array([1.0, -1.0, 2.0]), [b"0", b"1", b"2"]
    low, high = with_intervals(right, longer=longer, prompts=prompts)["rewards/accuracies"]["interval"]
    assert (low, high) == (pytest.approx(0.4385, abs=1e-3), 1.0)
    none = {"rewards/accuracies": np.zeros(3)}
    low, high = with_intervals(none, longer=longer, prompts=prompts, paired=True)["rewards/accuracies"]["interval"]
    assert -1 < low < -0.2 < 0.2 < high < 1
    assert low == -high


def test_seeds_are_averaged_before_pairs_are_drawn() -> None:
    """Means of two seeds by hand; the interval of a difference that is the same for every pair is a point."""

    def run(margins: list[float]) -> dict[str, Any]:
        values = {"rewards/accuracies": [float(m > 0) for m in margins], "rewards/margins": margins}
        return {
            "prompts": ["00", "01", "02"], "longer": [1, -1, 2], "trained": values, "float32": values, "steps": 3,
            "seconds": 6.0, "parity": 0.1,
        }  # fmt: skip

    first = [run([0.1, 0.2, 0.3]), run([0.3, 0.4, 0.5])]
    found = summarise("8bit", [run([0.4, 0.5, 0.6]), run([0.6, 0.7, 0.8])], first)
    assert found["float32"]["rewards/margins"]["mean"] == pytest.approx(0.6)
    assert found["difference"]["rewards/margins"]["mean"] == pytest.approx(0.3)
    assert np.ptp(found["difference"]["rewards/margins"]["interval"]) == pytest.approx(0.0, abs=1e-12)
    assert np.ptp(found["float32"]["rewards/margins"]["interval"]) > 0.05
    assert found["by_seed"]["rewards/margins"] == pytest.approx([0.5, 0.7])


def test_the_quality_command_takes_the_demos_model_and_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dpoeng.engine.recipes import demo

    asked: list[QualitySettings] = []

    def stop(told: QualitySettings, progress: Any) -> Any:
        asked.append(told)
        raise UserError("stop here", code="bench-peer-failed", remedy="none")

    monkeypatch.setattr(demo, "obtain_model", lambda progress: "the-model")
    monkeypatch.setattr(quality, "bench_quality", stop)
    CliRunner().invoke(bench, ["quality", "--work", str(tmp_path), "--seeds", "2"])
    (told,) = asked
    assert told.model == "the-model"
    assert told.ways == tuple(quality.WAYS)
    assert told.pairs[0].name == "demo_pairs.jsonl"
    assert told.seeds == 2


# --------------------------------------------------------------------------- selection


@pytest.mark.slow
def test_the_selection_study(tmp_path: Path, tiny_model: Path) -> None:
    """Every choice trains on as many pairs, over the same held-out ones; a second start trains nothing."""
    file = write_jsonl(tmp_path / "pairs.jsonl", pair_rows(40))
    settings = SelectionSettings(str(tiny_model), (file,), tmp_path / "work", pairs_count=40, seeds=2, lora_r=4)
    record = selection_study(settings)
    assert list(record["choices"]) == ["random", "large margin", "small margin", "large gap", "small gap"]
    assert (record["pairs_all"], record["pairs_chosen"], record["held_out_pairs"]) == (28, 11, 12)
    cache = tmp_path / "work" / "cache"
    rows = {
        name: {View.open(cache, name).key(i) for i in range(11)} for name in ("random-0", "random-1", "large-gap-0")
    }
    assert len({frozenset(keys) for keys in rows.values()}) == 3
    for choice in record["choices"].values():
        mean = np.mean([seed["rewards/margins"] for seed in choice["seeds"]])
        assert choice["rewards/margins"]["mean"] == pytest.approx(mean)
        away = mean - record["choices"]["random"]["rewards/margins"]["mean"]
        assert choice["difference"]["rewards/margins"]["mean"] == pytest.approx(away)
    assert table(record).row_count == 5
    again = selection_study(settings)
    assert again["choices"] == record["choices"]


# --------------------------------------------------------------------------- halving


def test_halving_is_replayed_by_hand() -> None:
    """Four runs, factor 2: a and b lead at the first rung, b at the second; d would have won at the end."""
    scores = {"a": [(3.0,), (1.0,), (1.0,)], "b": [(2.0,), (2.0,), (3.0,)], "c": [(1.0,), (9.0,), (2.0,)],
              "d": [(0.0,), (9.0,), (4.0,)]}  # fmt: skip
    # 4 runs to a quarter, 2 of them to a half, 1 to the end: (2 * 1/4 + 1/2 + 1) / 4
    assert halving.replay(scores, 2) == {"run": "b", "found": False, "regret": 1.0, "spread": 3.0, "share": 0.5}
    del scores["d"]  # three runs have two rungs, the last two: c leads there, and one in two of three is one
    share = (2 * 0.5 + 1) / 3
    assert halving.replay(scores, 2) == {"run": "c", "found": False, "regret": 1.0, "spread": 2.0, "share": share}


@pytest.mark.slow
def test_the_halving_study(tmp_path: Path, tiny_model: Path) -> None:
    file = write_jsonl(tmp_path / "pairs.jsonl", pair_rows(24))
    settings = HalvingSettings(
        str(tiny_model), (file,), tmp_path / "work", pairs_count=24, steps=4, learning_rates=(1e-4, 1e-3), seeds=1,
        factor=2, part=3, parts=4, lora_ranks=(2, 4),
    )  # fmt: skip
    record = halving.halving_study(settings)
    assert [len(values) for values in record["grids"][0].values()] == [3] * 4
    assert record["whole"][0]["share"] == 0.5
    assert record["parts"]["cases"] == 4
    assert halving.table(record).row_count == 3


@pytest.mark.slow
def test_the_time_of_a_plan_is_that_of_its_process() -> None:
    found = plan_time.measure("HuggingFaceTB/SmolLM2-135M")
    assert found["cpu_s"] > 1
    assert 100 * MIB < found["peak_bytes"] < 4000 * MIB
    assert 0 < found["phase2_gib"] < 10
    with pytest.raises(SystemExit, match="exit status 2"):
        plan_time.measure("no/such-model")
