"""What is printed: foreign text cannot steer a terminal, and no encoding ends a command."""

import io
import logging
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from search_r3_jax.console import TextConsole, prepare_streams, print_line, printable, show_log

HOSTILE = "a\x1b[2J\x1b]0;title\x07b\x9bc\rd\x7fe\u202ef\u2066"
HARMLESS = "a\ufffd[2J\ufffd]0;title\ufffdb\ufffdc\ufffdd\ufffde\ufffdf\ufffd"


def controls(text: str) -> set[str]:
    return {character for character in text if character != "\n" and not character.isprintable()}


def test_text_loses_its_controls() -> None:
    assert printable(HOSTILE) == HARMLESS
    assert printable("tab\tline\nend é 你") == "tab\tline\nend é 你"


def test_tables_lines_and_logs_lose_them() -> None:
    stream = io.StringIO()
    table = Table(HOSTILE, title=HOSTILE, box=SIMPLE_HEAD)
    table.add_row(Text(HOSTILE, style="bold"))
    console = TextConsole(stream)
    console.print(table)
    console.print(HOSTILE, markup=False)
    print_line(f"{HOSTILE}\nsecond", stream)
    logger = logging.getLogger("search_r3_jax")
    before = logger.handlers[:], logger.level, logger.propagate
    try:
        show_log(stream)
        logging.getLogger("search_r3_jax.test").warning(HOSTILE)
    finally:
        logger.handlers, logger.level, logger.propagate = before
    text = stream.getvalue()
    assert controls(text) == set()
    assert text.count("title") == 6
    assert text.splitlines()[-2].endswith(" second")


def test_colours_of_our_own_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = io.StringIO()
    TextConsole(stream).print(Text("\x1b[31mtext", style="bold"))
    assert stream.getvalue().startswith("\x1b[1m\ufffd[31mtext\x1b[0m")


def test_any_encoding_takes_any_text(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding="ascii") for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    last = logging.lastResort
    assert last is not None
    monkeypatch.setattr(logging, "lastResort", logging.StreamHandler())
    prepare_streams()
    print("− → ü \udcff")
    print_line("− → ü", sys.stderr)
    TextConsole().print("95 % … \u2009")
    for stream in streams.values():
        stream.flush()
    assert streams["stdout"].buffer.getvalue().startswith(b"? ? ? ?\n95 % ?")
    assert streams["stderr"].buffer.getvalue() == b"? ? ?\n"


def test_closed_streams_end_no_command_and_take_no_other_files_place(tmp_path: Path) -> None:
    """What is printed must not land in the next file that is opened."""
    program = (
        "import sys; from search_r3_jax.console import prepare_streams; prepare_streams();"
        f"file = open({str(tmp_path / 'result')!r}, 'w'); print('shown'); print('said', file=sys.stderr);"
        "sys.stdout.flush(); sys.stderr.flush(); file.write('result'); file.close()"
    )
    for closed, stdout in ((">&-", ""), ("<&-", "shown\n"), ("2>&-", "shown\n"), ("<&- >&- 2>&-", "")):
        command = f"{shlex.quote(sys.executable)} -c {shlex.quote(program)} {closed}"
        ended = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
        assert (ended.returncode, ended.stdout) == (0, stdout), (closed, ended.stderr)
        assert (tmp_path / "result").read_text() == "result"
