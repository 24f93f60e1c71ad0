"""Bases with already quantised files: FP8, compressed-tensors, MXFP4, GPTQ, AWQ. Codes stay as stored.

Each weight is widened exactly for each product; activations are not quantised.
"""
