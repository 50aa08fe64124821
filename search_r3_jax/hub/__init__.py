"""Weights in and out: checkpoints, GGUF files and Hugging Face folders."""
