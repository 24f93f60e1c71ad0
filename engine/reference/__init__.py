"""The frozen reference: its identity, loading it, and comparing a live model with the cache.

Decides which pairs go into which shard, and when older values must be checked again. Independent of losses and steps.
"""
