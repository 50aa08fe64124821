"""The subcommands of `search-r3`: each reads its options and calls one function.

Importing them does not load jax.
"""
