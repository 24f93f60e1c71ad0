"""Which layers are in memory, and which is read ahead; a GPU's streams and events are stood in for."""

from __future__ import annotations

import contextlib
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from dpoeng.engine.models.layers.store import LayerStore, without_values


class Files:
    """Layers of one number each: their own."""

    def __init__(self) -> None:
        self.reads: list[tuple[int, bool]] = []
        self.announced: list[int] = []

    def read(self, number: int) -> dict[str, torch.Tensor]:
        self.reads.append((number, threading.current_thread() is threading.main_thread()))
        return {"weight": nn.Parameter(torch.full((2, 3), float(number)), requires_grad=False)}

    def names(self, _number: int) -> list[str]:
        return ["weight"]

    def announce(self, number: int) -> None:
        self.announced.append(number)

    def shapes(self, number: int) -> tuple[int, ...]:
        return (number % 2,)


def layers(count: int) -> list[nn.Linear]:
    return [nn.Linear(3, 2, bias=False).requires_grad_(False) for _ in range(count)]


def there(modules: list[nn.Linear]) -> list[int]:
    """The layers that have weights, each checked to have its own."""
    found = [number for number, module in enumerate(modules) if not module.weight.isnan().any()]
    assert all(bool((modules[number].weight == number).all()) for number in found)
    return found


def test_one_layer_is_in_place_and_the_next_is_announced() -> None:
    files, modules = Files(), layers(4)
    store = LayerStore(files, modules, torch.device("cpu"))  # type: ignore[arg-type]
    assert there(modules) == []
    for number in (0, 0, 1, 2, 3, 3, 2, 1, 0):
        store.need(number)
        assert there(modules) == [number]
    assert [number for number, _ in files.reads] == [0, 1, 2, 3, 2, 1, 0]
    assert files.announced == [1, 2, 3, 1, 0]


def test_a_layer_without_its_weights_gives_no_numbers() -> None:
    module = layers(1)[0]
    LayerStore(Files(), [module], torch.device("cpu"))  # type: ignore[arg-type]
    assert module(torch.ones(1, 3)).isnan().all()
    assert module.weight.shape == (2, 3)
    assert module.weight.untyped_storage().nbytes() == 4
    made = without_values(nn.Parameter(torch.zeros(4, 4, dtype=torch.bfloat16)), torch.device("cpu"))
    assert (made.shape, made.dtype) == ((4, 4), torch.bfloat16)


def test_each_layer_may_stand_for_those_of_its_shape() -> None:
    files, modules = Files(), layers(4)
    store = LayerStore(files, modules, torch.device("cpu"))  # type: ignore[arg-type]
    with store.standing_in():
        assert [module.weight[0, 0].item() for module in modules] == [0, 1, 0, 1]
        store.need(3)
        assert len(files.reads) == 2
    assert there(modules) == []


def test_on_a_gpu_the_next_layer_is_read_by_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Event:
        def record(self, stream: Any) -> None:
            log.append("side has it" if stream == "side" else "main had its work")

        def synchronize(self) -> None:
            log.append("the device is done")

    main = SimpleNamespace(wait_event=lambda _event: log.append("main waits"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda _device: "side")
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", lambda _stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: main)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, _stream: log.append("kept for main"))
    monkeypatch.setattr(
        "dpoeng.engine.models.layers.store.without_values",
        lambda parameter, _device: without_values(parameter, torch.device("cpu")),
    )
    files, modules = Files(), layers(4)
    store = LayerStore(files, modules, torch.device("cuda", 0))  # type: ignore[arg-type]
    for number in (0, 1, 2, 3, 2, 1, 0):
        store.need(number)
        assert there(modules) == [number]
    store._drain()
    # The device is done with the layer before the one after the next is read: there are never three.
    assert [number for number, _ in files.reads] == [0, 1, 2, 3, 2, 1, 0]
    assert not any(in_main for _, in_main in files.reads)
    assert log.count("the device is done") == len(files.reads)
    assert log.count("main waits") == 7
    assert log.count("kept for main") == 7
    assert files.announced == []
