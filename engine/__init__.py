"""Pairs, tokens, layout, models, scoring and the two phases of offline-reference DPO."""
