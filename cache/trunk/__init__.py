"""The trunk: hidden states that enter one decoder layer, stored like log-probs. Knows bytes and texts, not models.

If the layers below layer L are frozen, the states that enter L are constants of the data. A trunk is a spec whose rows
are these states: one row for each prompt, and one for each response after its prompt.
"""
