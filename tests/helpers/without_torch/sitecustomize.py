"""With its folder in PYTHONPATH, a process finds no torch, as where it is not installed.

Most users have none. Where it is, transformers imports it, which takes two seconds a process.
"""

import sys

sys.modules["torch"] = None  # type: ignore[assignment]
