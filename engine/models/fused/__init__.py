"""Fused kernels in a model's own layers on a GPU, wherever a trial shows that a layer computes the same function.

A layer's function is determined by running it on small numbers, never by its name, so new architectures are either
supported or left unchanged. On a CPU nothing changes.
"""
