"""Measures a training step of a model with a few layers and random weights, next to what `bench/step` counts."""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dpoeng.bench.measuring.measure import elapsed_s, synchronize
from dpoeng.bench.step import StepSettings
from dpoeng.engine.config.fields import TrainConfig
from dpoeng.engine.losses.names import LossSettings
from dpoeng.engine.memory.overhead import model_fields
from dpoeng.engine.memory.simulate import Pair
from dpoeng.engine.models.adapters import make_trainable
from dpoeng.engine.models.loading import load_model
from dpoeng.engine.models.model import device_name, enable_gradient_checkpointing, set_mode
from dpoeng.engine.models.model_config import auto_class, config_of, with_layers
from dpoeng.engine.models.sources import find_model
from dpoeng.engine.scoring.choose_layout import choose_layout
from dpoeng.engine.training.batch_loss import batch_loss

FEW, MORE = 2, 4
"""Layers of the two models whose times tell that of a layer."""


def measure_step(settings: StepSettings, layers: int, device: torch.device) -> dict[str, Any]:
    """Forward and backward on a device: measured with two and with four layers, extended to so many.

    Returns:
        for the record of a count: the device, seconds of a layer and of what is outside, of the whole step, and kernels
        of both steps where a profiler counts them.
    """
    seconds, launches = [], []
    for depth in (FEW, MORE):
        with tempfile.TemporaryDirectory() as folder:
            model = random_model(settings.model, Path(folder), depth, device)
            time, kernels = time_a_step(replace(settings, model=str(model)), device)
        seconds.append(time)
        launches.append(kernels)
    layer = (seconds[1] - seconds[0]) / (MORE - FEW)
    return {
        "measured_on": device_name(device),
        "measured_layers": [FEW, MORE],
        "measured_seconds": seconds,
        "measured_launches": launches,
        "layer_s": layer,
        "outside_s": seconds[0] - FEW * layer,
        "measured_s": seconds[0] + (layers - FEW) * layer,
    }


def random_model(name: str, folder: Path, layers: int, device: torch.device) -> Path:
    """Writes a bfloat16 checkpoint of a known model's shape, or of a folder's, with this many layers."""
    config = with_layers(config_of(model_fields(name)), range(layers))
    torch.manual_seed(0)
    with device:
        model = auto_class(config).from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "model")
    del model
    torch.cuda.empty_cache()
    return folder / "model"


def time_a_step(settings: StepSettings, device: torch.device, tries: int = 5) -> tuple[float, int | None]:
    """Seconds of a forward and backward, the median of some tries after one; and on a GPU its kernels."""
    source = find_model(settings.model)
    lm = load_model(source, quantization=settings.quantization, dtype="bfloat16", device=device, tokenizer=False)
    config = TrainConfig.model_validate({"lora_r": settings.lora_r})
    lm = make_trainable(lm, config, "new")
    choose_layout(lm)
    if settings.gradient_checkpointing:
        enable_gradient_checkpointing(lm)
    set_mode(lm, training=True)
    pairs = [Pair(settings.prompt, settings.chosen, settings.rejected).scored()] * settings.batch_size

    def step() -> None:
        torch.autograd.backward(batch_loss(lm, pairs, LossSettings.of(config)).losses.sum())

    step()
    synchronize(device)
    seconds = statistics.median(elapsed_s(device, step) for _ in range(tries))
    if device.type != "cuda":
        return seconds, None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step()
        synchronize(device)
    kernels = [event for event in profiler.events() if event.device_type.name == "CUDA"]
    return seconds, sum(not event.name.startswith(("Memcpy", "Memset")) for event in kernels)
