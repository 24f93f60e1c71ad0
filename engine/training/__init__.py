"""The DPO step and the loop around it: batches, loss against cached numbers, optimizer, evaluation.

Takes pairs and a loaded policy. Knows nothing of the files pairs came from, or of how the model was loaded.
"""
