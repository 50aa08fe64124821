"""The indexer process and the trainer's side of it."""
