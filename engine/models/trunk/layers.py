"""Which decoder layers are trained, numbered from 0, like peft's `layers_to_transform`."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

from torch import nn

from dpoeng.cache.errors import UserError
from dpoeng.cache.words import counted
from dpoeng.engine.config.fields import TrainConfig
from dpoeng.engine.models.model import CausalLM, decoder_layers
from dpoeng.engine.models.sources import ModelSource


def layer_list(backbone: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of a decoder's layers, including layers replaced by stand-ins.

    Raises:
        UserError: its layers are not in one list.
    """
    layers = decoder_layers(backbone)
    for name, module in backbone.named_modules():
        if isinstance(module, nn.ModuleList) and layers and {*layers} <= {*module}:
            return name, module
    raise UserError(
        f"the decoder layers of {type(backbone).__name__} are not in one list, so they have no numbers",
        code="trunk-unsupported",
        where="--layers-to-transform, --train-last-layers or --trunk-layer",
        expected="a decoder with one list of layers",
        remedy="train all layers, without a trunk",
    )


def names_layers(config: TrainConfig) -> bool:
    """Whether a new LoRA goes only into some of the layers."""
    return config.layers_to_transform is not None or config.train_last_layers is not None


def chosen_layers(config: TrainConfig, depth: int) -> tuple[int, ...] | None:
    """The layers that get a new LoRA, ascending; None for all.

    Raises:
        UserError: the model of `depth` layers lacks such a layer.
    """
    if config.train_last_layers is not None:
        name, chosen = "--train-last-layers", list(range(depth - config.train_last_layers, depth))
    elif config.layers_to_transform is not None:
        name, chosen = "--layers-to-transform", sorted({*config.layers_to_transform})
    else:
        return None
    if min(chosen) < 0 or max(chosen) >= depth:
        raise UserError(
            "the model does not have these layers",
            code="config-value",
            where=name,
            expected=f"at most {depth} layers, counted from 0 to {depth - 1}",
            found=str(config.train_last_layers or ",".join(map(str, chosen))),
            remedy="name layers that the model has",
        )
    return tuple(chosen)


def trunk_layer(value: float, depth: int) -> int:
    """The layer that a trunk enters: a number of layers, or a share of the depth, to the nearest layer.

    Raises:
        UserError: no layer would be left below or above it.
    """
    layer = round(value * depth) if value < 1 else int(value)
    if not 0 < layer < depth:
        raise UserError(
            "a trunk must be between two layers of the model",
            code="config-value",
            where="--trunk-layer",
            expected=f"1 to {depth - 1}, or a share of the {depth} layers below 1",
            found=f"{value:g}",
            remedy="name the first layer that will be trained; 0 means no trunk",
        )
    return layer


_OF_LAYER = re.compile(r"\.(?:layers|layer|h|blocks|block)\.(\d+)\.")


def layers_of_adapter(adapter: ModelSource) -> Collection[int] | None:
    """The layers in which an adapter has weights; None if it trained something outside the layers."""
    from safetensors import safe_open

    with safe_open(adapter.weight_files[0], "pt") as file:
        matches = [_OF_LAYER.search(key) for key in file.keys()]  # noqa: SIM118  (a safetensors file is no dictionary)
    return {int(match[1]) for match in matches if match} if all(matches) else None


def limit_to_layers(lora: dict[str, Any], lm: CausalLM, chosen: Sequence[int], linear: Sequence[str]) -> dict[str, Any]:
    """peft's arguments for a LoRA on some layers only.

    Args:
        lora: the arguments without layers.
        lm: the base.
        chosen: the layers.
        linear: last names of the linear layers for LoRA: peft does not accept `all-linear` with layers.
    """
    name, layers = layer_list(lm.backbone)
    targets = lora["target_modules"]
    if targets == "all-linear":
        names = {key.rsplit(".", 1)[-1] for number in chosen for key, _ in layers[number].named_modules() if key}
        targets = sorted(names & set(linear))
    # Without the pattern peft takes the last number in a name, which may be an expert's.
    pattern = name.rsplit(".", 1)[-1]
    return {**lora, "target_modules": targets, "layers_to_transform": list(chosen), "layers_pattern": [pattern]}


def check_trained_layers(lm: CausalLM, chosen: Sequence[int]) -> None:
    """Raises UserError unless each chosen layer is trained, and nothing else."""
    _, layers = layer_list(lm.backbone)
    inside = {p: number for number, layer in enumerate(layers) for p in layer.parameters() if p.requires_grad}
    outside = [name for name, p in lm.model.named_parameters() if p.requires_grad and p not in inside]
    trained_layers = sorted({*inside.values()})
    if outside or trained_layers != sorted(chosen):
        raise UserError(
            "the adapter does not match the layers that you named",
            code="lora-no-target",
            where="--layers-to-transform or --train-last-layers, with --lora-target-modules",
            expected=f"something to train in each of the layers {', '.join(map(str, chosen))}, and nothing elsewhere",
            found=f"layers {', '.join(map(str, trained_layers)) or 'none'}"
            + (f", and {counted(len(outside), 'tensor')} outside them, such as {outside[0]}" if outside else ""),
            remedy="name modules of this model",
        )
