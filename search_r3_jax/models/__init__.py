"""The decoder, its attention, adapters, and the embedding head."""
