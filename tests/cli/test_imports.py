"""What each command imports: a budget of heavy libraries, which holds on a busy machine where seconds do not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from dpoeng_testing import pair_rows, write_jsonl

from dpoeng.engine.config.fields import PrecomputeConfig, TrainConfig
from dpoeng.engine.recipes.precompute import precompute_reference
from dpoeng.engine.recipes.train import train

PROGRAM = """
import json, os, sys

class Watch:  # sees what is imported and forgotten again, too
    def find_spec(self, name, path=None, target=None):
        seen.add(name if ".modeling_" in name else name.partition(".")[0])

seen = set()
sys.meta_path.insert(0, Watch())
from dpoeng.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit as stop:
    print(json.dumps([stop.code, sorted(seen)]), file=sys.stderr)
"""

HEAVY = {"torch", "transformers", "peft", "bitsandbytes", "accelerate", "tokenizers", "pyarrow", "numpy", "pydantic"}

# Seconds of CPU that each costs at least, on the machine where this was written: torch 1.6, transformers 1.2, peft 1.3.
BUDGETS = {
    "--version": set(),
    "--help": set(),
    "bench --help": set(),
    "migrate --help": set(),
    "train --help": {"pydantic"},
    "config show": {"pydantic"},
    "report {out}": {"pydantic", "numpy", "pyarrow"},
    "cache info {cache}": {"pydantic", "numpy", "pyarrow"},
    "train --cache {cache} --output-dir {out} --max-steps 2": {"pydantic", "numpy", "pyarrow"},
    "check {pairs}": {"pydantic", "numpy", "pyarrow"},
    # transformers reads a tokenizer as phase one will; torch is kept from it, and no model's code is imported.
    "check {pairs} --model {model}": {"pydantic", "numpy", "pyarrow", "tokenizers", "transformers"},
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("imports")
    pairs, cache, out = write_jsonl(folder / "pairs.jsonl", pair_rows(12)), folder / "cache", folder / "out"
    precompute_reference(PrecomputeConfig(pairs=(pairs,), model=str(tiny_model), cache=cache))
    train(TrainConfig(cache=cache, output_dir=out, max_steps=2))
    return {"pairs": pairs, "cache": cache, "out": out, "model": tiny_model}


def run(words: list[str], folder: Path) -> tuple[str, set[str]]:
    """What a command prints, and the names that it imports."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, *words], cwd=folder, capture_output=True, text=True)
    assert done.stderr, done.stdout
    status, names = json.loads(done.stderr.splitlines()[-1])
    assert status == 0, done.stderr
    return done.stdout, set(names)


@pytest.mark.parametrize("command", BUDGETS)
def test_a_command_imports_no_more_than_it_needs(command: str, places: dict[str, Path], tmp_path: Path) -> None:
    words = [word.format(**places) for word in command.split()]
    said, names = run(words, tmp_path)
    assert HEAVY & names <= BUDGETS[command]
    assert not [name for name in names if ".models." in name and ".modeling_" in name], (
        "a tokenizer needs no model's code"
    )
    if command.startswith("train --cache"):
        assert "already complete (2 steps)" in said
        assert "rewards/margins" in said
