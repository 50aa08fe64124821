"""Compiled programs are kept from call to call: in a folder of the user's, or with a run. Imports no jax."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from pathlib import Path

MOST_BYTES = 2 * 1024**3
_FOLDER = "JAX_COMPILATION_CACHE_DIR"
_SETTINGS = {
    "JAX_COMPILATION_CACHE_MAX_SIZE": MOST_BYTES,
    # Small programs too: a command has a hundred of them.
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": 0.0,
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": -1,
}


def user_folder() -> Path | None:
    """The user's folder of programs for this kind of processor, within `XDG_CACHE_HOME` or `~/.cache`.

    A program may use instructions that another processor lacks, and home folders are shared. None for a user
    without a home.
    """
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    if not caches.is_absolute():
        return None
    return caches / "search-r3" / f"programs-{platform.machine()}-{_instructions()}"


def keep_programs(keep: bool = True) -> None:
    """Keep what this process and its children compile in `user_folder`; with False keep nothing.

    JAX_COMPILATION_CACHE_DIR, if set, names another folder, whose bounds are its owner's. A folder that
    cannot be written is done without.
    """
    if not keep:
        _set("JAX_ENABLE_COMPILATION_CACHE", False)
        return
    if _FOLDER in os.environ or os.environ.get("JAX_ENABLE_COMPILATION_CACHE", "true").lower() in (
        "0",
        "false",
    ):
        return
    folder = user_folder()
    if folder is None:
        return
    try:
        # What lies here is run: nobody else may write it.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _remove_torn(folder)
    except OSError:
        return
    if os.access(folder, os.W_OK):
        _set(_FOLDER, str(folder))
        for name, value in _SETTINGS.items():
            _set(name, value)


def keep_programs_with_run(folder: Path) -> None:
    """Keep compiled programs in a folder of a run, which other hosts, and a restart elsewhere, find too.

    Of several processes only the first writes. JAX_COMPILATION_CACHE_DIR, if the user has set it, names
    another folder.
    """
    named = os.environ.get(_FOLDER)
    if named is not None and named != str(user_folder()):
        return
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    jax.config.update("jax_compilation_cache_dir", str(folder))
    # A bound needs locks, which buckets and network drives lack; a run has few programs.
    jax.config.update("jax_compilation_cache_max_size", -1)
    # Programs of before may have opened another folder, or have found that there is none.
    compilation_cache.reset_cache()


def _set(name: str, value: str | float) -> None:
    """For this process, whether or not it has imported jax, and for those that it starts."""
    os.environ[name] = str(value)
    if "jax" in sys.modules:
        import jax

        jax.config.update(name.lower(), value)


def _remove_torn(folder: Path) -> None:
    """Remove programs whose writer was killed: JAX writes the time of use last, and stumbles without it."""
    for program in folder.glob("*-cache"):
        if not program.with_name(f"{program.name.removesuffix('-cache')}-atime").exists():
            program.unlink(missing_ok=True)


def _instructions() -> str:
    """A name for the instructions that this processor has."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return hashlib.sha256(named.encode()).hexdigest()[:8]
