"""Running out of memory: noticed, released, done again; first as it was, then in halves.

The second try of the same work is for memory that was only badly cut up, or held by what has ended since: its result is
the same, bit for bit. Halving moves the order of sums and so the last bits; who calls decides whether that may be.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from dpoeng.cache.errors import UserError
from dpoeng.cache.schema import PairIds

Item = TypeVar("Item")
Result = TypeVar("Result")

# What torch's CPU allocator, cuBLAS and older CUDA paths say, as plain RuntimeErrors.
_SIGNS = ("can't allocate memory", "not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on a device or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def release_memory() -> None:
    """Gives back what nothing holds any more. Call it outside the `except`, whose traceback holds the tensors."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def attempt(work: Callable[[], Result], tries: int = 2) -> tuple[Result | None, str]:
    """Does some work, and again after an out-of-memory error: (its result, "") or (None, what the error said)."""
    said = ""
    for _ in range(tries):
        try:
            return work(), ""
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
        release_memory()
    return None, said


@contextlib.contextmanager
def no_way_back(message: str, where: str, remedy: str) -> Iterator[None]:
    """For work that cannot be done again: an update done half, or a forward in which other processes take part.

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
    """`work(items)`, in halves where memory does not suffice for all at once; the cut moves results in their last bits.

    Args:
        work: items -> results.
        items: at least one.
        note: told of a cut.
        describe: the error for items that cannot be cut further, with what torch said.

    Raises:
        UserError: one item alone does not fit.
    """
    results, said = attempt(lambda: work(items))
    if results is not None:
        return list(results)
    if len(items) == 1:
        raise describe(items, said)
    middle = (len(items) + 1) // 2
    note(f"out of memory with {len(items)} pairs in one forward: they are done in halves from here")
    return [
        result
        for half in (items[:middle], items[middle:])
        for result in in_parts(work, half, note=note, describe=describe)
    ]


def too_large(pairs: Sequence[PairIds], said: str, *, phase: str, helps: str) -> UserError:
    """The error for pairs that do not fit, naming them and what would help."""
    longest = max(pairs, key=lambda ids: ids.total_tokens)
    count = "one pair alone does" if len(pairs) == 1 else f"{len(pairs)} pairs do"
    return UserError(
        f"out of memory: {count} not fit",
        code="memory-full",
        where=f"{phase}, the longest pair has {longest.total_tokens} tokens: prompt {len(longest.prompt_ids)}, chosen "
        f"{len(longest.chosen_ids)}, rejected {len(longest.rejected_ids)}",
        found=said,
        remedy=f"{helps}; `dpoeng plan` shows beforehand what fits",
        exit_status=5,
    )
