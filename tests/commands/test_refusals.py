"""What the parser refuses is one line that names command, option and remedy, with status 2."""

import pytest
from helpers.command_line import search_r3_here

from search_r3_jax.commands.refusals import one_line

SFT = "sft --config smollm2 --run r"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (f"{SFT} --sft.steps eight", "sft: --sft.steps: 'eight' is no int; give a whole number"),
        (f"{SFT} --sft.temperature warm", "sft: --sft.temperature: 'warm' is no float; give a number"),
        (f"{SFT} --start-step first", "sft: --start-step: 'first' is none of a whole number, None, best"),
        (f"{SFT} --sft.reasoning none", "sft: --sft.reasoning: 'none' is none of off, column, self, "),
        (f"{SFT} --remat some", "sft: --remat: 'some' is none of none, dots, offload, full"),
        (f"{SFT} --sft.matryoshka 8 x", "sft: --sft.matryoshka: '8', 'x': not all are of its kind"),
        ("eval --model m --data d --mode fast", "eval: --mode: 'fast' is none of direct, reason, both, all"),
        ("eval --model m --data", "eval: --data: its value is missing"),
        ("eval --data d", "eval: --model STR: missing"),
        ("eval", "eval: --model STR, --data PATH: missing"),
        ("compare a", "compare: Another file on the same data, or another mode of the same file: missing"),
        ("rl --config smollm2", "rl: --run PATH: missing"),
        ("data build --out d --source html", "data build: --source: 'html' is none of beir, jsonl, table, "),
        ("data build --source beir", "data build: --out PATH: missing"),
        ("export --model m --out o more", "export: more: belongs to no option"),
        ("data", "data: a command is missing; there are build, mine"),
        ("", ": a command is missing; there are quickstart, data, sft"),
    ],
)
def test_a_refused_value_is_one_line(arguments: str, said: str) -> None:
    shown = search_r3_here(*arguments.split())
    assert (shown.returncode, shown.stdout, shown.stderr.count("\n")) == (2, "", 1)
    command = " ".join(["search-r3", *said.partition(":")[0].split()])
    assert shown.stderr.startswith(f"{command}:{said.partition(':')[2]}")
    assert shown.stderr.endswith(f"; `{command} --help` explains it\n")


def test_a_long_value_is_not_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    long = "x" * 150
    shown = search_r3_here(*SFT.split(), "--sft.steps", long)
    assert shown.stderr.startswith(f"search-r3 sft: --sft.steps: '{long}' is no int; ")


def test_a_value_cannot_steer_the_terminal() -> None:
    shown = search_r3_here(*SFT.split(), "--remat", "a\x1b[2Jb\nc")
    assert (shown.stderr.count("\n"), "\x1b" in shown.stderr) == (1, False)


FRAMED = """
╭─ Value error ───────────────────────────────────────────────╮
│ Error parsing --seed: invalid literal for int() with base 10: 'a b'   │
│ ─────────────────────────────────────────────────────────── │
│ Argument helptext:                                          │
╰─────────────────────────────────────────────────────────────╯
"""


def test_a_box_with_a_frame_is_read_too() -> None:
    said = "search-r3 sft: --seed: 'a b' is no int; give a whole number; `search-r3 sft --help` explains it"
    assert one_line(FRAMED, "search-r3 sft") == said
    assert one_line(f"\x1b[31m{FRAMED}\x1b[0m", "search-r3 sft") == said


def test_what_is_no_box_is_told_as_it_is() -> None:
    said = "search-r3 sft: something else; `search-r3 sft --help` explains it"
    assert one_line("something\nelse\n", "search-r3 sft") == said
