"""FSDP2: the base divided over the processes, layer by layer, for a base that no one card holds.

With a LoRA only what is frozen in the decoder layers is divided. The adapter, its gradients and the optimizer's state
are small beside the base and stay whole in every process: gradients are summed as in `step`, and optimizer, clipping,
checkpoints and the saved adapter are those of a run without FSDP, byte for byte. Embedding and head stay whole too: the
log-prob kernel reads the head as one tensor. Of a quantised base the codes are divided and gathered, never 16-bit
weights; their scales (8 bits: one a row; 4 bits: a 32nd of the codes with double quantisation) stay whole.

With full fine-tuning the layers' gradients and the optimizer's state of them are divided too: see `fsdp_rows`. Here
FSDP2 sums the gradients, in float32, at the end of each layer's backward pass. What lies outside the layers (embedding,
head, last norm) stays whole in every process, with its master, gradient and moments.

Each process reads only its share of the files (`fsdp_loading`), or all of them where a share is not enough.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dpoeng.cache.errors import UserError
from dpoeng.engine.config.fields import Quantization, TrainConfig
from dpoeng.engine.models.experts.stacks import held_tensors
from dpoeng.engine.models.fsdp_loading import whole_because
from dpoeng.engine.models.model import CausalLM, decoder_layers, decoder_of
from dpoeng.engine.models.quantized import holds_8_bits, int8_scales_of, quantized_layers
from dpoeng.engine.models.sources import ModelSource, adapter_config
from dpoeng.engine.runtime.distributed import Group


def check_fsdp(config: TrainConfig, group: Group, quantization: Quantization = "none") -> None:
    """Raises UserError where FSDP is asked for and cannot be had."""
    if not config.fsdp:
        return
    if quantization == "stored":
        raise UserError(
            "a base that is quantised in its files cannot be divided over processes",
            code="fsdp-unavailable",
            where="--fsdp",
            expected="a base in full precision, or in bitsandbytes' 8 or 4 bits",
            remedy="leave --fsdp out: every process then holds the codes of the whole base; or name the full-precision "
            "checkpoint with --model, and --quantization 4bit",
        )
    if group.size == 1:
        raise UserError(
            "fsdp needs several processes, and there is only one",
            code="fsdp-unavailable",
            where="--fsdp",
            expected="torchrun --nproc-per-node N --no-python dpoeng train ... with N above 1",
            remedy="start it that way, or leave --fsdp out",
        )
    if not config.use_peft and not config.optim.startswith("adamw_torch"):
        # bitsandbytes rounds its state in blocks of 256 numbers; a divided weight starts new blocks in each process.
        raise UserError(
            "the state of bitsandbytes' AdamW is rounded in blocks, and those of divided weights would be other blocks "
            "than those of whole ones: no run with another number of processes could go on with it",
            code="fsdp-unavailable",
            where="--fsdp --no-use-peft",
            expected="adamw_torch or adamw_torch_fused",
            found=f"--optim {config.optim}",
            remedy="take adamw_torch, whose state is divided too; or leave --fsdp out",
        )


def loads_whole_because(
    config: TrainConfig, group: Group, quantization: Quantization, source: ModelSource, adapter: ModelSource | None
) -> str:
    """Why each process has to load the whole base before it is divided, in words; empty where a share is enough."""
    if quantization != "none":
        return f"bitsandbytes makes {quantization.removesuffix('bit')} bits of whole tensors"
    held = adapter_config(adapter) if adapter is not None else {}
    if config.use_dora or held.get("use_dora"):
        return "DoRA begins with the norms of whole weights"
    if held.get("modules_to_save"):
        return "the SFT adapter has trained whole modules of the base"
    return whole_because(source, group.size)


def layer_sharding(group: Group, device: torch.device, *, trained: bool = False) -> Callable[[Any], None]:
    """Return the function that divides the layers of a model without weights, for `load_model`; `trained` as below."""
    mesh = _mesh(group, device)

    def shard(base: Any) -> None:
        _divide(decoder_of(base), mesh, trained=trained)

    return shard


def shard_base(lm: CausalLM, group: Group, device: torch.device, *, trained: bool = False) -> None:
    """Leaves this process its part of every decoder layer, on `device`; a layer is whole only while it is run.

    Args:
        lm: a model on the host, with its adapters, or before `train_all`.
        group: the processes; each has loaded the same model.
        device: where the parts, and everything that stays whole, are to be.
        trained: whether the layers' weights will be trained (`train_all`).

    Raises:
        UserError: it holds quantised experts.
    """
    if held_tensors(lm.base):
        raise UserError(
            "quantised experts cannot be divided over processes",
            code="fsdp-unavailable",
            where="--fsdp",
            expected="a base without stacked experts, or one that is not quantised",
            found=f"a mixture of experts, quantization {lm.quantization}",
            remedy="leave --fsdp out: every process then holds the quantised base whole; or add --quantization none "
            "--dtype bfloat16",
        )
    mesh = _mesh(group, device)
    for module in quantized_layers(lm.model):
        _as_plain_bytes(module, device)
    # Embedding, head and adapters stay whole: they are used outside the layers' gathers, and small next to the layers.
    whole = set(lm.model.parameters()) - _divide(lm.backbone, mesh, trained=trained)
    for parameter in whole:
        parameter.data = parameter.data.to(device)
    for module in lm.model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    lm.device, lm.sharded = device, True


def divided_parameters(layer: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Return a layer's divided parameters: all but adapters."""
    return [parameter for name, parameter in layer.named_parameters() if ".lora_" not in name]


def _mesh(group: Group, device: torch.device) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device.type, (group.size,))


def _divide(backbone: Any, mesh: Any, *, trained: bool) -> set[torch.nn.Parameter]:
    """Divide the decoder's layers without their adapters -> the divided parameters.

    `trained` parameters become float32 later and are gathered in their present dtype.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    settings: dict[str, Any] = {"mesh": mesh}
    if trained:
        dtype = next(backbone.parameters()).dtype
        settings["mp_policy"] = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    layers: list[Any] = [*decoder_layers(backbone)]
    assert layers, "transformers' decoder layers are GradientCheckpointingLayers"
    divided: set[torch.nn.Parameter] = set()
    for layer in layers:
        # A LoRA's gradient is summed once a step over all processes, which needs the same whole matrices everywhere.
        whole = set(layer.parameters()) - set(divided_parameters(layer))
        fully_shard(layer, ignored_params=whole, **settings)
        if trained:
            # The sum over the processes, as `step` means it: FSDP2's default is the mean.
            layer.set_gradient_divide_factor(1.0)
            layer.set_force_sum_reduction_for_comms(True)
        divided |= set(layer.parameters()) - whole
    # The decoder itself has nothing to divide: it is what its layers take turns in, so that the next one is gathered
    # while one is run.
    fully_shard(backbone, mesh=mesh, ignored_params=set(backbone.parameters()) - divided)
    return divided


def _as_plain_bytes(layer: Any, device: torch.device) -> None:
    """Makes a quantised layer's weight a plain tensor, which can be divided. bitsandbytes' own carries its scales.

    A 4-bit layer's forward then looks for them on the layer (`fix_4bit_weight_quant_state_from_module`, made for FSDP).
    An 8-bit one's, which is `int8_linear`, finds them in the layer's state, and needs no codes but the weight's.
    """
    if holds_8_bits(layer):
        scales = int8_scales_of(layer)
        assert scales is not None, "an 8-bit layer of a model that is trained multiplies by int8_linear"
        layer.state.SCB, layer.state.CB = scales.to(device), None
    else:
        layer.quant_state = layer.weight.quant_state
        layer.quant_state.to(device)
    layer.weight = torch.nn.Parameter(layer.weight.data, requires_grad=False)
