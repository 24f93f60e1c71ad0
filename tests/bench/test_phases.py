"""`dpoeng bench phases` on a tiny model: figures that agree with each other, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from dpoeng.bench.measuring.workload import save_small_model, synthetic_pairs, unique_tokens
from dpoeng.bench.phases import PhaseSettings, bench_phases, forward_flop, linear_shapes
from dpoeng.bench.studies.sharing import pairs_of, positions_left
from dpoeng.cache.errors import UserError
from dpoeng.cli.bench.commands import bench
from dpoeng.engine.models.loading import load_model
from dpoeng.engine.models.sources import find_model


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[str, Any]:
    return bench_phases(PhaseSettings(model=str(tiny_model), device="cpu", batch_size=2, steps=2, repeats=1))


def test_both_phases_in_both_layouts(record: dict[str, Any]) -> None:
    assert [(r["phase"], r["layout"]) for r in record["results"]] == [
        ("reference", "shared"),
        ("reference", "separate"),
        ("training", "shared"),
        ("training", "separate"),
    ]
    json.dumps(record, allow_nan=False)
    assert {"device_kind", "machine", "versions", "commit", "settings", "gemm_flops"} <= record.keys()


def test_the_split_adds_up_to_the_time(record: dict[str, Any]) -> None:
    for result in record["results"]:
        expected = {"data", "forward", "head"} | ({"backward", "optimizer"} if result["phase"] == "training" else set())
        assert result["split"].keys() == expected
        assert all(spent["wall_s"] > 0 for spent in result["split"].values())
        assert sum(spent["wall_s"] for spent in result["split"].values()) == pytest.approx(result["wall_s"][0])
        assert sum(spent["cpu_s"] for spent in result["split"].values()) == pytest.approx(result["cpu_s"][0])


def test_rates_are_counts_over_time(record: dict[str, Any]) -> None:
    for result in record["results"]:
        (seconds,) = result["wall_s"]
        assert result["pairs"] == 4
        assert result["pairs_per_s"] == pytest.approx(4 / seconds)
        assert result["unique_tokens_per_s"] == pytest.approx(result["unique_tokens"] / seconds)
        assert result["padded_equivalent"] > result["unique_tokens"]
        assert 0 < result["of_gemm"] == pytest.approx(result["flops"] / result["gemm_flops"][0])
    rates = [result["gemm_flops"][0] for result in record["results"]]
    assert min(rates) <= record["gemm_flops"] <= max(rates)


def test_a_missing_layout_is_reported_and_not_measured(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dpoeng.engine.scoring.attention import use_layout

    def refuse(lm: Any, wanted: str = "auto") -> None:
        use_layout(lm, "separate", "this architecture cannot")

    monkeypatch.setattr("dpoeng.bench.phases.choose_layout", refuse)
    found = bench_phases(PhaseSettings(model=str(tiny_model), device="cpu", batch_size=1, steps=1, repeats=1))
    assert {r["layout"] for r in found["results"]} == {"separate"}
    assert found["layout_reason"] == "this architecture cannot"


def test_flop_of_the_layers_are_what_torch_counts(tiny_model: Path) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    lm = load_model(find_model(str(tiny_model)), quantization="none", dtype="auto", device=torch.device("cpu"))
    pairs = synthetic_pairs(2, lm.vocab_size)
    layers = linear_shapes(lm)
    with FlopCounterMode(display=False) as counter:
        lm.backbone(input_ids=torch.zeros(1, unique_tokens(pairs), dtype=torch.long), use_cache=False)
    counted = sum(
        flop for op, flop in counter.get_flop_counts()["Global"].items() if "mm" in str(op) and "bmm" not in str(op)
    )
    assert counted == 2 * unique_tokens(pairs) * sum(n_in * n_out for n_in, n_out in layers)
    forward, backward = forward_flop(lm, pairs, layers, trained=0)
    assert counted < forward < backward < 2 * forward


def test_the_command_prints_a_table_and_keeps_the_record(tmp_path: Path, tiny_model: Path, pairs_file: Path) -> None:
    arguments = f"phases --model {tiny_model} --pairs {pairs_file} --device cpu --batch-size 2 --steps 1 --repeats 1"
    done = CliRunner().invoke(
        bench, [*arguments.split(), "--record", str(tmp_path / "one.jsonl"), "--results", str(tmp_path / "results")]
    )
    assert done.exit_code == 0, done.output
    assert "pairs/s" in done.output
    assert "peak above weights" in done.output
    (line,) = (tmp_path / "one.jsonl").read_text().splitlines()
    assert (tmp_path / "results" / "phases-cpu.jsonl").read_text().splitlines() == [line]
    assert json.loads(line)["settings"]["batch_size"] == 2


def test_the_embedded_model_has_the_shape_that_was_asked_for(tmp_path: Path) -> None:
    arguments = "phases --layers 1 --width 192 --device cpu --batch-size 1 --steps 1 --repeats 1"
    done = CliRunner().invoke(bench, [*arguments.split(), "--record", str(tmp_path / "one.jsonl")])
    assert done.exit_code == 0, done.output
    settings = json.loads((tmp_path / "one.jsonl").read_text())["settings"]
    assert (settings["model"], settings["layers"], settings["width"]) == (None, 1, 192)
    config = json.loads((save_small_model(tmp_path / "model", layers=1, width=192) / "config.json").read_text())
    assert (config["num_hidden_layers"], config["hidden_size"], config["intermediate_size"]) == (1, 192, 512)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--width 100", "--width 100 is not a multiple of 64"),
        ("--model M --layers 1", "leave them out, or --model"),
        ("--model M --width 64", "leave them out, or --model"),
    ],
)
def test_a_shape_that_no_model_can_take_is_refused(given: str, said: str) -> None:
    done = CliRunner().invoke(bench, ["phases", *given.split()])
    assert done.exit_code == 2
    assert said in " ".join(done.output.replace("│", " ").split())


def test_the_group_lists_its_commands() -> None:
    done = CliRunner().invoke(bench, ["--help"])
    assert done.exit_code == 0
    assert all(f"\n  {name} " in done.output for name in ("phases", "compare", "kernels", "sharing", "cache"))
    assert CliRunner().invoke(bench, ["nonsense"]).exit_code == 2


def test_the_cache_command(tmp_path: Path) -> None:
    arguments = ["cache", "--pairs", "500", "--weight-bytes", "1000000", "--record", str(tmp_path / "cache.jsonl")]
    done = CliRunner().invoke(bench, arguments)
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "cache.jsonl").read_text())["sizes"][0]["pairs"] == 500


def test_what_sharing_leaves_is_counted_by_hand() -> None:
    """A prompt of 6 and responses of 3: alone 6 + 3 + 3 of 9 + 9; three pairs 6 + 3 + 3 * 3 of 3 * (9 + 9)."""
    assert positions_left(pairs_of(2, 1, 6, 3, 50)) == pytest.approx(12 / 18)
    assert positions_left(pairs_of(2, 3, 6, 3, 50)) == pytest.approx(18 / 54)


@pytest.mark.slow
def test_the_sharing_command(tmp_path: Path, tiny_model: Path) -> None:
    arguments = ["sharing", "--model", str(tiny_model), "--tokens", "48", "--pairs", "8", "--repeats", "1"]
    result = CliRunner().invoke(bench, [*arguments, "--record", str(tmp_path / "r.jsonl")], catch_exceptions=False)
    assert "each prompt once for all its pairs" in result.output
    record = json.loads((tmp_path / "r.jsonl").read_text())
    assert [point["prompt_share"] for point in record["prompt_share"]] == [0.1, 0.25, 0.5, 0.75, 0.9]
    assert [point["pairs_a_prompt"] for point in record["pairs_a_prompt"]] == [1, 2, 4, 8]
    left = [point["positions_left"] for point in record["prompt_share"]]
    assert left == sorted(left, reverse=True)
    assert all(point["training_speedup"] > 0 for point in record["prompt_share"])


def test_pairs_for_the_embedded_model_are_refused_by_name(pairs_file: Path) -> None:
    for what in ("phases", "memory"):
        with pytest.raises(UserError, match="the built-in model has no tokenizer") as caught:
            CliRunner().invoke(bench, [what, "--pairs", str(pairs_file)], catch_exceptions=False)
        assert caught.value.where == f"--pairs {pairs_file}"
        assert "--model" in caught.value.remedy
