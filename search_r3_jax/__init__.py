"""Search-R3 in JAX: a language model that thinks first and then embeds."""

__version__ = "0.1.0"
