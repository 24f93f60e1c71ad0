"""Python lines that load a run's result as it was trained, using only transformers and peft."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dpoeng.engine.config.fields import Mode, Quantization
from dpoeng.engine.runs.folder import ADAPTER_FOLDER, MODEL_FOLDER


@dataclass(frozen=True, slots=True)
class Place:
    """Source of a model, adapter or tokenizer: a hub id with its commit, or an absolute path.

    `gguf_file` is the name of a GGUF file in that folder.
    """

    name: str
    revision: str | None = None
    gguf_file: str | None = None


@dataclass(frozen=True, slots=True)
class Loading:
    """The facts that the loading lines need.

    Attributes:
        mode: how the result relates to base and SFT adapter.
        loader: the transformers class whose names the result uses.
        base: the base.
        dtype: compute dtype, e.g. bfloat16.
        quantization: bitsandbytes' quantisation on loading; `none` also if the base's files are quantised.
        quant_type: with 4 bits: nf4 or fp4.
        double_quant: with 4 bits: whether the scales are quantised too.
        sft_adapter: the frozen adapter below a stacked one.
        tokenizer: whether the result has a tokenizer.
    """

    mode: Mode
    loader: str
    base: Place
    dtype: str
    quantization: Quantization = "none"
    quant_type: str = "nf4"
    double_quant: bool = True
    sft_adapter: Place | None = None
    tokenizer: bool = True


def loading_lines(loading: Loading, output_dir: Path | None = None) -> list[str]:
    """Lines that define `model` and `tokenizer`.

    Args:
        loading: how the result was trained.
        output_dir: the run's folder, to name by its absolute path; None for lines to run inside it.
    """
    full = loading.mode == "full"
    name = MODEL_FOLDER if full else ADAPTER_FOLDER
    result = repr(str(output_dir.resolve() / name) if output_dir is not None else name)
    bits = _bits(loading)
    imports = [
        loading.loader,
        *(["AutoTokenizer"] if loading.tokenizer else []),
        *(["BitsAndBytesConfig"] if bits else []),
    ]
    lines = [*(["import torch"] if loading.quantization == "4bit" else [])]
    lines += [
        *([] if full else ["from peft import PeftModel"]),
        f"from transformers import {', '.join(imports)}",
        *bits,
    ]
    arguments = [result if full else _place(loading.base), f"dtype={loading.dtype!r}", "device_map='auto'"]
    arguments += ["quantization_config=bits"] if bits else []
    lines.append(f"model = {loading.loader}.from_pretrained({', '.join(arguments)})")
    if loading.mode == "stack":
        assert loading.sft_adapter is not None
        lines += [
            f"model = PeftModel.from_pretrained(model, {_place(loading.sft_adapter)}, adapter_name='reference')",
            f"model.load_adapter({result}, adapter_name='default')",
            "model.base_model.set_adapter(['reference', 'default'])",
        ]
    elif not full:
        lines.append(f"model = PeftModel.from_pretrained(model, {result})")
    if loading.tokenizer:
        lines.append(f"tokenizer = AutoTokenizer.from_pretrained({result})")
    return lines


def _place(place: Place) -> str:
    words = [repr(place.name)]
    words += [f"revision={place.revision!r}"] if place.revision else []
    words += [f"gguf_file={place.gguf_file!r}"] if place.gguf_file else []
    return ", ".join(words)


def _bits(loading: Loading) -> list[str]:
    """Like `quantization_config` in engine/models/quantized.py: the head, which gives log-probs, is not quantised."""
    if loading.quantization == "8bit":
        return ["bits = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=['lm_head'])"]
    if loading.quantization == "4bit":
        return [
            "bits = BitsAndBytesConfig(",
            f"    load_in_4bit=True, bnb_4bit_quant_type={loading.quant_type!r}, "
            f"bnb_4bit_use_double_quant={loading.double_quant},",
            f"    bnb_4bit_compute_dtype=torch.{loading.dtype}, llm_int8_skip_modules=['lm_head'],",
            ")",
        ]
    return []
