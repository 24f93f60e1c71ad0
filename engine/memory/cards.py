"""Operations of both phases, and their hours at a given share of a card's peak. Calculated, never measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dpoeng.cache.errors import UserError
from dpoeng.cache.words import GIB
from dpoeng.engine.models.model_config import config_of, sizes


@dataclass(frozen=True, slots=True)
class Gpu:
    """A card: bytes available to programs, dense bfloat16 operations per second, and memory bandwidth in bytes per
    second.

    Unknown rates are 0.
    """

    name: str
    n_bytes: int
    flops: float = 0.0
    bytes_per_s: float = 0.0


# Usable memory is slightly less than the name says. Rates come from NVIDIA's and AMD's data sheets, for the SXM form if
# there are several, without sparsity.
_CARDS = {
    "rtx-3090-24gb": (23.6, 71e12, 936e9),
    "rtx-4090-24gb": (23.5, 165e12, 1008e9),
    "l4-24gb": (22.0, 121e12, 300e9),
    "a100-40gb": (39.4, 312e12, 1555e9),
    "a6000-48gb": (47.4, 155e12, 768e9),
    "l40s-48gb": (44.4, 362e12, 864e9),
    "a100-80gb": (79.1, 312e12, 2039e9),
    "h100-80gb": (79.1, 989e12, 3350e9),
    "h200-141gb": (139.7, 989e12, 4800e9),
    "b200-180gb": (178.0, 2250e12, 7700e9),
    "mi300x-192gb": (191.0, 1307e12, 5300e9),
}
GPUS = {name: Gpu(name, int(gib * GIB), flops, rate) for name, (gib, flops, rate) in _CARDS.items()}


def find_gpu(name: str) -> Gpu:
    """Finds a card by name, or makes one from its size: `80` or `80gb` as sold, `79.1gib` as available.

    Raises:
        UserError: no such card.
    """
    key = name.lower().replace(" ", "-")
    matches = [gpu for known, gpu in GPUS.items() if known == key or known.startswith(f"{key}-")]
    if matches:
        return matches[0]
    try:
        exact = key.endswith("gib")
        size = float(key.removesuffix("gib").removesuffix("gb"))
    except ValueError as error:
        raise UserError(
            f"unknown card {name}",
            code="config-value",
            where="--gpu",
            expected=", ".join(GPUS) + "; or a size, like 24gb",
            found=name,
            remedy="name one of these, or the memory that nvidia-smi shows",
        ) from error
    # A card sold as 80 GB has about 79 GiB available.
    return Gpu(f"{size:g} {'GiB' if exact else 'GB'}", int(size * (1.0 if exact else 0.985) * GIB))


@dataclass(frozen=True, slots=True)
class PhaseTime:
    """Operations of a phase over all pairs, and hours; None if the card's rate is unknown."""

    name: str
    flops: float
    hours: float | None


def phase_times(
    parameters: Mapping[str, int],
    model: Mapping[str, Any],
    *,
    pair: tuple[int, ...],
    pairs: int,
    epochs: float,
    checkpointing: bool,
    full: bool = False,
    shared: bool,
    gpu: Gpu,
    gpus: int = 1,
    utilisation: float,
    share: float = 1.0,
) -> list[PhaseTime]:
    """Time of both phases as configured, and without the cache or without shared prompts.

    A forward costs 2 operations per weight and token; attention costs 4 per pair of positions and channel, half of them
    masked. With a frozen base, backward costs another forward (no gradient of weights), and checkpointing one more; the
    head's two products are one forward and one gradient. `full` fine-tuning adds one forward for the gradient of the
    weights, and the backward recomputes the head for two gradients. Kaplan et al. 2020,
    https://arxiv.org/abs/2001.08361, section 2.1. `pair`: tokens of the prompt, then of each response; `share`: of the
    layers that phase two runs.
    """
    decoder = sizes(config_of(model))

    def forward(is_shared: bool) -> tuple[float, float]:
        prompt, *responses = pair
        prompts = 1 if is_shared else len(responses)
        tokens = sum(responses) + prompt * prompts
        positions = prompts * prompt**2 / 2 + sum(response * (prompt + response / 2) for response in responses)
        body = 2.0 * parameters["layers"] * tokens + 4.0 * decoder.layers * decoder.attention * positions
        return body, 2.0 * parameters["head"] * sum(responses)

    def hours(flops: float) -> float | None:
        return flops / (gpus * gpu.flops * utilisation) / 3600 if gpu.flops else None

    def one(name: str, body_forwards: float, head_forwards: float, is_shared: bool, times: float) -> PhaseTime:
        body, head = forward(is_shared)
        flops = times * pairs * (body_forwards * body + head_forwards * head)
        return PhaseTime(name, flops, hours(flops))

    step = ((3.0 if checkpointing else 2.0) + full) * share
    head = 4.0 if full else 2.0
    return [
        one("phase one", 1, 1, shared, 1),
        one("phase two", step, head, shared, epochs),
        one("phase two with a reference forward a step", step + 1, head + 1, shared, epochs),
        one("phase two without shared prompts", step, head, False, epochs),
    ]


@dataclass(frozen=True, slots=True)
class Roads:
    """How bytes reach a card.

    Attributes:
        bus_gb_per_s: from host memory.
        disk_gb_per_s: from files into host memory.
        host_bytes: host memory for files.
    """

    bus_gb_per_s: float
    disk_gb_per_s: float
    host_bytes: float

    def from_files(self, n_bytes: float, times: float) -> float:
        """Seconds to bring files to the card this many times: first from disk, then from host memory if they fit.

        Disk and bus work at the same time, so the slower one counts.
        """
        first = n_bytes / (min(self.bus_gb_per_s, self.disk_gb_per_s) * 1e9)
        again = self.over_bus(n_bytes) if n_bytes <= self.host_bytes else first
        return min(times, 1.0) * first + max(0.0, times - 1.0) * again

    def over_bus(self, n_bytes: float) -> float:
        """Seconds to copy bytes between host memory and card."""
        return n_bytes / (self.bus_gb_per_s * 1e9)


def layer_bytes(parameters: Mapping[str, int], quantization: str) -> float:
    """Bytes of all layers in 16-bit files, or in quantised files (`dpoeng quantize`)."""
    return parameters["layers"] * {"none": 2.0, "8bit": 1.0, "4bit": 0.5}[quantization]


def beside_loading(time: PhaseTime, seconds: float) -> PhaseTime:
    """A phase's time while bytes are copied: the longer of the two, since one hides the other."""
    return time if time.hours is None else replace(time, hours=max(time.hours, seconds / 3600))
