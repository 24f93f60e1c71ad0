"""Makes each mistake of mutants.toml in a copy of the sources, runs the tests that should notice, prints the kill rate.

make mutants                                        # before a release; some minutes; rewrites tests/mutants.md
python tests/support/mutants.py --only kernels      # those whose file or description holds this
"""

from __future__ import annotations

import argparse
import datetime
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MAX_SECONDS = 300
AIM = 0.95


def copy_sources(into: Path) -> None:
    """The files that git knows or would add."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(listed, cwd=ROOT, text=True).splitlines():
        source, target = ROOT / name, into / name
        if source.is_symlink() or source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)


def compile_sources(tree: Path) -> None:
    """Compiles each file once. Python compares hashes: a changed file is compiled again, and a stale one never runs."""
    folders = [name for name in ("bench", "cache", "cli", "engine", "kernels", "src") if (tree / name).is_dir()]
    command = [sys.executable, "-m", "compileall", "-q", "--invalidation-mode", "checked-hash", *folders]
    subprocess.run(command, cwd=tree, check=True)


def is_killed(tree: Path, tests: str, seconds: int = MAX_SECONDS) -> bool:
    """Whether the tests fail, do not end, or end the interpreter. They must run at all: pytest's status 1."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *shlex.split(tests)]
    environment = {**os.environ, "PYTHONPATH": str(tree / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return True
    if done.returncode > 1:
        sys.exit(f"pytest {tests} ended with status {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode != 0


def report(outcomes: list[tuple[dict[str, str], bool]]) -> str:
    """The kill rate by folder, the commit, and the mistakes that no test noticed."""
    commit = subprocess.check_output(["git", "describe", "--always", "--dirty=+"], cwd=ROOT, text=True).strip()
    by_folder: dict[str, list[bool]] = {}
    for one, found in outcomes:
        by_folder.setdefault(one["file"].split("/")[0], []).append(found)
    by_folder["all"] = [found for _, found in outcomes]
    rows = [f"| {name} | {len(of)} | {sum(of)} | {sum(of) / len(of):.0%} |" for name, of in by_folder.items()]
    left = [f"- {one['file']}: {one['what']}" for one, found in outcomes if not found]
    return "\n".join(
        [
            "# Planted mistakes that the tests notice",
            "",
            f"`make mutants` on {datetime.date.today()}, commit {commit}. Each mistake in",
            "[mutants.toml](support/mutants.toml) is made alone in a copy of the sources, where its tests must fail.",
            "",
            "| Folder | Mistakes | Noticed | Share |",
            "|---|---|---|---|",
            *rows,
            "",
            *(["Not noticed:", "", *left] if left else ["All are noticed."]),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Plant mistakes and see whether the tests notice.")
    parser.add_argument("--only", help="only those whose file or description holds this")
    parser.add_argument("--record", type=Path, help="write the kill rate by folder to this Markdown file")
    parser.add_argument("--seconds", type=int, default=MAX_SECONDS, help="after which tests count as noticing")
    parser.add_argument("--part", default="1/1", help="every N-th, e.g. 1/2 and 2/2, to share the work")
    options = parser.parse_args()
    first, parts = map(int, options.part.split("/"))
    listed = tomllib.loads((HERE / "mutants.toml").read_text(encoding="utf-8"))["mutant"]
    chosen = [one for one in listed if not options.only or options.only in f"{one['file']} {one['what']}"]
    chosen = chosen[first - 1 :: parts]
    if not chosen:
        sys.exit(f"no mistake in mutants.toml has a file or description with {options.only!r}")
    outcomes: list[tuple[dict[str, str], bool]] = []
    with tempfile.TemporaryDirectory(prefix="dpoeng-mutants-") as scratch:
        tree = Path(scratch)
        copy_sources(tree)
        compile_sources(tree)
        for tests in sorted({one["tests"] for one in chosen}):
            if is_killed(tree, tests, options.seconds):
                sys.exit(f"without any mistake, these tests fail or take more than {options.seconds} s: {tests}")
        for one in chosen:
            path = tree / one["file"]
            sound = path.read_text(encoding="utf-8")
            path.write_text(sound.replace(one["old"], one["new"]), encoding="utf-8")
            began = time.monotonic()
            found = is_killed(tree, one["tests"], options.seconds)
            path.write_text(sound, encoding="utf-8")
            outcomes.append((one, found))
            took = f"{time.monotonic() - began:.0f} s"
            print(f"{'killed  ' if found else 'SURVIVED'} {one['file']}: {one['what']} ({took})", flush=True)
    killed = sum(found for _, found in outcomes)
    print(f"\n{killed} of {len(chosen)} killed: {killed / len(chosen):.0%}")
    if options.record:
        options.record.write_text(report(outcomes), encoding="utf-8")
    sys.exit(0 if killed >= AIM * len(chosen) else 1)


if __name__ == "__main__":
    main()
