"""What the package logs, as a list of lines."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        self.lines.append(f"warning: {text}" if record.levelno >= logging.WARNING else text)


@contextmanager
def collect_log_lines() -> Iterator[list[str]]:
    """While entered, every message of the package is a line of the list; warnings say so."""
    handler, logger = _Lines(), logging.getLogger("search_r3_jax")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield handler.lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
