"""Finds the towers for images and sound of a model, and leaves them out: text alone does not run through them.

A tower is a module with weights beside decoder, embedding and head that the model's own forward of token ids does not
call before it enters the decoder. It is replaced before the model gets weights, so its tensors are never read. A
forward that calls it all the same fails.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dpoeng.engine.models.model import before_head, decoder_of
from dpoeng.engine.models.model_config import text_config


class LeftOut(nn.Module):
    """Replaces a tower; has no weights.

    Args:
        tower: the replaced module; its plain attributes, which wrappers read, are kept.
    """

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        for name, value in vars(tower).items():
            if name == "config" or (isinstance(value, (str, int, float)) and name != "training"):
                setattr(self, name, value)
        self.linear = tuple(name for name, module in tower.named_modules() if isinstance(module, nn.Linear))

    def forward(self, *_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError("this part of the model is not loaded, because text alone does not need it")


def towers_of(model: Any) -> tuple[str, ...]:
    """Names of a model's towers; empty if its config has no text part, or its forward does not reach the decoder.

    Args:
        model: a model without weights, on the meta device.
    """
    if text_config(model.config) is model.config:
        return ()
    decoder = decoder_of(model)
    kept = (decoder, model.get_input_embeddings(), model.get_output_embeddings(), before_head(model))
    text = {id(module) for part in kept if part is not None for module in part.modules()}
    beside = dict(_beside(model, text))
    called = _called_before(decoder, model, beside)
    return tuple(name for name in beside if name not in called)


def _beside(module: nn.Module, text: set[int], prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The largest submodules with weights that have nothing of the text's modules in them."""
    for name, child in module.named_children():
        if id(child) in text:
            continue
        if any(id(part) in text for part in child.modules()):
            yield from _beside(child, text, f"{prefix}{name}.")
        elif any(True for _ in child.parameters()):
            yield f"{prefix}{name}", child


@torch.no_grad()
def _called_before(decoder: nn.Module, model: Any, modules: Mapping[str, nn.Module]) -> set[str]:
    """Names of those modules that a forward of token ids calls before it enters the decoder; all if it never does."""
    called: set[str] = set()
    model.eval()  # in training some wrappers ask for more inputs

    def enter(*_: Any) -> NoReturn:
        raise _Entered

    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: called.add(name)) for name, module in modules.items()
    ]
    hooks.append(decoder.register_forward_pre_hook(enter))
    try:
        with _AnsweringZero():  # type: ignore[no-untyped-call]
            model(input_ids=torch.zeros(1, 2, dtype=torch.long, device="meta"), use_cache=False)
    except _Entered:
        return called
    except (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError, IndexError, KeyError):
        pass  # a forward that needs more than token ids
    finally:
        for hook in hooks:
            hook.remove()
    return set(modules)


class _Entered(Exception):  # noqa: N818  (no error)
    """Ends a forward where the decoder begins."""


class _AnsweringZero(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answers questions for a value on the meta device with 0, such as whether a text has places for images."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 0
        return func(*args, **(kwargs or {}))


def leave_out(model: Any, towers: tuple[str, ...]) -> None:
    """Replaces towers, of which `towers_of` gives the names."""
    for name in towers:
        model.set_submodule(name, LeftOut(model.get_submodule(name)))


def left_out(model: nn.Module) -> dict[str, LeftOut]:
    """The towers that were left out of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LeftOut)}


def linear_left_out(model: nn.Module) -> list[str]:
    """Names of the linear layers in towers that were left out."""
    return [f"{name}.{linear}".removesuffix(".") for name, tower in left_out(model).items() for linear in tower.linear]


def set_attention(model: Any, name: str) -> None:
    """Sets a model's attention implementation; leaves the config of towers that are not there as it is."""
    config, text = model.config, text_config(model.config)
    part = next((part for part in config.sub_configs if getattr(config, part, None) is text), None)
    model.set_attn_implementation({"": name, part: name} if part and left_out(model) else name)
