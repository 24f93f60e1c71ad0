"""Checkpoints for images, sound and text: text alone runs through their decoder, and the rest is not loaded."""
