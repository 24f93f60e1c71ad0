"""Chooses pairs by what the cache knows of them, as a new view of the same objects. Knows no model."""
