"""Fused kernels in a model's own layers, on a GPU: where a trial shows that a layer is the kernel's function.

What a layer computes is found by running it on small numbers, never by its name, so a new architecture is served or
left as it is. On a CPU nothing is changed.
"""
