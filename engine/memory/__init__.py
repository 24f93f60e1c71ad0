"""Predicts a phase's memory by running it on the meta device, and lists the cards' memory.

Runs the real forward and the real step, without data. Measures nothing on a GPU: every figure from here is simulated or
estimated, and labelled so.
"""
