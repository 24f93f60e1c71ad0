"""Turns checkpoints into models for scoring and training: loading, quantisation, LoRA, FSDP2, offloading.

The only wing that imports transformers, peft and bitsandbytes. Independent of pairs, losses and the cache's files.
"""
