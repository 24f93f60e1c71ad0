"""Mixtures of experts with stacked weights: in 8 or 4 bits, multiplied expert by expert, adapted by LoRA.

Knows transformers' experts modules and peft's parameter wrappers. Independent of routing, pairs and phases.
"""
