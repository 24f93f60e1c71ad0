"""Mixtures of experts whose weights are stacked: held in 8 or 4 bits, multiplied expert by expert, adapted by LoRA.

Knows transformers' experts modules and peft's wrappers of their parameters. Knows nothing of routing, pairs or phases.
"""
