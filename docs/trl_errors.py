"""Make the calls that fail one after the other on the way to DPO with TRL, and print what each answers.

    pip install trl==0.13.0 transformers==4.47.1 && python docs/trl_errors.py

Runs under whatever TRL and transformers are installed, on a CPU, with a random Qwen2 of a few thousand weights; it
needs neither dpoeng nor a network. Prints one line of JSON. docs/trl.md shows the lines of many releases.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

os.environ.update(
    CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", WANDB_DISABLED="true", TQDM_DISABLE="1"
)
warnings.simplefilter("ignore")


def answer(call: Callable[[], Any]) -> str:
    """The error of a call as a user reads it, or `accepted`."""
    try:
        call()
    except Exception as error:
        text = str(error).strip().splitlines()
        return f"{type(error).__name__}: {text[0] if text else ''}"
    return "accepted"


def tiny() -> tuple[Any, Any]:
    """A random Qwen2 and a tokenizer of characters."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    letters = ["<pad>", "<bos>", "<eos>", *map(chr, range(32, 127))]
    backend = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    config = Qwen2Config(
        vocab_size=len(letters),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return Qwen2ForCausalLM(config), tokenizer


def main() -> None:
    """Prints the line."""
    shown: dict[str, Any] = {"python": platform.python_version()}
    for name in ("trl", "transformers", "peft", "accelerate", "torch"):
        shown[name] = importlib.metadata.version(name)
    try:
        from datasets import Dataset
        from transformers import TrainingArguments
        from trl import DPOTrainer
    except Exception as error:
        shown["import"] = f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"
        print(json.dumps(shown))
        return
    try:
        from trl import DPOConfig
    except ImportError:
        DPOConfig = None  # type: ignore[assignment,misc]

    model, tokenizer = tiny()
    pairs = Dataset.from_list([{"prompt": "What? ", "chosen": "This.", "rejected": "That."}] * 4)
    with tempfile.TemporaryDirectory() as folder:
        common: dict[str, Any] = {"output_dir": folder, "max_steps": 1, "report_to": [], "save_strategy": "no"}
        plain = {**common, "remove_unused_columns": False, "use_cpu": True}
        old = {"model": model, "tokenizer": tokenizer, "train_dataset": pairs}
        new = {"model": model, "processing_class": tokenizer, "train_dataset": pairs}
        takes = DPOTrainer.__init__.__code__.co_varnames
        wrapped = getattr(DPOTrainer.__init__, "__wrapped__", None)
        takes = (*takes, *(wrapped.__code__.co_varnames if wrapped is not None else ()))
        named = new if "processing_class" in takes else old
        shown["evaluation_strategy"] = answer(lambda: TrainingArguments(**plain, evaluation_strategy="no"))
        shown["beta"] = answer(lambda: DPOTrainer(args=TrainingArguments(**plain), beta=0.1, **named))
        shown["TrainingArguments"] = answer(lambda: DPOTrainer(args=TrainingArguments(**plain), **named))
        if "processing_class" in takes:
            shown["tokenizer"] = answer(lambda: DPOTrainer(args=TrainingArguments(**plain), **old))
        if DPOConfig is not None:
            from peft import LoraConfig

            # With a LoRA no second model is loaded, which would need a folder to load it from.
            config = DPOConfig(**common, beta=0.1, use_cpu=True, remove_unused_columns=False, bf16=False)
            lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
            shown["DPOConfig(evaluation_strategy)"] = answer(lambda: DPOConfig(**common, evaluation_strategy="no"))
            shown["DPOConfig, DPOTrainer(beta)"] = answer(
                lambda: DPOTrainer(args=config, peft_config=lora, beta=0.1, **named)
            )
            shown["DPOConfig"] = answer(lambda: DPOTrainer(args=config, peft_config=lora, **named).train())
    sys.stdout.flush()
    print(json.dumps(shown))


if __name__ == "__main__":
    main()
