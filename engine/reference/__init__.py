"""The frozen reference: what identifies it, loading it, and whether a live model agrees with the cache.

Knows which pairs go into which shard and when older values must be checked again. Knows nothing of losses or steps.
"""
