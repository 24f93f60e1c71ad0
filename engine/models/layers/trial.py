"""Tests whether a decoder can run layer by layer: on a few tokens, against its own forward, bit for bit.

Every layer gets the weights of the first layer with its shapes, so that a full-depth model fits into the memory of one
or two layers. If layers exchange more than hidden states (keys and values, inputs of each layer, routers' scores), the
results differ, whether or not dpoeng knows the architecture.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import nn

from dpoeng.cache.errors import UserError
from dpoeng.engine.models.layers.gates import Gates, States

Forward = Callable[[], torch.Tensor]
"""Calls the decoder; returns hidden states after its last layer."""


@torch.no_grad()
def try_by_layers(gates: Gates, standing_in: Callable[[], AbstractContextManager[None]], forward: Forward) -> States:
    """Runs `forward` unchanged and layer by layer, and compares.

    Args:
        gates: the gates of the decoder.
        standing_in: gives every layer the weights of the first layer with its shapes, within its block.
        forward: over a few tokens.

    Returns:
        the hidden states between two layers, from which their size is known.

    Raises:
        UserError: the two differ in a bit, or the layers do not run one after the other.
    """
    for weights in (standing_in, contextlib.nullcontext):  # the second round reads every layer twice
        with weights():
            with gates.observing() as order:
                expected_states = forward()
            if order != list(range(gates.count)):
                raise _unsupported(f"layers that run in another order than their list: {_short(order)}")
            if not bool(expected_states.isfinite().all()):
                continue  # nothing to compare
            between = states = gates.run_layer(0, None, forward)
            for number in range(1, gates.count):
                versions = [state._version for state in states]
                made = gates.run_layer(number, states, forward)
                if versions != [state._version for state in states]:
                    raise _unsupported("a layer that changes its input in place")
                states = made
            with gates.starting_at(gates.count, states):
                ours = forward()
            if torch.equal(expected_states, ours):
                return between
            difference = float((expected_states.float() - ours.float()).abs().max())
            raise _unsupported(f"hidden states that differ from the model's own forward by up to {difference:.3g}")
    raise _unsupported("hidden states of a few tokens that are not finite")


def check_apart(layers: Sequence[nn.Module]) -> None:
    """Refuses layers that share weights or contain one another.

    Raises:
        UserError: they do.
    """
    counts = Counter(id(parameter) for layer in layers for parameter in set(layer.parameters()))
    if any(count > 1 for count in counts.values()):
        raise _unsupported("layers that share weights")


def _unsupported(found: str) -> UserError:
    return UserError(
        "this architecture cannot be run layer by layer",
        code="layer-offloading-unsupported",
        where="--layer-offloading, a trial on a few tokens",
        expected="layers that exchange only hidden states, and the same bits as the model's forward",
        found=found,
        remedy="use --layer-offloading off, with fewer bits (--quantization) or a larger device if it does not fit",
        exit_status=5,
    )


def _short(order: Sequence[int]) -> str:
    return ", ".join(map(str, order[:8])) + (" ..." if order[8:] else "")
