"""Progress for people: a line a stage, and a bar with rate and time left."""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.segment import Segment
from rich.text import Text

from search_r3_jax.errors import UserError
from search_r3_jax.pace import Pace

PLAIN_LINE_SECONDS = 10.0
LOGGER = logging.getLogger("search_r3_jax")
# Also what breaks lines (2028, 2029) or turns their direction round (202a to 202e, 2066 to 2069).
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def printable(text: str) -> str:
    """Replace controls, but line feeds and tabs, and what UTF-8 cannot hold by U+FFFD."""
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)


def print_line(text: str, stream: TextIO | None = None) -> None:
    """Print a line that may hold foreign text to a stream, by default standard output."""
    print(printable(" ".join(text.splitlines())), file=stream)


def show_mistake(error: UserError) -> None:
    """Print a user's mistake to standard error: its line, and its table below."""
    print_line(f"search-r3: {error.line}", sys.stderr)
    for row in error.table:
        print_line(row, sys.stderr)
    sys.stderr.flush()


class TextConsole(Console):
    """A console for lines and tables that may hold foreign text, which cannot steer the terminal."""

    def __init__(self, stream: TextIO | None = None, *, quiet: bool = False, soft_wrap: bool = True):
        """Print to `stream`, by default standard output; `soft_wrap` leaves long lines to the terminal."""
        super().__init__(file=stream, highlight=False, soft_wrap=soft_wrap, quiet=quiet)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The segments of `renderable`; what rich itself has to say to the terminal is a control segment."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def prepare_streams() -> None:
    """Let standard streams of any encoding take any text, and warnings no control characters.

    Where a stream is closed its descriptor is taken by nothing: the next file that is opened would get what
    is printed.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or _nowhere()
    sys.stderr = sys.stderr or _nowhere()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_LineFormatter(timestamps=False))


def _nowhere() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        each = task.fields["each"]
        return Text(_rate(each) if each else "", style="cyan")


class _Left(ProgressColumn):
    def render(self, task: Task) -> Text:
        ends = task.fields["ends"]
        return Text("" if ends is None else f"{_clock(max(ends - time.monotonic(), 0.0))} left", style="cyan")


class Bar:
    """Progress of one piece of work: a live bar in a terminal, a plain line every ten seconds elsewhere."""

    def __init__(
        self,
        console: Console,
        what: str,
        total: int,
        progress: Progress | None,
        *,
        aside: Callable[[], float] = lambda: 0.0,
        note: str = "",
    ):
        self._console, self._what, self._total, self._aside = console, what, total, aside
        self._progress = progress
        self._task = (
            None
            if progress is None
            else progress.add_task(what, total=total, note=note, each=None, ends=None)
        )
        self._done, self._first = 0, 0
        # The clock starts at the first report: time before it is loading, compiling, or another call.
        self._started, self._pace = False, Pace(aside=aside)
        self._spoken = time.monotonic()
        self._part: Bar | None = None

    def advance(self, count: int = 1, note: str = "") -> None:
        """Report `count` more as finished; `note` is shown beside the bar."""
        self.to(self._done + count, note)

    def to(
        self,
        done: int,
        note: str = "",
        total: int | None = None,
        *,
        each: float | None = None,
        left: float | None = None,
    ) -> None:
        """Report `done` in total as finished; `each` and `left` are seconds known better by the caller."""
        now = time.monotonic()
        self._pace.add(done - self._done)
        self._done = done
        self._total = total or self._total
        if not self._started:
            self._first, self._started = done, True
            if self._progress is not None and self._task is not None:
                self._progress.reset(self._task, completed=done, total=self._total)
        each = self._pace.seconds_each() if each is None else each
        if left is None and each is not None:
            left = (self._total - done) * each
        if self._progress is not None and self._task is not None:
            ends = None if left is None else now + left
            self._progress.update(
                self._task, completed=done, total=self._total, note=note, each=each, ends=ends
            )
            return
        if now - self._spoken >= PLAIN_LINE_SECONDS and done > self._first and each and left is not None:
            self._spoken = now
            line = (
                f"      {self._what} {done}/{self._total}, {_rate(each)}, {_clock(left)} "
                f"left{'  ' + note if note else ''}"
            )
            self._console.print(line, highlight=False, markup=False)

    def part(self, what: str, done: int, total: int) -> None:
        """Report progress of something between two steps of the work, in a bar of its own until it ends."""
        if self._part is None or self._part._what != what:
            self._end_part()
            self._part = Bar(self._console, what, total, self._progress, aside=self._aside)
        self._part.to(done, total=total)
        if done >= total:
            self._end_part()

    def _end_part(self) -> None:
        if self._part is not None and self._progress is not None and self._part._task is not None:
            self._progress.remove_task(self._part._task)
        self._part = None


class Stages:
    """Numbered stages on standard output, each with the time it took."""

    def __init__(self, count: int, *, silent: bool = False):
        """With `silent`, print nothing: only one of several processes prints."""
        self.console = TextConsole(quiet=silent)
        self.seconds: dict[str, float] = {}
        self._count, self._number = count, 0

    @contextmanager
    def stage(self, key: str, title: str) -> Iterator[None]:
        """Announce a stage and print its duration at the end; `key` names it in `seconds`."""
        self._number += 1
        head = f"[{self._number}/{self._count}]"
        self.console.print(f"{head} {title} …", markup=False)
        started = time.monotonic()
        yield
        self.seconds[key] = time.monotonic() - started
        self.console.print(f"      done in {_clock(self.seconds[key])}", style="green", markup=False)

    def reused(self, key: str, title: str, seconds: float) -> None:
        """Print a stage whose result already exists."""
        self._number += 1
        self.seconds[key] = seconds
        self.console.print(f"[{self._number}/{self._count}] {title}: reused", markup=False)

    def say(self, text: str) -> None:
        """Print a line within a stage."""
        self.console.print(f"      {text}", markup=False)

    @contextmanager
    def log(self) -> Iterator[None]:
        """Print the package's log messages as lines within a stage while the context is open."""
        handler = _StageHandler(self)
        before = LOGGER.level, LOGGER.propagate
        _install(handler)
        try:
            yield
        finally:
            LOGGER.removeHandler(handler)
            LOGGER.level, LOGGER.propagate = before

    @contextmanager
    def bar(self, what: str, total: int, *, aside: Callable[[], float] = lambda: 0.0) -> Iterator[Bar]:
        """A progress bar for one piece of work; `aside` as in `progress_bar`."""
        with progress_bar(self.console, what, total, aside=aside) as bar:
            yield bar


class _StageHandler(logging.Handler):
    """Prints log messages as lines within a stage, above a bar that is on the screen."""

    def __init__(self, stages: Stages):
        super().__init__(logging.INFO)
        self._stages = stages

    def emit(self, record: logging.LogRecord) -> None:
        self._stages.say(_with_level(record))


def show_log(stream: TextIO, *, timestamps: bool = False) -> None:
    """Print the package's log messages to a stream, from now on."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_LineFormatter(timestamps))
    _install(handler)


def _install(handler: logging.Handler) -> None:
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    # Other libraries add handlers to the root logger, which would print each message again.
    LOGGER.propagate = False


class _LineFormatter(logging.Formatter):
    """The message alone, or preceded by the time in UTC."""

    converter = time.gmtime

    def __init__(self, timestamps: bool):
        super().__init__(datefmt="%Y-%m-%d %H:%M:%S")
        self._timestamps = timestamps

    def format(self, record: logging.LogRecord) -> str:
        text = _with_level(record)
        return f"{self.formatTime(record, self.datefmt)} {text}" if self._timestamps else text


def _with_level(record: logging.LogRecord) -> str:
    text = printable(record.getMessage())
    return f"{record.levelname.lower()}: {text}" if record.levelno >= logging.WARNING else text


@contextmanager
def progress_bar(
    console: Console,
    what: str,
    total: int,
    *,
    aside: Callable[[], float] = lambda: 0.0,
    note: str = "",
) -> Iterator[Bar]:
    """A bar with rate and time left on `console`; plain lines if it is no terminal.

    `aside` gives seconds that are no part of the work, such as those of compiling; `note` stands
    beside the bar until the first report.
    """
    if not console.is_terminal:
        yield Bar(console, what, total, None, aside=aside)
        return
    columns = (
        TextColumn("      {task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        _Rate(),
        TimeElapsedColumn(),
        _Left(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield Bar(console, what, total, progress, aside=aside, note=note)


def _rate(seconds_each: float) -> str:
    return f"{1 / seconds_each:.1f}/s" if seconds_each <= 1 else f"{seconds_each:.1f} s each"


def _clock(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 60}:{whole % 60:02d}"
