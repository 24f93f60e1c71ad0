"""Maps a setting of another trainer to dpoeng's fields, with the tables of `foreign_names` or a special rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from dpoeng.engine.config.fields import COMMANDS, known_fields
from dpoeng.engine.config.other_trainers import meaning, remedy
from dpoeng.engine.config.problems import option, value_problems
from dpoeng.engine.config.template import Line
from dpoeng.engine.migration.scripts import Given, Unread

KINDS = {
    "script": "a TRL script",
    "trl": "a DPOConfig of TRL",
    "axolotl": "an Axolotl configuration",
    "llama_factory": "a LLaMA-Factory configuration",
}


@dataclass(slots=True)
class Migration:
    """A script or configuration as fields of dpoeng, and what has no equivalent.

    Attributes:
        kind: a key of KINDS.
        lines: field -> value and comments, for dpoeng.yaml.
        lost: settings without an equivalent, or computed ones: one message each.
        needless: names of settings that dpoeng does not need.
        notes: remarks beyond single settings.
        refused: why the newest releases refuse it.
        fits: the releases that it was written for.
    """

    kind: str
    lines: dict[str, Line] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    needless: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    fits: str = ""
    eval_pairs: list[str] = field(default_factory=list)

    def put(self, name: str, value: Any, *comments: str) -> None:
        """Sets a field if it accepts the value; otherwise adds it to `lost`, with the reason."""
        for cls in COMMANDS.values():
            if name not in cls.model_fields:
                continue
            try:
                cls(**{name: value})
            except ValidationError as error:
                problems = value_problems(error, {name: value}, {}, None)
                # Only check the value itself; conflicts between fields are checked at the end.
                for problem in problems:
                    if problem.where == option(name):
                        rule = problem.message.removeprefix(f"{name}: ")
                        self.lost.append(f"{name} {value!r}: {rule}; {problem.remedy}")
                        return
        comments_before = self.lines[name].comments if name in self.lines else ()
        self.lines[name] = Line(value, (*comments_before, *(c for c in comments if c and c not in comments_before)))


def carry_over(item: Given, by_name: dict[str, Given], result: Migration) -> None:
    """Carries one setting over; `by_name` has all settings, since some depend on others."""
    known = meaning(item.name, item.source, fields=known_fields())
    if isinstance(item.value, Unread) and known is not None and known.needless:
        result.needless.append(item.name)
    elif isinstance(item.value, Unread) and item.name != "dataset_code":
        result.lost.append(f"{at(item)}{item.name}: computed when the script runs ({item.value.text}); set it by hand")
    elif item.name in _SPECIAL:
        _SPECIAL[item.name](item, by_name, result)
    elif item.name in _SWITCHES:
        if item.value:
            result.put(*_SWITCHES[item.name])
    elif item.name in _BY_HAND:
        result.lost.append(f"{at(item)}{item.name}: {item.value!r}; {_BY_HAND[item.name]}")
    elif item.name != "args":  # TrainingArguments passed to DPOTrainer are reported in `refused`
        _translate(item, result)


def at(item: Given) -> str:
    """`line 7, ` if the line is known."""
    return f"line {item.line}, " if item.line else ""


def _off(value: Any) -> bool:
    """Whether a value means "off"."""
    return value is None or value is False or value in ("", "no", "none", "off", 0, [], {}, ["none"])


def _translate(item: Given, result: Migration) -> None:
    """Uses the tables of foreign_names."""
    known = meaning(item.name, item.source, fields=known_fields())
    if known is None:
        if not _off(item.value):
            result.lost.append(f"{at(item)}{item.name}: unknown; `dpoeng config show` lists all fields")
        return
    if known.field is None:
        if known.needless or _off(item.value):
            result.needless.append(item.name)
        else:
            result.lost.append(f"{at(item)}{item.name}: {item.value!r}; {remedy(item.name, known)}")
        return
    if known.field not in known_fields():
        if not _off(item.value):
            result.lost.append(f"{at(item)}{item.name}: {item.value!r}; dpoeng has no {known.field}")
        return
    if item.value is None:
        return
    was = f"{item.name} of {item.owner}" if known.field != item.name else ""
    note = known.note if known.note and item.name in _NOTED else ""
    result.put(known.field, _value(known.field, item.value), "; ".join(part for part in (was, note) if part))


_NOTED = {
    "label_smoothing",
    "ld_alpha",
    "f_alpha_divergence_coef",
    "rpo_alpha",
    "truncation_mode",
    "max_prompt_length",
    "warmup_ratio",
}
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}


def _value(name: str, value: Any) -> Any:
    """The value in dpoeng's notation."""
    if name == "dtype" and isinstance(value, str):
        return _DTYPES.get(value.removeprefix("torch."), value.removeprefix("torch."))
    if name in ("lora_target_modules", "lora_target_parameters"):
        if isinstance(value, str):
            value = [word.strip() for word in value.split(",")]
        return ["all-linear"] if value in (["all"], ["all-linear"]) else value
    if name == "fsdp":  # until transformers 5 a list of options, `full_shard auto_wrap`
        return bool(value)
    if isinstance(value, float) and value.is_integer() and "steps" in name:
        return int(value)
    return value


def _evaluation(item: Given, by_name: dict[str, Given], result: Migration) -> None:
    if item.value in ("no", None, False):
        result.put("eval_share", 0.0, f"{item.name}: no")
    elif item.value == "steps":
        if "eval_steps" not in by_name:
            every = by_name["logging_steps"].value if "logging_steps" in by_name else 500
            result.put("eval_steps", every, f"{item.name}: steps; without eval_steps transformers takes logging_steps")
    else:
        result.lines.pop("eval_steps", None)
        result.notes.append(f"{item.name}: {item.value}: dpoeng evaluates before the first step and once per epoch.")


def _eval_steps(item: Given, by_name: dict[str, Given], result: Migration) -> None:
    """Axolotl evaluates if eval_steps is set; transformers only with eval_strategy: steps."""
    unset = "steps" if result.kind == "axolotl" else "no"
    strategy = next((by_name[n].value for n in ("eval_strategy", "evaluation_strategy") if n in by_name), unset)
    if strategy == "steps" and item.value is not None:
        result.put("eval_steps", _value("eval_steps", item.value))
    else:
        result.needless.append("eval_steps")


def _quantize(item: Given, _: dict[str, Given], result: Migration) -> None:
    bits = {"load_in_8bit": "8bit", "load_in_4bit": "4bit"}.get(item.name) or f"{item.value}bit"
    if item.value in (8, 4, True, "8", "4"):
        result.put("quantization", bits, "for reference and policy alike, so that the first loss is ln 2")


def _half(item: Given, by_name: dict[str, Given], result: Migration) -> None:
    wanted = "bfloat16" if item.name.startswith(("bf", "pure_bf", "bfloat")) else "float16"
    if item.value not in (True, "auto", "true"):
        return
    if "torch_dtype" in by_name or "dtype" in by_name:
        return
    result.put("dtype", wanted, f"{item.name}: the frozen base is in {wanted}, the LoRA in float32")


def _warmup(item: Given, _: dict[str, Given], result: Migration) -> None:
    if isinstance(item.value, float) and 0 < item.value < 1:
        result.put("warmup_ratio", item.value, "warmup_steps below 1 is a share")
    elif item.value:
        result.put("warmup_steps", _value("warmup_steps", item.value))


def _saving(item: Given, _: dict[str, Given], result: Migration) -> None:
    if item.value != "steps":
        result.notes.append(f"save_strategy: {item.value}: checkpoints are written ten times a run; see save_steps.")


def _trackers(item: Given, _: dict[str, Given], result: Migration) -> None:
    if item.value in ("none", ["none"], [], None):
        result.needless.append(item.name)
    else:
        result.put("report_to", item.value)


def _pairs(item: Given, _: dict[str, Given], result: Migration) -> None:
    files = item.value if isinstance(item.value, list) else [item.value]
    result.put("pairs", [str(file) for file in files], "the files that precompute-ref scores")


def _eval_pairs(item: Given, _: dict[str, Given], result: Migration) -> None:
    files = [str(file) for file in (item.value if isinstance(item.value, list) else [item.value])]
    if "pairs" in result.lines and files == result.lines["pairs"].value:
        result.lost.append(
            f"{at(item)}eval_dataset: from the same file as the training pairs; set eval_share to its share of them, "
            "or write it to a separate file and set eval_view"
        )
        return
    result.eval_pairs = files
    result.put("eval_view", "eval", "pairs for evaluation only")


def _hub_data(item: Given, _: dict[str, Given], result: Migration) -> None:
    if item.owner == "eval_dataset":
        result.lost.append(
            f"{at(item)}eval_dataset: save its part of {item.value!r} too, run precompute-ref on it with --name eval, "
            "and set eval_view: eval"
        )
        return
    result.lost.append(
        f"{at(item)}data set {item.value!r}: save it once, "
        f"`load_dataset({item.value!r}, split='train').to_json('pairs.jsonl')`, and set pairs: pairs.jsonl"
    )


def _data_code(item: Given, _: dict[str, Given], result: Migration) -> None:
    assert isinstance(item.value, Unread)
    note = (
        f"{at(item)}the data set is changed in code, {item.value.text}: use where, columns or prompt_format for it, or "
        "save the changed data set with .to_json('pairs.jsonl')."
    )
    if note not in result.notes:  # training and evaluation pairs may both come from there
        result.notes.append(note)


def _datasets(item: Given, _: dict[str, Given], result: Migration) -> None:
    """Axolotl's list of data sets."""
    files = []
    for entry in item.value if isinstance(item.value, list) else []:
        path = entry.get("data_files") or entry.get("path") if isinstance(entry, dict) else entry
        for file in path if isinstance(path, list) else [path]:
            if str(file).endswith((".jsonl", ".json", ".parquet", ".csv", ".arrow", ".gz", ".zst")):
                files.append(str(file))
            else:
                result.lost.append(
                    f"{at(item)}data set {file!r}: save it once with .to_json('pairs.jsonl') and add the file to pairs"
                )
        kind = entry.get("type") if isinstance(entry, dict) else None
        if kind:
            result.notes.append(f"data set type {kind!r}: dpoeng detects the shape; see docs/data.md and --columns.")
    if files:
        result.put("pairs", files, "the files that precompute-ref scores")


def _shares(item: Given, _: dict[str, Given], result: Migration) -> None:
    if isinstance(item.value, (int, float)) and item.value >= 1:
        result.lost.append(f"{at(item)}{item.name}: {item.value} rows; set eval_share to a share of the prompts")
    else:
        result.put("eval_share", float(item.value), f"{item.name}; here a share of the prompts, not of the pairs")


def _ref_model(item: Given, by_name: dict[str, Given], result: Migration) -> None:
    base = next((by_name[name].value for name in ("model", "model_name_or_path") if name in by_name), None)
    adapter = by_name["adapter"].value if "adapter" in by_name else None
    if item.value == (adapter or base):
        result.needless.append("ref_model")
    elif adapter and item.value == base:
        result.lost.append(
            f"{at(item)}ref_model: {item.value!r} is the base without the SFT adapter; dpoeng's reference is base + "
            "adapter, the SFT model"
        )
    else:
        result.lost.append(
            f"{at(item)}ref_model: {item.value!r} is not where the policy starts; dpoeng's reference is `model` with "
            "`adapter`, and the policy starts there"
        )


def _method(item: Given, _: dict[str, Given], result: Migration) -> None:
    """The training method of Axolotl and LLaMA-Factory."""
    wanted = {"rl": "dpo", "stage": "dpo", "finetuning_type": "lora"}[item.name]
    if (item.name, item.value) == ("finetuning_type", "full"):
        result.put("use_peft", False, "finetuning_type: full")
    elif item.name == "rl" and item.value in ("ipo", "simpo", "orpo"):
        result.put("loss_type", item.value)
    elif item.value != wanted:
        result.lost.append(f"{at(item)}{item.name}: {item.value!r}; dpoeng only supports {wanted}")


def _adapter_kind(item: Given, by_name: dict[str, Given], result: Migration) -> None:
    """`adapter` is lora or qlora in Axolotl, but a path in a script's settings."""
    if item.source != "axolotl":
        result.put("adapter", item.value)
    elif item.value and item.value not in ("lora", "qlora"):
        result.lost.append(f"{at(item)}adapter: {item.value!r}; dpoeng trains a LoRA or all weights")


def _model_path(item: Given, _: dict[str, Given], result: Migration) -> None:
    result.put("model", item.value)


def _max_length(item: Given, _: dict[str, Given], result: Migration) -> None:
    if item.value is None:
        result.lost.append(f"{at(item)}max_length: None; dpoeng always has a limit, 1024 by default: set what you need")
    else:
        result.put("max_length", item.value, "" if item.name == "max_length" else f"{item.name} there")


# name -> field, value and comment, if the setting is on
_SWITCHES: dict[str, tuple[str, Any, str]] = {
    "use_cpu": ("device", "cpu", ""),
    "no_cuda": ("device", "cpu", ""),
    "resume_from_checkpoint": (
        "resume",
        True,
        "requires a checkpoint; without this a run continues if there is one",
    ),
    "create_new_adapter": ("adapter_mode", "stack", "a new LoRA on base + frozen SFT adapter"),
    "disable_gradient_checkpointing": ("gradient_checkpointing", False, ""),
}
_BY_HAND = {
    "test_datasets": "run precompute-ref on these pairs with --name eval, and set eval_view: eval",
    "dataset": "dataset_info.json names its file: set pairs to it, and see docs/data.md",
}
_SPECIAL: dict[str, Callable[[Given, dict[str, Given], Migration], None]] = {
    "eval_strategy": _evaluation,
    "evaluation_strategy": _evaluation,
    "eval_steps": _eval_steps,
    "load_in_8bit": _quantize,
    "load_in_4bit": _quantize,
    "quantization_bit": _quantize,
    "bf16": _half,
    "fp16": _half,
    "pure_bf16": _half,
    "bfloat16": _half,
    "float16": _half,
    "warmup_steps": _warmup,
    "save_strategy": _saving,
    "report_to": _trackers,
    "pairs": _pairs,
    "eval_pairs": _eval_pairs,
    "dataset_name": _hub_data,
    "dataset_code": _data_code,
    "datasets": _datasets,
    "eval_share": _shares,
    "val_set_size": _shares,
    "val_size": _shares,
    "ref_model": _ref_model,
    "rl": _method,
    "stage": _method,
    "finetuning_type": _method,
    "adapter": _adapter_kind,
    "model": _model_path,
    "max_length": _max_length,
}
