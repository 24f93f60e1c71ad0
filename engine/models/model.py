"""Models: loaded, quantised, and put in the mode in which both phases score. The importer of transformers.

Both phases run the same modules in the same mode (`set_mode`), because bitsandbytes' layers compute different numbers
in train() and in eval(). Knows nothing of pairs, of the cache's files, or of losses.
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
"""The name under which the trained adapter is known to peft."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(slots=True)
class CausalLM:
    """A loaded model, ready to score.

    Attributes:
        model: what is saved and switched: a PeftModel if there are adapters, else the same as `base`.
        base: the transformers causal LM, with adapter layers injected.
        tokenizer: its tokenizer, or None if it was not asked for.
        device: where inputs go.
        dtype: compute dtype.
        quantization: how the base is held.
        native_attention: the attention that transformers chose for this architecture.
        layout: whether branches share their prompt, and why if they do not.
        attention: how attention over shared prompts is computed; see `engine/scoring/attention`.
        scored_end: whether the last layer computes scored positions only; see `engine/scoring/scored_end`.
        source: the files that it was loaded from.
        remarks: what users are to be told of how it was loaded.
        padding: whether separate texts of several lengths go through one forward, padded; else each goes alone.
        sharded: whether layers are divided over processes, so that every forward is one of all of them.
        masters: with full fine-tuning in another dtype than float32, the float32 tensor behind each weight, which is
            what the optimizer moves.
        parts: with full fine-tuning over divided layers, this process's rows of each of their weights, in float32, as
            a plain tensor over the same memory; see `engine/models/fsdp_rows`.
        by_layer: how its layers are run one at a time, where their weights are not all in memory; else None.
        entry: of a model that begins at a trunk, the stand-in below its first layer; see `engine/models/trunk`.
        watch: sees the states that enter a layer while a trunk is made; else None.
        states: of a model that begins at a trunk, what gives the stored states [tokens, H] of a prompt, or of a
            response under it, on the host.
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
    source: ModelSource | None = None
    remarks: tuple[str, ...] = ()
    padding: bool = True
    sharded: bool = False
    masters: dict[nn.Parameter, nn.Parameter] = field(default_factory=dict)
    parts: dict[nn.Parameter, nn.Parameter] = field(default_factory=dict)
    by_layer: ByLayer | None = None
    entry: Any = None
    watch: Any = None
    states: StatesOf | None = None

    @property
    def backbone(self) -> Any:
        """The decoder below the head: token ids in, last hidden states out."""
        return decoder_of(self.base)

    @property
    def head(self) -> nn.Module:
        """The `lm_head` module."""
        head: nn.Module = self.base.get_output_embeddings()
        return head

    @property
    def vocab_size(self) -> int:
        """Token ids that the model has: rows of the input embedding, or of the head where these are fewer."""
        rows = [int(self.base.get_input_embeddings().weight.shape[0])]
        if isinstance(self.head, nn.Linear):
            rows.append(int(self.head.weight.shape[0]))
        return min(rows)

    def trainable_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Name and tensor of each parameter that is trained (of a divided one, the part), in the model's own order."""
        moved = self.masters | self.parts
        return [(name, moved.get(p, p)) for name, p in self.model.named_parameters() if p.requires_grad]

    @torch.no_grad()
    def take_masters(self) -> None:
        """Gives each weight the value of its master, rounded. To be called whenever the trained tensors have moved."""
        for weight, master in self.masters.items():
            weight.copy_(master)


def decoder_of(base: Any) -> Any:
    """The decoder of a causal language model, without its head.

    transformers' `get_decoder` returns the model itself where its prefix is another's (Llama 4), and the head where
    that is called `decoder` (ModernBERT).
    """
    found = base.get_decoder()
    if found is not base and found is not base.get_output_embeddings():
        return found
    embedding = base.get_input_embeddings()
    for name in (base.base_model_prefix, "model"):
        part = getattr(base, name, None)
        if isinstance(part, nn.Module) and any(module is embedding for module in part.modules()):
            return part
    return found


def before_head(base: Any) -> Any:
    """The layer between decoder and output embeddings, where a model has one; else None."""
    part, head = getattr(base, "lm_head", None), base.get_output_embeddings()
    if not isinstance(part, nn.Module) or any(module is head for module in part.modules()):
        return None
    return part


# --------------------------------------------------------------------------- running


def set_mode(lm: CausalLM, *, training: bool) -> None:
    """Puts every module in the mode that both phases use; with `training`, only what must differ differs.

    - Everything in eval(), so that no dropout of the base and no router noise separates policy and reference.
    - bitsandbytes' layers in train(), in both phases: in eval() NF4 on a CPU repacks its weights for good and then
      loses gradients.
    - With `training`: dropout of the trained adapter, and of nothing else. A layer's own `training` flag stays false,
      since OPT, Falcon and others read it for their dropout; checkpointing does not need it
      (`enable_gradient_checkpointing`).
    """
    lm.model.eval()
    for name, module in lm.model.named_modules():
        if type(module).__module__.startswith("bitsandbytes.nn"):
            module.training = True
        elif training and name.endswith(f".lora_dropout.{POLICY_ADAPTER}"):
            module.train()


def decoder_layers(backbone: nn.Module) -> list[nn.Module]:
    """The layers of a decoder, in its order: what transformers marks as such, or its longest list of modules."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in backbone.modules() if isinstance(module, GradientCheckpointingLayer)]
    lists = [list(module) for module in backbone.modules() if isinstance(module, nn.ModuleList)]
    return layers or max(lists, key=len, default=[])


def enable_gradient_checkpointing(lm: CausalLM, *, inputs_on_host: bool = False, layers: int | None = None) -> None:
    """Recomputes decoder layers in the backward pass, without re-entrance; their inputs may wait in host memory.

    With `layers`, the first so many. The last ones keep what they computed: the backward frees that before the first
    layers are recomputed. The numbers are the same for any count.

    The layer's `forward` is wrapped, and not its call, so that hooks (FSDP2's) stay outside and run once. transformers'
    own switch is not used: it acts where the layer's `training` is true, a flag that some layers also read for dropout.
    To be called when the adapters are there.
    """
    draws = adapter_draws(lm)  # without it no state of generators is read off the device
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
    """Versions of all that computes a number."""
    names = ("dpoeng", "torch", "transformers", "peft", "bitsandbytes", "tokenizers", "triton", "pyarrow")
    return {**{name: _version(name) for name in names}, "torch": torch.__version__}


@cache  # parsing a package's metadata takes milliseconds, and what has been imported keeps its version
def _version(name: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def device_name(device: torch.device) -> str:
    """The device in words, for records."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    import platform

    return f"cpu ({platform.machine()}, {counted(torch.get_num_threads(), 'thread')})"


def register_attention(name: str, attention: Callable[..., Any]) -> None:
    """Make an attention function known to transformers under a name; registering it again changes nothing.

    It gets no mask function: transformers then builds no mask, and does not look for packed texts on the device.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(name, attention)
