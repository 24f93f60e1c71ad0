"""The DPO step and the loop around it: batches, loss against cached log-probs, optimizer, evaluation.

Takes pairs and a loaded policy. Independent of the pairs' files and of how the model was loaded.
"""
