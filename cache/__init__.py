"""The reference cache: content-hashed, memory-mapped Arrow files. Independent of models and of DPO."""
