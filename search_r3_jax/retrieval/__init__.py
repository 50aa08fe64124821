"""Search over document vectors: indexes, their published versions, and the environment that rewards
rollouts."""
