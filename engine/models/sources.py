"""Finds models and adapters by name: their files, and which of their settings change a log-prob.

Reads names and JSON; loads no weights.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yaml import YAMLError

from dpoeng.cache.errors import UserError
from dpoeng.engine.models.foreign.checkpoints import (
    check_adapter_ranges,
    check_headers,
    check_pattern,
    check_sizes,
    shard_files,
)
from dpoeng.engine.models.lora_fields import check_lora_fields
from dpoeng.engine.models.stored.formats import Format, NotWidenedError, format_of

MAX_JSON_BYTES = 64 << 20  # an index of 100,000 tensors takes 10 MB

# Fields of config.json that name things or control generation, and do not change a log-prob.
_INERT_CONFIG_FIELDS = frozenset(
    """_name_or_path architectures attn_implementation auto_map bos_token_id dtype eos_token_id id2label
    initializer_range label2id output_attentions output_hidden_states pad_token_id problem_type return_dict
    return_dict_in_generate torch_dtype transformers_version transformers.js_config unsloth_fixed unsloth_version
    use_cache""".split()
)
# Fields of adapter_config.json that do change one.
_ADAPTER_FIELDS = (
    "peft_type r lora_alpha use_rslora use_dora target_modules target_parameters rank_pattern alpha_pattern bias "
    "lora_bias fan_in_fan_out modules_to_save layers_to_transform layers_pattern layer_replication exclude_modules "
    "trainable_token_indices use_qalora qalora_group_size use_bdlora kasa_config velora_config alora_invocation_tokens "
    "arrow_config"
).split()


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model's files. `name` is the user's; `revision` is the hub commit, if it came from the hub."""

    name: str
    folder: Path
    weight_files: tuple[Path, ...]
    gguf: bool = False
    revision: str | None = None


def find_model(name: str, *, revision: str | None = None) -> ModelSource:
    """Finds the files of a directory, GGUF file or hub id.

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
                remedy="name the directory with config.json",
            )
        return ModelSource(name, path.parent, (path,), gguf=True)
    commit: str | None = None
    if path.is_dir():
        folder = path
    elif _is_hub_id(name):
        folder, commit = _download(name, revision, "*.safetensors")
    else:
        raise UserError(
            f"no model at {name}",
            code="model-not-found",
            where="--model",
            expected="a directory with config.json and *.safetensors, a .gguf file, or a hub id like Qwen/Qwen2.5-32B",
            found="no such file or directory",
            remedy="check the path; a relative path starts at the current folder",
        )
    return ModelSource(name, folder, _weight_files(folder), revision=commit)


def find_tokenizer(name: str) -> ModelSource:
    """Like `find_model`, for the tokenizer only: weights are not required or downloaded.

    Raises:
        UserError: nothing is there, or the hub cannot be reached.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return ModelSource(name, path, ())
    if not path.is_file() and _is_hub_id(name):
        folder, commit = _download(name, None, "tokenizer*")
        return ModelSource(name, folder, (), revision=commit)
    return find_model(name)


def find_adapter(name: str) -> ModelSource:
    """Finds the files of a peft adapter's directory or hub id."""
    path = folder = Path(name).expanduser()
    commit: str | None = None
    if not path.is_dir() and _is_hub_id(name):
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
    fields = _read_json(config)
    kind = fields.get("peft_type", "LORA")
    if kind != "LORA":
        raise UserError(
            f"{name} is not a LoRA",
            code="adapter-mismatch",
            where=str(config),
            expected="peft_type LORA, whose settings dpoeng supports",
            found=str(kind),
            remedy="merge it into the base with peft (merge_and_unload) and give the result as --model",
        )
    check_lora_fields(name, str(config), fields)
    check_adapter_ranges(str(config), fields)
    check_headers([weights])
    return ModelSource(name, folder, (weights,), revision=commit)


def read_fields(source: ModelSource) -> dict[str, Any]:
    """Reads a checkpoint's config.json."""
    return _read_json(source.folder / "config.json")


def license_of(source: ModelSource) -> str | None:
    """The licence in the model card next to a checkpoint; None if there is none."""
    from huggingface_hub import metadata_load

    card = source.folder / "README.md"
    try:
        fields = metadata_load(card) if card.is_file() else None
    except (OSError, ValueError, YAMLError):
        return None
    found = (fields or {}).get("license_name") or (fields or {}).get("license")
    return found if isinstance(found, str) and re.fullmatch(r"[\w. +-]{1,60}", found) else None


def read_adapter_fields(adapter: ModelSource) -> dict[str, Any]:
    """Reads an adapter's adapter_config.json."""
    return _read_json(adapter.folder / "adapter_config.json")


def has_stored_quantization(source: ModelSource) -> bool:
    """Whether config.json says that the checkpoint's weights are quantised."""
    return bool(_quantization_record(source))


def _quantization_record(source: ModelSource) -> dict[str, Any] | None:
    file = source.folder / "config.json"
    return quantization_record({} if source.gguf or not file.is_file() else _read_json(file))


def quantization_record(fields: Mapping[str, Any]) -> dict[str, Any] | None:
    """The entry in a config.json's fields that describes the quantisation of the weights."""
    record: dict[str, Any] | None = fields.get("quantization_config")
    text = fields.get("text_config")
    return record or (text.get("quantization_config") if isinstance(text, dict) else None) or fields.get("quantization")


def stored_quantization(source: ModelSource) -> dict[str, Any] | None:
    """The quantisation of a checkpoint's files, as fields of PrecomputeConfig; None if it is not quantised.

    Raises:
        UserError: dpoeng does not support it, or config.json cannot be read.
    """
    file = source.folder / "config.json"
    record = _quantization_record(source)
    if not record:
        return None
    if record.get("quant_method") == "bitsandbytes" and record.get("load_in_8bit"):
        return {"quantization": "8bit"}
    if record.get("quant_method") == "bitsandbytes" and record.get("load_in_4bit"):
        return {
            "quantization": "4bit",
            "bnb_4bit_quant_type": record.get("bnb_4bit_quant_type", "fp4"),
            "bnb_4bit_use_double_quant": bool(record.get("bnb_4bit_use_double_quant", False)),
        }
    read_format(source.name, str(file), record)
    return {"quantization": "stored"}


def read_format(name: str, where: str, record: Mapping[str, Any]) -> Format:
    """The format of quantised weight files, from their config.json.

    Raises:
        UserError: dpoeng does not support the format.
    """
    mlx = "group_size" in record and "quant_method" not in record
    try:
        stored = format_of(record)
    except (NotWidenedError, TypeError, ValueError, AttributeError, LookupError, OverflowError) as error:
        instead = getattr(error, "instead", "")
        raise UserError(
            f"{name} is quantised by {'MLX' if mlx else record.get('quant_method', 'a method without a name')}",
            code="quantization-stored",
            where=where,
            expected="full precision, bitsandbytes in 8 or 4 bits, FP8, MXFP4, GPTQ, AWQ, or compressed-tensors",
            found=str(error),
            remedy=f"name {instead + ', or ' if instead else ''}the full-precision checkpoint; --quantization 8bit or "
            "4bit quantises it while it is loaded",
        ) from error
    for pattern in (*stored.targets, *stored.ignored):
        check_pattern(where, "quantization_config", pattern.removeprefix("re:"))
    return stored


def stored_format(source: ModelSource) -> Format:
    """The format of a checkpoint whose `stored_quantization` is `stored`."""
    record = _quantization_record(source)
    assert record is not None
    return read_format(source.name, str(source.folder / "config.json"), record)


def quantized_otherwise(source: ModelSource, field: str, stored: Any, asked: Any) -> UserError:
    """The error for a field that contradicts a quantised checkpoint's files."""
    return UserError(
        f"{source.name} is already quantised differently",
        code="quantization-stored",
        where="--" + field.replace("_", "-"),
        expected=f"{stored}, as its config.json says, or nothing",
        found=str(asked),
        remedy="leave the option out, or name the full-precision checkpoint with --model",
    )


def write_config(source: ModelSource, into: Path, dtype: str = "auto") -> None:
    """Writes `source`'s config.json to a folder, with another dtype unless that is auto."""
    fields = _read_json(source.folder / "config.json")
    if dtype != "auto":
        fields = {**{name: value for name, value in fields.items() if name != "torch_dtype"}, "dtype": dtype}
    (into / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def copy_beside(source: ModelSource, into: Path) -> None:
    """Copies files next to the weights (tokenizer, template, generation settings) that `into` does not have."""
    for file in sorted(source.folder.iterdir()):
        wanted = file.suffix in (".json", ".txt", ".model", ".jinja") and not (into / file.name).exists()
        if file.is_file() and wanted and "index" not in file.name:
            shutil.copyfile(file, into / file.name)
    more = "additional_chat_templates"
    if (source.folder / more).is_dir() and not (into / more).exists():
        shutil.copytree(source.folder / more, into / more)


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a checkpoint.

    Raises:
        UserError: it cannot be read, or is not a JSON object.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"larger than {MAX_JSON_BYTES >> 20} MiB, the limit for such a file")
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            "cannot read a file of the checkpoint",
            code="checkpoint-json",
            where=str(path),
            expected="a JSON object",
            found=str(error),
            remedy="download or save the checkpoint again",
        ) from error
    return content


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not name.startswith((".", "/"))


def _weight_files(folder: Path) -> tuple[Path, ...]:
    if not (folder / "config.json").is_file():
        nearby = sorted(p.parent.name for p in folder.glob("*/config.json"))
        adapter = (folder / "adapter_config.json").is_file()
        raise UserError(
            f"{folder} contains no model",
            code="model-not-found",
            where="--model",
            expected="config.json and *.safetensors",
            found="a peft adapter"
            if adapter
            else (f"config.json in {', '.join(nearby)}" if nearby else "no config.json"),
            remedy="give the base as --model and this folder as --adapter"
            if adapter
            else "name the folder with config.json",
        )
    config = _read_json(folder / "config.json")
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{folder} contains a model and an adapter",
            code="model-ambiguous",
            where=str(folder / "adapter_config.json"),
            expected="one of them: transformers would silently load the adapter with the model",
            remedy="move adapter_config.json and its weights to a separate folder, and pass that as --adapter",
        )
    if config.get("transformers_weights"):
        raise UserError(
            f"{folder / 'config.json'} names its own weight file",
            code="model-ambiguous",
            where="transformers_weights",
            expected="model.safetensors, or model.safetensors.index.json with its shards",
            found=str(config["transformers_weights"]),
            remedy="load it with transformers and save_pretrained() into a new folder",
        )
    if (folder / "model.safetensors").is_file():  # before the index, in the order of transformers
        return _checked(folder, config, [folder / "model.safetensors"])
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = shard_files(folder, index, _read_json(index))
        missing = [f.name for f in files if not f.is_file()]
        if missing:
            raise UserError(
                f"{len(missing)} of {len(files)} weight files are missing",
                code="model-incomplete",
                where=str(folder),
                expected=", ".join(missing[:3]),
                remedy="download the checkpoint again",
            )
        return _checked(folder, config, files)
    pickles = sorted(p.name for p in folder.glob("*.bin"))
    raise UserError(
        f"{folder} contains no safetensors weights",
        code="model-no-safetensors",
        where="--model",
        expected="model.safetensors, or model.safetensors.index.json with its shards",
        found=", ".join(pickles[:3]) or "no weight files",
        remedy="convert it: AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder); dpoeng reads no "
        "pickles, since loading one can run code",
    )


def _checked(folder: Path, config: Mapping[str, Any], files: Sequence[Path]) -> tuple[Path, ...]:
    """The weight files, after checks that their claims and those of config.json are in range."""
    check_headers(files)
    check_sizes(folder / "config.json", config, sum(file.stat().st_size for file in files))
    return tuple(files)


def _download(name: str, revision: str | None, weights: str) -> tuple[Path, str | None]:
    from huggingface_hub import snapshot_download

    patterns = [weights, "*.json", "*.txt", "*.model", "*.jinja", "README.md"]
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:
        raise UserError(
            f"the hub has no {name}, or cannot be reached",
            code="model-not-found",
            where="--model",
            expected="a local directory, a .gguf file, or a hub id",
            found=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            remedy="check the name and the network (gated models need HF_TOKEN), or give a local directory",
        ) from error
    return folder, folder.name


def forward_config(source: ModelSource) -> dict[str, Any]:
    """The fields of the model's configuration that can change a log-prob, as stored on disk.

    They come from config.json, not from the loaded object, which gets new default fields with every release of
    transformers and would invalidate old caches.
    """
    if source.gguf:
        # A GGUF file contains all settings of the forward, and its bytes are hashed.
        return {"format": "gguf"}
    raw = _read_json(source.folder / "config.json")
    return {k: v for k, v in sorted(raw.items()) if k not in _INERT_CONFIG_FIELDS}


def adapter_config(source: ModelSource) -> dict[str, Any]:
    """The fields of adapter_config.json that change a log-prob (such as `lora_alpha`)."""
    raw = _read_json(source.folder / "adapter_config.json")
    selected = {k: raw[k] for k in _ADAPTER_FIELDS if raw.get(k) not in (None, [], {}, False)}
    start = raw.get("init_lora_weights")
    if isinstance(start, str) and start not in ("gaussian", "orthogonal"):
        selected["init_lora_weights"] = start  # PiSSA, OLoRA and similar starts change the base at every load
    if isinstance(selected.get("target_modules"), list):
        selected["target_modules"] = sorted(selected["target_modules"])
    return selected
