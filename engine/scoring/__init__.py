"""Token ids to per-token log-probs, by the one path that both phases share.

Packs pairs into rows that share their prompt, attends over such rows, and meets the head only where a response token is
predicted. Knows nothing of losses, of the cache's files, or of which model is the reference.
"""
