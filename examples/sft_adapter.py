"""Trains a small SFT LoRA on the chosen responses of a file of pairs: the adapter that DPO starts from.

    python examples/sft_adapter.py MODEL PAIRS OUT [--steps 20]

Any SFT trainer does; this one is here so that examples/sft_then_dpo.sh can be run from nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpoeng.engine.data.pairs import read_pairs
from dpoeng.engine.data.tokenization import tokenize_pairs


def main() -> None:
    """Plain next-token training on prompt + chosen, one pair at a time, loss on the response."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("pairs", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--max-length", type=int, default=256)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(arguments.model)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    data = tokenize_pairs(read_pairs([arguments.pairs]).pairs, tokenizer, max_length=arguments.max_length)
    for step in range(arguments.steps):
        ids = data.pairs[step % len(data.pairs)].ids
        tokens = torch.tensor([[*ids.prompt_ids.tolist(), *ids.chosen_ids.tolist()]])
        labels = tokens.clone()
        labels[0, : len(ids.prompt_ids)] = -100
        loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: loss {loss.item():.3f}")
    model.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
