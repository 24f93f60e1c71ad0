"""Loaded models, and the mode in which both phases score. Imports transformers.

Both phases run the same modules in the same mode (`set_mode`), because bitsandbytes' layers compute different numbers
in train() and eval(). Independent of pairs, the cache's files and losses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, Literal

import torch
import torch.utils.checkpoint
from torch import nn

from dpoeng.cache.schema import IdArray
from dpoeng.cache.words import counted
from dpoeng.engine.config.fields import Attention, Quantization
from dpoeng.engine.models.layers.by_layer import ByLayer
from dpoeng.engine.models.offload import HostInputs
from dpoeng.engine.models.sources import ModelSource

Layout = Literal["shared", "separate"]

StatesOf = Callable[[IdArray, IdArray | None], torch.Tensor]

POLICY_ADAPTER = "default"
"""peft's name for the trained adapter."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(slots=True)
class CausalLM:
    """A loaded model, ready to score.

    Attributes:
        model: the object to save and switch: a PeftModel if there are adapters, else the same as `base`.
        base: the transformers causal LM, with adapter layers injected.
        tokenizer: its tokenizer, or None if it was not loaded.
        device: the device for inputs.
        dtype: compute dtype.
        quantization: precision of the base.
        native_attention: the attention that transformers chose for this architecture.
        layout: whether branches share their prompt, and the reason if they do not.
        attention: implementation of attention over shared prompts; see `engine/scoring/attention`.
        scored_end: whether the last layer computes scored positions only; see `engine/scoring/scored_end`.
        tree: the shortest beginning that responses to a prompt have in common and that runs once for them, in tokens;
            0 where each response runs whole.
        source: the files that it was loaded from.
        remarks: remarks for the user on how it was loaded.
        padding: whether separate texts of different lengths share one padded forward; else each has its own.
        sharded: whether layers are sharded over processes, so that all processes must run every forward together.
        masters: in full fine-tuning with another dtype than float32, the float32 tensor behind each weight, which the
            optimizer updates.
        parts: in full fine-tuning with sharded layers, this process's float32 rows of each weight, as a plain tensor
            that shares its memory; see `engine/models/fsdp_rows`.
        by_layer: how to run its layers one at a time, if their weights are not all in memory; else None.
        in_files: the layers' weights, if they are not loaded yet: `fsdp.shard_base` reads and shards each.
        entry: for a model that begins at a trunk, the stand-in below its first layer; see `engine/models/trunk`.
        carried: tensors of the trained adapter in parts that are not loaded; they are saved unchanged.
        watch: sees the states that enter a layer while a trunk is made; else None.
        states: for a model that begins at a trunk, returns the stored states [tokens, H] of a prompt, or of a
            response after it, on the host.
    """

    model: Any
    base: Any
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    quantization: Quantization
    native_attention: str
    layout: Layout = "separate"
    layout_reason: str = ""
    attention: Attention = "segments"
    scored_end: bool = False
    tree: int = 0
    source: ModelSource | None = None
    remarks: tuple[str, ...] = ()
    padding: bool = True
    sharded: bool = False
    masters: dict[nn.Parameter, nn.Parameter] = field(default_factory=dict)
    parts: dict[nn.Parameter, nn.Parameter] = field(default_factory=dict)
    by_layer: ByLayer | None = None
    in_files: Any = None
    entry: Any = None
    carried: dict[str, torch.Tensor] = field(default_factory=dict)
    watch: Any = None
    states: StatesOf | None = None

    @property
    def backbone(self) -> Any:
        """The decoder without the head: token ids to last hidden states."""
        return decoder_of(self.base)

    @property
    def head(self) -> nn.Module:
        """The `lm_head` module."""
        head: nn.Module = self.base.get_output_embeddings()
        return head

    @property
    def vocab_size(self) -> int:
        """Number of token ids: rows of the input embedding, or of the head if it has fewer."""
        rows = [int(self.base.get_input_embeddings().weight.shape[0])]
        if isinstance(self.head, nn.Linear):
            rows.append(int(self.head.weight.shape[0]))
        return min(rows)

    def trainable_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Name and tensor of each trained parameter (of a sharded one, the share), in the model's order."""
        moved = self.masters | self.parts
        return [(name, moved.get(p, p)) for name, p in self.model.named_parameters() if p.requires_grad]

    @torch.no_grad()
    def take_masters(self) -> None:
        """Gives each weight the rounded value of its master. Call it whenever the trained tensors have changed."""
        for weight, master in self.masters.items():
            weight.copy_(master)


def decoder_of(base: Any) -> Any:
    """The decoder of a causal language model, without its head.

    transformers' `get_decoder` returns the model itself if its prefix belongs to another class (Llama 4), and the head
    if that is named `decoder` (ModernBERT).
    """
    decoder = base.get_decoder()
    if decoder is not base and decoder is not base.get_output_embeddings():
        return decoder
    embedding = base.get_input_embeddings()
    for name in (base.base_model_prefix, "model"):
        part = getattr(base, name, None)
        if isinstance(part, nn.Module) and any(module is embedding for module in part.modules()):
            return part
    return decoder


def before_head(base: Any) -> Any:
    """The layer between decoder and output embeddings, or None."""
    part, head = getattr(base, "lm_head", None), base.get_output_embeddings()
    if not isinstance(part, nn.Module) or any(module is head for module in part.modules()):
        return None
    return part


# --------------------------------------------------------------------------- running


def set_mode(lm: CausalLM, *, training: bool) -> None:
    """Puts every module in the mode that both phases use; `training` changes only what must differ.

    - Everything is in eval(): no dropout in the base and no router noise separates policy and reference. -
    bitsandbytes' layers are in train() in both phases: in eval(), NF4 on a CPU repacks its weights permanently and then
      loses gradients.
    - With `training`: only the trained adapter has dropout. A layer's own `training` flag stays false, because OPT,
    Falcon
      and others read it for their dropout; checkpointing does not need it (`enable_gradient_checkpointing`).
    """
    lm.model.eval()
    for name, module in lm.model.named_modules():
        if type(module).__module__.startswith("bitsandbytes.nn"):
            module.training = True
        elif training and name.endswith(f".lora_dropout.{POLICY_ADAPTER}"):
            module.train()


def decoder_layers(backbone: nn.Module) -> list[nn.Module]:
    """The layers of a decoder, in order: those that transformers marks, or the longest list of modules."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in backbone.modules() if isinstance(module, GradientCheckpointingLayer)]
    lists = [list(module) for module in backbone.modules() if isinstance(module, nn.ModuleList)]
    return layers or max(lists, key=len, default=[])


def enable_gradient_checkpointing(lm: CausalLM, *, inputs_on_host: bool = False, layers: int | None = None) -> None:
    """Recomputes decoder layers in the backward pass, non-reentrant; their inputs may be kept in host memory.

    `layers` limits it to the first ones. The last layers keep their activations: the backward frees those before the
    first layers are recomputed. The numbers are the same for any count.

    The layer's `forward` is wrapped, not its call, so that hooks (FSDP2's) stay outside and run once. transformers' own
    switch is not used: it depends on the layer's `training` flag, which some layers also read for dropout. Call this
    once the adapters are in place.
    """
    draws = adapter_draws(lm)  # if none draws, skip reading the generators' state from the device
    on_device = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    checkpoint = partial(HostInputs().checkpoint if inputs_on_host else on_device, preserve_rng_state=draws)
    for layer in decoder_layers(lm.backbone)[:layers]:
        layer.forward = partial(_recomputed, checkpoint, layer.forward)


def adapter_draws(lm: CausalLM) -> bool:
    """Whether a forward draws random numbers: only the adapter's dropout does (`set_mode`)."""
    dropouts = [module for name, module in lm.model.named_modules() if ".lora_dropout." in name]
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in dropouts)


def _recomputed(checkpoint: Callable[..., Any], forward: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
    return (partial(checkpoint, forward) if torch.is_grad_enabled() else forward)(*inputs, **named)


def library_versions() -> dict[str, str]:
    """Versions of everything that computes a number."""
    names = ("dpoeng", "torch", "transformers", "peft", "bitsandbytes", "tokenizers", "triton", "pyarrow")
    return {**{name: _version(name) for name in names}, "torch": torch.__version__}


@cache  # parsing a package's metadata takes milliseconds, and an imported package keeps its version
def _version(name: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def device_name(device: torch.device) -> str:
    """Description of the device, for records."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    import platform

    return f"cpu ({platform.machine()}, {counted(torch.get_num_threads(), 'thread')})"


def register_attention(name: str, attention: Callable[..., Any]) -> None:
    """Registers an attention function with transformers under a name; registering it again changes nothing.

    It has no mask function: transformers then builds no mask, and does not search for packed texts on the device.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(name, attention)
