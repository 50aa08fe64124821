"""Peak memory of a piece of work in this process."""

import re
import threading
from pathlib import Path


def anonymous_bytes() -> int:
    """This process's resident anonymous pages."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


class PeakMemory:
    """Samples `anonymous_bytes` about every millisecond while it is entered."""

    def __enter__(self) -> "PeakMemory":
        self.start = self.peak = anonymous_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._done.wait(0.001):
            self.peak = max(self.peak, anonymous_bytes())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.peak = max(self.peak, anonymous_bytes())
