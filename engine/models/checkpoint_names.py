"""Converts names of weights between three forms: on disk, in memory, and in an adapter.

They differ for the text part of a multimodal checkpoint, for experts that are stacked on loading, and for layers
renamed in a newer release. Knows names; the only tensors it reads are those of an adapter to rename.
"""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dpoeng.cache.errors import UserError
from dpoeng.engine.models.fsdp_loading import empty_model_of
from dpoeng.engine.models.model_config import auto_class_of, text_config
from dpoeng.engine.models.multimodal.towers import left_out, linear_left_out, towers_of
from dpoeng.engine.models.sources import ModelSource
from dpoeng.engine.models.trunk.stand_ins import stood_for

PREFIX = "base_model.model."
"""peft's prefix of every name."""

_MODULE = re.compile(
    r"^(.*?)\.(lora_\w+|base_layer|modules_to_save|token_adapter|trainable_tokens_delta|weight|bias)(\.|$)"
)
_TAIL = re.compile(r"(^|\.)((?:layers|h|blocks|block)\.\d+\..*)$")
_ENDS = re.compile(r"(^|\.)(lm_head|embed_tokens|embed_in|embed_out|wte)$")
_OTHER_TOWERS = re.compile(r"(^|\.)(vision\w*|visual|image\w*|audio\w*|\w*projector|encoder)\.")


@dataclass(frozen=True, slots=True)
class StoredNames:
    """How names in a checkpoint's files relate to those of the loaded model.

    Attributes:
        model: the model, without weights.
        in_memory: name on disk -> name in the model; only for weights that the model has.
        converted: names in memory of weights made from several on disk, or changed in another way.
    """

    model: Any
    in_memory: Mapping[str, str]
    converted: frozenset[str]

    def on_disk(self) -> dict[str, str]:
        """Name in memory -> name on disk, for weights that are copied unchanged."""
        return {name: stored for stored, name in self.in_memory.items() if name not in self.converted}


def stored_names(source: ModelSource) -> StoredNames:
    """The names in a checkpoint's files, and those of the model that `load_model` builds from them."""
    _, model = empty_model_of(source)
    state = model.state_dict()
    in_memory: dict[str, str] = {}
    converted: set[str] = set()
    for stored, renamed, pattern in _renamed(source, model, state):
        name = renamed if renamed in state else stored
        if name in state:
            in_memory[stored] = name
            converted |= {name} if pattern is not None else set()
    return StoredNames(model, in_memory, frozenset(converted))


def _renamed(source: ModelSource, model: Any, state: dict[str, Any]) -> Iterator[tuple[str, str, str | None]]:
    """Each name in the files, that of transformers in the model, and the pattern of its conversion if it has one."""
    from safetensors import safe_open
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    conversions = get_model_conversion_mapping(model)
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    converters = [one for one in conversions if isinstance(one, WeightConverter)]
    for file in source.weight_files:
        with safe_open(file, framework="pt") as tensors:
            for stored in tensors.keys():  # noqa: SIM118  (a safetensors file is no dictionary)
                name, pattern = rename_source_key(stored, renamings, converters, model.base_model_prefix, state)
                yield stored, name, pattern


@dataclass(frozen=True, slots=True)
class Beside:
    """Parts of a checkpoint beside its language model, which change no log-prob of a text.

    Attributes:
        tensors: names in the files.
        fields: fields of config.json that describe these parts.
    """

    tensors: frozenset[str] = frozenset()
    fields: frozenset[str] = frozenset()


def beside_language(source: ModelSource) -> Beside:
    """What a checkpoint has for images and sound; nothing if transformers cannot tell."""
    from safetensors import SafetensorError
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING as WITH_IMAGES

    if source.gguf:
        return Beside()
    try:
        config = AutoConfig.from_pretrained(source.folder)
        if text_config(config) is config or type(config) not in WITH_IMAGES:
            return Beside()
        _, model = empty_model_of(source, WITH_IMAGES[type(config)])
        towers = tuple(f"{name}." for name in towers_of(model))
        names = list(_renamed(source, model, model.state_dict()))
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, TypeError, AttributeError, SafetensorError):
        return Beside()  # hashing or loading, which follow, report the error
    parts = (name for name in config.sub_configs if getattr(config, name, None) is not text_config(config))
    return Beside(
        frozenset(stored for stored, name, _ in names if name.startswith(towers)), frozenset(parts if towers else ())
    )


def in_towers(adapter: ModelSource, base: Any) -> dict[str, torch.Tensor]:
    """An adapter's tensors in towers for images or sound, which `base` was loaded without."""
    from safetensors import safe_open

    modules, towers = _modules(base), tuple(f"{name}." for name in left_out(base))
    with safe_open(adapter.weight_files[0], "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys() if _of_tower(key, modules, towers)}  # noqa: SIM118


def _of_tower(key: str, modules: Collection[str], towers: tuple[str, ...]) -> bool:
    """Whether a tensor of an adapter belongs to a tower that is not among these modules."""
    bare = _key_in_model(key, modules).removeprefix(PREFIX)
    match = _MODULE.match(bare)
    path = match.group(1) if match else bare
    return path not in modules and (bare.startswith(towers) or _OTHER_TOWERS.search(path) is not None)


def _modules(base: Any) -> frozenset[str]:
    return frozenset(name for name, _ in base.named_modules() if ".base_layer" not in name)


@contextlib.contextmanager
def as_peft_reads(adapter: ModelSource, base: Any, *, whole: bool = False) -> Iterator[ModelSource]:
    """Yields an adapter that peft can load onto this model: the adapter itself, or a copy with renamed weights.

    Adapters carry the names of the class they were trained on, which may nest the decoder differently
    (`language_model`) or be a compiled model (`_orig_mod`). For a model that begins at a trunk, weights of missing
    layers are left out, and those in towers for images and sound (`in_towers`), unless the adapter is needed `whole`.

    Raises:
        UserError: the adapter has empty tensors, as DeepSpeed's ZeRO-3 leaves them.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(adapter.weight_files[0], "pt") as file:
        keys = list(file.keys())
        empty = [key for key in keys if 0 in file.get_slice(key).get_shape()]
    if empty:
        raise UserError(
            "the adapter contains empty tensors",
            code="adapter-mismatch",
            where=f"{adapter.name}, {empty[0]}",
            expected="the trained matrices",
            found=f"{len(empty)} of {len(keys)} tensors without a number: DeepSpeed's ZeRO-3 had divided them",
            remedy="save it with stage3_gather_16bit_weights_on_model_save, or convert with zero_to_fp32.py",
        )
    modules, towers = _modules(base), () if whole else tuple(f"{name}." for name in left_out(base))
    renamed = {key: _key_in_model(key, modules) for key in keys if whole or not _of_tower(key, modules, towers)}
    places = tuple(f".{place}" for place in stood_for(base))
    selected = {key: new for key, new in renamed.items() if not any(place in f".{new}" for place in places)}
    stored = json.loads((adapter.folder / "adapter_config.json").read_text(encoding="utf-8"))
    fields = dict(stored)
    if isinstance(targets := stored.get("target_modules"), list):
        fields["target_modules"] = [_in_model(target, modules) if "." in target else target for target in targets]
    if isinstance(excluded := stored.get("exclude_modules"), list) and towers:
        fields["exclude_modules"] = [name for name in excluded if not name.startswith(towers)]
    if selected == {key: key for key in keys} and fields == stored:
        yield adapter
        return
    with tempfile.TemporaryDirectory() as folder:
        tensors = load_file(adapter.weight_files[0])
        changed = {selected[key]: tensor for key, tensor in tensors.items() if key in selected}
        weights = Path(folder, "adapter_model.safetensors")
        save_file(changed, weights, metadata={"format": "pt"})
        Path(folder, "adapter_config.json").write_text(json.dumps(fields), encoding="utf-8")
        yield replace(adapter, folder=Path(folder), weight_files=(weights,))


def named_class(source: ModelSource, base: Any) -> Any:
    """The class that config.json names if `base` is only its text part; else None."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(source.folder)
    name = (config.architectures or [""])[0]
    is_whole = name.endswith("ForConditionalGeneration") and name != type(base).__name__
    return getattr(transformers, name, None) if is_whole else None


def class_to_load(source: ModelSource, base: Any) -> str:
    """Name of the transformers class that results trained on `base` are saved for."""
    if source.gguf:
        return "AutoModelForCausalLM"
    whole = named_class(source, base)
    return whole.__name__ if whole is not None else str(auto_class_of(source.folder).__name__)


def save_for_whole(source: ModelSource, base: Any, folder: Path, carried: Mapping[str, torch.Tensor]) -> None:
    """Renames a saved adapter for the way in which the user will load it.

    - It fits the whole model: no LoRA is expected in towers, except for the `carried` tensors, which are added.
    - The class in config.json nests the decoder differently from the trained text class: peft ignores names that it
    does
      not find, with only a warning.
    - adapter_config.json names the base as the user did (a hub id, not the snapshot's folder on this machine).
    """
    from safetensors.torch import load_file, save_file

    file, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    fields = json.loads(settings.read_text(encoding="utf-8"))
    whole = None if source.gguf else named_class(source, base)
    excluded = set(linear_left_out(base))
    if fields.get("base_model_name_or_path") == source.name and whole is None and not excluded and not carried:
        return
    fields |= {"base_model_name_or_path": source.name, "revision": source.revision}
    adapted = {match.group(1) for key in carried if (match := _MODULE.match(key.removeprefix(PREFIX)))}
    if whole is not None:
        modules = [name for name, _ in empty_model_of(source, whole)[1].named_modules()]
        tensors = {_key_in_model(k, modules): t for k, t in load_file(file).items()}
        save_file({**tensors, **carried}, file, metadata={"format": "pt"})
        targets = _targets_in(fields.get("target_modules"), modules, base)
        more = adapted if isinstance(targets, list) else ()
        fields |= {"auto_mapping": None, "target_modules": sorted({*targets, *more}) if more else targets}
    elif carried:
        save_file({**load_file(file), **carried}, file, metadata={"format": "pt"})
    if excluded - adapted and not isinstance(fields.get("exclude_modules"), str):
        fields["exclude_modules"] = sorted({*(fields.get("exclude_modules") or ()), *(excluded - adapted)})
    settings.write_text(json.dumps(fields, indent=2, sort_keys=True), encoding="utf-8")


def _targets_in(targets: Any, modules: Collection[str], base: Any) -> Any:
    """Targets with which the whole class adapts only the decoder, not a tower with equally named layers."""
    if not isinstance(targets, list):
        return targets
    module_names = [name for name, _ in base.named_modules() if ".base_layer" not in name]
    ends = tuple(f".{target}" for target in targets)
    return sorted({_in_model(name, modules) for name in module_names if f".{name}".endswith(ends)})


def _key_in_model(key: str, modules: Collection[str]) -> str:
    bare = key.replace("_orig_mod.", "").removeprefix(PREFIX)
    match = _MODULE.match(bare)
    if match is None:
        return PREFIX + bare
    path = match.group(1)
    return PREFIX + _in_model(path, modules) + bare[len(path) :]


def _in_model(path: str, modules: Collection[str]) -> str:
    """The model's name for a module that another class nests differently; unchanged if that is ambiguous."""
    tail = _TAIL.search(path) or _ENDS.search(path)
    if path in modules or tail is None or _OTHER_TOWERS.search(path):
        return path
    alike = [name for name in modules if f".{name}".endswith("." + tail.group(2)) and not _OTHER_TOWERS.search(name)]
    return alike[0] if len(alike) == 1 else path
