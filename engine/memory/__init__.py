"""How much memory a phase needs, found by running it on the meta device; and what a card has.

Knows the real forward and the real step, which it runs without data. Measures nothing on a GPU: every figure from here
is a simulation or an estimate, and is labelled so.
"""
