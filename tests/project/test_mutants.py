"""The list of planted mistakes fits the sources: each old text stands there once, and the tests exist."""

from __future__ import annotations

import shlex
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_mutant_can_be_made() -> None:
    listed = tomllib.loads((ROOT / "tests/support/mutants.toml").read_text(encoding="utf-8"))["mutant"]
    assert len(listed) >= 40
    for one in listed:
        count = (ROOT / one["file"]).read_text(encoding="utf-8").count(one["old"])
        assert count == 1, f"{one['what']}: {count} times in {one['file']}"
        assert one["new"] != one["old"]
        paths = [word for word in shlex.split(one["tests"]) if word.startswith("tests/")]
        assert paths
        assert all((ROOT / path).exists() for path in paths), one["tests"]
