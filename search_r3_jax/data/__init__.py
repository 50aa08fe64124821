"""Collections: read, generated, and built into TFDS data sets."""
