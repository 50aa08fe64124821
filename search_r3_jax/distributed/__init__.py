"""Several processes: who takes part, and what becomes of the others when one dies."""
