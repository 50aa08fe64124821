"""What the parser of the command line refuses, in one line instead of its boxes of several."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
# A line of a box with a frame, or of one for streams that are not UTF-8; and one that divides boxes.
_LINE = re.compile(r"│ (.*?)\s*│|  (.*?)\s*")
_RULE = re.compile(r"[─-]{3,}")
_KINDS = {"INT": "a whole number", "FLOAT": "a number"}

_Tell = Callable[[re.Match[str]], str]
# What the parser says, and what is said instead.
_SAYINGS: tuple[tuple[re.Pattern[str], _Tell], ...] = (
    (
        re.compile(r"Error parsing (\S+): invalid literal for int\(\) with base 10: (.+)"),
        lambda said: f"{said[1]}: {said[2]} is no int; give a whole number",
    ),
    (
        re.compile(r"Error parsing (\S+): could not convert string to float: (.+)"),
        lambda said: f"{said[1]}: {said[2]} is no float; give a number",
    ),
    (
        re.compile(r"Error parsing (\S+): no type matching (\S+) could be instantiated from \[(.+?)\]\..*"),
        lambda said: f"{said[1]}: {said[3]} is none of {_kinds(said[2])}",
    ),
    (
        re.compile(r"Error parsing (\S+): Could not .*parse.* arguments:? \[(.+)\].*"),
        lambda said: f"{said[1]}: {said[2]}: not all are of its kind",
    ),
    (
        re.compile(r"invalid choice (.+) for argument '(\S+)'\. Expected one of \((.+?),?\)\."),
        lambda said: f"{said[2]}: {said[1]} is none of {said[3].replace(chr(39), '')}",
    ),
    (
        re.compile(r"Missing value for argument '(\S+)'\. Expected \d+ values\."),
        lambda said: f"{said[1]}: its value is missing",
    ),
    (re.compile(r"Expected one of \{(.+)\}\."), lambda said: f"a command is missing; there are {said[1]}"),
    (re.compile(r"Unrecognized options: (.+)"), lambda said: f"{said[1]}: belongs to no option"),
    (re.compile(r"Error parsing (\S+): (.+)"), lambda said: f"{said[1]}: {said[2]}"),
)


def one_line(box: str, command: str) -> str:
    """What a box of the parser says, as `COMMAND: WHAT; REMEDY`; a text that is no box as it is.

    The box must be as wide as its lines are long.
    """
    text = _ANSI.sub("", box)
    rows = list(_body(text))
    said = (_missing(rows) or _translated(" ".join(" ".join(rows).split()))) if rows else text
    return f"{command}: {' '.join(said.split())}; `{command} --help` explains it"


def _body(text: str) -> Iterator[str]:
    """The lines of a box below its title up to its first rule, indented as they are."""
    for line in text.splitlines():
        if found := _LINE.fullmatch(line):
            row = found[1] or found[2] or ""
            if _RULE.fullmatch(row.strip()):
                return
            yield row


def _missing(rows: Sequence[str]) -> str:
    """The required options that a box lists, each with its help further in; empty for other boxes."""
    if not any(row.startswith("Missing from ") for row in rows):
        return ""
    options = []
    for row, following in zip(rows, [*rows[1:], ""], strict=True):
        if re.match(r" {4}\S", row):
            name = row.strip()
            # Of what has no flag only the help tells what it is.
            options.append(name if name.startswith("-") else following.strip().partition(". ")[0])
    return f"{', '.join(options)}: missing"


def _translated(said: str) -> str:
    for pattern, tell in _SAYINGS:
        if found := pattern.fullmatch(said):
            return tell(found)
    return said


def _kinds(union: str) -> str:
    """`a whole number, best, None` for `{None}|INT|{best}`."""
    kinds: list[str] = re.findall(r"[^|{},]+", union)
    first = [_KINDS[kind] for kind in kinds if kind in _KINDS]
    return ", ".join([*first, *(kind for kind in kinds if kind not in _KINDS)])
