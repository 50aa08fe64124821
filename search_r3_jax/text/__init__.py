"""Prompts, the tokenizer with `<|embed_token|>`, padding and packing."""
