"""Names of weights: on disk, in memory and in an adapter are three things, and they are converted here.

A multimodal checkpoint that is loaded as its text part, experts that are stacked while they are loaded, layers that a
release has renamed: the file keeps its names. Knows names; reads no tensor but those of an adapter to be renamed.
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
"""What peft writes before every name."""

_MODULE = re.compile(
    r"^(.*?)\.(lora_\w+|base_layer|modules_to_save|token_adapter|trainable_tokens_delta|weight|bias)(\.|$)"
)
_TAIL = re.compile(r"(^|\.)((?:layers|h|blocks|block)\.\d+\..*)$")
_ENDS = re.compile(r"(^|\.)(lm_head|embed_tokens|embed_in|embed_out|wte)$")
_OTHER_TOWERS = re.compile(r"(^|\.)(vision\w*|visual|image\w*|audio\w*|\w*projector|encoder)\.")


@dataclass(frozen=True, slots=True)
class StoredNames:
    """How the names in a checkpoint's files stand to those of the loaded model.

    Attributes:
        model: the model, without weights.
        in_memory: name on disk -> the model's own; only what the model has.
        converted: names in memory of weights that are made of several on disk, or by more than a copy.
    """

    model: Any
    in_memory: Mapping[str, str]
    converted: frozenset[str]

    def on_disk(self) -> dict[str, str]:
        """Name in memory -> the one on disk, for weights that are copied as they are."""
        return {name: stored for stored, name in self.in_memory.items() if name not in self.converted}


def stored_names(source: ModelSource) -> StoredNames:
    """The names in a checkpoint's files, and those of the model that `load_model` makes of them."""
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


@contextlib.contextmanager
def as_peft_reads(adapter: ModelSource, base: Any) -> Iterator[ModelSource]:
    """An adapter as peft can load it onto this model: itself, or a copy with its names changed.

    Adapters carry the names of the class they were made on, which may hold the decoder elsewhere (`language_model`),
    and of a compiled model (`_orig_mod`). Of a model that begins at a trunk, what lies in layers that are not there is
    left out.

    Raises:
        UserError: the adapter holds empty tensors, as DeepSpeed's ZeRO-3 leaves them.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(adapter.weight_files[0], "pt") as file:
        keys = list(file.keys())
        empty = [key for key in keys if 0 in file.get_slice(key).get_shape()]
    if empty:
        raise UserError(
            "the adapter holds empty tensors",
            code="adapter-mismatch",
            where=f"{adapter.name}, {empty[0]}",
            expected="the trained matrices",
            found=f"{len(empty)} of {len(keys)} tensors without a number: DeepSpeed's ZeRO-3 had divided them",
            remedy="save it with stage3_gather_16bit_weights_on_model_save, or convert with zero_to_fp32.py",
        )
    modules = [name for name, _ in base.named_modules() if ".base_layer" not in name]
    renamed = {key: _key_in_model(key, modules) for key in keys}
    places = tuple(f".{place}" for place in stood_for(base))
    kept = {key: new for key, new in renamed.items() if not any(place in f".{new}" for place in places)}
    fields = json.loads((adapter.folder / "adapter_config.json").read_text(encoding="utf-8"))
    targets = fields.get("target_modules")
    if isinstance(targets, list):
        fields["target_modules"] = [_in_model(target, modules) if "." in target else target for target in targets]
    if kept == {key: key for key in keys} and fields.get("target_modules") == targets:
        yield adapter
        return
    with tempfile.TemporaryDirectory() as folder:
        tensors = load_file(adapter.weight_files[0])
        changed = {kept[key]: tensor for key, tensor in tensors.items() if key in kept}
        weights = Path(folder, "adapter_model.safetensors")
        save_file(changed, weights, metadata={"format": "pt"})
        Path(folder, "adapter_config.json").write_text(json.dumps(fields), encoding="utf-8")
        yield replace(adapter, folder=Path(folder), weight_files=(weights,))


def named_class(source: ModelSource, base: Any) -> Any:
    """The class that config.json names, where it is the whole of which `base` is the text part; else None."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(source.folder)
    name = (config.architectures or [""])[0]
    is_whole = name.endswith("ForConditionalGeneration") and name != type(base).__name__
    return getattr(transformers, name, None) if is_whole else None


def class_to_load(source: ModelSource, base: Any) -> str:
    """The name of the class of transformers that what is trained on `base` is saved for."""
    if source.gguf:
        return "AutoModelForCausalLM"
    whole = named_class(source, base)
    return whole.__name__ if whole is not None else str(auto_class_of(source.folder).__name__)


def save_for_whole(source: ModelSource, base: Any, folder: Path) -> None:
    """Gives a saved adapter the names and the base that the user's own loading of it asks for.

    - The class that config.json names keeps the decoder elsewhere than the text class that was trained: peft takes
      names that it does not find for none at all, and only warns.
    - What was named (a hub id, not the snapshot's folder on this machine) is what adapter_config.json names.
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
    """Targets by which the whole class adapts the decoder alone, and no tower that has layers of these names."""
    if not isinstance(targets, list):
        return targets
    own = [name for name, _ in base.named_modules() if ".base_layer" not in name]
    ends = tuple(f".{target}" for target in targets)
    return sorted({_in_model(name, modules) for name in own if f".{name}".endswith(ends)})


def _key_in_model(key: str, modules: Collection[str]) -> str:
    bare = key.replace("_orig_mod.", "").removeprefix(PREFIX)
    found = _MODULE.match(bare)
    if found is None:
        return PREFIX + bare
    path = found.group(1)
    return PREFIX + _in_model(path, modules) + bare[len(path) :]


def _in_model(path: str, modules: Collection[str]) -> str:
    """The model's own name of a module that another class keeps elsewhere; the name itself where that is not plain."""
    tail = _TAIL.search(path) or _ENDS.search(path)
    if path in modules or tail is None or _OTHER_TOWERS.search(path):
        return path
    alike = [name for name in modules if f".{name}".endswith("." + tail.group(2)) and not _OTHER_TOWERS.search(name)]
    return alike[0] if len(alike) == 1 else path
