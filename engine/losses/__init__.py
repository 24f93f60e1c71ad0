"""The DPO family as functions: from per-token log-probs of policy and reference to one loss per pair.

`names` imports no torch, so that a configuration can be checked without it.
"""
