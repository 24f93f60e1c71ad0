"""Selects pairs by their reference log-probs, as a new view of the same objects. Needs no model."""
