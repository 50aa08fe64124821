"""The day that chat templates of `transformers` see."""

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
