"""DPO with TRL 1.16, for those who stay with TRL: a base, an SFT adapter that is trained further, JSON Lines pairs.

    pip install trl==1.16.0 peft bitsandbytes
    python examples/trl_dpo_1_16.py --model Qwen/Qwen2.5-32B --adapter my-sft-lora --pairs pairs.jsonl

Needs nothing of dpoeng. What stands where, and since which release, is explained in docs/trl.md.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from datasets import load_dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import DPOConfig, DPOTrainer


def main() -> None:
    """Trains and saves the adapter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the SFT base: a folder or a hub id")
    parser.add_argument("--adapter", help="the SFT LoRA; without it a new one is trained on the base")
    parser.add_argument("--pairs", required=True, help="JSON Lines with prompt, chosen, rejected")
    parser.add_argument("--output-dir", default="trl-out")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--max-steps", type=int, default=-1)
    given = parser.parse_args()

    on_gpu = torch.cuda.is_available()
    loading: dict[str, Any] = {"dtype": torch.bfloat16 if on_gpu else torch.float32}
    if on_gpu:
        loading |= {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": {"": 0}}
    model = AutoModelForCausalLM.from_pretrained(given.model, **loading)
    lora = None
    if given.adapter:
        # Without a ref_model TRL (since 0.29) copies this adapter, and the copy is the reference: base + SFT adapter.
        model = PeftModel.from_pretrained(model, given.adapter, is_trainable=True)
    else:
        lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")

    # Only these three columns: others, such as `messages` or `images`, would change how TRL reads a row.
    pairs = load_dataset("json", data_files=given.pairs, split="train")
    pairs = pairs.select_columns(["prompt", "chosen", "rejected"])
    split = pairs.train_test_split(test_size=0.1, seed=42)

    config = DPOConfig(
        output_dir=given.output_dir,
        beta=0.1,  # DPOConfig since 0.9; DPOTrainer's until 0.12
        loss_type=["sigmoid"],
        max_length=given.max_length,  # there is no max_prompt_length since 0.29
        learning_rate=1e-5,  # the default is 1e-6, made for full fine-tuning
        num_train_epochs=3,
        max_steps=given.max_steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=8,
        gradient_checkpointing=on_gpu,
        bf16=on_gpu,  # the default is True
        use_cpu=not on_gpu,
        eval_strategy="epoch",  # evaluation_strategy until transformers 4.50
        save_strategy="epoch",
        logging_steps=1,
        report_to="none",
        seed=42,
    )
    trainer = DPOTrainer(
        model=model,
        args=config,  # a DPOConfig: plain TrainingArguments lack fields that the trainer reads
        train_dataset=split["train"],
        eval_dataset=split["test"],
        processing_class=AutoTokenizer.from_pretrained(given.model),  # `tokenizer` until 0.11
        peft_config=lora,
    )
    trainer.train()
    trainer.save_model(given.output_dir)


if __name__ == "__main__":
    main()
