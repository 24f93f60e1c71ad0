"""Bases whose files are quantised by others: FP8, compressed-tensors, MXFP4, GPTQ, AWQ. Codes stay as they are stored.

Each weight is widened for each product, exactly, and activations are left alone. Knows formats, tensors and modules.
"""
