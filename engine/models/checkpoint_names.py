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

from dpoeng.cache.errors import UserError
from dpoeng.engine.models.fsdp_loading import empty_model_of
from dpoeng.engine.models.model_config import auto_class_of
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
    from safetensors import safe_open
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    _, model = empty_model_of(source)
    state = model.state_dict()
    conversions = get_model_conversion_mapping(model)
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    converters = [one for one in conversions if isinstance(one, WeightConverter)]
    in_memory: dict[str, str] = {}
    converted: set[str] = set()
    for file in source.weight_files:
        with safe_open(file, framework="pt") as tensors:
            for stored in tensors.keys():  # noqa: SIM118  (a safetensors file is no dictionary)
                name, pattern = rename_source_key(stored, renamings, converters, model.base_model_prefix, state)
                name = name if name in state else stored
                if name in state:
                    in_memory[stored] = name
                    converted |= {name} if pattern is not None else set()
    return StoredNames(model, in_memory, frozenset(converted))


def of_other_tower(name: str) -> bool:
    """Whether a module is part of a tower for images or sound, by its name."""
    return _OTHER_TOWERS.search(name) is not None


@contextlib.contextmanager
def as_peft_reads(adapter: ModelSource, base: Any) -> Iterator[ModelSource]:
    """Yields an adapter that peft can load onto this model: the adapter itself, or a copy with renamed weights.

    Adapters carry the names of the class they were trained on, which may nest the decoder differently
    (`language_model`) or be a compiled model (`_orig_mod`). For a model that begins at a trunk, weights of missing
    layers are left out.

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
    modules = [name for name, _ in base.named_modules() if ".base_layer" not in name]
    renamed = {key: _key_in_model(key, modules) for key in keys}
    places = tuple(f".{place}" for place in stood_for(base))
    selected = {key: new for key, new in renamed.items() if not any(place in f".{new}" for place in places)}
    fields = json.loads((adapter.folder / "adapter_config.json").read_text(encoding="utf-8"))
    targets = fields.get("target_modules")
    if isinstance(targets, list):
        fields["target_modules"] = [_in_model(target, modules) if "." in target else target for target in targets]
    if selected == {key: key for key in keys} and fields.get("target_modules") == targets:
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


def save_for_whole(source: ModelSource, base: Any, folder: Path) -> None:
    """Renames a saved adapter for the way in which the user will load it.

    - The class in config.json nests the decoder differently from the trained text class: peft ignores names that it
    does
      not find, with only a warning.
    - adapter_config.json names the base as the user did (a hub id, not the snapshot's folder on this machine).
    """
    from safetensors.torch import load_file, save_file

    file, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    fields = json.loads(settings.read_text(encoding="utf-8"))
    whole = None if source.gguf else named_class(source, base)
    if fields.get("base_model_name_or_path") == source.name and whole is None:
        return
    fields |= {"base_model_name_or_path": source.name, "revision": source.revision}
    if whole is not None:
        modules = [name for name, _ in empty_model_of(source, whole)[1].named_modules()]
        save_file({_key_in_model(k, modules): t for k, t in load_file(file).items()}, file, metadata={"format": "pt"})
        fields |= {"auto_mapping": None, "target_modules": _targets_in(fields.get("target_modules"), modules, base)}
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
