"""Exports for other programs: the cache's log-probs for other trainers, adapters and models for other runtimes."""
