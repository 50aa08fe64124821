"""Search over document vectors: indexes, their published versions, the reward environment."""
