"""What the pages say of the command line: commands parse, flags and settings exist, each flag has a help."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import io
import re
import shlex
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.pages import PAGES, ROOT, fenced, name_of, prose_of

SECTIONS = ("data", "text", "lora", "sft", "rl", "index", "mesh")


def subcommands_of(action: argparse.Action) -> dict[str, argparse.ArgumentParser]:
    """The parsers under an action that chooses one; tyro has an argparse of its own, so types say nothing."""
    return action.choices if isinstance(action.choices, dict) else {}


@functools.cache
def parsers() -> dict[tuple[str, ...], argparse.ArgumentParser]:
    """The parser of each subcommand, by its words."""
    import tyro

    from search_r3_jax.cli import subcommands

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        whole = tyro.extras.get_parser(
            subcommands(["--config", "smollm2"]), prog="search-r3", config=(tyro.conf.OmitSubcommandPrefixes,)
        )
    found: dict[tuple[str, ...], argparse.ArgumentParser] = {}

    def walk(parser: Any, words: tuple[str, ...]) -> None:
        found[words] = parser
        for action in parser._actions:
            for word, under in subcommands_of(action).items():
                walk(under, (*words, word))

    walk(whole, ())
    return found


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    return {flag.replace("_", "-") for action in parser._actions for flag in action.option_strings}


def commands_in_blocks(page: Path) -> Iterator[str]:
    """The arguments of `search-r3` in a page's blocks, those after a launcher's `--` included."""
    for block in fenced(page, "", "bash", "sh"):
        # A line continues after a backslash, and in an indented line that starts with a flag.
        joined = re.sub(r"\\\n|\n[ ]+(?=[\[(-])", " ", block)
        for line in joined.splitlines():
            yield from command_in(line)


def commands_of(page: Path) -> Iterator[str]:
    """The same in a page's blocks and its text."""
    yield from commands_in_blocks(page)
    for code in re.findall(r"`([^`\n]+)`", prose_of(page).replace("\n", " ")):
        yield from command_in(code)


def command_in(line: str) -> Iterator[str]:
    line = re.split(r"\s#\s", line)[0].strip()
    if line.startswith("search-r3 "):
        yield line.removeprefix("search-r3 ")
    elif re.match(r"\S*launch/\S+\.sh ", line) and " -- " in line:
        yield line.split(" -- ", 1)[1]


def mistakes_in(command: str) -> list[str]:
    """What a command line names that there is not; words in capitals, brackets and dots are placeholders."""
    words: tuple[str, ...] = ()
    for word in command.split():
        if (*words, word) not in parsers():
            break
        words = (*words, word)
    written = command.split()[len(words) : len(words) + 1]
    if words == ():
        # `search-r3 …` and `search-r3 --help` say nothing of a subcommand.
        only_flags = not written or written[0].startswith(("…", "-", "ARGUMENTS"))
        return [] if only_flags else [f"{written[0]}: no subcommand"]
    known = flags_of(parsers()[words])
    return [flag for flag in re.findall(r"(?<![\w-])--[a-z][\w.-]*", command) if flag not in known]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_name_what_there_is(page: Path) -> None:
    wrong = {command: mistakes_in(command) for command in commands_of(page)}
    assert {command: found for command, found in wrong.items() if found} == {}


def without_options(command: str) -> list[str]:
    """The words of a command line without what stands in brackets; none where dots leave more open."""
    command = re.sub(r"\s*\[[^\]]*\]", "", command)
    return [] if re.search(r"[…|<>]|&&", command) else shlex.split(command)


def refusal_of(words: list[str]) -> str:
    """What the command line says of these words; empty where it takes them."""
    from search_r3_jax.cli import parse
    from search_r3_jax.errors import UserError

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            parse(words)
    except UserError as error:
        return str(error)
    except SystemExit as ended:
        return said.getvalue() if ended.code else ""
    return ""


def test_commands_in_blocks_are_taken() -> None:
    """With their values, and with all that a command requires."""
    every = {command: without_options(command) for page in PAGES for command in commands_in_blocks(page)}
    refused = {command: refusal_of(words) for command, words in every.items() if words}
    assert {command: said for command, said in refused.items() if said} == {}
    assert len(refused) > 25
    assert "'eight' is no int" in refusal_of(["sft", "--config", "smollm2", "--run", "r", "--seed", "eight"])


def test_commands_are_found() -> None:
    every = [command for page in PAGES for command in commands_of(page)]
    assert len(every) > 40
    assert any("\n" not in command and "--last-rank" in command for command in every)
    assert mistakes_in("data mine --model M [--frist-rank 0]") == ["--frist-rank"]
    assert mistakes_in("trian --run DIR") == ["trian: no subcommand"]


def test_launchers_are_called_with_flags_that_they_know() -> None:
    wrong = []
    for page in PAGES:
        for block in fenced(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                call = re.match(r"\./(launch/\S+\.sh)(.*)", re.split(r"\s#\s", line)[0])
                if call is None:
                    continue
                script = (ROOT / call[1]).read_text(encoding="utf-8")
                flags = re.findall(r"(?<![\w-])--[a-z][\w-]*", call[2].split(" -- ")[0])
                wrong += [f"{call[1]} {flag}" for flag in flags if not re.search(rf"{flag}(?![\w-])", script)]
    assert wrong == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_scripts_that_are_named_exist(page: Path) -> None:
    scripts = re.findall(
        r"(?:python |\./)((?:tests|launch)/\S+\.(?:py|sh))", page.read_text(encoding="utf-8")
    )
    assert [script for script in scripts if not (ROOT / script).exists()] == []


@functools.cache
def settings() -> set[str]:
    from search_r3_jax.config import RunConfig

    # Any: each section is a dataclass of its own.
    def paths(config: Any, prefix: str) -> Iterator[str]:
        for entry in dataclasses.fields(config):
            value = getattr(config, entry.name)
            yield prefix + entry.name
            if dataclasses.is_dataclass(value):
                yield from paths(value, f"{prefix}{entry.name}.")

    return set(paths(RunConfig(), ""))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_settings_in_the_text_exist(page: Path) -> None:
    """Also those that are written as flags; the change log names those that were renamed."""
    text = re.sub(r"### Renamed settings.*?(?=\n#|\Z)", "", prose_of(page), flags=re.DOTALL)
    named = {
        match.replace("-", "_").replace(".no_", ".")
        for code in re.findall(r"`([^`]+)`", text)
        for match in re.findall(
            rf"(?<![\w./-])(?:--)?((?:{'|'.join(SECTIONS)})\.[a-z][\w.-]*\w)(?![\w*.-])", code
        )
        if not match.endswith((".py", ".json", ".jsonl", ".md"))
    }
    assert named - settings() == set()


def undocumented(parser: argparse.ArgumentParser) -> list[str]:
    """Flags whose help is nothing but a default."""
    return [
        (action.option_strings or [action.dest])[0]
        for action in parser._actions
        if not subcommands_of(action)
        and not re.sub(
            r"\((?:default|required|repeatable|optional)\b.*\)\s*$", "", action.help or "", flags=re.DOTALL
        ).strip()
    ]


def test_every_flag_has_a_help_text() -> None:
    missing = {" ".join(words): undocumented(parser) for words, parser in parsers().items()}
    assert {words: flags for words, flags in missing.items() if flags} == {}


def test_a_flag_without_a_text_would_be_found() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--told", help="something (default: (1, 2))")
    parser.add_argument("--bare", help="(default: (1, 2))")
    parser.add_argument("--nothing")
    assert undocumented(parser) == ["--bare", "--nothing"]


def test_no_line_of_a_help_text_begins_as_a_paragraph_of_its_own() -> None:
    """A docstring's line that begins with a mark and not with a word is shown on a new line."""
    sources = [ROOT / "search_r3_jax" / room for room in ("config", "commands", "evaluation")]
    for file in (file for folder in sources for file in folder.rglob("*.py")):
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            assert not re.match(r" {12}[`-]\S", line), f"{file}, line {number}"
