"""Checkpoints, adapters and tokenizers of strangers: what they claim is looked at before a library acts on it."""
