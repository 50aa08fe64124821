"""A mistyped command or option is one short line that says what was probably meant, and status 2."""

import pytest
from helpers.command_line import search_r3_here


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("stf --config smollm2", "stf: no such command; did you mean sft?"),
        ("evaluate --model m", "evaluate: no such command; did you mean eval?"),
        ("data biuld --out d", "data biuld: no such command; did you mean build?"),
        ("data xyz", "data xyz: no such command; there are build, mine"),
        ("export --modle m --out o", "--modle: search-r3 export has no such option; did you mean --model?"),
        ("eval --model m --data d --max_querys=4", "did you mean --max-queries"),
        ("data build --source jsonl --out d --skip-bda", "did you mean --skip-bad or --no-skip-bad?"),
        ("sft --config smollm2 --run r --sft.stesp 3", "did you mean --sft.steps"),
        # Of an option's last part.
        ("sft --config smollm2 --run r --eval-every 3", "did you mean --rl.eval-every or --sft.eval-every"),
        ("compare a b --zzz 1", "--zzz: search-r3 compare has no such option; `search-r3 compare --help`"),
    ],
)
def test_a_mistyped_word_is_one_line(arguments: str, line: str) -> None:
    shown = search_r3_here(*arguments.split())
    assert (shown.returncode, shown.stdout, shown.stderr.count("\n")) == (2, "", 1)
    assert shown.stderr.startswith("search-r3: ")
    assert line in shown.stderr


def test_a_stage_may_be_given_the_settings_that_its_help_hides() -> None:
    shown = search_r3_here("sft", "--config", "smollm2", "--rl.stpes", "3", "--run", "r")
    assert "did you mean --rl.steps" in shown.stderr


def test_help_and_completion_are_not_held_back() -> None:
    assert "--skip-bad" in search_r3_here("data", "build", "--help").stdout
    script = search_r3_here("--tyro-print-completion", "bash")
    assert (script.returncode, "complete" in script.stdout) == (0, True)
