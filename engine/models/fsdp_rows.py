"""Weights trained in shares: each process updates only its rows of every tensor in the decoder layers.

FSDP2 keeps the rows in float32, gathers a layer in its compute dtype, and leaves each process its rows of the summed
gradient. This module does the other direction: rows as plain tensors for the optimizer; and, for checkpoints and the
result, whole tensors in the first process, one after the other, so that the files equal those of an unsharded run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dpoeng.cache.errors import UserError
from dpoeng.engine.models.model import CausalLM, decoder_layers
from dpoeng.engine.runtime.distributed import Group


def train_parts(lm: CausalLM) -> None:
    """Makes the sharded weights float32, and makes an optimizer tensor from this process's rows of each.

    Raises:
        UserError: they have several dtypes.
    """
    from torch.distributed.tensor import DTensor

    dtypes = {str(weight.dtype) for weight in lm.base.parameters() if isinstance(weight, DTensor)}
    if len(dtypes) > 1:
        raise UserError(
            "FSDP2 gathers a layer in one dtype, and some layers of this model mix dtypes",
            code="fsdp-unavailable",
            where="--fsdp --no-use-peft",
            expected="layers in one dtype",
            found=", ".join(sorted(dtypes)),
            remedy="add --dtype float32, or leave --fsdp out",
        )
    layers: list[Any] = [*decoder_layers(lm.backbone)]
    for layer in layers:
        # Copy even if all are float32 already: the loaded tensor may be a view of a whole one. FSDP2 then pads rows
        # that do not divide evenly, which moves them; the tensors below must share the memory that it reads.
        layer._apply(lambda tensor: tensor.to(torch.float32, copy=True) if isinstance(tensor, DTensor) else tensor)
    divided: list[Any] = [weight for weight in lm.base.parameters() if isinstance(weight, DTensor)]
    lm.parts.update({weight: nn.Parameter(local(weight)) for weight in divided})


def local(weight: Any) -> torch.Tensor:
    """This process's rows of a sharded weight, sharing its memory."""
    with torch.no_grad():
        rows: torch.Tensor = weight.to_local()
    return rows.detach()


def whole_parameters(lm: CausalLM) -> list[nn.Parameter]:
    """The parameters that every process trains whole. Walks all modules: call it once per run, not per step."""
    parts = set(lm.parts.values())
    return [parameter for _, parameter in lm.trainable_parameters() if parameter not in parts]


def take_gradients(lm: CausalLM) -> None:
    """Passes the rows of the gradients, already summed over the processes, to the tensors that the optimizer moves."""
    for weight, part in lm.parts.items():
        assert local(weight).data_ptr() == part.data_ptr(), "FSDP2 has moved its rows elsewhere"
        if weight.grad is not None:
            part.grad, weight.grad = local(weight.grad), None


def clip_gradients(lm: CausalLM, whole: Sequence[nn.Parameter], group: Group, limit: float) -> float:
    """Scales the gradient to a norm of at most `limit`; returns its former norm over all processes' shares.

    `whole` is the result of `whole_parameters`.

    Pascanu et al. 2013, https://arxiv.org/abs/1211.5063, section 3.2
    """
    if not lm.parts:
        return float(nn.utils.clip_grad_norm_(whole, limit))
    # Each row of a sharded weight is in exactly one process; whole parameters are equal in all, and count once.
    squares = group.gather(_norm(list(lm.parts.values())) ** 2)
    norm = math.sqrt(math.fsum([*squares, _norm(whole) ** 2]))
    if norm > limit:
        for parameter in [*whole, *lm.parts.values()]:
            if parameter.grad is not None:
                parameter.grad.mul_(limit / norm)
    return norm


def _norm(parameters: Sequence[nn.Parameter]) -> float:
    return float(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))


def make_whole(lm: CausalLM, group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gathers tensors that are sharded by rows: in the first process whole, in host memory; in the others nothing.

    All processes call this together, with the same names. They communicate once per sharded tensor, and only the first
    process ever has more than one of them whole.

    Args:
        lm: the policy.
        group: its processes.
        tensors: by the name of a parameter, or `<parameter>/<quantity>`, as `optim.optimizer_tensors` gives it.
    """
    if not lm.parts:
        return dict(tensors)
    from torch.distributed.tensor import DTensor

    weights = _divided(lm)
    whole_tensors = {}
    for key, tensor in tensors.items():
        weight = weights.get(_parameter(key)) if tensor.dim() else None
        if weight is not None:
            # No run_check, which would be another message between the processes for each tensor.
            tensor = DTensor.from_local(
                tensor, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape,
                stride=weight.stride(),
            ).full_tensor()  # fmt: skip
        if group.is_first:
            whole_tensors[key] = tensor.cpu().contiguous()
    return whole_tensors


def own_rows(lm: CausalLM, group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The reverse of `make_whole`: this process's rows of the first process's tensors; all call it together."""
    if not lm.parts:
        return dict(tensors)
    from torch.distributed.tensor import distribute_tensor

    weights = _divided(lm)
    rows_by_name = {}
    for key, shape, dtype in group.from_first([(key, value.shape, value.dtype) for key, value in tensors.items()]):
        weight = weights.get(_parameter(key)) if shape else None
        whole = tensors[key] if group.is_first else torch.empty(shape, dtype=dtype)
        # The cast makes a copy, so that the tensor to send does not share a checkpoint's memory.
        whole = whole.to(lm.device, copy=True)
        group.copy_first([whole])
        if weight is not None:
            # No src_data_rank: every process has the whole tensor and takes its own rows without another message.
            rows = distribute_tensor(whole, weight.device_mesh, weight.placements, src_data_rank=None)
            whole = local(rows).clone()  # only the rows, not a view of the whole
        rows_by_name[key] = whole.cpu()
    return rows_by_name


def _divided(lm: CausalLM) -> dict[str, Any]:
    return {name: weight for name, weight in lm.model.named_parameters() if weight in lm.parts}


def _parameter(key: str) -> str:
    return key.partition("/")[0]
