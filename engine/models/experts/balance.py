"""The balancing loss of a mixture of experts: the function of the model's own file, over the routers of a forward.

It is small where tokens go to all experts alike (Fedus et al. 2021, Switch Transformers,
https://arxiv.org/abs/2101.03961, equations 4 to 6). Knows routers; not what else is in a loss.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dpoeng.cache.errors import UserError
from dpoeng.engine.models.experts.targets import routed_experts
from dpoeng.engine.models.model import CausalLM
from dpoeng.engine.models.model_config import text_config


@dataclass(frozen=True, slots=True)
class Balance:
    """A model's balancing loss for its routers.

    Attributes:
        coefficient: factor of the loss.
        routers: modules, in the order of the layers.
        backbone: the decoder; its attention mask marks padding.
        index: position of the logits in a router's output.
        function: (logits [T, E] of each layer, experts, experts per token, mask or None) -> the loss.
        experts: number of experts.
        each: experts per token.
    """

    coefficient: float
    routers: list[nn.Module]
    backbone: nn.Module
    index: int
    function: Callable[..., torch.Tensor]
    experts: int
    each: int

    @contextlib.contextmanager
    def watching(self) -> Iterator[Seen]:
        """Collects the routers' logits in the forwards of the block, without those of layers recomputed later."""
        seen = Seen(self)
        hooks = [router.register_forward_hook(seen.look) for router in self.routers]
        hooks.append(self.backbone.register_forward_pre_hook(seen.look_at_mask, with_kwargs=True))
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()


@dataclass(slots=True)
class Seen:
    """The logits of the routers in some forwards."""

    balance: Balance
    logits: list[torch.Tensor] = field(default_factory=list)
    mask: torch.Tensor | None = None

    def look(self, _router: nn.Module, _inputs: Any, output: Any) -> None:
        """The hook of each router."""
        logits = output[self.balance.index] if isinstance(output, tuple) else output
        self.logits.append(logits.reshape(-1, logits.shape[-1]))

    def look_at_mask(self, _backbone: nn.Module, _inputs: Any, named: dict[str, Any]) -> None:
        """The hook of the decoder."""
        mask = named.get("attention_mask")
        self.mask = mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None

    def loss(self) -> torch.Tensor:
        """Of all tokens that were run, each once, as the model's own file computes it."""
        balance = self.balance
        return balance.function(tuple(self.logits), balance.experts, balance.each, self.mask)


def balance_of(lm: CausalLM, coefficient: float, *, whole_batch: bool = False) -> Balance | None:
    """What adds a model's balancing loss; None with a coefficient of 0.

    Args:
        lm: the policy.
        coefficient: what it is multiplied by.
        whole_batch: whether a pair's loss depends on the others of its step, so that forwards are run twice.

    Raises:
        UserError: transformers has no such loss for this model, or it does not go with how the forwards are run.
    """
    if coefficient == 0:
        return None
    base, where = lm.base, f"--router-aux-loss-coef {coefficient:g}"
    ways = {
        "layers that are loaded one at a time (--layer-offloading off ends that)": lm.by_layer is not None,
        "a model that begins at a trunk (--trunk-layer 0 ends that)": lm.entry is not None,
        "a loss in which the pairs of a step meet": whole_batch,
    }
    found = [way for way, is_so in ways.items() if is_so]
    if found:
        raise UserError(
            "the balancing loss needs all routers in the one forward that is trained on",
            code="config-value",
            where=where,
            found=found[0],
            remedy="leave the coefficient out, or run the forwards in the ordinary way",
        )
    function = getattr(sys.modules[type(base).__module__], "load_balancing_loss_func", None)
    routers, index = _routers(base)
    experts, config = routed_experts(base.config), text_config(base.config)
    each = getattr(base, "num_experts_per_tok", None) or getattr(config, "num_experts_per_tok", None)
    if function is None or not routers or not experts or not isinstance(each, int):
        raise UserError(
            f"transformers has no balancing loss for {type(base).__name__}",
            code="config-value",
            where=where,
            expected="a mixture of experts with an auxiliary loss: Mixtral, Qwen3-MoE, gpt-oss, OLMoE, ...",
            remedy="leave the coefficient out",
        )
    return Balance(coefficient, routers, lm.backbone, index, function, experts, each)


def trains_routers(lm: CausalLM) -> bool:
    """Whether a model's routers are trained, so that they may lose their balance."""
    return any(parameter.requires_grad for router in _routers(lm.base)[0] for parameter in router.parameters())


def _routers(base: Any) -> tuple[list[nn.Module], int]:
    """The routers whose logits transformers records, and where these stand in what they return."""
    recorder: Any = (getattr(base, "_can_record_outputs", None) or {}).get("router_logits")
    kind: Any = getattr(recorder, "target_class", recorder)
    modules: list[nn.Module] = list(base.modules())
    found = [module for module in modules if isinstance(kind, type) and isinstance(module, kind)]
    return found, int(getattr(recorder, "index", 0) or 0)
