"""From the set-up of another trainer to a dpoeng.yaml: what has an equivalent, what has none, and why it failed there.

Reads TRL scripts, a DPOConfig in JSON or YAML, and DPO configurations of Axolotl and LLaMA-Factory.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

from packaging.version import Version
from pydantic import ValidationError

from dpoeng.cache.errors import UserError
from dpoeng.engine.config.fields import COMMANDS, known_fields
from dpoeng.engine.config.files import load_yaml
from dpoeng.engine.config.other_trainers import meaning, signatures
from dpoeng.engine.config.problems import Entry, value_problems
from dpoeng.engine.migration.fields import KINDS, Migration, at, carry_over
from dpoeng.engine.migration.scripts import Given, Unread, read_script


def migrate(path: Path, text: str) -> Migration:
    """Reads the set-up in `text`; `path` tells its kind and where mistakes are.

    Raises:
        UserError: it cannot be read, or there is nothing of DPO in it.
    """
    kind, given = read_setup(path, text)
    if not given:
        raise UserError(
            "there is nothing of DPO in this file",
            code="migrate-nothing",
            where=str(path),
            expected="calls of DPOTrainer, DPOConfig or TrainingArguments; or a DPO configuration in YAML or JSON",
            found="none of their names",
            remedy="name the file that makes these calls, or begin with `dpoeng init`",
        )
    result = Migration(kind)
    by_name = {item.name: item for item in given}
    for item in given:
        carry_over(item, by_name, result)
    defaults = [item.name for item in given if item.default]
    if defaults:
        result.notes.append(
            f"{', '.join(defaults)}: defaults of the script's command-line arguments; its command line may have set "
            "other values."
        )
    _adapter(by_name, result)
    _defaults(by_name, result)
    _contradictions(result)
    if kind in ("script", "trl"):
        result.refused, result.fits = refusals(given), fitting_releases(given)
    return result


# --------------------------------------------------------------------------- reading


def read_setup(path: Path, text: str) -> tuple[str, list[Given]]:
    """The kind of a set-up, and its settings.

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
        return "script", read_script(text, path)  # a paste without a suffix
    kind = _kind_of(entries)
    items = []
    for name, entry in entries.items():
        source = kind
        if kind == "llama_factory" and meaning(name, kind, fields=known_fields()) is None:
            source = "trl"  # it takes transformers' TrainingArguments too
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
        "the set-up cannot be read",
        code="migrate-unreadable",
        where=str(path),
        expected="Python, or a mapping in JSON or YAML",
        found=found,
        remedy="mend the file; a script must end in .py",
    )


# --------------------------------------------------------------------------- the whole


def _adapter(by_name: dict[str, Given], result: Migration) -> None:
    """Set which weights are trained: all, a new LoRA, or the SFT adapter."""
    shape = {"lora_r", "lora_alpha", "lora_target_modules", "use_rslora", "use_dora", "init_lora_weights"}
    new_lora = any(item.source == "peft" for item in by_name.values()) or bool(shape & set(result.lines))
    if "adapter" in result.lines:
        seen = result.kind == "script" and "ref_model" not in by_name  # one that is passed is explained by itself
        if seen and new_lora:
            result.notes.append(
                "With a PeftModel and a peft_config, older releases of TRL merged the adapter into the base, as it was "
                "loaded, and took that as the reference; 1.16 refuses the two together. Here the reference is base + "
                "adapter, the SFT model, and the new LoRA stands on it."
            )
        elif seen:
            result.notes.append(
                "With a PeftModel and no ref_model, TRL's reference is the base without the adapter up to 0.28, and a "
                "copy of the adapter since. Here the reference is base + adapter: the SFT model."
            )
        if "adapter_mode" not in result.lines:
            mode = "stack" if new_lora and result.kind not in _OTHERS else "continue"
            said = (
                "a new LoRA on base + frozen SFT adapter" if mode == "stack" else "the SFT adapter is trained further"
            )
            result.put("adapter_mode", mode, said)
        if result.lines["adapter_mode"].value == "continue":
            for name in sorted(shape & set(result.lines)):
                result.lost.append(f"{name}: the SFT adapter that is trained further keeps its own shape")
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
    """No LoRA was seen there: full fine-tuning, as far as that can be known."""
    trainer = any(item.owner == "DPOTrainer" for item in by_name.values())
    computed = "model" in by_name and isinstance(by_name["model"].value, Unread)
    if result.kind == "script" and trainer and not computed and "quantization" not in result.lines:
        result.put("use_peft", False, "no LoraConfig was seen: all weights are trained there")
    elif result.kind == "axolotl" and "quantization" not in result.lines:
        result.put("use_peft", False, "no adapter: all weights are trained there")
    elif result.kind == "script":
        result.notes.append(
            "No LoraConfig was seen. dpoeng trains a LoRA on the frozen base; set use_peft: false where TRL trained "
            "all weights."
        )


def _contradictions(result: Migration) -> None:
    """Fields that are right one by one, and not together."""
    for cls in COMMANDS.values():
        try:
            cls(**{name: line.value for name, line in result.lines.items() if name in cls.model_fields})
        except ValidationError as error:
            result.lost += [f"together: {problem.message}" for problem in value_problems(error, {}, {}, None)]


# What the other trainers do when nothing is said. peft's: LoraConfig; Axolotl's and LLaMA-Factory's: their schemas.
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


def _defaults(by_name: dict[str, Given], result: Migration) -> None:
    """Writes out the other trainer's defaults where dpoeng's differ: the same run, not only the same names."""
    if result.kind in _OTHERS:
        wanted, whose = dict(_OTHERS[result.kind]), KINDS[result.kind].split(" ")[1]
        if result.kind == "llama_factory":
            rank = result.lines["lora_r"].value if "lora_r" in result.lines else wanted["lora_r"]
            wanted["lora_alpha"] = 2 * rank
    else:
        config = any(item.owner == "DPOConfig" for item in by_name.values())
        wanted = {name: value for name in _FROM_TRL if (value := trl_default(name, config=config)) is not None}
        whose = "TRL 1.16" if config else "transformers"
        if any(item.source == "peft" for item in by_name.values()):
            wanted |= _PEFT
            if "lora_target_modules" not in result.lines:
                result.notes.append(
                    "LoraConfig without target_modules: peft picks some for each family; here all-linear."
                )
    if "warmup_steps" in result.lines:
        wanted.pop("warmup_ratio", None)
    if "use_peft" in result.lines and result.lines["use_peft"].value is False:
        wanted = {name: value for name, value in wanted.items() if not name.startswith("lora_")}
    keeps_shape = "adapter_mode" in result.lines and result.lines["adapter_mode"].value == "continue"
    given = {name for name in by_name if isinstance(by_name[name].value, Unread)}
    for name, value in wanted.items():
        ours = next(cls.model_fields[name].default for cls in COMMANDS.values() if name in cls.model_fields)
        if name not in result.lines and name not in given and value != ours and not (keeps_shape and name in _PEFT):
            of = "peft" if name in _PEFT and result.kind not in _OTHERS else whose
            result.put(name, value, f"not set there: the default of {of}; dpoeng's is {ours}")
    _held_out(by_name, result)


def _held_out(by_name: dict[str, Given], result: Migration) -> None:
    """Hold nothing out where nothing was evaluated; say so where the evaluation pairs were not seen."""
    if {"eval_share", "eval_view", "load_best_model_at_end", "early_stopping_patience"} & set(result.lines):
        return
    strategy = next((by_name[n].value for n in ("eval_strategy", "evaluation_strategy") if n in by_name), "no")
    if (
        strategy not in ("no", None, False)
        or "eval_steps" in result.lines
        or any(item.owner == "eval_dataset" for item in by_name.values())
    ):
        result.notes.append(
            "The evaluation pairs were not found in the set-up: dpoeng holds out a tenth of the prompts (eval_share)."
        )
    else:
        result.put("eval_share", 0.0, "nothing was evaluated there; dpoeng's default holds out a tenth of the prompts")


def trl_default(name: str, *, config: bool) -> Any:
    """The newest default of a name in DPOConfig, or in plain TrainingArguments. None: none, or no constant."""
    owners = signatures()["names"].get(name, {})
    for owner in ("DPOConfig", "TrainingArguments") if config else ("TrainingArguments", "DPOConfig"):
        if owner in owners:
            try:
                value = ast.literal_eval(owners[owner]["defaults"][-1][1])
            except (ValueError, SyntaxError):
                return None
            return 0.0 if name == "warmup_ratio" else value
    return None


def fitting_releases(given: list[Given]) -> str:
    """The releases that take all of these calls, e.g. `it fits TRL 0.7.5 to 0.8.0 with transformers 4.31.0 to 4.50.0`.

    By the arguments that they know, and by the transformers that the metadata of these releases of TRL ask for.
    """
    names, versions = signatures()["names"], signatures()["versions"]
    trl, transformers = list(versions["trl"]), list(versions["transformers"])
    for item in given:
        if item.name == "args" and item.source == "script":
            trl = [version for version in trl if version.startswith(("0.7.", "0.8."))]  # seen: docs/trl.md
        owners = names.get(item.name, {})
        if item.owner not in ("DPOConfig", "DPOTrainer", "TrainingArguments") or item.source != "trl" or not owners:
            continue
        own, inherited = owners.get(item.owner), owners.get("TrainingArguments")
        if item.owner != "TrainingArguments" and own is not None and not (item.owner == "DPOConfig" and inherited):
            trl = [version for version in trl if _within(version, own["in"], versions["trl"])]
        elif inherited is not None and item.owner != "DPOTrainer":
            transformers = [v for v in transformers if _within(v, inherited["in"], versions["transformers"])]
        else:
            trl = []
    wanted = [(version, [v for v in transformers if Version(v) >= _least_transformers(version)]) for version in trl]
    fitting = [(version, found) for version, found in wanted if found]
    if not fitting:
        return "no release takes all of it"
    # The newest of them asks for the newest transformers, so its releases are right for all.
    return f"it fits TRL {_range([version for version, _ in fitting])} with transformers {_range(fitting[-1][1])}"


def _least_transformers(trl: str) -> Version:
    """The oldest transformers that a release of TRL accepts."""
    since, versions = signatures()["requires"], signatures()["versions"]["trl"]
    return Version([least for first, least in since if versions.index(first) <= versions.index(trl)][-1])


def _within(version: str, stretches: list[list[str]], known: list[str]) -> bool:
    place = known.index(version)
    return any(known.index(first) <= place <= known.index(last) for first, last in stretches)


def _range(versions: list[str]) -> str:
    return versions[0] if len(versions) == 1 else f"{versions[0]} to {versions[-1]}"


def refusals(given: list[Given]) -> list[str]:
    """Why the newest TRL and transformers refuse these calls, call by call."""
    names, versions = signatures()["names"], signatures()["versions"]
    told = []
    for item in given:
        owners = names.get(item.name, {})
        if item.owner not in ("DPOConfig", "DPOTrainer", "TrainingArguments") or item.source == "script":
            continue
        accepting = ("DPOConfig", "TrainingArguments") if item.owner == "DPOConfig" else (item.owner,)
        newest = {o: versions["transformers" if o == "TrainingArguments" else "trl"][-1] for o in accepting}
        if any(o in owners and owners[o]["in"][-1][1] == newest[o] for o in accepting):
            continue
        last = next((f"{o} took it to {owners[o]['in'][-1][1]}" for o in accepting if o in owners), "")
        known = meaning(item.name, fields=known_fields())
        renamed = f"; now {known.renamed[0]}" if known and known.renamed else ""
        moved = [o for o in ("DPOConfig",) if o in owners and owners[o]["in"][-1][1] == versions["trl"][-1]]
        if item.owner == "DPOTrainer" and moved:
            renamed = "; now an argument of DPOConfig"
        told.append(f"{at(item)}{item.name}: {last or f'{item.owner} never took it'}{renamed}")
    if any(item.name == "args" and item.source == "script" for item in given):
        told.append(
            "TrainingArguments is handed to DPOTrainer, which reads fields that only DPOConfig has: "
            "'TrainingArguments' object has no attribute 'padding_value' or 'model_init_kwargs'"
        )
    return told
