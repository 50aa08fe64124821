"""Stage 2's environment: candidates, fresh vectors, rewards."""
