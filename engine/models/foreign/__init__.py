"""Checkpoints, adapters and tokenizers from strangers: checks their claims before a library acts on them."""
