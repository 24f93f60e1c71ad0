"""Turns files of preference pairs into token ids: read, filter, render with the template, tokenise, truncate.

Decides which text is scored. Imports no torch, and knows only the tokenizer of a model.
"""
