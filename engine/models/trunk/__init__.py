"""Models that begin at a decoder layer: which layers are trained, and stand-ins for those below.

Knows modules, layers and checkpoints; not where hidden states are stored (`dpoeng.cache.trunk`).
"""
