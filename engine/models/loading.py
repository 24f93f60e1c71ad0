"""Loads a checkpoint as a frozen `CausalLM` on a device in the requested precision, or as an empty one on meta."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import types
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from dpoeng.cache.errors import UserError
from dpoeng.cache.words import counted
from dpoeng.engine.config.fields import PrecomputeConfig, Quantization
from dpoeng.engine.models.checkpoint_tensors import check_loaded, refuse_unrecorded_quantization
from dpoeng.engine.models.experts.forward import multiply_by_stacks
from dpoeng.engine.models.experts.loading import quantize_experts, quantizing_experts
from dpoeng.engine.models.experts.stacks import unreached_stacks
from dpoeng.engine.models.fsdp_loading import prepared_class
from dpoeng.engine.models.fused.install import use_fused_kernels
from dpoeng.engine.models.layers.files import LayerFiles, layered_class
from dpoeng.engine.models.layers.setting_up import gguf_by_layer, layer_store, run_by_layer
from dpoeng.engine.models.model import DTYPES, CausalLM, decoder_layers, device_name
from dpoeng.engine.models.model_config import (
    auto_class,
    auto_class_of,
    config_of,
    has_text_part,
    layer_lists,
    text_config,
    with_layers,
)
from dpoeng.engine.models.multimodal.towers import leave_out, towers_of
from dpoeng.engine.models.quantized import compute_in, multiply_exactly, quantization_config, quantize_empty
from dpoeng.engine.models.sources import (
    ModelSource,
    has_stored_quantization,
    quantization_record,
    quantized_otherwise,
    read_fields,
    read_format,
    stored_format,
    stored_quantization,
)
from dpoeng.engine.models.stored.loading import Found, store_empty, stored_class
from dpoeng.engine.models.tokenizer import load_tokenizer
from dpoeng.engine.models.trunk.stand_ins import NoEmbedding, cut_below, entry_of, without_stand_ins
from dpoeng.engine.runtime.determinism import fix_workspaces
from dpoeng.engine.runtime.to_device import on_host, send
from dpoeng.kernels.cpu_linear import linear, native_bf16, product_dtype

# --------------------------------------------------------------------------- loading


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto` -> cuda if there is one, else cpu; each of several processes on a machine gets its own GPU.

    Raises:
        UserError: this machine does not have the named device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UserError(
            f"unknown device {name}",
            code="config-value",
            where="--device",
            expected="auto, cpu, cuda or cuda:N",
            found=name,
            remedy="name one of these, or leave it out",
        )
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "no usable CUDA device on this machine",
            code="no-gpu",
            where="--device cuda",
            found=f"torch {torch.__version__}, CUDA build {torch.version.cuda or 'none'}",
            remedy="use --device cpu, or install a CUDA build of torch and check nvidia-smi",
            exit_status=5,
        )
    if device.type == "cuda" and device.index is None:
        # If each process sees only its own GPU, as Slurm can arrange, that is the first one.
        index = local_rank % torch.cuda.device_count() if local_rank else torch.cuda.current_device()
        return torch.device("cuda", index)
    return device


def load_model(
    source: ModelSource,
    *,
    quantization: Quantization,
    dtype: str,
    device: torch.device,
    quant_type: str = "nf4",
    double_quant: bool = True,
    tokenizer: bool = True,
    shard: Callable[[Any], None] | None = None,
    by_layer: bool = False,
    layers_later: bool = False,
    trunk_layer: int | None = None,
    whole: bool = False,
) -> CausalLM:
    """Loads the base model, frozen, on `device`, which becomes the current one; other functions add adapters.

    With `shard` (from `fsdp`) this process reads only its share of the sharded weights; only for checkpoints that allow
    it: see `whole_because`. With `by_layer` the decoder's layers stay in the files; with `layers_later` they are read
    by `fsdp.shard_base`. With `trunk_layer` nothing below that layer is read; towers only if `whole`, to save them.

    Raises:
        UserError: the files cannot be loaded, or bitsandbytes does not work here.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)  # for the kernels of others; ours are launched on their tensors' device
        fix_workspaces()
        require_triton(device)
    compute = resolve_dtype(source, dtype, device)
    ready = exact_products() if device.type == "cuda" else ()
    remarks: tuple[str, ...] = ()
    files: list[LayerFiles] = []
    store = None
    if source.gguf:
        if by_layer:
            raise gguf_by_layer(source)
        assert trunk_layer is None, "a GGUF file is decoded whole"
        base = _load_gguf(source, quantization, compute, device)
    else:
        bits = _bits(source, quantization, compute, quant_type, double_quant)
        if quantization == "stored" and (by_layer or shard is not None):
            raise stored_whole(source.name, "--layer-offloading on" if by_layer else "--fsdp")
        prepare = shard if trunk_layer is None else partial(cut_below, number=trunk_layer)
        layers = files if by_layer or layers_later else None
        base, remarks = _load_safetensors(
            source, bits, compute, device, prepare, layers, divided=shard is not None, whole=whole
        )
        store = layer_store(base, files[0], device) if files else None
        if quantization == "none" and shard is None:
            base = base.to(device)
        if stored_quantization(source) is not None:
            compute_in(base, compute)
    words = load_tokenizer(source) if tokenizer else None
    lm = _frozen(base, words, device, compute, quantization, by_layer=by_layer or layers_later)
    if by_layer and store is not None:
        lm.by_layer = run_by_layer(lm, store)
    lm.in_files = store if layers_later else None
    lm.sharded, lm.source, lm.remarks = shard is not None, source, (*ready, *remarks, *lm.remarks)
    lm.entry = entry_of(base)
    return lm


def require_triton(device: torch.device) -> None:
    """Tries Triton on this GPU before loading anything, so that a missing compiler gives one clear message.

    Raises:
        UserError: Triton cannot be imported or cannot compile, or its kernel does not run.
    """
    try:
        from dpoeng.kernels.try_triton import try_triton

        try_triton(device)
    except Exception as error:
        problem = str(error).strip().splitlines()
        raise UserError(
            "no Triton kernel compiles and runs on this GPU",
            code="triton-unusable",
            where=f"--device {device}",
            expected="a C compiler (gcc or clang), Python's headers, a driver as new as this torch, and its own triton",
            found=f"{type(error).__name__}: {problem[0] if problem else ''}",
            remedy="install gcc and python3-dev, or name a compiler in CC; for others see `dpoeng doctor`, or use "
            "--device cpu",
            exit_status=5,
        ) from error


def exact_products() -> tuple[str, ...]:
    """Makes a GPU add products up in float32, and multiply float32 as it is; returns remarks for the user.

    TF32 keeps 10 bits of each factor: a float32 reference, and LoRA, would only have bfloat16's precision. And torch
    lets cuBLAS add up the parts of a long 16-bit product in 16 bits. The gradient of the head is a sum over the
    vocabulary, the longest of all; how it is cut into parts also depends on the number of rows.
    """
    products: Any = torch.backends.cuda.matmul
    products.allow_bf16_reduced_precision_reduction = products.allow_fp16_reduced_precision_reduction = False
    torch.backends.cudnn.allow_tf32 = False  # the convolutions of layers with a state
    # torch before 2.9 has only the older name; reading it raises if the newer one was set.
    on = products.fp32_precision not in ("none", "ieee") if hasattr(products, "fp32_precision") else products.allow_tf32
    if not on:
        return ()
    torch.set_float32_matmul_precision("highest")  # sets both
    return ("TF32 turned off: float32 products are computed in float32",)


def _load_gguf(source: ModelSource, quantization: Quantization, dtype: torch.dtype, device: torch.device) -> Any:
    if quantization != "none":
        raise UserError(
            "a GGUF file is already quantised",
            code="gguf-quantization",
            where=f"--quantization {quantization}",
            found=source.name,
            remedy="convert it to safetensors first (`dpoeng demo` shows how), or use --quantization none",
        )
    from dpoeng.engine.models.gguf import load_gguf_model

    return load_gguf_model(source.weight_files[0], dtype).to(device)


def _bits(
    source: ModelSource, quantization: Quantization, compute: torch.dtype, quant_type: str, double_quant: bool
) -> Any:
    """bitsandbytes' settings for quantising on load; None to leave the files' precision.

    Raises:
        UserError: the files are quantised differently, or in a way that config.json does not describe.
    """
    stored = stored_quantization(source)
    if stored is not None and stored["quantization"] != quantization:
        raise quantized_otherwise(source, "quantization", stored["quantization"], quantization)
    if stored is None and quantization == "stored":
        raise not_stored(source.name, str(source.folder / "config.json"))
    refuse_unrecorded_quantization(source)
    if quantization == "none" or stored is not None:
        return None
    return quantization_config(quantization, compute, quant_type, double_quant)


def _load_safetensors(
    source: ModelSource,
    bits: Any,
    dtype: torch.dtype,
    device: torch.device,
    prepare: Callable[[Any], Any] | None,
    layer_files: list[LayerFiles] | None = None,
    *,
    divided: bool,
    whole: bool,
) -> tuple[Any, tuple[str, ...]]:
    """Loads transformers' model from a folder; also returns remarks on parts that were left out.

    `prepare` changes the model before it gets weights; it may then be `divided` over processes. With `layer_files` the
    decoder's layers are not loaded, and the locations of their weights are added to it. `whole` loads towers too.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    kwargs: dict[str, Any] = {"dtype": dtype, "trust_remote_code": False, "use_safetensors": True}
    if bits is not None:
        kwargs["quantization_config"] = bits
    if (
        bits is not None
        or has_stored_quantization(source)
        or device.type == "cuda"
        or divided
        or layer_files is not None
    ):
        kwargs["device_map"] = {"": str(device)}  # tensor by tensor, never the whole model in host memory
    codes, found = stored_quantization(source) == {"quantization": "stored"}, Found()
    try:
        loader, prepared = auto_class_of(source.folder), None
        if codes:
            loader, kwargs["config"] = stored_class(source, stored_format(source), found, prepare)
        elif prepare is not None or (not whole and has_text_part(source.folder)):
            assert bits is None or not divided, "bitsandbytes quantises whole tensors"
            loader, kwargs["config"] = prepared = prepared_class(source, prepare)
        if layer_files is not None:
            loader, kwargs["config"] = layered_class(source, layer_files, prepared)
        with _quiet_loading(), quantizing_experts(bits):
            base, loaded = loader.from_pretrained(
                source.folder, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise _unloadable(source, error) from error
    remarks = check_loaded(base, without_stand_ins(base, loaded), source)
    remarks += found.remarks(stored_format(source)) if codes else ()
    left = unreached_stacks(base) if bits is not None else []
    if left:
        remarks += (
            f"{counted(len(left), 'stack')} of experts stay in {dtype}, because they cannot be quantised: {left[0]}",
        )
    return base, remarks


def _unloadable(source: ModelSource, error: Exception) -> UserError:
    return UserError(
        f"cannot load {source.name}",
        code="model-unloadable",
        where=str(source.folder),
        found=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
        remedy="check that the files are complete; if the model type is unknown, install a newer transformers",
    )


def empty_model(
    fields: Mapping[str, Any],
    *,
    quantization: Quantization,
    dtype: torch.dtype,
    quant_type: str = "nf4",
    double_quant: bool = True,
    layers: Sequence[int] | None = None,
) -> CausalLM:
    """Builds the model of a config.json without weights, on the `meta` device, with the modules of `load_model`.

    Args:
        fields: contents of config.json.
        quantization: as in `load_model`.
        dtype: compute dtype.
        quant_type: 4bit: the number format.
        double_quant: 4bit: whether the scales are quantised too.
        layers: use only these of its layers.

    Raises:
        UserError: transformers does not know the architecture.
    """
    try:
        config = config_of(fields)
        if layers is not None:
            config = with_layers(config, layers)
        with torch.device("meta"):
            base = auto_class(config).from_config(config, dtype=dtype)
        leave_out(base, towers_of(base))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            "cannot build a model from this config.json",
            code="model-unloadable",
            where="--model",
            expected="the config.json of a causal language model that this transformers knows",
            found=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            remedy="check model_type, or install a newer transformers",
        ) from error
    if quantization == "stored":
        record = quantization_record(fields)
        if record is None:
            raise not_stored("the model", "--model")
        store_empty(base, read_format("the model", "--model", record))
    elif quantization != "none":
        settings = quantization_config(quantization, dtype, quant_type, double_quant)
        quantize_empty(base, settings)
        quantize_experts(base, settings)
    return _frozen(base, None, torch.device("meta"), dtype, quantization)


def not_stored(name: str, where: str) -> UserError:
    """Return the error for `stored` where the files are in full precision."""
    return UserError(
        f"{name} is not quantised in its files",
        code="quantization-stored",
        where=where,
        expected="a quantization_config, which --quantization stored leaves as it is",
        remedy="use --quantization none, 8bit or 4bit",
    )


def stored_whole(name: str, option: str) -> UserError:
    """Return the error for a way to load that does not know stored codes."""
    return UserError(
        f"{name} is quantised in its files, and such a base is loaded whole by every process",
        code="quantization-stored",
        where=option,
        expected="a base in full precision, or one in bitsandbytes' 8 or 4 bits",
        remedy=f"leave {option} out, or name the full-precision checkpoint with --quantization 4bit",
    )


def layer_kinds(fields: Mapping[str, Any]) -> list[int] | None:
    """The kind of each decoder layer as a number: 0 for the first and all equal ones; None if they cannot be told.

    Layers are equal if they have the same parameters, the same words and switches, and the same entries in the config's
    lists.
    """
    layers, _ = _described(_as_text(fields), None)
    numbers = {layer: number for number, layer in enumerate(dict.fromkeys(layers or ()))}
    return [numbers[layer] for layer in layers] if layers is not None else None


def can_leave_out(fields: Mapping[str, Any], chosen: Sequence[int]) -> bool:
    """Whether a model with only these layers is like the whole one in them, and in all that belongs to no layer.

    It is not if a layer's kind depends on its number alone, or if there are tensors with something for each layer.
    """
    return _can_leave_out(_as_text(fields), tuple(chosen))


@functools.lru_cache(maxsize=32)
def _can_leave_out(fields: str, chosen: tuple[int, ...]) -> bool:
    whole, around = _described(fields, None)
    with contextlib.suppress(UserError, ValueError, LookupError, AttributeError, TypeError, RuntimeError):
        return whole is not None and _described(fields, chosen) == ([whole[i] for i in chosen], around)
    return False


def layer_period(fields: Mapping[str, Any]) -> int | None:
    """The number of decoder layers after which their kinds repeat: 1 if all are equal; None if they do not repeat."""
    kinds = layer_kinds(fields) or []
    return next((n for n in range(1, len(kinds)) if kinds[n:] == kinds[:-n]), len(kinds) or None)


def whole_model(fields: Mapping[str, Any]) -> CausalLM:
    """The empty model of a config.json in bfloat16, the same one for each call: to look at, not to change."""
    return _whole_model(_as_text(fields))


def _as_text(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, sort_keys=True, default=str)


@functools.lru_cache(maxsize=1)
def _whole_model(fields: str) -> CausalLM:
    return empty_model(json.loads(fields), quantization="none", dtype=torch.bfloat16)


@functools.lru_cache(maxsize=32)
def _described(fields: str, chosen: tuple[int, ...] | None) -> tuple[list[Hashable] | None, list[torch.Size]]:
    """What tells each layer of a model, or of one with only some layers; and the shapes of all other tensors."""
    if chosen is None:
        lm = _whole_model(fields)
    else:
        lm = empty_model(json.loads(fields), quantization="none", dtype=torch.bfloat16, layers=chosen)
    layers = decoder_layers(lm.backbone)
    lists = layer_lists(lm.base.config)
    inside = {id(tensor) for layer in layers for tensor in [*layer.parameters(), *layer.buffers()]}
    around = [tensor.shape for tensor in [*lm.base.parameters(), *lm.base.buffers()] if id(tensor) not in inside]
    if len(lists) != len(layers):
        return None, around
    kinds: list[Hashable] = [
        (type(layer), listed, _marks(layer), tuple((name, tensor.shape) for name, tensor in layer.named_parameters()))
        for layer, listed in zip(layers, lists, strict=True)
    ]
    return kinds, around


def _marks(layer: nn.Module) -> tuple[tuple[str, str, str | bool], ...]:
    """Words and switches of a layer's modules, such as `attention_type`, `is_sliding` or `use_rope`."""
    return tuple(
        (module_name, name, value)
        for module_name, module in layer.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, (str, bool)) and name != "training"
    )


def _frozen(
    base: Any,
    tokenizer: Any,
    device: torch.device,
    dtype: torch.dtype,
    quantization: Quantization,
    *,
    by_layer: bool = False,
) -> CausalLM:
    base.requires_grad_(False)
    base.config.use_cache = False
    for module in base.modules():
        # Attention dropout is a plain float on the attention module, so eval() does not turn it off.
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    if quantization == "8bit":
        multiply_exactly(base)
    if quantization != "none":
        multiply_by_stacks(base)
    if device.type != "cuda" and product_dtype(dtype) != dtype:
        _multiply_wide(base)
    if device.type == "cuda" and not by_layer and embedding_on_host(base, quantization):
        keep_embedding_on_host(base, device)
    remarks = use_fused_kernels(base, device) if device.type != "cpu" else ()
    return CausalLM(
        model=base,
        base=base,
        tokenizer=tokenizer,
        device=device,
        dtype=dtype,
        quantization=quantization,
        native_attention=base.config._attn_implementation,
        remarks=remarks,
    )


def _multiply_wide(base: nn.Module) -> None:
    """Makes linear layers multiply in a dtype that this CPU has units for (also on meta, if it stands for a CPU)."""

    def forward(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)

    for module in base.modules():
        if type(module) is nn.Linear:
            module.forward = types.MethodType(forward, module)  # type: ignore[method-assign]


def embedding_on_host(base: Any, quantization: Quantization) -> bool:
    """Whether the input embedding stays in host memory when the rest is on a GPU.

    It does if the base is quantised, because memory is then scarce; not if the head is the same tensor.
    """
    head = base.get_output_embeddings()
    if isinstance(base.get_input_embeddings(), NoEmbedding):
        return False
    return quantization != "none" and head is not None and head.weight is not base.get_input_embeddings().weight


def keep_embedding_on_host(base: Any, device: torch.device) -> None:
    """Looks tokens up in host memory and copies the rows to `device`: saves 1.4 GiB of GPU memory for a 32B model.

    transformers takes the first parameter's device, now the host, as the model's, and `generate` moves masks and
    positions there: the model's inputs are moved to `device`.
    """
    embedding = base.get_input_embeddings().to("cpu")
    embedding.register_forward_pre_hook(lambda _module, inputs: (on_host(inputs[0]), *inputs[1:]))
    embedding.register_forward_hook(lambda _module, _inputs, output: send(output, device))

    def to_device(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return inputs, {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in named.items()}

    base.register_forward_pre_hook(to_device, with_kwargs=True)


def resolve_dtype(source: ModelSource, dtype: str, device: torch.device) -> torch.dtype:
    """`auto` -> the checkpoint's own dtype (float32 for a GGUF).

    On a CPU that does not multiply bfloat16 in hardware, `auto` is float32: bfloat16 would be widened for each product.

    Raises:
        UserError: an unusable dtype, or bfloat16 on a GPU without units for it.
    """
    requested = dtype
    if dtype == "auto":
        if source.gguf:
            return torch.float32
        dtype = stored_dtype(read_fields(source)) or "float32"
    if dtype not in DTYPES:
        raise UserError(
            f"{dtype} is not usable as compute dtype",
            code="config-value",
            where="--dtype",
            expected=", ".join(DTYPES),
            found=dtype,
            remedy="name one of these with --dtype",
        )
    if requested == "auto" and device.type == "cpu" and not native_bf16():
        return torch.float32
    if dtype == "bfloat16" and device.type == "cuda" and not gpu_multiplies_bf16(device):
        raise UserError(
            "this GPU has no units for bfloat16",
            code="config-value",
            where=f"--dtype {requested}",
            expected="float16 or float32 on a GPU of compute capability below 8.0",
            found=f"bfloat16 on {device_name(device)}",
            remedy="add --dtype float32; or --dtype float16, half the memory, in which some models overflow: dpoeng "
            "stops if a log-prob is not finite",
        )
    return DTYPES[dtype]


def stored_dtype(fields: Mapping[str, Any]) -> str | None:
    """The dtype in a config.json; a model with several parts may name it for its text decoder alone (Qwen3.5)."""
    found = fields.get("dtype") or fields.get("torch_dtype")
    if found is None:
        try:
            found = text_config(config_of(fields)).dtype
        except (KeyError, ValueError, TypeError, AttributeError):
            return None  # loading says what is wrong with this config
    return str(found).removeprefix("torch.") if found else None


def gpu_multiplies_bf16(device: torch.device) -> bool:
    """Whether a GPU has units for bfloat16: NVIDIA's do from compute capability 8.0 (Ampere) on."""
    return bool(torch.version.hip) or torch.cuda.get_device_capability(device) >= (8, 0)


@contextlib.contextmanager
def _quiet_loading() -> Iterator[None]:
    """Limits transformers' load report to errors: dpoeng itself reports what users must know."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def with_stored_quantization(config: PrecomputeConfig, source: ModelSource) -> PrecomputeConfig:
    """The configuration, completed by the quantisation that the checkpoint itself records.

    Raises:
        UserError: another quantisation was requested.
    """
    stored = stored_quantization(source)
    if stored is None:
        return config
    for name, value in stored.items():
        if name in config.model_fields_set and getattr(config, name) != value:
            raise quantized_otherwise(source, name, value, getattr(config, name))
    return config.model_copy(update=dict(stored))
