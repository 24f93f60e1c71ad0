"""Converts another trainer's script or configuration to a dpoeng.yaml, and explains why it failed there.

Reads TRL scripts, a DPOConfig in JSON or YAML, and DPO configurations of Axolotl and LLaMA-Factory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dpoeng.cache.errors import UserError
from dpoeng.engine.config.fields import COMMANDS, known_fields
from dpoeng.engine.config.files import load_yaml
from dpoeng.engine.config.other_trainers import meaning
from dpoeng.engine.config.problems import Entry, value_problems
from dpoeng.engine.migration.fields import KINDS, Migration, carry_over
from dpoeng.engine.migration.releases import (
    assumed_release,
    defaults_of,
    fitting_releases,
    imported_from_trl,
    refusals,
    release_read,
)
from dpoeng.engine.migration.scripts import Given, Unread, read_script


def migrate(path: Path, text: str, trl_version: str | None = None) -> Migration:
    """Reads another trainer's script or configuration as fields of dpoeng.

    Args:
        path: source of `text`; its ending tells the kind, and errors name it.
        text: its whole content.
        trl_version: the release of TRL that a script was written for; None derives it from the script's calls.

    Raises:
        UserError: it cannot be read, contains no DPO settings, or names an unknown release.
    """
    release = release_read(trl_version) if trl_version is not None else None
    kind, settings = read_setup(path, text)
    if not settings:
        raise UserError(
            "no DPO settings in this file",
            code="migrate-nothing",
            where=str(path),
            expected="calls of DPOTrainer, DPOConfig or TrainingArguments; or a DPO configuration in YAML or JSON",
            found="none of their names",
            remedy="name the file with these calls, or start with `dpoeng init`",
        )
    result = Migration(kind)
    by_name = {item.name: item for item in settings}
    for item in settings:
        carry_over(item, by_name, result)
    defaults = [item.name for item in settings if item.default]
    if defaults:
        result.notes.append(
            f"{', '.join(defaults)}: defaults of the script's command-line arguments; its command line may have set "
            "other values."
        )
    _adapter(by_name, result)
    if kind in ("script", "trl"):
        fits = fitting_releases(settings, imported_from_trl(text) if kind == "script" else ())
        result.refused, result.fits = refusals(settings), str(fits)
        _trl_defaults(by_name, result, release or assumed_release(fits), () if release else fits.trl)
    else:
        if release:
            result.notes.append(f"--trl-version: not used, since this is {KINDS[kind]}")
        _other_defaults(by_name, result)
    _held_out(by_name, result)
    _contradictions(result)
    return result


# --------------------------------------------------------------------------- reading


def read_setup(path: Path, text: str) -> tuple[str, list[Given]]:
    """Returns the kind of a file and its settings.

    Raises:
        UserError: it is neither Python nor a mapping in JSON or YAML.
    """
    if path.suffix == ".ipynb":
        raise _not_read(path, "a notebook; `jupyter nbconvert --to script` makes a script of it")
    if path.suffix == ".py":
        return "script", read_script(text, path)
    entries: dict[str, Entry] | None = None
    try:
        if path.suffix == ".json":
            values = json.loads(text)
            entries = {str(k): Entry(v, 0) for k, v in values.items()} if isinstance(values, dict) else None
        else:
            entries = load_yaml(path, text)
    except (ValueError, RecursionError) as error:
        raise _not_read(path, str(error)) from error
    except UserError as error:
        if path.suffix in (".yaml", ".yml"):
            raise _not_read(path, error.found or str(error)) from error
    if entries is None:
        return "script", read_script(text, path)  # pasted text without a file ending
    kind = _kind_of(entries)
    items = []
    for name, entry in entries.items():
        source = kind
        if kind == "llama_factory" and meaning(name, kind, fields=known_fields()) is None:
            source = "trl"  # also accepts transformers' TrainingArguments
        if isinstance(entry.value, dict) and name in ("dpo_config", "training_arguments", "training_args"):
            items += [Given(str(k), v, "DPOConfig", "trl", entry.line or None) for k, v in entry.value.items()]
        else:
            items.append(
                Given(name, entry.value, "DPOConfig" if kind == "trl" else KINDS[kind], source, entry.line or None)
            )
    return kind, items


def _kind_of(entries: dict[str, Entry]) -> str:
    if {"base_model", "micro_batch_size", "rl", "sequence_len"} & set(entries):
        return "axolotl"
    if {"finetuning_type", "cutoff_len", "pref_beta", "stage", "lora_rank"} & set(entries):
        return "llama_factory"
    return "trl"


def _not_read(path: Path, found: str) -> UserError:
    return UserError(
        "cannot read the script or configuration",
        code="migrate-unreadable",
        where=str(path),
        expected="Python, or a mapping in JSON or YAML",
        found=found,
        remedy="fix the file; a script's name must end in .py",
    )


# --------------------------------------------------------------------------- the whole


def _adapter(by_name: dict[str, Given], result: Migration) -> None:
    """Decides which weights are trained: all, a new LoRA, or the SFT adapter."""
    shape = {"lora_r", "lora_alpha", "lora_target_modules", "lora_target_parameters", "use_rslora", "use_dora"}
    shape |= {"init_lora_weights", "layers_to_transform", "train_last_layers"}
    new_lora = any(item.source == "peft" for item in by_name.values()) or bool(shape & set(result.lines))
    if "adapter" in result.lines:
        seen = result.kind == "script" and "ref_model" not in by_name  # a given ref_model is explained separately
        if seen and new_lora:
            result.notes.append(
                "With a PeftModel and a peft_config, older releases of TRL merged the adapter into the base, as it was "
                "loaded, and took that as the reference; 1.16 refuses the two together. Here the reference is base + "
                "adapter, the SFT model, and the new LoRA goes on top of it."
            )
        elif seen:
            result.notes.append(
                "With a PeftModel and no ref_model, TRL's reference is the base without the adapter up to 0.28, and a "
                "copy of the adapter since. Here the reference is base + adapter: the SFT model."
            )
        if "adapter_mode" not in result.lines:
            mode = "stack" if new_lora and result.kind not in _OTHERS else "continue"
            comment = (
                "a new LoRA on base + frozen SFT adapter" if mode == "stack" else "the SFT adapter, trained further"
            )
            result.put("adapter_mode", mode, comment)
        if result.lines["adapter_mode"].value == "continue":
            for name in sorted(shape & set(result.lines)):
                result.lost.append(f"{name}: the SFT adapter keeps its own shape when it is trained further")
                del result.lines[name]
    elif not new_lora and not any(
        by_name[name].value for name in {"use_peft", "peft_config", "adapter"} & set(by_name)
    ):
        _all_weights(by_name, result)
    if "use_peft" in result.lines and result.lines["use_peft"].value is False:
        for name in sorted({*shape, "lora_dropout", "adapter_mode"} & set(result.lines)):
            result.needless.append(name)
            del result.lines[name]


def _all_weights(by_name: dict[str, Given], result: Migration) -> None:
    """Sets full fine-tuning if the script or configuration has no LoRA, as far as that can be known."""
    trainer = any(item.owner == "DPOTrainer" for item in by_name.values())
    computed = "model" in by_name and isinstance(by_name["model"].value, Unread)
    if result.kind == "script" and trainer and not computed and "quantization" not in result.lines:
        result.put("use_peft", False, "no LoraConfig in the script: it trains all weights")
    elif result.kind == "axolotl" and "quantization" not in result.lines:
        result.put("use_peft", False, "no adapter: it trains all weights")
    elif result.kind == "script":
        result.notes.append(
            "No LoraConfig in the script. dpoeng trains a LoRA on the frozen base; set use_peft: false if TRL trained "
            "all weights."
        )


def _contradictions(result: Migration) -> None:
    """Reports fields that are valid separately, but not together."""
    for cls in COMMANDS.values():
        try:
            cls(**{name: line.value for name, line in result.lines.items() if name in cls.model_fields})
        except ValidationError as error:
            result.lost += [f"together: {problem.message}" for problem in value_problems(error, {}, {}, None)]


# Defaults of other trainers. peft's are from LoraConfig; Axolotl's and LLaMA-Factory's from their schemas.
_PEFT = {"lora_r": 8, "lora_alpha": 8}
_OTHERS: dict[str, dict[str, Any]] = {
    "axolotl": {"num_train_epochs": 1.0, "max_length": 512, "gradient_accumulation_steps": 1, "warmup_ratio": 0.0},
    "llama_factory": {
        "num_train_epochs": 3.0,
        "max_length": 2048,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "learning_rate": 5e-5,
        "warmup_ratio": 0.0,
        "lora_r": 8,
    },
}
_FROM_TRL = (
    "learning_rate",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "warmup_ratio",
    "max_length",
    "truncation_mode",
    "beta",
)


def _trl_defaults(by_name: dict[str, Given], result: Migration, release: str, candidates: Sequence[str]) -> None:
    """Writes the defaults of a release of TRL if dpoeng's differ, so that the run stays the same.

    `candidates`: the releases that the script fits; adds a note about a default on which they disagree.
    """
    config = any(item.owner == "DPOConfig" for item in by_name.values())
    wanted = defaults_of(_FROM_TRL, release, config=config)
    written = _write_defaults(by_name, result, wanted, f"TRL {_minor(release)}" if config else "transformers")
    newest = candidates[-1] if candidates else release
    for name in written:
        later = defaults_of([name], newest, config=config).get(name)
        if later != wanted[name]:
            result.notes.append(
                f"{name}: {wanted[name]!r} is the default of TRL {_minor(release)}, {later!r} that of "
                f"{_minor(newest)}. The script fits both; name its release with --trl-version."
            )
    if "max_length" not in {*result.lines, *by_name, *wanted}:
        result.notes.append(
            f"max_length: not set there, and TRL {_minor(release)} has no fixed default. dpoeng cuts at 1024 tokens: "
            "set what you need."
        )
    if any(item.source == "peft" for item in by_name.values()):
        keeps_shape = "adapter_mode" in result.lines and result.lines["adapter_mode"].value == "continue"
        _write_defaults(by_name, result, {} if keeps_shape else _PEFT, "peft")
        if "lora_target_modules" not in result.lines:
            result.notes.append("LoraConfig without target_modules: peft picks some for each family; here all-linear.")


def _other_defaults(by_name: dict[str, Given], result: Migration) -> None:
    """The same for Axolotl and LLaMA-Factory."""
    wanted = dict(_OTHERS[result.kind])
    if result.kind == "llama_factory":
        rank = result.lines["lora_r"].value if "lora_r" in result.lines else wanted["lora_r"]
        wanted["lora_alpha"] = 2 * rank
    if "adapter_mode" in result.lines and result.lines["adapter_mode"].value == "continue":
        wanted = {name: value for name, value in wanted.items() if name not in _PEFT}
    _write_defaults(by_name, result, wanted, KINDS[result.kind].split(" ")[1])


def _write_defaults(by_name: dict[str, Given], result: Migration, wanted: Mapping[str, Any], whose: str) -> list[str]:
    """Sets each field that was left out and whose default here differs; returns their names."""
    left_to_you = {name for name, item in by_name.items() if isinstance(item.value, Unread)}
    whole = "use_peft" in result.lines and result.lines["use_peft"].value is False
    written = []
    for name, value in wanted.items():
        ours = next(cls.model_fields[name].default for cls in COMMANDS.values() if name in cls.model_fields)
        if name in result.lines or name in left_to_you or value == ours:
            continue
        if (whole and name.startswith("lora_")) or (name == "warmup_ratio" and "warmup_steps" in result.lines):
            continue
        result.put(name, value, f"not set there: the default of {whose}; dpoeng's is {ours}")
        written.append(name)
    return written


def _minor(release: str) -> str:
    return ".".join(release.split(".")[:2])


def _held_out(by_name: dict[str, Given], result: Migration) -> None:
    """Holds nothing out if the script evaluated nothing; adds a note if its evaluation pairs were not found."""
    if {"eval_share", "eval_view", "load_best_model_at_end", "early_stopping_patience"} & set(result.lines):
        return
    strategy = next((by_name[n].value for n in ("eval_strategy", "evaluation_strategy") if n in by_name), "no")
    if (
        strategy not in ("no", None, False)
        or "eval_steps" in result.lines
        or any(item.owner == "eval_dataset" for item in by_name.values())
    ):
        result.notes.append("No evaluation pairs found: dpoeng holds out a tenth of the prompts (eval_share).")
    else:
        result.put("eval_share", 0.0, "the script evaluates nothing; dpoeng's default holds out a tenth of the prompts")
