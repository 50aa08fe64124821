"""Weights in and out: GGUF and Hugging Face folders."""
