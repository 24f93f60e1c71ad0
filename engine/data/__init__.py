"""Files of preference pairs to token ids: read, filter, render with the template, tokenise, truncate.

Decides what text is scored. Imports no torch, and knows nothing of models beyond their tokenizer.
"""
