"""Several processes that share one run, started by torchrun (or by accelerate or Slurm with the same variables).

A process started alone is a group of one and does not touch torch.distributed.
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

# How long a waiting rank waits while the others compute. A rank that dies is noticed at once, because its connection
# closes; this limit is for a rank that hangs.
_TIMEOUT = datetime.timedelta(hours=24)

# gloo raises plain RuntimeErrors; they contain these words.
_LOSS = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")

BUCKET_BYTES = 64 * 2**20
"""Gradients are summed in pieces of about this size: few calls, and little memory besides the gradients."""


@dataclass(frozen=True, slots=True)
class Group:
    """The processes of a run.

    Attributes:
        rank: this process's number, from 0.
        size: number of processes.
        local_rank: its number on this machine, and the number of its GPU.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that reports."""
        return self.rank == 0

    # ------------------------------------------------------------------ shares of work

    def mine(self, count: int) -> range:
        """Indices of this process's pieces of work: every `size`-th, so that shares differ by at most one."""
        return range(self.rank, count, self.size)

    def idle(self, count: int) -> int:
        """How many pieces fewer than the first process this process has: 0 or 1."""
        return -(-count // self.size) - len(self.mine(count))

    # ------------------------------------------------------------------ messages

    def gather(self, value: Value) -> list[Value]:
        """The value of every process, by rank. For small values on the host: they are pickled."""
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
        value_of_first: Value = values[0]
        return value_of_first

    def each(self, work: Callable[[], Value], *, in_step: bool = False) -> list[Value]:
        """Runs `work` in every process; returns the results by rank.

        Args:
            work: must not wait for other processes, unless all run it `in_step`.
            in_step: the work has collectives. A process that runs out of memory then raises alone: it cannot tell the
            others.

        Raises:
            MemoryError: one process ran out of memory. All raise it, so that all take the same next step.
        """
        if self.size == 1 or in_step:
            return self.gather(work())
        # All report before one raises; otherwise the others would wait for it until the timeout.
        outcomes = self.gather(attempt(work, tries=1))
        for rank, (_, problem) in enumerate(outcomes):
            if problem:
                raise MemoryError(f"rank {rank}: {problem}")
        return [result for result, _ in outcomes if result is not None]

    def agree(self, what: str, value: Any, remedy: str) -> None:
        """Raises UserError in every process unless all have the same value; for mappings, names the differences."""
        values = self.gather(value)
        different = [rank for rank in range(self.size) if values[rank] != values[0]]
        if not different:
            return
        if isinstance(value, Mapping):
            names = {name for rank in different for name in value if values[rank].get(name) != values[0].get(name)}
            values = [", ".join(f"{name} = {fields.get(name)}" for name in sorted(names)) for fields in values]
        raise UserError(
            f"the processes of this run have different {what}",
            code="ranks-differ",
            where="ranks 0 and " + ", ".join(map(str, different)),
            expected=str(values[0]),
            found="; ".join(sorted({str(values[rank]) for rank in different})),
            remedy=remedy,
        )

    def wait(self) -> None:
        """Waits until every process calls this. Raises UserError if one has ended before."""
        if self.size > 1:
            with self._meeting():
                torch.distributed.barrier()

    @contextlib.contextmanager
    def first_on_machine(self) -> Iterator[None]:
        """Runs a block in one process of each machine first, so that the others find its files (a memo, a download)."""
        if self.local_rank != 0:
            self.wait()
        yield
        if self.local_rank == 0:
            self.wait()

    # ------------------------------------------------------------------ tensors, on their device

    def copy_first(self, tensors: Sequence[torch.Tensor]) -> None:
        """Overwrites each tensor with the first process's values."""
        if self.size > 1:
            with self._meeting():
                for tensor in tensors:
                    torch.distributed.broadcast(tensor, src=0)

    def add(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replaces each tensor by its sum over the processes, with the same bits in all of them."""
        if self.size == 1:
            return
        # One flat tensor per bucket, since each all-reduce costs a round trip: an adapter has hundreds of tensors.
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            with self._meeting():
                torch.distributed.all_reduce(flat)
            for tensor, total in zip(bucket, torch.split(flat, [tensor.numel() for tensor in bucket]), strict=True):
                tensor.copy_(total.view_as(tensor))

    @contextlib.contextmanager
    def _meeting(self) -> Iterator[None]:
        """Wraps a call in which all processes meet: an error there means that another process or the network failed."""
        try:
            yield
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise self._lost(error) from error

    @contextlib.contextmanager
    def noticing_loss(self) -> Iterator[None]:
        """The same for a block that does other work too: only errors that name the connection mean a lost process."""
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
"""The group of a process that runs alone."""


def _buckets(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Groups of consecutive tensors of one dtype with at most `BUCKET_BYTES` together, or a single larger tensor."""
    bucket: list[torch.Tensor] = []
    for tensor in tensors:
        full = sum(queued.nbytes for queued in bucket) + tensor.nbytes > BUCKET_BYTES
        if bucket and (full or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


@contextlib.contextmanager
def process_group(environment: Mapping[str, str] = os.environ) -> Iterator[Group]:
    """The group that the environment names, for as long as the context lasts.

    Messages go through gloo on the CPU, even with GPUs; tensors on GPUs go through NCCL.
    """
    size = group_size(environment)
    if size == 1:
        yield ALONE
        return
    group = Group(int(environment["RANK"]), size, int(environment.get("LOCAL_RANK", environment["RANK"])))
    owner = not torch.distributed.is_initialized()
    if owner:
        # NCCL moves only GPU tensors; pickled messages are CPU tensors.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        with group._meeting():
            torch.distributed.init_process_group(backend, timeout=_TIMEOUT)
    try:
        with group.noticing_loss():
            yield group
    finally:
        if owner:
            torch.distributed.destroy_process_group()
