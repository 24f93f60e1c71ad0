"""Longer studies: accuracy, quality by precision, scaling, sharing, several processes, calculated plans."""
