"""Writes GGUF files, the format of llama.cpp: models with their tokenizer, and LoRA adapters."""
