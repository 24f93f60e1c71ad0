"""The model card of a result: README.md next to the adapter, made only from run.json and the log.

It answers the questions of someone who receives the folder: which base, which data, which loss, how good on which
pairs, how to load it. It does not depend on the output folder or the time, so a resumed run writes the same card.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpoeng.engine.config.fields import TrainConfig
from dpoeng.engine.runs.identity import FREE_TO_CHANGE

CARD_FILE = "README.md"

_SHOWN = (
    ("accuracy", "rewards/accuracies", ".3f"),
    ("accuracy, length-controlled", "rewards/accuracies_length_controlled", ".3f"),
    ("reward margin", "rewards/margins", ".3f"),
    ("log-prob of chosen, nats", "logps/chosen", ".1f"),
    ("log-prob of rejected, nats", "logps/rejected", ".1f"),
    ("loss", "loss", ".4f"),
)


def model_card(
    record: Mapping[str, Any],
    before: Mapping[str, Any] | None,
    after: Mapping[str, Any] | None,
    steps: int,
    load: Sequence[str],
) -> str:
    """The text of the card: Markdown with the hub's header.

    Args:
        record: run.json.
        before: the record of the evaluation before training; None if no pair was held out.
        after: that of the saved weights.
        steps: optimizer steps done.
        load: Python lines that load the result from within the run's folder.
    """
    config = record["config"]
    full = record["adapter_mode"] == "full"
    base = str(record["model"])
    lines = [
        "---",
        *([f"base_model: {base}"] if not Path(base).is_absolute() and base.count("/") <= 1 else []),
        *([f"license: {record['license']}"] if record.get("license") else []),
        f"library_name: {'transformers' if full else 'peft'}",
        "tags: [dpo, dpoeng]",
        "---",
        "",
        f"# {'Checkpoint' if full else 'LoRA adapter'} trained by DPO on {Path(base).name}",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {_cell(value)} |" for name, value in _facts(record, steps) if value),
        "",
        *_held_out(before, after),
        "## Load it",
        "",
        f"In the folder that holds `{'model' if full else 'adapter'}/`:",
        "",
        "```python",
        *load,
        "```",
        "",
        "## Train it again",
        "",
        "```",
        shlex.join(["dpoeng", "train", "--cache", "refcache", *_options(config)]),
        "```",
        "",
        f"Versions: {', '.join(f'{name} {version}' for name, version in record['versions'].items())}.",
    ]
    return "\n".join(lines) + "\n"


def _facts(record: Mapping[str, Any], steps: int) -> list[tuple[str, str]]:
    reference, config, adapter = record["reference"], record["config"], record["sft_adapter"]
    base = str(record["model"])
    return [
        ("base", f"`{base}`" + (f", revision `{reference['revision']}`" if reference.get("revision") else "")),
        ("SFT adapter", f"`{adapter}` ({record['adapter_mode']})" if adapter else "none"),
        ("precision of the base", f"{_held(config, reference)}"),
        ("reference", f"`{reference['spec']}`: the model above before training, as {_held({}, reference)}"),
        ("pairs", ", ".join(f"`{_file(name)}` ({digest})" for name, digest in (record.get("files") or {}).items())),
        ("loss", f"{' + '.join(config['loss_type'])}, beta {config['beta']:g}"),
        ("licence of the base", record.get("license") or "not stated beside it: see the base"),
        ("hardware", record.get("device") or ""),
        ("steps", f"{steps:,}" + "".join(map(_extended, record.get("extensions") or ()))),
    ]


def _file(name: str) -> str:
    """A file's name; of a data set of the hub with its commit, by which others find it."""
    return name if name.startswith("hf://") else Path(name).name


def _extended(extension: Mapping[str, int]) -> str:
    return "; planned for {planned:,}, extended to {steps:,} after step {step:,}".format(**extension)


def _held(config: Mapping[str, Any], reference: Mapping[str, Any]) -> str:
    quantization = config.get("quantization") or reference["quantization"]
    dtype = config.get("dtype") or reference["dtype"]
    return f"{dtype}, not quantised" if quantization == "none" else f"{quantization}, computed in {dtype}"


def _held_out(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> Sequence[str]:
    if after is None:
        return ["No pair was held out, so its quality is unknown.", ""]
    first = before or after
    prompts = f" of {after['prompts']:,} prompts" if "prompts" in after else ""
    rows = [
        f"| {label} | {_figure(first, name, form)} | {_figure(after, name, form)} | {_bounds(after, name, form)} |"
        for label, name, form in _SHOWN
        if name in after["metrics"]
    ]
    note = "Before training the policy equals its reference: every margin is 0, a tie, which counts as wrong."
    return [
        "## On held-out pairs",
        "",
        f"n = {after['pairs']:,} pairs{prompts}.",
        *([note] if first.get("ties") == first["pairs"] else []),
        "",
        f"| | before | after | {after.get('confidence', 0.95):.0%} interval |",
        "|---|---|---|---|",
        *rows,
        "",
    ]


def _figure(record: Mapping[str, Any], name: str, form: str) -> str:
    value = record["metrics"].get(name)
    return "" if value is None else f"{value:{form}}"


def _bounds(record: Mapping[str, Any], name: str, form: str) -> str:
    bounds = record.get("intervals", {}).get(name)
    return f"{bounds[0]:{form}} to {bounds[1]:{form}}" if bounds else ""


def _options(config: Mapping[str, Any]) -> list[str]:
    """Non-default settings as options, except those that do not affect the weights."""
    default = TrainConfig.model_validate({}).model_dump(mode="json")
    left_out = FREE_TO_CHANGE - {"eval_steps"}  # it may decide which weights are saved
    words: list[str] = []
    for name, value in config.items():
        if name in left_out or value is None or value == default.get(name):
            continue
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif not isinstance(value, dict):
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            words += [f"--{flag}", text]
    return words


def _cell(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", " ")
