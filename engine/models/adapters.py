"""LoRA adapters on a loaded base: the reference's frozen one, and the trained one. Imports peft."""

from __future__ import annotations

import contextlib
import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from dpoeng.cache.errors import UserError
from dpoeng.cache.words import counted
from dpoeng.engine.config.fields import Mode, TrainConfig
from dpoeng.engine.models.checkpoint_names import as_peft_reads, in_towers, save_for_whole
from dpoeng.engine.models.experts.forward import use_stack_product
from dpoeng.engine.models.experts.targets import beside_experts
from dpoeng.engine.models.full_finetuning import train_all
from dpoeng.engine.models.lora_fields import start_changes_base
from dpoeng.engine.models.lora_product import use_lora_product
from dpoeng.engine.models.model import POLICY_ADAPTER, CausalLM
from dpoeng.engine.models.sources import ModelSource, read_adapter_fields
from dpoeng.engine.models.trunk.layers import (
    check_trained_layers,
    chosen_layers,
    layer_list,
    limit_to_layers,
    names_layers,
)

AdapterMode = Literal["new", "stack", "continue"]
"""Modes that train an adapter; `full` trains all weights (`engine/models/full_finetuning`)."""

REFERENCE_ADAPTER = "reference"

_PATTERNS_OF_STACKS = "The following (rank|alpha)_pattern keys did not match"
"""peft's warning about ranks that it set itself for experts that transformers stacks: these are not modules."""


def load_reference_adapter(lm: CausalLM, adapter: ModelSource) -> CausalLM:
    """base + frozen adapter: the SFT model whose log-probs are cached."""
    lm.model = _peft_from_pretrained(lm, adapter, REFERENCE_ADAPTER, trainable=False)
    use_lora_product(lm.model)
    return lm


def lora_arguments(config: TrainConfig) -> dict[str, Any]:
    """The arguments of peft's LoraConfig."""
    targets = list(config.lora_target_modules)
    return {
        "r": config.lora_r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": targets[0] if targets == ["all-linear"] else targets,
        "target_parameters": list(config.lora_target_parameters) or None,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "init_lora_weights": config.init_lora_weights,
    }


def make_trainable(lm: CausalLM, config: TrainConfig, mode: Mode, adapter: ModelSource | None = None) -> CausalLM:
    """Turns a loaded base into the policy that `config` trains; arguments and errors as in `add_policy_adapter`."""
    if mode == "full":
        return train_all(lm)
    layers = (
        chosen_layers(config, len(layer_list(lm.backbone)[1])) if mode != "continue" and names_layers(config) else None
    )
    return add_policy_adapter(lm, mode, adapter, lora_arguments(config), layers)


def add_policy_adapter(
    lm: CausalLM,
    mode: AdapterMode,
    adapter: ModelSource | None,
    lora: dict[str, Any],
    layers: Sequence[int] | None = None,
) -> CausalLM:
    """Makes the policy trainable.

    Args:
        lm: the base, without adapters.
        mode: `new`, a fresh LoRA on the base; `stack`, a fresh LoRA on base + frozen `adapter`, unmerged; `continue`,
            `adapter` itself, trained further.
        adapter: the SFT adapter for `stack` and `continue`.
        lora: arguments of peft's LoraConfig; `continue` uses only their `lora_dropout`.
        layers: decoder layers that get a fresh LoRA, counted from 0; None for all.

    Raises:
        UserError: a target matches nothing, or the adapter does not fit the base.
    """
    _check_over_stored(lm, "the new LoRA", lora if mode != "continue" else {})
    if mode == "continue":
        assert adapter is not None, "mode continue needs an adapter"
        lm.model = _peft_from_pretrained(lm, adapter, POLICY_ADAPTER, trainable=True)
        _set_dropout(lm, float(lora.get("lora_dropout", 0.0)))
    else:
        _add_new_adapter(lm, adapter if mode == "stack" else None, lora, layers)
        if layers is not None:
            check_trained_layers(lm, layers)
    # Adapters are float32 even over a half-precision base: 8-bit Adam and bf16 rounding can lose small updates.
    for _, parameter in lm.trainable_parameters():
        parameter.data = parameter.data.float()
    use_lora_product(lm.model)
    return lm


def _add_new_adapter(
    lm: CausalLM, below: ModelSource | None, lora: dict[str, Any], layers: Sequence[int] | None
) -> None:
    """Adds a fresh LoRA to the base, or to the base with a frozen adapter `below` it.

    Raises:
        UserError: a target matches nothing, or peft refuses it.
    """
    from peft import LoraConfig, get_peft_model

    names = linear_names(lm.base)
    refused = [name for name in names if _mamba_refuses(lm.base, name) or name in _linear_in_name(lm.base)]
    arguments = {"task_type": "CAUSAL_LM", **lora}
    if refused and lora.get("target_modules") == "all-linear":
        arguments["exclude_modules"] = refused
        lm.remarks += (f"all-linear leaves out {', '.join(refused)}: peft's LoRA does not fit this kind of layer",)
    linear = [name for name in names if name not in refused]
    if lora.get("target_modules") == "all-linear":
        beside, remark = beside_experts(lm.base, linear)
        if beside:
            linear = beside
            arguments |= {"target_modules": beside} if layers is None else {}
            lm.remarks += (remark,)
    if layers is not None:
        arguments.pop("exclude_modules", None)
        arguments = limit_to_layers(arguments, lm, layers, linear)
    config = LoraConfig(**arguments)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=_PATTERNS_OF_STACKS)
            warnings.filterwarnings("ignore", message="target_parameters=.* no parameter was matched")  # told below
            if below is None:
                lm.model = get_peft_model(lm.base, config, adapter_name=POLICY_ADAPTER)
            else:
                # Its layers draw random numbers before they are loaded, and fewer if some are below a trunk. Without
                # this the new adapter on some of the layers would start differently.
                with torch.random.fork_rng(enabled=layers is not None):
                    lm.model = _peft_from_pretrained(lm, below, REFERENCE_ADAPTER, trainable=False)
                lm.model.add_adapter(POLICY_ADAPTER, config)
                lm.model.base_model.set_adapter([REFERENCE_ADAPTER, POLICY_ADAPTER])
                for name, parameter in lm.model.named_parameters():
                    if POLICY_ADAPTER not in name.split("."):  # SFT may have trained biases, embeddings, tokens
                        parameter.requires_grad_(False)
    except ValueError as error:
        if "bias" in str(error) and below is not None:
            raise UserError(
                "peft cannot add a second adapter to one with trained biases",
                code="adapter-mode",
                where="--adapter-mode stack",
                expected="an SFT adapter with bias none",
                found=str(error).splitlines()[0],
                remedy="use --adapter-mode continue, or merge the SFT adapter into the base first",
            ) from error
        if "arget" not in str(error):
            raise
        raise _no_target(lora, names, str(error).splitlines()[0]) from error
    _check_targets(lm, lora, names)


def _check_targets(lm: CausalLM, lora: Mapping[str, Any], names: list[str]) -> None:
    """Checks that all targets exist that the user named; remarks on those that peft added to `all-linear`.

    Raises:
        UserError: some match nothing.
    """
    named = lora.get("target_modules") != "all-linear"
    missed = _unmatched(lm.model, named=named)
    if missed and not named and not lora.get("target_parameters"):
        # By the architecture's name; a checkpoint may have dense layers alone.
        lm.remarks += (f"all-linear leaves out {', '.join(missed)}: peft expects stacks of experts under these names",)
    elif missed:
        raise _no_target(lora, names, f"nothing is named {', '.join(missed)}")


def _check_over_stored(lm: CausalLM, name: str, fields: Mapping[str, Any]) -> None:
    """Refuses LoRAs that read or change the base's weights if these are quantised codes.

    Raises:
        UserError: names the setting.
    """
    found = "use_dora" if fields.get("use_dora") else "init_lora_weights" if start_changes_base(fields) else None
    if lm.quantization == "stored" and found is not None:
        raise UserError(
            "this LoRA starts from the base's weights, which are quantised codes here",
            code="adapter-mode",
            where=f"{name}, {found}",
            expected="a plain LoRA over a base that is quantised in its files",
            found=f"{found} {fields[found]}",
            remedy="train a plain LoRA, or name the full-precision checkpoint with --model",
        )


def _no_target(lora: Mapping[str, Any], names: list[str], why: str) -> UserError:
    return UserError(
        "some of the LoRA's targets are missing in this model, or peft cannot adapt them",
        code="lora-no-target",
        where="--lora-target-modules and --lora-target-parameters",
        expected="all-linear, or some of: " + ", ".join(names),
        found=f"{lora.get('target_modules')} {lora.get('target_parameters') or ''}: {why}",
        remedy="name modules or parameters of this model",
    )


@torch.no_grad()
def _linear_in_name(base: nn.Module) -> set[str]:
    """Last names of modules that inherit from linear layers but return something else, such as Llama 4's router."""
    odd_names: set[str] = set()
    for name, module in base.named_modules():
        if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward:
            continue
        last = name.rsplit(".", 1)[-1]
        if last not in odd_names and not type(module).__module__.startswith("bitsandbytes"):
            try:
                output = module(module.weight.new_zeros(1, module.in_features))
            except (RuntimeError, ValueError, TypeError, IndexError):
                output = None  # it needs other inputs, such as DeepSeek V4's grouped layers
            odd_names |= set() if isinstance(output, torch.Tensor) else {last}
    return odd_names


def _mamba_refuses(base: Any, name: str) -> bool:
    """Whether peft refuses LoRA on modules with this name here: Mamba's kernels read their weights directly."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba

    try:
        _check_lora_target_modules_mamba(LoraConfig(), base, name)
    except ValueError:
        return True
    return False


def _unmatched(model: Any, *, named: bool) -> list[str]:
    """The new adapter's targets that match nothing; peft itself accepts targets if one of them matches.

    Modules count only if the user `named` them.

    Names of experts that transformers keeps as stacked parameters are excluded: peft has turned these into
    `target_parameters`.
    """
    config = model.peft_config[POLICY_ADAPTER]
    modules = config.target_modules if named and not isinstance(config.target_modules, str) else ()
    wanted = [
        *((target, model.base_model.targeted_module_names) for target in modules or ()),
        *((target, model.base_model.targeted_parameter_names) for target in config.target_parameters or ()),
    ]
    return sorted(t for t, candidates in wanted if not any(name == t or name.endswith(f".{t}") for name in candidates))


def _set_dropout(lm: CausalLM, probability: float) -> None:
    """Replaces the dropout that SFT trained the adapter with: DPO's dropout is this run's own setting.

    With SFT's dropout the first policy would differ from the reference by noise, and the first loss from ln 2.
    """
    for module in lm.model.modules():
        dropouts = getattr(module, "lora_dropout", None)
        if isinstance(dropouts, nn.ModuleDict) and POLICY_ADAPTER in dropouts:
            dropouts[POLICY_ADAPTER] = nn.Dropout(probability) if probability > 0 else nn.Identity()


def _peft_from_pretrained(lm: CausalLM, adapter: ModelSource, name: str, *, trainable: bool) -> Any:
    from peft import PeftModel

    _check_over_stored(lm, adapter.name, read_adapter_fields(adapter))
    with _fitting(adapter), warnings.catch_warnings(), as_peft_reads(adapter, lm.base) as renamed:
        warnings.filterwarnings("ignore", message="Found missing adapter keys")  # refused below, with a remedy
        warnings.filterwarnings("ignore", message=_PATTERNS_OF_STACKS)
        model = PeftModel.from_pretrained(
            lm.base, str(renamed.folder), adapter_name=name, is_trainable=trainable, torch_device=str(lm.device)
        )
        _check_weights(model, renamed, name)
    if beside := in_towers(adapter, lm.base):
        lm.carried = beside if trainable else {}
        count, told = counted(len(beside), "tensor"), "are saved as they are" if trainable else "are not loaded"
        lm.remarks += (f"{count} of {adapter.name} for images or sound {told}: text does not use them",)
    return model


@contextlib.contextmanager
def _fitting(adapter: ModelSource) -> Iterator[None]:
    """Turns peft's error about a mismatched adapter into a message for the user."""
    try:
        yield
    except (ValueError, RuntimeError, KeyError) as error:
        raise UserError(
            "the adapter does not fit this base model",
            code="adapter-mismatch",
            where=adapter.name,
            found=_line_of_interest(error),
            remedy="use the base that the adapter was trained on: base_model_name_or_path in adapter_config.json"
            + ("; if tokens were added for it, resize the base's embeddings and save it" if _is_of_size(error) else ""),
        ) from error


def _is_of_size(error: Exception) -> bool:
    return "size mismatch" in str(error)


def _line_of_interest(error: Exception) -> str:
    """The line that names the tensors: torch's first line only says that there are some."""
    lines = str(error).splitlines() or [type(error).__name__]
    return next((line.strip() for line in lines if "size mismatch" in line), lines[0])


@torch.no_grad()
def _put_in_place(model: Any, tensors: Mapping[str, torch.Tensor], name: str) -> None:
    """Sets an adapter's tensors, which have the model's own names.

    peft has done so already, except where its conversion of old names mistakes new names for old (Laguna's experts).
    """
    parameters = {_without_name(key, name): p for key, p in model.named_parameters()}
    for key, tensor in tensors.items():
        place = parameters.get(key)
        if place is not None and place.shape == tensor.shape:
            place.copy_(tensor)


def _check_weights(model: Any, adapter: ModelSource, name: str) -> None:
    """Checks that the file fits exactly: peft loads what fits and ignores the rest, such as half an adapter.

    Raises:
        ValueError: the file lacks weights of this adapter in this model, or has others.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    tensors = load_file(adapter.weight_files[0])
    wanted = set(get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False))
    whole = wanted <= set(tensors)
    if whole:
        _put_in_place(model, {key: tensors[key] for key in wanted}, name)
    adapter_weights = {_without_name(key, name) for key in tensors} if whole else _as_peft_names(model, tensors, name)
    lacking = sorted(wanted - adapter_weights)
    if lacking:
        raise ValueError(f"its file lacks {lacking[0]}" + (f" and {len(lacking) - 1} more" if lacking[1:] else ""))
    # Saved embeddings are not part of the adapter's state.
    over = sorted(key for key in adapter_weights - wanted if "lora_" in key)
    if over:
        raise ValueError(f"the base has no place for {over[0]}" + (f" and {len(over) - 1} more" if over[1:] else ""))


def _as_peft_names(model: Any, tensors: Mapping[str, torch.Tensor], name: str) -> set[str]:
    """The names under which peft loads an adapter's tensors: separately adapted experts become stacks."""
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

    loaded = convert_peft_adapter_state_dict_for_transformers(
        model=model, peft_config=model.peft_config[name], adapter_state_dict=dict(tensors), adapter_name=name
    )
    return {_without_name(key, name) for key in loaded}


def _without_name(key: str, name: str) -> str:
    """A parameter's key as an adapter's file has it, without the adapter's own name."""
    return key.replace(f".{name}.", ".").removesuffix(f".{name}")


@torch.no_grad()
def begin_with(lm: CausalLM, start: ModelSource) -> None:
    """Copies the weights of an adapter of the same shape into the adapter to train.

    Raises:
        UserError: the two adapters differ in shape or weights.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    wanted = lm.model.peft_config[POLICY_ADAPTER].to_dict()
    fields = read_adapter_fields(start)
    other = [
        f"{name} {_plain(fields.get(name))}, not {_plain(wanted.get(name))}"
        for name in _SHAPE
        if _plain(fields.get(name)) != _plain(wanted.get(name))
    ]
    with as_peft_reads(start, lm.base) as read:
        tensors = load_file(read.weight_files[0])
    own = get_peft_model_state_dict(lm.model, adapter_name=POLICY_ADAPTER, save_embedding_layers=False)
    sizes = {name: tensor.shape for name, tensor in tensors.items()}
    if not other and sizes != {name: tensor.shape for name, tensor in own.items()}:
        odd = sorted(name for name in {*sizes, *own} if name not in own or sizes.get(name) != own[name].shape)
        other = [f"other weights, among them {odd[0]}"]
    if other:
        raise UserError(
            "the policy cannot start from this adapter: it has another shape",
            code="adapter-mismatch",
            where=f"--init-adapter {start.name}",
            expected="an adapter of the trained one's shape",
            found="; ".join(other),
            remedy="use the LoRA settings and --adapter-mode of that adapter's training",
        )
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


_SHAPE = "r lora_alpha use_rslora use_dora bias target_modules target_parameters rank_pattern alpha_pattern".split()


def _plain(value: Any) -> Any:
    """A field of peft's config as in JSON: sets sorted, and empty values as None."""
    return sorted(value) if isinstance(value, set | frozenset | list) and value else value or None


def linear_names(base: nn.Module) -> list[str]:
    """Distinct last names of linear layers without the head: possible LoRA targets."""
    head = getattr(base, "get_output_embeddings", lambda: None)()
    return sorted(
        {name.rsplit(".", 1)[-1] for name, m in base.named_modules() if isinstance(m, nn.Linear) and m is not head}
    )


@contextlib.contextmanager
def as_reference(lm: CausalLM, mode: Mode) -> Iterator[None]:
    """Makes the untrained policy act as the reference: without its new adapter, or as it is (`continue`, `full`)."""
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


def stands_alone(adapter: ModelSource) -> bool:
    """Whether no second adapter can be loaded next to it: it changed the base, or trained the base's biases."""
    fields = read_adapter_fields(adapter)
    return start_changes_base(fields) or fields.get("bias", "none") != "none"


def load_trained_adapter(
    lm: CausalLM, mode: AdapterMode, trained: ModelSource, reference: ModelSource | None
) -> CausalLM:
    """The base with a finished adapter, as in training, and the reference's adapter next to or below it.

    Raises:
        UserError: an adapter does not fit the base.
    """
    if reference is None:
        lm.model = _peft_from_pretrained(lm, trained, POLICY_ADAPTER, trainable=False)
        use_stack_product(lm.model)
        return lm
    lm.model = _peft_from_pretrained(lm, reference, REFERENCE_ADAPTER, trainable=False)
    with _fitting(trained), as_peft_reads(trained, lm.base) as renamed:
        lm.model.load_adapter(str(renamed.folder), adapter_name=POLICY_ADAPTER, torch_device=str(lm.device))
        _check_weights(lm.model, renamed, POLICY_ADAPTER)
    lm.model.base_model.set_adapter([REFERENCE_ADAPTER, POLICY_ADAPTER] if mode == "stack" else POLICY_ADAPTER)
    use_stack_product(lm.model)
    return lm


@contextlib.contextmanager
def before_training(lm: CausalLM) -> Iterator[None]:
    """Makes a model from `load_trained_adapter` act as the reference: the base, with the reference's adapter if any."""
    if REFERENCE_ADAPTER not in lm.model.peft_config:
        with lm.model.disable_adapter():
            yield
        return
    active = list(lm.model.base_model.active_adapters)
    lm.model.base_model.set_adapter(REFERENCE_ADAPTER)
    try:
        yield
    finally:
        lm.model.base_model.set_adapter(active)


def check_savable(lm: CausalLM) -> None:
    """Saves the untrained adapter once to a temporary folder, so that an error appears now, not at the end.

    Adds a remark if plain peft does not load what it saves.

    Raises:
        UserError: peft cannot save it.
    """
    from safetensors import SafetensorError

    with tempfile.TemporaryDirectory() as folder:
        try:
            save_policy_adapter(lm, Path(folder))
        except (OSError, SafetensorError):
            return  # a full disk, not the adapter: the real save reports it for the user's folder
        except Exception as error:
            raise UserError(
                "peft cannot save this adapter",
                code="adapter-unsavable",
                where="the untrained adapter, saved before the first step",
                expected="adapter_config.json and adapter_model.safetensors, as peft writes them",
                found=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
                remedy="use --adapter-mode continue instead of stack, or merge the SFT adapter into the base first",
            ) from error
    lost, count = _lost_by_peft(lm)
    if lost:
        lm.remarks += (
            f"plain peft loads {lost} of the {counted(count, 'tensor')} of the trained adapter under wrong names and "
            "ignores them; dpoeng loads all: serve the model that `dpoeng merge` writes, not the adapter",
        )


def _lost_by_peft(lm: CausalLM) -> tuple[int, int]:
    """How many of the adapter's tensors peft loads under names that the model lacks, and how many it has.

    peft renames what older versions saved, and takes some newer names for older ones (Laguna's experts).
    """
    from peft import get_peft_model_state_dict

    saved = get_peft_model_state_dict(lm.model, adapter_name=POLICY_ADAPTER, save_embedding_layers=False)
    tensors = {key: tensor.detach() for key, tensor in saved.items()}
    return len(saved.keys() - _as_peft_names(lm.model, tensors, POLICY_ADAPTER)), len(saved)


def save_policy_adapter(lm: CausalLM, folder: Path) -> None:
    """Writes the trained adapter in peft's format: adapter_config.json and adapter_model.safetensors."""
    lm.model.save_pretrained(str(folder), selected_adapters=[POLICY_ADAPTER], safe_serialization=True)
    _sort_sets(folder / "adapter_config.json", lm.model.peft_config[POLICY_ADAPTER])
    if lm.source is not None:
        save_for_whole(lm.source, lm.base, folder, lm.carried)
    (folder / "README.md").unlink(missing_ok=True)  # peft's model card is an empty form; run.json contains more


def _sort_sets(file: Path, config: Any) -> None:
    """Sorts the sets in a saved peft config: peft writes them in an order that depends on the hash seed."""
    fields = json.loads(file.read_text(encoding="utf-8"))
    fields.update({name: sorted(fields[name]) for name in fields if isinstance(getattr(config, name, None), set)})
    file.write_text(json.dumps(fields, indent=2, sort_keys=True), encoding="utf-8")
