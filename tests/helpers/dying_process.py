"""A program for tests: `search-r3`, whose process is gone as soon as process 0 calls something of all.

Arguments: the name of the call, then those of `search-r3`.
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any, cast

from search_r3_jax.distributed.lockstep import Team


def main() -> None:
    deadly = sys.argv.pop(1)
    from search_r3_jax import cli

    together = Team.together

    def deadly_together(team: Team, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def die(*arrays: Any) -> Any:
            os.kill(os.getpid(), signal.SIGKILL)

        return together(team, name, die if name == deadly else call)

    cast(Any, Team).together = deadly_together
    cli.main()


if __name__ == "__main__":
    main()
