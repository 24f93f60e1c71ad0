"""Several processes at one piece of work, as torchrun (or accelerate, or Slurm with the same variables) starts them.

Started alone, a process is a group of one and nothing here touches torch.distributed.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dpoeng.cache.errors import UserError

# How long the others may compute before a rank that waits gives up. A rank that dies is noticed at once, by its
# connection; this limit is for one that hangs.
_TIMEOUT = datetime.timedelta(hours=24)


@dataclass(frozen=True, slots=True)
class Group:
    """The processes that work together.

    Attributes:
        rank: this process's number, from 0.
        size: how many there are.
        local_rank: its number on this machine; also that of its GPU.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that reports."""
        return self.rank == 0

    def agree(self, what: str, value: Any, remedy: str) -> None:
        """Raises UserError in every process unless all of them have the same value."""
        if self.size == 1:
            return
        values: list[Any] = [None] * self.size
        with self._peers():
            torch.distributed.all_gather_object(values, value)
        if different := [rank for rank in range(self.size) if values[rank] != values[0]]:
            raise UserError(
                f"the processes of this run have different {what}",
                code="ranks-differ",
                where="ranks 0 and " + ", ".join(map(str, different)),
                expected=str(values[0]),
                found="; ".join(sorted({str(values[rank]) for rank in different})),
                remedy=remedy,
            )

    def wait(self) -> None:
        """Returns when every process has come here. Raises UserError where one has ended before."""
        if self.size > 1:
            with self._peers():
                torch.distributed.barrier()

    @contextlib.contextmanager
    def first_on_machine(self) -> Iterator[None]:
        """Runs a block in one process of each machine first, so that the others find what it left (a memo, a file)."""
        if self.local_rank != 0:
            self.wait()
        yield
        if self.local_rank == 0:
            self.wait()

    @contextlib.contextmanager
    def _peers(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise UserError(
                "another process of this run has ended or cannot be reached",
                code="rank-lost",
                where=f"rank {self.rank} of {self.size}",
                found=str(error).splitlines()[0],
                remedy="look for the first error among the outputs of the others; then start the same command again: "
                "it goes on from what was committed",
                exit_status=5,
            ) from error


@contextlib.contextmanager
def process_group(environment: Mapping[str, str] = os.environ) -> Iterator[Group]:
    """The group that the environment names, for as long as the context lasts.

    Messages go through gloo, on the CPU: what is exchanged here is small, and works with and without GPUs.
    """
    size = int(environment.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Group()
        return
    group = Group(int(environment["RANK"]), size, int(environment.get("LOCAL_RANK", environment["RANK"])))
    owner = not torch.distributed.is_initialized()
    if owner:
        with group._peers():
            torch.distributed.init_process_group("gloo", timeout=_TIMEOUT)
    try:
        yield group
    finally:
        if owner:
            torch.distributed.destroy_process_group()
