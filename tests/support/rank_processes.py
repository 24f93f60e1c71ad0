"""Commands run as torchrun runs them: a process each, with its variables, on this machine's CPU through gloo."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from processes import quietly, start_process


def run_rank(command: list[str], variables: dict[str, str], output: Path, prelude: Callable[[], None] | None) -> None:
    from dpoeng.cli.main import main

    os.environ.update(variables)
    quietly(output)
    if prelude is not None:
        prelude()
    try:
        main(command)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def train_command(cache: Path, out: Path, *settings: str) -> list[str]:
    return ["train", "--cache", str(cache), "--output-dir", str(out), *settings]


def run_alone(command: list[str]) -> None:
    """The same command in this process, which must end well."""
    from dpoeng.cli.main import main

    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 0


@dataclass
class Rank:
    process: Any
    output: Path

    def end(self, within_s: float = 240) -> tuple[int, str, str]:
        """(exit status, stdout, stderr)."""
        self.process.join(within_s)
        assert self.process.exitcode is not None, "still running"
        return self.process.exitcode, *(self.output.with_suffix(end).read_text("utf-8") for end in (".out", ".err"))


def variables_of(size: int) -> list[dict[str, str]]:
    """The variables that torchrun sets, for each of so many processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{**own, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


def start(commands: Sequence[list[str]], folder: Path, *, last: Callable[[], None] | None = None) -> list[Rank]:
    """A process for each command line, with the variables that torchrun sets.

    What they print goes into `folder`. `last` is called in the last of them before.
    """
    ranks = []
    for rank, variables in enumerate(variables_of(len(commands))):
        output = folder / f"rank{rank}"
        prelude = last if rank == len(commands) - 1 else None
        ranks.append(Rank(start_process(run_rank, commands[rank], variables, output, prelude), output))
    return ranks


def ends(ranks: list[Rank]) -> list[tuple[int, str, str]]:
    """How each of them ended."""
    return [rank.end() for rank in ranks]
