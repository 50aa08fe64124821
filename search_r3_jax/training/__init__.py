"""The two training stages: one jitted step and one loop each."""
