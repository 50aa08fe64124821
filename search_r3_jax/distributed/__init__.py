"""Several processes as one JAX cluster."""
