"""Recovery from running out of memory: release, retry once unchanged, then in halves.

The unchanged retry helps if memory was fragmented or used by something that has ended; its result is identical, bit for
bit. Halving changes the order of sums and so the last bits; the caller decides whether that is acceptable.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from dpoeng.cache.errors import UserError
from dpoeng.cache.schema import PairIds, ScoredRow, lengths_of

Item = TypeVar("Item")
Result = TypeVar("Result")

# Messages of torch's CPU allocator, cuBLAS and older CUDA paths, which are plain RuntimeErrors.
_SIGNS = ("can't allocate memory", "not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out, on a device or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def release_memory() -> None:
    """Releases unused memory. Call it outside the `except`, because the traceback keeps tensors alive."""
    gc.collect()  # modules and autograd graphs form cycles, which keep their tensors until then
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def attempt(work: Callable[[], Result], tries: int = 2) -> tuple[Result | None, str]:
    """Runs `work`, again after an out-of-memory error. Returns (result, "") or (None, the error's first line)."""
    problem = ""
    for _ in range(tries):
        try:
            return work(), ""
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            problem = str(error).splitlines()[0] if str(error) else type(error).__name__
        release_memory()
    return None, problem


@contextlib.contextmanager
def no_way_back(message: str, where: str, remedy: str) -> Iterator[None]:
    """For work that cannot be repeated: a half-done update, or a forward with collectives.

    Raises:
        UserError: memory ran out.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            message,
            code="memory-full",
            where=where,
            found=str(error).splitlines()[0] if str(error) else type(error).__name__,
            remedy=remedy,
            exit_status=5,
        ) from error


def in_parts(
    work: Callable[[Sequence[Item]], Sequence[Result]],
    items: Sequence[Item],
    *,
    note: Callable[[str], None],
    describe: Callable[[Sequence[Item], str], UserError],
) -> list[Result]:
    """Runs `work(items)`, in halves if memory is too small; halving changes the last bits of results.

    Args:
        work: items -> results.
        items: at least one.
        note: receives a message when the work is split.
        describe: the error for items that cannot be split further, given torch's message.

    Raises:
        UserError: one item alone does not fit.
    """
    results, problem = attempt(lambda: work(items))
    if results is not None:
        return list(results)
    if len(items) == 1:
        raise describe(items, problem)
    middle = (len(items) + 1) // 2
    note(f"out of memory with {len(items)} pairs in one forward: computing them in halves")
    return [
        result
        for half in (items[:middle], items[middle:])
        for result in in_parts(work, half, note=note, describe=describe)
    ]


def too_large(pairs: Sequence[PairIds | ScoredRow], problem: str, *, phase: str, helps: str) -> UserError:
    """The error for rows that do not fit: names the longest and a remedy."""
    prompt, *responses = max(map(lengths_of, pairs), key=sum)
    if len(responses) == 2:
        parts = f"chosen {responses[0]}, rejected {responses[1]}"
    else:
        parts = f"{len(responses)} responses {sum(responses)}"
    count = "one pair alone does" if len(pairs) == 1 else f"{len(pairs)} pairs do"
    return UserError(
        f"out of memory: {count} not fit",
        code="memory-full",
        where=f"{phase}, the longest pair has {prompt + sum(responses)} tokens: prompt {prompt}, {parts}",
        found=problem,
        remedy=f"{helps}; `dpoeng plan` shows what fits",
        exit_status=5,
    )
