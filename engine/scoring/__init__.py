"""Turns token ids into per-token log-probs, by the one path that both phases share.

Packs pairs into rows that share their prompt, attends over such rows, and applies the head only where a response token
is predicted. Independent of losses, the cache's files, and of which model is the reference.
"""
