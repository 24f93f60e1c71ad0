"""Remembered results of operations on the meta device are what PyTorch computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dpoeng.engine.memory import meta_results
from dpoeng.engine.memory.meta_results import result_of

aten = torch.ops.aten


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


CALLS: dict[str, tuple[Any, Callable[[], tuple[Any, ...]], dict[str, Any]]] = {
    "broadcast": (aten.add.Tensor, lambda: (meta(4, 1, 3), meta(5, 1)), {}),
    "promoted": (aten.mul.Tensor, lambda: (meta(4, dtype=torch.bfloat16), meta(4)), {}),
    "a tensor without dimensions": (aten.mul.Tensor, lambda: (meta(4, dtype=torch.bfloat16), meta()), {}),
    "transposed": (aten.add.Tensor, lambda: (meta(4, 3).t(), meta(3, 4)), {}),
    "expanded": (aten.exp.default, lambda: (meta(1, 3).expand(4, 3),), {}),
    "a list": (aten.cat.default, lambda: ([meta(2, 3), meta(4, 3)],), {}),
    "a dimension": (aten.sum.dim_IntList, lambda: (meta(2, 3), [1], True), {}),
    "to another dtype": (aten._to_copy.default, lambda: (meta(2, 3),), {"dtype": torch.float16}),
    "product": (aten.bmm.default, lambda: (meta(2, 3, 4), meta(2, 4, 5)), {}),
    "nothing": (aten.exp.default, lambda: (meta(0, 3),), {}),
    "complex": (aten.mul.Tensor, lambda: (meta(2, dtype=torch.complex64).conj(), meta(2)), {}),
    "several results": (aten.sort.default, lambda: (meta(2, 3),), {}),
    "a view": (aten.view.default, lambda: (meta(2, 3), [6]), {}),
    "a view that its schema does not declare": (aten._unsafe_view.default, lambda: (meta(2, 4), [2, 4, 1]), {}),
    "such a view of a part": (aten._unsafe_view.default, lambda: (meta(3, 4)[1:], [2, 4, 1]), {}),
    "in place": (aten.add_.Tensor, lambda: (meta(2, 3), meta(3)), {}),
    "in place, of many": (aten._foreach_add_.Scalar, lambda: ([meta(2, 3), meta(3)], 1.0), {}),
    "another shape in place": (aten.unsqueeze_.default, lambda: (meta(2, 3), 0), {}),
    "another memory in place": (aten.set_.source_Tensor, lambda: (meta(2, 3), meta(2, 3)), {}),
}


def shape(result: Any, args: tuple[Any, ...]) -> Any:
    if result is None:
        return [shape(one, args) for one in args[0]]
    if isinstance(result, (tuple, list)):
        return [shape(one, args) for one in result]
    storage = result.untyped_storage()
    shares = [a.untyped_storage()._cdata == storage._cdata for a in args if isinstance(a, torch.Tensor)]
    kind = (type(result), result.dtype, result.is_meta, result.is_conj())
    return (*kind, tuple(result.shape), result.stride(), result.storage_offset(), storage.nbytes(), shares)


@pytest.mark.parametrize("name", CALLS)
def test_first_and_later_results_are_pytorchs(name: str) -> None:
    func, make, named = CALLS[name]
    expected_of = make()
    expected = shape(func(*expected_of, **named), expected_of)
    for _ in range(3):
        args = make()
        assert shape(result_of(func, args, named), args) == expected


def test_an_operation_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meta_results, "_results", {})
    ran = []

    class Counted:
        _schema = aten.add.Tensor._schema

        def __call__(self, *args: Any) -> torch.Tensor:
            ran.append(args)
            return torch.add(*args)

    func = Counted()
    for _ in range(3):
        result_of(func, (meta(2, 3), meta(3)), {})
    result_of(func, (meta(2, 4), meta(4)), {})
    assert len(ran) == 2


def test_an_operation_in_place_returns_what_it_wrote() -> None:
    for _ in range(3):
        into, narrow = meta(2, 5), meta(0)
        assert result_of(aten.add_.Tensor, (into, meta(5)), {}) is into
        assert result_of(aten.mm.out, (meta(2, 3), meta(3, 5)), {"out": into}) is into
        assert result_of(aten.mm.out, (meta(2, 3), meta(3, 5)), {"out": narrow}) is narrow
        assert narrow.shape == (2, 5)
        assert result_of(aten._foreach_add_.Scalar, ([into], 1.0), {}) is None
        with pytest.raises(RuntimeError):
            result_of(aten.add_.Tensor, (into, meta(7)), {})


def test_equal_numbers_of_two_kinds_are_two_results() -> None:
    counts = meta(3, dtype=torch.int64)
    assert result_of(aten.mul.Scalar, (counts, 2), {}).dtype == torch.int64
    assert result_of(aten.mul.Scalar, (counts, 2.0), {}).dtype == torch.float32
    assert result_of(aten.mul.Scalar, (counts, 2), {}).dtype == torch.int64


def test_values_are_computed_each_time() -> None:
    """A tensor with values is never remembered: the result depends on more than its shape."""
    for value in (1.0, 2.0):
        assert result_of(aten.add.Tensor, (torch.tensor([value]), torch.ones(1)), {}).item() == value + 1


def test_a_failure_is_raised_each_time() -> None:
    for _ in range(2):
        with pytest.raises(RuntimeError):
            result_of(aten.bmm.default, (meta(2, 3, 4), meta(2, 5, 6)), {})


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meta_results, "_results", {})
    monkeypatch.setattr(meta_results, "_MOST", 3)
    for size in range(10):
        result_of(aten.exp.default, (meta(size),), {})
        assert len(meta_results._results) <= 3
