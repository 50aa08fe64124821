"""`python -m search_r3_jax` is `search-r3`."""

from search_r3_jax.cli import main

if __name__ == "__main__":
    main()
