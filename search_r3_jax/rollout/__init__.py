"""Generation of reasoning and embedding in one pass."""
