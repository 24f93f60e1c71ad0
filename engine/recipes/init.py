"""Proposes settings for a model, pairs and a GPU, from the plan's simulation of config.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dpoeng.cache.errors import UserError
from dpoeng.cache.words import GIB
from dpoeng.engine.config.fields import PrecomputeConfig, TrainConfig
from dpoeng.engine.config.plan import PlanConfig
from dpoeng.engine.config.template import Line
from dpoeng.engine.memory.cards import find_gpu
from dpoeng.engine.memory.overhead import count_parameters, model_fields, weights_bytes
from dpoeng.engine.models.sources import quantization_record
from dpoeng.engine.recipes.plan import Plan, make_plan, suggested
from dpoeng.engine.runtime.progress import QUIET, Progress

HEADROOM = 0.8
"""Share of a card that a proposal may fill: a plan is calculated, and pairs may become longer."""


def suggest(
    pairs: Sequence[Path], model: str | None, adapter: str | None, *, gpu: str | None, progress: Progress = QUIET
) -> dict[str, Line]:
    """Proposes fields with values.

    Args:
        pairs: files to score.
        model: a folder or a name; its config.json decides what fits.
        adapter: an SFT adapter on it.
        gpu: a card by a name of `dpoeng plan`; None for this machine's, if there is one.
        progress: receives the simulation's progress.

    Raises:
        UserError: a named file or folder does not exist, or the card is unknown.
    """
    lines: dict[str, Line] = {}
    for path in pairs:
        if not path.exists():
            raise _missing("pairs", str(path))
    if pairs:
        lines["pairs"] = Line([str(path) for path in pairs])
    for field, name in (("model", model), ("adapter", adapter)):
        if name is None:
            continue
        if name.startswith((".", "/", "~")) and not Path(name).expanduser().exists():
            raise _missing(f"--{field}", name)
        lines[field] = Line(name)
    if adapter is not None:
        lines["adapter_mode"] = Line("continue", ("train the SFT adapter further; stack puts a new LoRA on top of it",))
    gpu = gpu or _gpu_here()
    if gpu is not None:
        find_gpu(gpu)  # report an unknown card before simulating anything
        if model is not None:
            lines |= _what_fits(model, gpu, progress)
    return lines


def _what_fits(model: str, gpu: str, progress: Progress) -> dict[str, Line]:
    """Quantization and batch sizes: the most exact weights with headroom, else the most exact that fit, else 4 bits."""
    try:
        fields = model_fields(model)
    except UserError:
        progress.note(f"the size of {model} is unknown: set quantization and batch sizes yourself")
        return {}
    parts = count_parameters(fields)
    plans: list[Plan] = []
    max_length = PrecomputeConfig.model_fields["max_length"].default
    with progress.task(f"simulating {model}", 3, "ways") as advance:
        for quantization in ("none", "8bit", "4bit") if quantization_record(fields) is None else ("stored",):
            if quantization in ("4bit", "stored") or weights_bytes(parts, quantization) < find_gpu(gpu).n_bytes:
                request = {"model": model, "gpu": (gpu,), "compare": False, "max_length": max_length}
                request |= {} if quantization == "stored" else {"quantization": quantization}
                plans.append(make_plan(PlanConfig.model_validate(request)))
                if _share(plans[-1]) <= HEADROOM:
                    break
            advance(1, quantization)
    roomy, fitting = _share(plans[-1]) <= HEADROOM, [plan for plan in plans if plan.cards[0].fits]
    as_asked = [plan for plan in fitting if not plan.cards[0].way.trains_less]
    whole = [plan for plan in as_asked if not any(plan.cards[0].by_layer)]
    # Layer by layer, the most exact weights cost no memory; a whole base is faster. Training less is the last resort.
    return _lines(plans[-1] if roomy or not fitting else whole[-1] if whole else [*as_asked, *fitting][0])


def _share(plan: Plan) -> float:
    """The share of the card that both phases need with one pair per forward and the whole base."""
    peaks = (plan.step, plan.evaluation.peak, plan.phase1[min(plan.phase1)].peak)
    return max(map(plan.needed, peaks)) / plan.cards[0].gpu.n_bytes


def _lines(plan: Plan) -> dict[str, Line]:
    """Suggested fields whose values are not the defaults; quantization always, with the reason."""
    card = plan.cards[0]
    reason = (
        f"calculated by dpoeng plan: at least {_share(plan) * card.gpu.n_bytes / GIB:.3g} of the "
        f"{card.gpu.n_bytes / GIB:.3g} GiB of {card.gpu.name}, for pairs of 2 x {plan.request.max_length} tokens"
    )
    if any(card.by_layer) and card.fits:
        needed = max(card.needed_bytes) / GIB
        reason = f"calculated by dpoeng plan: {needed:.3g} of the {card.gpu.n_bytes / GIB:.3g} GiB, layer by layer"
    elif card.fits and card.way.changes:
        needed = max(card.needed_bytes) / GIB
        reason = f"calculated by dpoeng plan: {needed:.3g} of the {card.gpu.n_bytes / GIB:.3g} GiB, with what follows"
    elif not card.fits:
        reason += "; this will not fit"
    lines = {"quantization": Line(plan.request.quantization, (reason,))}
    values = suggested(plan, card)
    if "layer_offloading" in values:
        lines["layer_offloading"] = Line("on", ("the whole base does not fit: its layers are loaded one at a time",))
    for name, why in (
        ("trunk_layer", "training all layers does not fit: phase one stores the input of this layer"),
        ("train_last_layers", "trains only these layers, which gives another model: see docs/trunk-cache.md"),
        ("optim", "8-bit moments: 32-bit ones do not fit"),
        ("lora_r", "a larger LoRA does not fit"),
        ("lora_alpha", "keeps lora_alpha / lora_r"),
    ):
        if card.fits and name in card.way.changes:
            lines[name] = Line(values[name], (why,))
    for cls, names in (
        (PrecomputeConfig, ("batch_tokens",)),
        (
            TrainConfig,
            ("per_device_train_batch_size", "gradient_accumulation_steps", "per_device_eval_batch_size"),
        ),
    ):
        lines |= {name: Line(values[name]) for name in names if values[name] != cls.model_fields[name].default}
    return lines


def _gpu_here() -> str | None:
    import torch

    if not torch.cuda.is_available():
        return None
    return f"{torch.cuda.get_device_properties(0).total_memory / GIB:.4g}gib"


def _missing(where: str, name: str) -> UserError:
    return UserError(
        f"{name} does not exist",
        code="init-missing",
        where=where,
        expected="a file or folder that exists",
        found="no such file",
        remedy="correct the path",
    )
