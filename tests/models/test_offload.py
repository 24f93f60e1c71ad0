"""Layer inputs that wait in host memory: the same bytes trained, and less memory where it is short."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from dpoeng_testing import pair_rows, write_jsonl
from model_fields import fields
from torch.multiprocessing.reductions import StorageWeakRef

from dpoeng.engine.config.fields import PrecomputeConfig, TrainConfig
from dpoeng.engine.memory.simulate import Pair, Setup, trace_step
from dpoeng.engine.models import offload
from dpoeng.engine.models.offload import HostInputs
from dpoeng.engine.recipes.precompute import precompute_reference
from dpoeng.engine.recipes.train import train


def test_the_adapter_is_the_same(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit; and every layer of every forward has kept one tensor on the host."""
    pairs = write_jsonl(tmp_path / "pairs.jsonl", pair_rows(8))
    precompute_reference(PrecomputeConfig(pairs=(pairs,), model=str(tiny_model), cache=tmp_path / "cache"))
    kept: list[torch.Size] = []
    original = HostInputs.to_host

    def counted(self: HostInputs, tensor: torch.Tensor) -> Any:
        kept.append(tensor.shape)
        return original(self, tensor)

    monkeypatch.setattr(HostInputs, "to_host", counted)
    adapters = []
    for name, switches in (
        ("plain", {"gradient_checkpointing": True}),
        ("offloaded", {"gradient_checkpointing": True, "activation_offloading": True}),
        ("by itself", {"activation_offloading": True}),
    ):
        kept.clear()
        places = {"cache": tmp_path / "cache", "output_dir": tmp_path / name}
        config = TrainConfig(**places, **switches, max_steps=2, eval_share=0.0)
        train(config)
        adapters.append((tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes())
        layers, forwards = 2, 2 * config.gradient_accumulation_steps
        assert len(kept) == (0 if name == "plain" else layers * forwards)
    assert adapters[0] == adapters[1] == adapters[2]


def test_the_plan_knows_what_it_saves() -> None:
    """The inputs of all layers but the one at work leave the device.

    The peak of all eight is in the last but one: the last layer computes scored positions only.
    """
    peaks = []
    for activation_offloading in (False, True):
        config = TrainConfig(gradient_checkpointing=True, activation_offloading=activation_offloading)
        model = fields("qwen2", num_hidden_layers=8)
        setup = Setup(model=model, dtype=torch.bfloat16, quantization="none", config=config)
        peaks.append(trace_step(setup, [Pair(64, 96, 96)]).peak().n_bytes)
    a_layer = 128 * 256 * 2  # hidden size x tokens x bytes
    assert 5 * a_layer <= peaks[0] - peaks[1] <= 9 * a_layer


def test_it_needs_checkpointing() -> None:
    with pytest.raises(ValueError, match="activation_offloading"):
        TrainConfig(gradient_checkpointing=False, activation_offloading=True)


# --------------------------------------------------------------------------- in a stream of its own


class LazyStream:
    """A stream whose copies are done at the last moment that its events allow: what waits for nothing reads too early.

    Memory that is freed before a copy of it is done, and that nothing keeps for the stream, holds other numbers then.
    """

    active: LazyStream | None = None
    log: list[str]

    def __init__(self, _: torch.device) -> None:
        self.copies: list[Callable[[], None]] = []
        self.keeps: list[Any] = []
        self.waited = False

    def wait_stream(self, current: Any) -> None:
        assert current is COMPUTING
        self.waited = True

    def add(self, target: torch.Tensor, source: torch.Tensor) -> None:
        assert self.waited, "the stream copies what may not have been computed yet"
        self.waited = False
        places = [(StorageWeakRef(x.untyped_storage()), x.shape, x.stride(), x.dtype) for x in (target, source)]

        def copy() -> None:
            there, here = (self.tensor(*place) for place in places)
            if there is not None:
                OWN_COPY(there, here if here is not None else torch.full(there.shape, torch.nan))

        self.copies.append(copy)
        self.keeps.append(None)
        LazyStream.log.append("copy")

    @staticmethod
    def tensor(weak: StorageWeakRef, shape: Any, stride: Any, dtype: torch.dtype) -> torch.Tensor | None:
        storage = torch.UntypedStorage._new_with_weak_ptr(weak.cdata)  # type: ignore[attr-defined]
        return None if storage is None else torch.empty(0, dtype=dtype).set_(storage, 0, shape, stride)

    def record_event(self) -> int:
        return len(self.copies)


class Computing:
    """The stream that computes: at once."""

    def wait_event(self, event: int) -> None:
        LazyStream.log.append("wait")
        (stream,) = STREAMS
        for at in range(event):
            stream.copies[at]()
            stream.copies[at], stream.keeps[at] = (lambda: None), None


COMPUTING, STREAMS, OWN_COPY = Computing(), list[LazyStream](), torch.Tensor.copy_


@pytest.fixture
def _lazy(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors as a GPU's, with streams."""

    @contextlib.contextmanager
    def active(stream: LazyStream) -> Iterator[None]:
        LazyStream.active = stream
        yield
        LazyStream.active = None

    def make(device: torch.device) -> LazyStream:
        STREAMS.append(LazyStream(device))
        return STREAMS[-1]

    def copy(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        if LazyStream.active is None or not non_blocking:
            return OWN_COPY(target, source, non_blocking)
        LazyStream.active.add(target, source)
        return target

    STREAMS.clear()
    LazyStream.log = []
    monkeypatch.setattr(offload, "has_streams", lambda _: True)
    monkeypatch.setattr(torch.cuda, "Stream", make)
    monkeypatch.setattr(torch.cuda, "stream", active)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: COMPUTING)
    monkeypatch.setattr(torch.Tensor, "copy_", copy)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, stream: stream.keeps.__setitem__(-1, x.detach()))


def gradients(on_host: bool) -> list[torch.Tensor]:
    """Of three recomputed layers, twice over, as two forwards of a step are."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(8, 8) for _ in range(3)]
    inputs, found = HostInputs(), []
    for _ in range(2):
        x = torch.randn(4, 8, requires_grad=True)
        out = x * 1.0
        for number, layer in enumerate(layers):

            def run(states: torch.Tensor, layer: Any = layer, number: int = number) -> torch.Tensor:
                if on_host:
                    LazyStream.log.append(f"layer {number}")
                return torch.tanh(layer(states))

            plain = torch.utils.checkpoint.checkpoint
            out = inputs.checkpoint(run, out) if on_host else plain(run, out, use_reentrant=False)
        found += torch.autograd.grad(out.sum(), [x, *(layer.weight for layer in layers)])
    return found


@pytest.mark.usefixtures("_lazy")
def test_copies_run_beside_the_computation_and_change_nothing() -> None:
    expected, found = gradients(on_host=False), gradients(on_host=True)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    forward = ["copy", "layer 0", "copy", "layer 1", "copy", "layer 2"]
    # The input of the layer below is on its way while one is recomputed, and is waited for only then.
    backward = ["copy", "wait", "copy", "layer 2", "wait", "copy", "layer 1", "wait", "layer 0"]
    assert LazyStream.log == 2 * (forward + backward)


@pytest.mark.usefixtures("_lazy")
@pytest.mark.parametrize("fault", ["no wait", "memory is given away", "copied before it is computed"])
def test_the_stand_in_notices(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault == "no wait":
        monkeypatch.setattr(offload.Beside, "wait", lambda *_: None)
    elif fault == "memory is given away":
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    else:
        monkeypatch.setattr(LazyStream, "wait_stream", lambda *_: None)
        with pytest.raises(AssertionError, match="computed yet"):
            gradients(on_host=True)
        return
    assert not all(torch.equal(*both) for both in zip(gradients(on_host=True), gradients(on_host=False), strict=True))
