"""The index protocol and its kinds."""
