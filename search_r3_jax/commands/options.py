"""Options of every command."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro


@dataclass(frozen=True, kw_only=True)
class CommonOptions:
    """What every command takes.

    Attributes:
        compile_cache: Keep compiled programs where the next call finds them: in `~/.cache/search-r3`,
            2 GiB at most; on a TPU, training keeps them in its run folder.
        debug: On an error, show the traceback.
    """

    compile_cache: bool = True
    debug: bool = False


Common = Annotated[CommonOptions, tyro.conf.arg(name="")]
"""The last field of a command: its flags have no prefix, and come last in its help."""
