"""Checkpoints to models that can be scored and trained: loading, quantisation, LoRA, FSDP2, offloading.

The only wing that imports transformers, peft and bitsandbytes. Knows nothing of pairs, losses or the cache's files.
"""
