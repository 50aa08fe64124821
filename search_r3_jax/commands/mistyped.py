"""Mistyped commands and options: one line with what was probably meant."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Callable, Iterable, Sequence

_CHOICES = re.compile(r"\{([a-z,-]+)\}")
_OPTION = re.compile(r"(?<![\w-])--[a-z][\w.-]*\w")
# The words behind which another one chooses a command.
GROUPS = ((), ("data",))
MOST = 3


def explain_mistyped(arguments: Sequence[str], help_of: Callable[[Sequence[str]], str]) -> str | None:
    """A line about the first word that is no command, or the first option that the command does not have.

    None where all are known. `help_of` gives the help text of a command, which lists what there is.
    """
    left, words = list(arguments), ()
    while words in GROUPS and left and not left[0].startswith("-"):
        found, word = _CHOICES.search(help_of(words)), left.pop(0)
        choices = found[1].split(",") if found else [word]
        if word not in choices:
            meant = _meant(difflib.get_close_matches(word, choices, MOST))
            there = meant or f"there are {', '.join(choices)}"
            return f"{' '.join((*words, word))}: no such command; {there}"
        words = (*words, word)
    text = help_of(words)
    known = {option.replace("_", "-") for option in _OPTION.findall(text)}
    command = " ".join(["search-r3", *words])
    for argument in itertools.takewhile(lambda each: each != "--", left):
        option = argument.partition("=")[0].replace("_", "-")
        if option.startswith("--") and option not in known:
            there = _meant(_similar(option, known)) or f"`{command} --help` lists what there is"
            return f"{option}: {command} has no such option; {there}"
    return None


def command_words(arguments: Sequence[str]) -> tuple[str, ...]:
    """The words at the beginning that choose a command."""
    words = ()
    for argument in arguments:
        if words not in GROUPS or argument.startswith("-"):
            break
        words = (*words, argument)
    return words


def _similar(option: str, known: Iterable[str]) -> list[str]:
    """Options whose last part is this one, then those that look like it."""
    known = sorted(known)
    same_end = [each for each in known if each.endswith(f".{option[2:]}")]
    alike = difflib.get_close_matches(option, known, MOST, cutoff=0.7)
    return list(dict.fromkeys([*same_end, *alike]))[:MOST]


def _meant(names: Sequence[str]) -> str:
    return f"did you mean {' or '.join(names)}?" if names else ""
