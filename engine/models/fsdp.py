"""FSDP2: shards the base over the processes, layer by layer, for a base that does not fit one card.

With a LoRA only the frozen weights of the decoder layers are sharded. The adapter, its gradients and the optimizer's
state are small and stay whole in every process: gradients are summed as in `step`, and optimizer, clipping, checkpoints
and the saved adapter are byte for byte those of a run without FSDP. Embedding and head stay whole, because the log-prob
kernel reads the head as one tensor. A quantised base shards and gathers its codes, never 16-bit weights; its scales (8
bits: one per row; 4 bits: a 32nd of the codes with double quantisation) stay whole.

Full fine-tuning also shards the layers' gradients and optimizer state: see `fsdp_rows`. There FSDP2 sums the gradients
in float32 at the end of each layer's backward pass. Weights outside the layers (embedding, head, last norm) stay whole
in every process, with their masters, gradients and moments.

Each process reads only its share of the files (`fsdp_loading`), or all of them if a share is not enough. A base that is
quantised on the way is read by each process whole, a layer at a time, and each keeps its share of every layer, because
bitsandbytes quantises whole tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dpoeng.cache.errors import UserError
from dpoeng.engine.config.fields import Quantization, TrainConfig
from dpoeng.engine.models.experts.stacks import held_tensors
from dpoeng.engine.models.fsdp_loading import layers_share_weights, whole_because
from dpoeng.engine.models.lora_fields import start_changes_base
from dpoeng.engine.models.model import CausalLM, decoder_layers, decoder_of
from dpoeng.engine.models.quantized import holds_8_bits, int8_scales_of, quantized_layers
from dpoeng.engine.models.sources import ModelSource, adapter_config
from dpoeng.engine.runtime.distributed import Group


def check_fsdp(config: TrainConfig, group: Group, quantization: Quantization = "none") -> None:
    """Raises UserError if FSDP is requested but not possible."""
    if not config.fsdp:
        return
    if quantization == "stored":
        raise UserError(
            "a base that is quantised in its files cannot be sharded over processes",
            code="fsdp-unavailable",
            where="--fsdp",
            expected="a base in full precision, or in bitsandbytes' 8 or 4 bits",
            remedy="leave --fsdp out, so that every process keeps the whole quantised base; or name the full-precision "
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
        # bitsandbytes rounds its state in blocks of 256 numbers; a sharded weight starts new blocks in each process.
        raise UserError(
            "bitsandbytes' AdamW rounds its state in blocks, and sharded weights have other blocks "
            "than whole ones: a run with another number of processes could not continue from it",
            code="fsdp-unavailable",
            where="--fsdp --no-use-peft",
            expected="adamw_torch or adamw_torch_fused",
            found=f"--optim {config.optim}",
            remedy="use adamw_torch, whose state is also sharded; or leave --fsdp out",
        )


def loads_whole_because(
    config: TrainConfig, group: Group, quantization: Quantization, source: ModelSource, adapter: ModelSource | None
) -> str:
    """Why each process must load the whole base before sharding, in words; empty if a share is enough."""
    adapter_settings = adapter_config(adapter) if adapter is not None else {}
    if config.use_dora or adapter_settings.get("use_dora"):
        return "DoRA needs the norms of whole weights"
    if adapter_settings.get("modules_to_save"):
        return "the SFT adapter has trained whole modules of the base"
    if quantization == "none":
        return whole_because(source, group.size)
    if adapter_settings.get("bias", "none") != "none" or start_changes_base(adapter_settings):
        return "the SFT adapter changes weights of the base"
    return "its layers share weights" if layers_share_weights(source) else ""


def layer_sharding(group: Group, device: torch.device, *, trained: bool = False) -> Callable[[Any], None]:
    """Returns a function for `load_model` that shards the layers of a model without weights; `trained` as below."""
    mesh = _mesh(group, device)

    def shard(base: Any) -> None:
        _divide(decoder_of(base), mesh, trained=trained)

    return shard


def shard_base(lm: CausalLM, group: Group, device: torch.device, *, trained: bool = False) -> None:
    """Leaves this process its share of every decoder layer, on `device`; layers are whole only while they run.

    Args:
        lm: a model on the host, with its adapters, or before `train_all`; or one whose layers are still in its files
            (`in_files`), on `device`.
        group: the processes; each has loaded the same model.
        device: the device for the shares and for everything that stays whole.
        trained: whether the layers' weights will be trained (`train_all`).

    Raises:
        UserError: the base has quantised experts.
    """
    mesh = _mesh(group, device)
    _refuse_experts(lm.base, lm.quantization)

    def prepare(number: int, layer: Any) -> None:
        if lm.in_files is not None:
            lm.in_files.keep(number)
            _refuse_experts(layer, lm.quantization)
        for module in quantized_layers(layer):
            _as_plain_bytes(module, device)

    inside = {module for layer in decoder_layers(lm.backbone) for module in layer.modules()}
    for module in quantized_layers(lm.model):
        if module not in inside:
            _as_plain_bytes(module, device)
    # Embedding, head and adapters stay whole: they are used outside the layers' gathers, and small next to the layers.
    divided = _divide(lm.backbone, mesh, trained=trained, prepare=prepare)
    whole, lm.in_files = set(lm.model.parameters()) - divided, None
    # Assigned in place, so that tied weights and the optimizer's references stay valid.
    for parameter in whole:
        parameter.data = parameter.data.to(device)
    for module in lm.model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    lm.device, lm.sharded = device, True


def _refuse_experts(part: torch.nn.Module, quantization: Quantization) -> None:
    if held_tensors(part):
        raise UserError(
            "quantised experts cannot be sharded over processes",
            code="fsdp-unavailable",
            where="--fsdp",
            expected="a base without stacked experts, or an unquantised one",
            found=f"a mixture of experts, quantization {quantization}",
            remedy="leave --fsdp out, so that every process has the whole quantised base; or add --quantization none "
            "--dtype bfloat16",
        )


def divided_parameters(layer: torch.nn.Module) -> list[torch.nn.Parameter]:
    """A layer's sharded parameters: all but adapters."""
    return [parameter for name, parameter in layer.named_parameters() if ".lora_" not in name]


def _mesh(group: Group, device: torch.device) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device.type, (group.size,))


def _divide(
    backbone: Any, mesh: Any, *, trained: bool, prepare: Callable[[int, Any], None] = lambda _number, _layer: None
) -> set[torch.nn.Parameter]:
    """Shards the decoder's layers without their adapters; returns the sharded parameters.

    `trained` parameters become float32 later, and are gathered in their present dtype. `prepare` gets each layer ready
    just before it is sharded, so that only one is whole at a time.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    settings: dict[str, Any] = {"mesh": mesh}
    if trained:
        dtype = next(backbone.parameters()).dtype
        settings["mp_policy"] = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    layers: list[Any] = [*decoder_layers(backbone)]
    assert layers, "transformers' decoder layers are GradientCheckpointingLayers"
    divided: set[torch.nn.Parameter] = set()
    for number, layer in enumerate(layers):
        prepare(number, layer)
        # A LoRA's gradient is summed once per step over all processes, which needs the same whole matrices everywhere.
        whole = set(layer.parameters()) - set(divided_parameters(layer))
        fully_shard(layer, ignored_params=whole, **settings)
        if trained:
            # Sum over the processes, as `step` expects: FSDP2's default is the mean.
            layer.set_gradient_divide_factor(1.0)
            layer.set_force_sum_reduction_for_comms(True)
        divided |= set(layer.parameters()) - whole
    # The decoder itself has no parameters to shard. It is wrapped so that FSDP2 knows the order of its layers and
    # gathers the next one while one runs.
    fully_shard(backbone, mesh=mesh, ignored_params=set(backbone.parameters()) - divided)
    return divided


def _as_plain_bytes(layer: Any, device: torch.device) -> None:
    """Makes a quantised layer's weight a plain tensor, which can be sharded. bitsandbytes' own class carries scales.

    A 4-bit layer's forward then finds them on the layer (`fix_4bit_weight_quant_state_from_module`, made for FSDP). An
    8-bit layer's forward, `int8_linear`, finds them in the layer's state, and needs only the weight's codes.
    """
    if holds_8_bits(layer):
        scales = int8_scales_of(layer)
        assert scales is not None, "an 8-bit layer of a trained model multiplies by int8_linear"
        layer.state.SCB, layer.state.CB = scales.to(device), None
    else:
        layer.quant_state = layer.weight.quant_state
        layer.quant_state.to(device)
    layer.weight = torch.nn.Parameter(layer.weight.data, requires_grad=False)
