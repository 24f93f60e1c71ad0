"""Models: found, loaded, quantised, given adapters. The only module that imports transformers, peft and bitsandbytes.

Both phases run the same modules in the same mode (`set_mode`), because bitsandbytes' layers compute different numbers
in train() and in eval(). Knows nothing of pairs, of the cache's files, or of losses.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from dpoeng.cache.errors import UserError
from dpoeng.engine.attention import SHARED_PROMPT, no_mask, shared_prompt_attention

Quantization = Literal["none", "8bit", "4bit"]
AdapterMode = Literal["new", "stack", "continue"]
Layout = Literal["shared", "separate"]

REFERENCE_ADAPTER = "reference"
POLICY_ADAPTER = "default"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Fields of config.json that name things, or set how text is generated, and do not move a log-probability.
_INERT_CONFIG_FIELDS = frozenset(
    """_name_or_path architectures attn_implementation auto_map bos_token_id dtype eos_token_id id2label
    initializer_range label2id output_attentions output_hidden_states pad_token_id problem_type return_dict
    return_dict_in_generate torch_dtype transformers_version transformers.js_config unsloth_fixed unsloth_version
    use_cache""".split()
)
# Fields of adapter_config.json that do move one.
_ADAPTER_FIELDS = (
    "peft_type r lora_alpha use_rslora use_dora target_modules target_parameters rank_pattern alpha_pattern bias "
    "lora_bias fan_in_fan_out modules_to_save layers_to_transform layers_pattern layer_replication exclude_modules "
    "trainable_token_indices use_qalora alora_invocation_tokens arrow_config"
).split()


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model's files are. `name` is what the user wrote; `revision` the hub commit, if it came from the hub."""

    name: str
    folder: Path
    weight_files: tuple[Path, ...]
    gguf: bool = False
    revision: str | None = None


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

    @property
    def backbone(self) -> Any:
        """The decoder below the head: token ids in, last hidden states out."""
        return self.base.get_decoder()

    @property
    def head(self) -> nn.Module:
        """The `lm_head` module."""
        head: nn.Module = self.base.get_output_embeddings()
        return head

    @property
    def vocab_size(self) -> int:
        """Rows of the input embedding."""
        return int(self.base.get_input_embeddings().weight.shape[0])

    def trainable_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Name and tensor of each parameter that is trained, in the model's own order."""
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]


# --------------------------------------------------------------------------- finding


def find_model(name: str, *, revision: str | None = None) -> ModelSource:
    """A directory, a GGUF file or a hub id -> its files.

    Raises:
        UserError: nothing there, no safetensors, or the hub cannot be reached.
    """
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(
                f"{path} is a file, but not a GGUF model",
                code="model-not-found",
                where="--model",
                expected="a directory with config.json and *.safetensors, a .gguf file, or a hub id",
                remedy="name the directory that holds config.json",
            )
        return ModelSource(name, path.parent, (path,), gguf=True)
    commit: str | None = None
    if path.is_dir():
        folder = path
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith((".", "/")):
        folder, commit = _download(name, revision, "*.safetensors")
    else:
        raise UserError(
            f"no model at {name}",
            code="model-not-found",
            where="--model",
            expected="a directory with config.json and *.safetensors, a .gguf file, or a hub id like Qwen/Qwen2.5-32B",
            found="no such file or directory",
            remedy="check the path; a relative one starts at the current folder",
        )
    return ModelSource(name, folder, _weight_files(folder), revision=commit)


def find_adapter(name: str) -> ModelSource:
    """A peft adapter's directory or hub id -> its files."""
    path = folder = Path(name).expanduser()
    commit: str | None = None
    if not path.is_dir() and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith((".", "/")):
        folder, commit = _download(name, None, "adapter_model.safetensors")
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if not config.is_file() or not weights.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        raise UserError(
            f"no peft adapter at {name}",
            code="adapter-not-found",
            where="--adapter",
            expected="a directory with adapter_config.json and adapter_model.safetensors",
            found="adapter_model.bin, a pickle, which can run code when it is loaded" if pickled else f"{folder}",
            remedy="load it once with peft and save_pretrained(..., safe_serialization=True)"
            if pickled
            else "name the folder that peft's save_pretrained wrote",
        )
    return ModelSource(name, folder, (weights,), revision=commit)


def _weight_files(folder: Path) -> tuple[Path, ...]:
    if not (folder / "config.json").is_file():
        nearby = sorted(p.parent.name for p in folder.glob("*/config.json"))
        adapter = (folder / "adapter_config.json").is_file()
        raise UserError(
            f"{folder} holds no model",
            code="model-not-found",
            where="--model",
            expected="config.json and *.safetensors",
            found="a peft adapter"
            if adapter
            else (f"config.json in {', '.join(nearby)}" if nearby else "no config.json"),
            remedy="give the base as --model and this folder as --adapter"
            if adapter
            else "name the folder that holds config.json",
        )
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [folder / shard for shard in shards]
        missing = [f.name for f in files if not f.is_file()]
        if missing:
            raise UserError(
                f"{len(missing)} of {len(files)} weight files are missing",
                code="model-incomplete",
                where=str(folder),
                expected=", ".join(missing[:3]),
                remedy="download the checkpoint again",
            )
        return tuple(files)
    if (folder / "model.safetensors").is_file():
        return (folder / "model.safetensors",)
    pickles = sorted(p.name for p in folder.glob("*.bin"))
    raise UserError(
        f"{folder} holds no safetensors weights",
        code="model-no-safetensors",
        where="--model",
        expected="model.safetensors, or model.safetensors.index.json with its shards",
        found=", ".join(pickles[:3]) or "no weight files",
        remedy="convert: AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder); pickles are not read, "
        "since loading one can run code",
    )


def _download(name: str, revision: str | None, weights: str) -> tuple[Path, str | None]:
    from huggingface_hub import snapshot_download

    patterns = [weights, "*.json", "*.txt", "*.model", "*.jinja"]
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:
        raise UserError(
            f"the hub has no {name}, or cannot be reached",
            code="model-not-found",
            where="--model",
            expected="a local directory, a .gguf file, or a hub id",
            found=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            remedy="check the name and the network (HF_TOKEN for gated models), or give a local directory",
        ) from error
    return folder, folder.name


def forward_config(source: ModelSource) -> dict[str, Any]:
    """The fields of the model's configuration that can move a log-probability, as they stand on disk.

    Taken from config.json and not from the loaded object, which grows new default fields with every release of
    transformers and would make old caches miss.
    """
    if source.gguf:
        # Everything in a GGUF that shapes the forward is in the file whose bytes are hashed.
        return {"format": "gguf"}
    raw = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    return {k: v for k, v in sorted(raw.items()) if k not in _INERT_CONFIG_FIELDS}


def adapter_config(source: ModelSource) -> dict[str, Any]:
    """The fields of adapter_config.json that move a log-probability (`lora_alpha` among them)."""
    raw = json.loads((source.folder / "adapter_config.json").read_text(encoding="utf-8"))
    kept = {k: raw[k] for k in _ADAPTER_FIELDS if raw.get(k) not in (None, [], {}, False)}
    if isinstance(kept.get("target_modules"), list):
        kept["target_modules"] = sorted(kept["target_modules"])
    return kept


# --------------------------------------------------------------------------- loading


def pick_device(name: str) -> torch.device:
    """`auto` -> cuda where there is one, else cpu.

    Raises:
        UserError: a device was named that this machine does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "no CUDA device is usable here",
            code="no-gpu",
            where="--device cuda",
            found=f"torch {torch.__version__}, CUDA build {torch.version.cuda or 'none'}",
            remedy="use --device cpu, or install a CUDA build of torch and check nvidia-smi",
            exit_status=5,
        )
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def load_tokenizer(source: ModelSource) -> Any:
    """The model's tokenizer.

    Raises:
        UserError: there is none beside the model.
    """
    if source.gguf:
        from dpoeng.engine.gguf import load_gguf_tokenizer

        return load_gguf_tokenizer(source.weight_files[0])
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False)
    except Exception as error:
        raise UserError(
            f"no usable tokenizer beside the model {source.name}",
            code="tokenizer-missing",
            where=str(source.folder),
            expected="tokenizer.json and tokenizer_config.json",
            found=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            remedy="copy the tokenizer files from the model that this one was trained from",
        ) from error


def load_model(
    source: ModelSource,
    *,
    quantization: Quantization,
    dtype: str,
    device: torch.device,
    int8_threshold: float = 6.0,
    quant_type: str = "nf4",
    double_quant: bool = True,
    tokenizer: bool = True,
) -> CausalLM:
    """The base model, frozen, on `device`; adapters are added by the functions below.

    Raises:
        UserError: the files cannot be loaded, or bitsandbytes cannot be used.
    """
    import transformers
    from transformers import AutoModelForCausalLM

    transformers.utils.logging.disable_progress_bar()
    register_attention()
    compute = resolve_dtype(source, dtype)
    if source.gguf:
        if quantization != "none":
            raise UserError(
                "a GGUF file cannot be quantised again",
                code="gguf-quantization",
                where=f"--quantization {quantization}",
                found=source.name,
                remedy="convert it to safetensors first (`dpoeng demo` shows how), or use --quantization none",
            )
        from dpoeng.engine.gguf import load_gguf_model

        base = load_gguf_model(source.weight_files[0], compute).to(device)
    else:
        kwargs: dict[str, Any] = {"dtype": compute, "trust_remote_code": False, "use_safetensors": True}
        if quantization != "none":
            kwargs["quantization_config"] = _quantization_config(
                quantization, compute, int8_threshold, quant_type, double_quant
            )
            kwargs["device_map"] = {"": str(device)}
        try:
            with _quiet_loading():
                base = AutoModelForCausalLM.from_pretrained(source.folder, **kwargs)
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            raise UserError(
                f"cannot load {source.name}",
                code="model-unloadable",
                where=str(source.folder),
                found=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
                remedy="check that config.json names an architecture that this transformers knows, and that the files "
                "are complete",
            ) from error
        if quantization == "none":
            base = base.to(device)
    base.requires_grad_(False)
    base.config.use_cache = False
    for module in base.modules():
        # Attention dropout is a plain float on the attention module; dropout would make policy and reference differ.
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    return CausalLM(
        model=base,
        base=base,
        tokenizer=load_tokenizer(source) if tokenizer else None,
        device=device,
        dtype=compute,
        quantization=quantization,
        native_attention=base.config._attn_implementation,
    )


def resolve_dtype(source: ModelSource, dtype: str) -> torch.dtype:
    """`auto` -> the checkpoint's own dtype (float32 for a GGUF)."""
    if dtype == "auto":
        if source.gguf:
            return torch.float32
        raw = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
        dtype = str(raw.get("dtype") or raw.get("torch_dtype") or "float32")
    if dtype not in DTYPES:
        raise UserError(
            f"dtype {dtype} cannot be used for computing",
            code="config-value",
            where="--dtype",
            expected=", ".join(DTYPES),
            found=dtype,
            remedy="name one of these with --dtype",
        )
    return DTYPES[dtype]


def _quantization_config(
    quantization: Quantization, compute: torch.dtype, int8_threshold: float, quant_type: str, double_quant: bool
) -> Any:
    try:
        import bitsandbytes  # noqa: F401  # exercised here so that a broken install is named early
        from transformers import BitsAndBytesConfig
    except Exception as error:
        raise UserError(
            "bitsandbytes cannot be used",
            code="bitsandbytes-unusable",
            where=f"--quantization {quantization}",
            found=f"{type(error).__name__}: {error}",
            remedy="pip install 'bitsandbytes>=0.48', or use --quantization none",
            exit_status=5,
        ) from error
    if quantization == "8bit":
        return BitsAndBytesConfig(
            load_in_8bit=True, llm_int8_threshold=float(int8_threshold), llm_int8_skip_modules=["lm_head"]
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=["lm_head"],
    )


@contextlib.contextmanager
def _quiet_loading() -> Iterator[None]:
    """Keeps transformers' load report to errors: what users must know is said by dpoeng itself."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


# --------------------------------------------------------------------------- adapters


def load_reference_adapter(lm: CausalLM, adapter: ModelSource) -> CausalLM:
    """base + frozen adapter: the SFT model whose log-probs are cached."""
    lm.model = _peft_from_pretrained(lm, adapter, REFERENCE_ADAPTER, trainable=False)
    return lm


def add_policy_adapter(lm: CausalLM, mode: AdapterMode, adapter: ModelSource | None, lora: dict[str, Any]) -> CausalLM:
    """Makes the policy trainable.

    Args:
        lm: the base, without adapters.
        mode: `new`, a fresh LoRA on the base; `stack`, a fresh LoRA on base + frozen `adapter`, unmerged; `continue`,
            `adapter` itself trained further.
        adapter: the SFT adapter for `stack` and `continue`.
        lora: arguments of peft's LoraConfig; `continue` takes only `lora_dropout` from them.

    Raises:
        UserError: the targets match nothing, or the adapter does not fit the base.
    """
    if mode == "continue":
        assert adapter is not None, "mode continue needs an adapter"
        lm.model = _peft_from_pretrained(lm, adapter, POLICY_ADAPTER, trainable=True)
        _set_dropout(lm, float(lora.get("lora_dropout", 0.0)))
    else:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(task_type="CAUSAL_LM", **lora)
        try:
            if mode == "new":
                lm.model = get_peft_model(lm.base, config, adapter_name=POLICY_ADAPTER)
            else:
                assert adapter is not None, "mode stack needs an adapter"
                lm.model = _peft_from_pretrained(lm, adapter, REFERENCE_ADAPTER, trainable=False)
                lm.model.add_adapter(POLICY_ADAPTER, config)
                lm.model.base_model.set_adapter([REFERENCE_ADAPTER, POLICY_ADAPTER])
                for name, parameter in lm.model.named_parameters():
                    if f".{REFERENCE_ADAPTER}." in name:
                        parameter.requires_grad_(False)
        except ValueError as error:
            if "arget modules" not in str(error):
                raise
            raise UserError(
                "lora_target_modules matches nothing in this model",
                code="lora-no-target",
                where="--lora-target-modules",
                found=str(lora.get("target_modules")),
                expected="all-linear, or some of: " + ", ".join(linear_names(lm.base)),
                remedy="name modules that the model has",
            ) from error
    # fp32 adapters over a half-precision base: 8-bit Adam and bf16 rounding can lose small updates otherwise.
    for _, parameter in lm.trainable_parameters():
        parameter.data = parameter.data.float()
    return lm


def _set_dropout(lm: CausalLM, probability: float) -> None:
    """Replaces the dropout that the adapter was trained with in SFT: DPO's is this run's own choice.

    Left as it was, the first policy would differ from the reference by noise, and the first loss from ln 2.
    """
    for module in lm.model.modules():
        dropouts = getattr(module, "lora_dropout", None)
        if isinstance(dropouts, nn.ModuleDict) and POLICY_ADAPTER in dropouts:
            dropouts[POLICY_ADAPTER] = nn.Dropout(probability) if probability > 0 else nn.Identity()


def _peft_from_pretrained(lm: CausalLM, adapter: ModelSource, name: str, *, trainable: bool) -> Any:
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(
            lm.base, str(adapter.folder), adapter_name=name, is_trainable=trainable, torch_device=str(lm.device)
        )
    except (ValueError, RuntimeError, KeyError) as error:
        raise UserError(
            "the adapter does not fit this base model",
            code="adapter-mismatch",
            where=adapter.name,
            found=str(error).splitlines()[0],
            remedy="give the base that the adapter was trained on; adapter_config.json names it in "
            "base_model_name_or_path",
        ) from error


def linear_names(base: nn.Module) -> list[str]:
    """Distinct last names of the linear layers, the head left out: what LoRA can target."""
    head = getattr(base, "get_output_embeddings", lambda: None)()
    return sorted(
        {name.rsplit(".", 1)[-1] for name, m in base.named_modules() if isinstance(m, nn.Linear) and m is not head}
    )


@contextlib.contextmanager
def as_reference(lm: CausalLM, mode: AdapterMode | None) -> Iterator[None]:
    """The policy as the reference: without its trainable adapter (`new`, `stack`), or as it is (`continue`, None)."""
    if mode == "new":
        with lm.model.disable_adapter():
            yield
    elif mode == "stack":
        frozen = [(name, p.requires_grad) for name, p in lm.model.named_parameters()]
        lm.model.base_model.set_adapter(REFERENCE_ADAPTER)
        try:
            yield
        finally:
            lm.model.base_model.set_adapter([REFERENCE_ADAPTER, POLICY_ADAPTER])
            for (_, p), (_, requires_grad) in zip(lm.model.named_parameters(), frozen, strict=True):
                p.requires_grad_(requires_grad)
    else:
        yield


def save_policy_adapter(lm: CausalLM, folder: Path) -> None:
    """Writes the trained adapter in peft's own format: adapter_config.json and adapter_model.safetensors."""
    lm.model.save_pretrained(str(folder), selected_adapters=[POLICY_ADAPTER], safe_serialization=True)
    (folder / "README.md").unlink(missing_ok=True)  # peft's model card is an empty form; run.json tells more


# --------------------------------------------------------------------------- running


def set_mode(lm: CausalLM, *, training: bool) -> None:
    """Puts every module in the mode that both phases use; with `training`, only what must differ differs.

    - Everything in eval(), so that no dropout of the base and no router noise separates policy and reference.
    - bitsandbytes' layers in train(), in both phases: in eval() LLM.int8() on a CPU quantises activations too and its
      numbers depend on what else is in the batch; NF4 repacks its weights for good and then loses gradients.
    - With `training`: dropout of the trained adapter, and the flag that checkpointed layers look at.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    lm.model.eval()
    for name, module in lm.model.named_modules():
        checkpointed = training and isinstance(module, GradientCheckpointingLayer)
        if checkpointed or type(module).__module__.startswith("bitsandbytes.nn"):
            module.training = True
        elif training and name.endswith(f".lora_dropout.{POLICY_ADAPTER}"):
            module.train()


def register_attention() -> None:
    """Makes the shared-prompt attention known to transformers; more than once does no harm."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(SHARED_PROMPT, shared_prompt_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(SHARED_PROMPT, no_mask)


def use_layout(lm: CausalLM, layout: Layout, reason: str = "") -> None:
    """Switches the attention between the shared-prompt one and transformers' own."""
    lm.layout, lm.layout_reason = layout, reason
    lm.base.set_attn_implementation(SHARED_PROMPT if layout == "shared" else lm.native_attention)


def enable_gradient_checkpointing(lm: CausalLM) -> None:
    """Recomputes each decoder layer in the backward pass.

    bitsandbytes' int8 layers keep their input where saved-tensor hooks do not see it, so the non-reentrant kind would
    hold every layer's input; the re-entrant kind runs the forward without a graph and so holds none of them.
    """
    reentrant = lm.quantization == "8bit"
    lm.base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        lm.base.enable_input_require_grads()


def library_versions() -> dict[str, str]:
    """Versions of all that computes a number."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for name in ("dpoeng", "torch", "transformers", "peft", "bitsandbytes", "tokenizers", "triton", "pyarrow"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    versions["torch"] = torch.__version__
    return versions


def device_name(device: torch.device) -> str:
    """The device in words, for records."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    import platform

    return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"


def lr_schedule(name: str, optimizer: torch.optim.Optimizer, warmup_steps: int, total_steps: int) -> Any:
    """transformers' learning-rate schedule of that name."""
    from transformers import get_scheduler

    return get_scheduler(name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=total_steps)
