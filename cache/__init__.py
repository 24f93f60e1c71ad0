"""The reference cache: content-hashed, memory-mapped Arrow files. Knows nothing of models or of DPO."""
