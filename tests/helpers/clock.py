"""Clocks of tests: the day that chat templates of `transformers` see, and seconds that pass on request."""

import datetime

import pytest
from transformers.utils import chat_template_utils


class Clock(datetime.datetime):
    """A clock that stands still on a day of November 2026."""

    shown = 1

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> "Clock":
        """Noon of that day."""
        return cls(2026, 11, cls.shown, 12, tzinfo=tz)


def set_day(patch: pytest.MonkeyPatch, day: int) -> None:
    """Let `strftime_now` of chat templates name a day of November 2026."""
    patch.setattr(Clock, "shown", day)
    patch.setattr(chat_template_utils, "datetime", Clock)


class Timer:
    """Stands in for `time.perf_counter`: its seconds pass when a test says so."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        """The seconds up to now."""
        return self.seconds

    def wait(self, seconds: float) -> None:
        """Let seconds pass."""
        self.seconds += seconds
