"""The subcommands of `search-r3`, thin: each reads its options and calls one function. Importing them loads
no jax."""
