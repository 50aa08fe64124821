"""A program for tests: `search-r3`, killed when the checkpoint of step 4 is there and its snapshot is not.

Arguments: those of `search-r3`.
"""

import os
import signal
from typing import Any, cast

from search_r3_jax import cli
from search_r3_jax.hub import snapshot_writer

STEP = 4


def main() -> None:
    write, module = snapshot_writer.write_checksums, cast(Any, snapshot_writer)

    def dying(folder: Any) -> None:
        # The last act before the snapshot takes its name.
        if folder.name.startswith(f"{STEP}."):
            os.kill(os.getpid(), signal.SIGKILL)
        write(folder)

    module.write_checksums = dying
    cli.main()


if __name__ == "__main__":
    main()
