"""Several processes at one piece of work, as torchrun (or accelerate, or Slurm with the same variables) starts them.

Started alone, a process is a group of one and nothing here touches torch.distributed.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from dpoeng.cache.errors import UserError
from dpoeng.engine.runtime.host import group_size
from dpoeng.engine.runtime.out_of_memory import attempt, is_out_of_memory

Value = TypeVar("Value")

# How long the others may compute before a rank that waits gives up. A rank that dies is noticed at once, by its
# connection; this limit is for one that hangs.
_TIMEOUT = datetime.timedelta(hours=24)

# gloo raises plain RuntimeErrors; these words are in them.
_LOSS = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")

BUCKET_BYTES = 64 * 2**20
"""Gradients are summed in pieces of about this size: few calls, and little memory beside the gradients."""


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

    # ------------------------------------------------------------------ who does what

    def mine(self, count: int) -> range:
        """Which of `count` pieces of work this process does: in turn, so that shares differ by one at most."""
        return range(self.rank, count, self.size)

    def idle(self, count: int) -> int:
        """How many of `count` pieces this process has fewer than the first one: 0 or 1."""
        return -(-count // self.size) - len(self.mine(count))

    # ------------------------------------------------------------------ what they tell each other

    def gather(self, value: Value) -> list[Value]:
        """The value of every process, by rank. For small values on the host: they travel as pickles."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self._meeting():
            torch.distributed.all_gather_object(values, value)
        return values

    def from_first(self, value: Value) -> Value:
        """The first process's value."""
        if self.size == 1:
            return value
        values: list[Any] = [value]
        with self._meeting():
            torch.distributed.broadcast_object_list(values, src=0)
        found: Value = values[0]
        return found

    def each(self, work: Callable[[], Value], *, in_step: bool = False) -> list[Value]:
        """Return the work's result in every process, by rank.

        Args:
            work: waits for no other process, or is done `in_step` with them.
            in_step: whoever then runs out of memory raises that alone, since nobody can tell the others.

        Raises:
            MemoryError: one of them ran out of memory. All raise it, so that all do the same next.
        """
        if self.size == 1 or in_step:
            return self.gather(work())
        outcomes = self.gather(attempt(work, tries=1))
        for rank, (_, said) in enumerate(outcomes):
            if said:
                raise MemoryError(f"rank {rank}: {said}")
        return [result for result, _ in outcomes if result is not None]

    def agree(self, what: str, value: Any, remedy: str) -> None:
        """Raises UserError in every process unless all of them have the same value; of mappings, says where."""
        values = self.gather(value)
        different = [rank for rank in range(self.size) if values[rank] != values[0]]
        if not different:
            return
        if isinstance(value, Mapping):
            names = {name for rank in different for name in value if values[rank].get(name) != values[0].get(name)}
            values = [", ".join(f"{name} = {found.get(name)}" for name in sorted(names)) for found in values]
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
            with self._meeting():
                torch.distributed.barrier()

    @contextlib.contextmanager
    def first_on_machine(self) -> Iterator[None]:
        """Runs a block in one process of each machine first, so that the others find what it left (a memo, a file)."""
        if self.local_rank != 0:
            self.wait()
        yield
        if self.local_rank == 0:
            self.wait()

    # ------------------------------------------------------------------ tensors, on the device where they are

    def copy_first(self, tensors: Sequence[torch.Tensor]) -> None:
        """Gives each tensor the first process's values."""
        if self.size > 1:
            with self._meeting():
                for tensor in tensors:
                    torch.distributed.broadcast(tensor, src=0)

    def add(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replaces each tensor by its sum over the processes: the same bits in all of them."""
        if self.size == 1:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            with self._meeting():
                torch.distributed.all_reduce(flat)
            for tensor, total in zip(bucket, torch.split(flat, [tensor.numel() for tensor in bucket]), strict=True):
                tensor.copy_(total.view_as(tensor))

    @contextlib.contextmanager
    def _meeting(self) -> Iterator[None]:
        """A call in which all processes meet: what goes wrong there is another process, or the way to it."""
        try:
            yield
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise self._lost(error) from error

    @contextlib.contextmanager
    def noticing_loss(self) -> Iterator[None]:
        """The same for a block that does other things too: only what names the connection is taken for its loss."""
        try:
            yield
        except RuntimeError as error:
            named = isinstance(error, torch.distributed.DistError) or any(sign in str(error) for sign in _LOSS)
            if self.size == 1 or not named or is_out_of_memory(error):
                raise
            raise self._lost(error) from error

    def _lost(self, error: RuntimeError) -> UserError:
        return UserError(
            "another process of this run ended or cannot be reached",
            code="rank-lost",
            where=f"rank {self.rank} of {self.size}",
            found=str(error).splitlines()[0],
            remedy="find the first error in the output of the others, then start the same command again to continue",
            exit_status=5,
        )


ALONE = Group()
"""One process that was started alone."""


def _buckets(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Tensors of one dtype that follow each other, `BUCKET_BYTES` together or one alone."""
    bucket: list[torch.Tensor] = []
    for tensor in tensors:
        full = sum(held.nbytes for held in bucket) + tensor.nbytes > BUCKET_BYTES
        if bucket and (full or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


@contextlib.contextmanager
def process_group(environment: Mapping[str, str] = os.environ) -> Iterator[Group]:
    """The group that the environment names, for as long as the context lasts.

    Messages go through gloo, on the CPU, with and without GPUs; tensors on GPUs go through NCCL.
    """
    size = group_size(environment)
    if size == 1:
        yield ALONE
        return
    group = Group(int(environment["RANK"]), size, int(environment.get("LOCAL_RANK", environment["RANK"])))
    owner = not torch.distributed.is_initialized()
    if owner:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        with group._meeting():
            torch.distributed.init_process_group(backend, timeout=_TIMEOUT)
    try:
        with group.noticing_loss():
            yield group
    finally:
        if owner:
            torch.distributed.destroy_process_group()
