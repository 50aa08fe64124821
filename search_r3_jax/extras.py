"""Packages that only some commands need: which extra brings them, told before the work begins."""

from __future__ import annotations

import importlib.util

from search_r3_jax.errors import UserError

# Where a package is not called what is imported of it.
_PACKAGES = {"Stemmer": "PyStemmer", "sentence_transformers": "sentence-transformers"}


def require(what: str, extra: str, *modules: str) -> None:
    """Raise UserError if a module that `what`, a command or an option, needs is not installed.

    The modules are looked for, not imported.
    """
    for module in modules:
        if not _is_installed(module):
            package = _PACKAGES.get(module, module)
            raise UserError(f"{what}: {package} is not installed; run: pip install 'search_r3_jax[{extra}]'")


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        # A package above it is missing, or has no spec.
        return False
