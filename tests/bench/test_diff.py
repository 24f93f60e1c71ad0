"""`dpoeng bench diff`: by hand, on records of two commits; what cannot be compared is refused."""

from __future__ import annotations

import copy
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from dpoeng.bench.diff import Figure, compare_records, differences, find_records, verdict
from dpoeng.bench.measuring.records import append, stamp
from dpoeng.cache.errors import UserError
from dpoeng.cli.bench.commands import bench


def record(commit: str = "aaaaaaaaaaaa", cpu_s: tuple[float, ...] = (2.0, 2.1, 1.9), **changes: Any) -> dict[str, Any]:
    """A record of phases with one phase in one layout."""
    made = stamp("phases", torch.device("cpu"), {"batch_size": 4, **changes})
    result = {
        "phase": "reference", "layout": "shared", "cpu_s": list(cpu_s), "wall_s": [x / 2 for x in cpu_s],
        "peaks_bytes": [100, 101, 102],
    }  # fmt: skip
    return {**made, "commit": commit, "results": [result]}


def seconds(*values: float) -> Figure:
    return Figure(values, "s")


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (seconds(1.0, 1.1, 0.9), seconds(1.2, 1.3, 1.25), "worse"),  # 1.2 > 1.05 * 1.1
        (seconds(1.0, 1.1, 0.9), seconds(1.15, 1.3, 1.25), "same"),  # 1.15 < 1.05 * 1.1: apart, but by too little
        (seconds(1.0, 1.1, 0.9), seconds(1.05, 3.0, 3.0), "same"),  # one repeat within the others' range
        (seconds(1.2, 1.3, 1.25), seconds(1.0, 1.1, 0.9), "better"),
        (seconds(1.0), seconds(9.0, 9.0), "not judged"),
        (Figure((100,), "bytes", exact=True), Figure((106,), "bytes", exact=True), "worse"),
        (Figure((100,), "bytes", exact=True), Figure((104,), "bytes", exact=True), "same"),
        (seconds(0.0, 0.0), seconds(0.0, 0.0), "same"),
    ],
)
def test_what_is_outside_of_noise(before: Figure, after: Figure, expected: str) -> None:
    assert verdict(before, after, 0.05) == expected
    mirrored = {"worse": "better", "better": "worse"}.get(expected, expected)
    assert verdict(after, before, 0.05) == mirrored


def test_figures_have_names_and_changes() -> None:
    found = {d.name: d for d in differences(record(), record(cpu_s=(4.0, 4.2, 3.8)))}
    assert {name: d.verdict for name, d in found.items()} == {
        "reference, shared: CPU": "worse", "reference, shared: clock": "worse", "reference, shared: peak": "same"
    }  # fmt: skip
    assert found["reference, shared: CPU"].change == pytest.approx(1.0)


def test_the_newest_record_of_each_measurement_counts() -> None:
    before = [record(cpu_s=(9.0, 9.0, 9.0)), record(), record(batch_size=8)]
    found = compare_records(before, [record(cpu_s=(2.0, 2.0, 2.0))])
    assert [d.verdict for d in found.comparisons[0].differences] == ["same"] * 3
    assert found.alone == ["phases (only before)"]


def test_kinds_without_repeats_are_named() -> None:
    sharing = {**record(), "kind": "sharing"}
    assert compare_records([record(), sharing], [record()]).alone == ["sharing (its record keeps no repeats)"]


@pytest.mark.parametrize("change", ["machine", "settings", "device"])
def test_other_circumstances_are_refused_unless_asked_for(change: str) -> None:
    other = copy.deepcopy(record(cpu_s=(4.0, 4.2, 3.8)))
    if change == "machine":
        other["machine"]["processor"] = "another one"
    elif change == "settings":
        other["settings"]["batch_size"] = 8
    else:
        other["device"] = "another one"
    with pytest.raises(UserError) as caught:
        compare_records([record()], [other])
    assert caught.value.code == "bench-not-comparable"
    assert ("8" if change == "settings" else "another one") in str(caught.value.found)
    found = compare_records([record()], [other], anyway=True)
    assert len(found.comparisons[0].unlike) == 1
    assert len(found.worse) == 2


def test_load_and_versions_are_no_other_circumstances() -> None:
    other = copy.deepcopy(record())
    other["machine"]["load"] = 17.0
    other["versions"]["torch"] = "3.0"
    (comparison,) = compare_records([record()], [other]).comparisons
    assert comparison.unlike == {"version of torch": (torch.__version__, "3.0")}


def test_commits_are_found_in_a_folder_of_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "--quiet")
    git("commit", "--quiet", "--allow-empty", "-m", "one")
    head = git("rev-parse", "HEAD")
    monkeypatch.chdir(tmp_path)
    append(record(head[:12] + "+"), tmp_path / "results" / "phases-cpu.jsonl")
    append(record("bbbbbbbbbbbb"), tmp_path / "results" / "phases-cpu.jsonl")
    for name in (head, head[:7], "HEAD"):
        assert [r["commit"] for r in find_records(name, Path("results"))] == [head[:12] + "+"]
    with pytest.raises(UserError, match=r"no record of HEAD~1[\s\S]*bbbbbbbbbbbb"):
        find_records("HEAD~1", Path("results"))
    with pytest.raises(UserError, match="no records"):
        find_records("HEAD", Path("nowhere"))


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    before, after = str(tmp_path / "before.jsonl"), str(tmp_path / "after.jsonl")
    append(record(), Path(before))
    append(record("bbbbbbbbbbbb", (4.0, 4.2, 3.8)), Path(after))
    worse = CliRunner().invoke(bench, ["diff", before, after])
    assert worse.exit_code == 6, worse.output
    for shown in ("2 worse, 1 same", "reference, shared: CPU", "+100.0 %", "4 CPU-s (3.8–4.2)"):
        assert shown in worse.output
    assert "peak" not in worse.output
    assert CliRunner().invoke(bench, ["diff", after, before]).exit_code == 0
    assert CliRunner().invoke(bench, ["diff", before, after, "--threshold", "150"]).exit_code == 0
    everything = CliRunner().invoke(bench, ["diff", before, before, "--all"])
    assert (everything.exit_code, everything.output.count("same")) == (0, 4)
    for_scripts = CliRunner().invoke(bench, ["diff", before, after, "--json"])
    told = json.loads(for_scripts.output)
    assert told["worse"] == ["reference, shared: CPU", "reference, shared: clock"]
    assert told["comparisons"][0]["commits"] == ["aaaaaaaaaaaa", "bbbbbbbbbbbb"]


def test_what_the_repository_keeps_can_be_compared() -> None:
    """Records as the commands wrote them, against themselves; new ones: tests/bench/test_memory.py."""
    kept = str(Path(__file__).parents[2] / "bench" / "results" / "kernels-cpu.jsonl")
    found = CliRunner().invoke(bench, ["diff", kept, kept, "--all", "--json"])
    assert found.exit_code == 0, found.output
    (comparison,) = json.loads(found.output)["comparisons"][:1]
    verdicts = [figure["verdict"] for figure in comparison["figures"]]
    assert len(verdicts) > 20
    assert set(verdicts) == {"same", "not judged"}
