"""A training run on disk: its folder, checkpoints, metrics, lock and trackers.

Takes and gives plain values. Knows nothing of models' arithmetic, and nothing of the cache beyond what identifies it.
"""
