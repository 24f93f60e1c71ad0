"""Remembers the results of operations on the meta device: their shapes depend on the shapes of the arguments alone.

PyTorch computes the shapes of many operations in Python, in about 0.4 ms each, and a simulated step repeats the same
operations in every layer and every chunk of a recurrence.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

_MOST = 100_000
"""Results that are remembered; a plan has some thousands."""

_Result = tuple[tuple[int, ...], tuple[int, ...], torch.dtype | None]
"""Size, stride and dtype of a tensor with a storage that nothing else uses; no dtype: a view of the first argument."""

_UNCHANGED: _Result = ((), (), None)
"""For an operation that wrote into tensors and changed neither shape nor storage of any."""

_results: dict[Hashable, _Result | list[_Result] | None] = {}
"""Operation and arguments -> its result, or its results; None if they must be computed each time."""


def result_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What `func(*args, **kwargs)` returns, with new tensors where all its tensors are on the meta device."""
    kind = _kind(func)
    if kind == "other" or not args:
        return func(*args, **kwargs)
    try:
        key = (func, torch.get_default_dtype(), _described(args), _described(tuple(kwargs.items())))
        known = _results[key]
    except (_NotOnMetaError, TypeError):  # a TypeError: an argument that cannot be a key
        return func(*args, **kwargs)
    except KeyError:
        if len(_results) >= _MOST:
            _results.clear()
        before = _memory((args, kwargs)) if kind == "in place" else []
        result = func(*args, **kwargs)
        if kind == "new":
            _results[key] = _read(result, args) if isinstance(result, torch.Tensor) else _read_all(result, args)
        else:
            _results[key] = _UNCHANGED if _memory((args, kwargs)) == before else None
        return result
    if known is None:
        return func(*args, **kwargs)
    if known is _UNCHANGED:  # without values there is nothing to do
        return kwargs.get("out", args[0]) if func._schema.returns else None
    return [_made(one, args) for one in known] if isinstance(known, list) else _made(known, args)


def _made(known: _Result, args: tuple[Any, ...]) -> torch.Tensor:
    size, stride, dtype = known
    if dtype is None:
        return cast("torch.Tensor", args[0].as_strided(size, stride))
    return torch.empty_strided(size, stride, dtype=dtype, device="meta")


class _NotOnMetaError(Exception):
    """A tensor has values, or is of a class that may do something else."""


@functools.cache
def _kind(func: Any) -> Literal["new", "in place", "other"]:
    """What an operation on tensors does, as its schema says.

    Returns tensors that share no memory; or writes into its first argument or `out`, and returns that or nothing.
    """
    schema = func._schema
    returns = [str(value.type) for value in schema.returns]
    takes_tensors = any("Tensor" in str(value.type) for value in schema.arguments)
    aliases = [value.alias_info for value in (*schema.arguments, *schema.returns) if value.alias_info is not None]
    if not aliases:
        return "new" if takes_tensors and returns in (["Tensor"], ["List[Tensor]"]) else "other"
    written = [at for at, value in enumerate(schema.arguments) if value.alias_info is not None]
    one = len(written) == 1 and (
        written == [0] or (schema.arguments[written[0]].name, func._overloadname) == ("out",) * 2
    )
    returned = all(value.alias_info is not None for value in schema.returns) and returns in ([], ["Tensor"])
    return "in place" if one and returned and all(alias.is_write for alias in aliases) else "other"


def _memory(values: Any) -> list[Any]:
    """Shape and storage of each tensor."""
    leaves = [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]
    return [
        (t.shape, t.stride(), t.storage_offset(), t.untyped_storage()._cdata, t.untyped_storage().nbytes())
        for t in leaves
    ]


def _described(values: tuple[Any, ...] | list[Any]) -> Hashable:
    found: list[Hashable] = []
    for value in values:
        kind = type(value)
        if kind is torch.Tensor or kind is nn.Parameter:
            if not value.is_meta:
                raise _NotOnMetaError
            found.append((value.shape, value.stride(), value.dtype))
        elif isinstance(value, torch.Tensor):
            raise _NotOnMetaError
        elif kind is tuple or kind is list:
            found.append(_described(value))
        else:
            found.append((kind, value))  # 1 and 1.0 are one key otherwise
    return tuple(found)


def _read_all(results: list[Any], args: tuple[Any, ...]) -> list[_Result] | None:
    found = [_read(result, args) for result in results]
    known = [one for one in found if one is not None]
    alone = len({result.untyped_storage()._cdata for result in results}) == len(results)
    return known if alone and len(known) == len(found) else None


def _read(result: Any, args: tuple[Any, ...]) -> _Result | None:
    """The result if `torch.empty_strided` makes the same one."""
    if type(result) is not torch.Tensor or not result.is_meta:
        return None
    tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
    if not tensors or any(tensor.is_complex() for tensor in (result, *tensors)):  # views of these carry flags
        return None
    if any(tensor.untyped_storage()._cdata == result.untyped_storage()._cdata for tensor in tensors):
        # Not in the schema of `_unsafe_view`. The tensor whose memory it is gives its offset too.
        return (tuple(result.shape), result.stride(), None) if len(tensors) == 1 and args[0] is tensors[0] else None
    again = torch.empty_strided(result.shape, result.stride(), dtype=result.dtype, device="meta")
    if result.storage_offset() or again.untyped_storage().nbytes() != result.untyped_storage().nbytes():
        return None
    return tuple(result.shape), result.stride(), result.dtype
