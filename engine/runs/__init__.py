"""A training run on disk: its folder, checkpoints, metrics, lock and trackers.

Takes and returns plain values. Independent of models' arithmetic, and of the cache beyond its identity.
"""
