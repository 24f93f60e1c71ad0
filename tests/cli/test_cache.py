"""The `dpoeng cache` commands, as a user runs them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from dpoeng.bench.cache import synthetic_rows
from dpoeng.cache.errors import UserError
from dpoeng.cache.schema import ScoredPair, pair_key
from dpoeng.cache.spec import ReferenceSpec
from dpoeng.cache.store import Store
from dpoeng.cache.table import ViewEntry
from dpoeng.cli.cache.commands import cache

SPEC = ReferenceSpec.from_fields({"model": "cli", "dtype": "float32"})
ROWS = synthetic_rows(9)
COMMANDS = ["info", "verify", "export", "diff", "explain", "import", "merge", "gc", "stats"]


def made(root: Path, rows: list[ScoredPair] = ROWS, spec: ReferenceSpec = SPEC, view: str = "pairs") -> Path:
    store = Store.open(root, create=True)
    digest = store.put_spec(spec)
    store.commit_shard(digest, rows, {"torch": "2.13.0"})
    store.seal(digest)
    entries = [ViewEntry("pairs.jsonl", i + 1, pair_key(row.ids)) for i, row in enumerate(rows)]
    store.write_view(digest, view, entries, {"max_length": 1024})
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return made(tmp_path / "refcache")


@pytest.fixture
def run() -> Callable[..., Result]:
    def invoke(*arguments: object, status: int = 0) -> Result:
        result = CliRunner().invoke(cache, [str(argument) for argument in arguments])
        if isinstance(result.exception, UserError):
            raise result.exception
        assert result.exit_code == status, result.output
        return result

    return invoke


Run = Callable[..., Result]


def test_every_command_has_an_example_and_help_is_quick(run: Run) -> None:
    assert sorted(cache.list_commands(click.Context(cache))) == sorted(COMMANDS)
    for command in COMMANDS:
        assert f"Example:\n    dpoeng cache {command} " in run(command, "--help").output
    program = "import sys, time; import dpoeng.cli.cache.contents; print(time.process_time(), *sys.modules)"
    cpu_s, *loaded = subprocess.check_output([sys.executable, "-c", program], text=True).split()
    assert float(cpu_s) < 3  # by its own clock: others on the machine count in another
    assert not {"pyarrow", "numpy", "torch", "rich"} & {*loaded}


def test_info(folder: Path, run: Run) -> None:
    text = run("info", folder).output
    for words in (SPEC.digest, "float32", "9 in 1 object", "generation 1", "2.13.0", "pairs", "1024"):
        assert words in text
    found = json.loads(run("info", folder, "--json").output)
    assert [(item["digest"], item["rows"]) for item in found["references"]] == [(SPEC.digest, 9)]
    assert [(item["name"], item["rows"], item["meta"]) for item in found["views"]] == [
        ("pairs", 9, {"max_length": 1024})
    ]
    assert found["problems"] == []


def test_info_and_verify_name_damage_and_exit_with_4(folder: Path, run: Run) -> None:
    assert "sound" in run("verify", folder).output
    record = next((folder / "runs").rglob("commits/*.json"))
    record.write_bytes(record.read_bytes().replace(b"2.13.0", b"2.14.0"))
    assert record.name in run("info", folder, status=4).output.replace("\n", "")
    for depth in ("open", "semantic", "full", "all"):
        text = run("verify", folder, "--depth", depth, status=4).output
        assert f"damaged {record}" in text
        assert "precompute-ref" in text
    assert record.exists()


def test_export(folder: Path, tmp_path: Path, run: Run) -> None:
    assert "9 rows" in run("export", folder, tmp_path / "out.jsonl").output
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["ref_chosen_logps"] for row in rows] == [row.chosen_sum for row in ROWS]
    made(folder, ROWS[:2], view="second")
    with pytest.raises(UserError, match="several views"):
        run("export", folder, tmp_path / "out.jsonl")
    assert "2 rows" in run("export", folder, tmp_path / "out.jsonl", "--view", "second").output


def test_diff_and_explain(folder: Path, tmp_path: Path, run: Run) -> None:
    assert "the same reference" in run("diff", folder, folder).output
    assert "only reference" in run("explain", folder).output
    changed = ReferenceSpec.from_fields({"model": "cli", "dtype": "bfloat16"})
    other = made(tmp_path / "other", spec=changed)
    table = run("diff", folder, other, status=1).output
    assert [word for word in table.split() if word.isalnum()][-3:] == ["dtype", "float32", "bfloat16"]
    made(folder, spec=changed, view="changed")
    text = run("explain", folder, changed.digest[:6]).output
    assert f"reference {changed.digest} was new" in text
    assert SPEC.digest in text
    assert "model" not in text.splitlines()[-1]
    with pytest.raises(UserError, match="does not name one"):
        run("diff", folder, folder)
    assert "the same" in run("diff", folder, folder, "--old", SPEC.digest, "--new", SPEC.digest[:8]).output


def test_merge(folder: Path, tmp_path: Path, run: Run) -> None:
    text = run("merge", tmp_path / "both", folder).output
    assert "views: pairs" in text
    assert "sound" in run("verify", tmp_path / "both").output


def test_gc(folder: Path, run: Run) -> None:
    assert "0 files" in run("gc", folder).output
    left = folder / "tmp" / "left"
    left.write_bytes(b"half")
    assert "nothing was removed (--delete does)" in run("gc", folder, "--min-age-s", 0).output
    assert left.exists()
    assert "1 file removed" in run("gc", folder, "--min-age-s", 0, "--delete").output
    assert not left.exists()
    with pytest.raises(UserError, match="cannot drop this reference"):
        run("gc", folder, "--delete", "--drop-spec", SPEC.digest[:4])


def test_stats(folder: Path, tmp_path: Path, run: Run) -> None:
    text = run("stats", folder, "--html", tmp_path / "page.html").output
    assert re.search(r"distinct pairs +9\b", text)
    assert "<svg" in (tmp_path / "page.html").read_text()
    found = json.loads(run("stats", folder, "--json", "--pairs", 2).output)
    margins = [row.chosen_sum - row.rejected_sum for row in ROWS]
    assert found["margin"]["mean"] == pytest.approx(sum(margins) / 9)
    assert len(found["strongly_right"]) + len(found["strongly_wrong"]) <= 4


def test_a_folder_that_is_not_a_cache(tmp_path: Path, run: Run) -> None:
    for command in ("info", "verify", "stats", "gc", "explain"):
        with pytest.raises(UserError) as caught:
            run(command, tmp_path)
        assert caught.value.code == "cache-not-found"
        assert caught.value.exit_status == 4
