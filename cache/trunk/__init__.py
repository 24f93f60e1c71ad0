"""The trunk: hidden states that enter one decoder layer, stored like log-probs. Knows bytes and texts, no models.

Where the layers below some layer L are frozen, the states that enter L are constants of the data. A trunk is a spec
whose rows hold them, one row for each prompt and one for each response under its prompt.
"""
