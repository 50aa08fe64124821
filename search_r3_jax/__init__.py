"""Search-R3 in JAX: a language model that thinks first and then embeds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from search_r3_jax.embedder import Embedder, Thought

__all__ = ["Embedder", "Thought"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Imported when first asked for: the package alone loads in no time and without jax.
    if name in __all__:
        from search_r3_jax.compile_cache import keep_programs
        from search_r3_jax.runtime_env import configure_environment

        configure_environment()
        keep_programs()
        from search_r3_jax import embedder

        return getattr(embedder, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
