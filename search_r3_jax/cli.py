"""The command line `search-r3`: its subcommands, and its handling of errors."""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from functools import partial
from types import FrameType
from typing import Annotated, Any, NoReturn

import tyro

from search_r3_jax import __version__
from search_r3_jax.commands.data import DataBuild, DataMine
from search_r3_jax.commands.evaluation import Budget, Compare, Curves, Eval, Mteb, Perplexity, Report
from search_r3_jax.commands.mistyped import command_words, explain_mistyped
from search_r3_jax.commands.models import Embed, Export, Think
from search_r3_jax.commands.planning import Plan
from search_r3_jax.commands.refusals import one_line
from search_r3_jax.commands.settings import plan_settings, rl_settings, sft_settings
from search_r3_jax.commands.training import Indexer, Quickstart, Rl, Sft
from search_r3_jax.compile_cache import keep_programs
from search_r3_jax.config import RunConfig, renamed_flags
from search_r3_jax.configs import load_config
from search_r3_jax.console import prepare_streams, print_line, show_mistake
from search_r3_jax.errors import (
    DISK_ERRORS,
    TRY_AGAIN,
    USER_STATUS,
    StoppedError,
    TransientError,
    UserError,
    status_of,
)
from search_r3_jax.runtime_env import configure_libraries

INTERRUPTED = 130

DESCRIPTION = (
    f"search-r3 {__version__}: train an LLM to think before it embeds. "
    "`search-r3 COMMAND --help` explains a command; `search-r3 --version` prints the version."
)

DataCommand = (
    Annotated[DataBuild, tyro.conf.subcommand("build")] | Annotated[DataMine, tyro.conf.subcommand("mine")]
)


def main() -> None:
    """Parse the command line and run one subcommand.

    Exit status 2 for a user's mistake, 75 for what passes by itself, 130 when a signal ended it; 0 when
    training has saved before it ended by a signal (`training/stopping.py`).
    """
    configure_libraries()
    prepare_streams()
    # As Ctrl-C does, until training takes these signals for requests to save.
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _interrupt)
    trains = False
    try:
        command = parse(sys.argv[1:])
        trains = isinstance(command, Quickstart | Sft | Rl)
        keep_programs(command.common.compile_cache)
        command.run()
        sys.stdout.flush()
    except UserError as error:
        if "--debug" in sys.argv:
            raise
        show_mistake(error)
        sys.exit(USER_STATUS)
    except TransientError as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        print_line(f"search-r3: {error}; try again", sys.stderr)
        sys.exit(TRY_AGAIN)
    except StoppedError as stopped:
        print_line(f"search-r3: {stopped}")
    except OSError as error:
        if status_of(error) == TRY_AGAIN:
            if "--debug" in sys.argv:
                traceback.print_exc()
            print_line(f"search-r3: {' '.join(str(error).split())}; try again", sys.stderr)
            sys.exit(TRY_AGAIN)
        if "--debug" in sys.argv or error.errno not in DISK_ERRORS:
            raise
        _end_after(error)
    except KeyboardInterrupt:
        what_then = "; the same command starts, or goes on from the last checkpoint" if trains else ""
        print_line(f"search-r3: interrupted{what_then}", sys.stderr)
        sys.stderr.flush()
        # Library threads may still run and would block a normal exit; all our files are written.
        os._exit(INTERRUPTED)


def parse(arguments: Sequence[str]) -> Any:
    """The subcommand that the arguments name, with its flags."""
    if list(arguments) == ["--version"]:
        print(f"search-r3 {__version__}", flush=True)
        sys.exit(0)
    arguments, notes = renamed_flags(arguments)
    for note in notes:
        print_line(f"search-r3: note: {note}", sys.stderr)
    refuse_contradictions(arguments)
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown):
            return _parsed(arguments, arguments)
    except SystemExit as ended:
        if ended.code == 2:
            shown = io.StringIO()
            if mistake := explain_mistyped(arguments, partial(_help_of, arguments)):
                raise UserError(mistake) from None
            command = " ".join(["search-r3", *command_words(arguments)])
            print_line(one_line(_refusal_of(arguments), command), sys.stderr)
        raise
    finally:
        sys.stderr.write(shown.getvalue())
        # A reader who has had enough is no error here; at the interpreter's end it would be.
        sys.stdout.flush()


def _parsed(arguments: Sequence[str], for_settings: Sequence[str]) -> Any:
    return tyro.cli(
        subcommands(for_settings),
        prog="search-r3",
        description=DESCRIPTION,
        args=arguments,
        config=(tyro.conf.OmitSubcommandPrefixes,),
    )


def _refusal_of(arguments: Sequence[str]) -> str:
    """What the parser prints about arguments that it refuses, in lines that no terminal breaks."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100000"
    try:
        with contextlib.redirect_stderr(io.StringIO()) as shown, contextlib.suppress(SystemExit):
            _parsed(arguments, arguments)
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
    return shown.getvalue()


def _help_of(arguments: Sequence[str], words: Sequence[str]) -> str:
    """The help text of a command, with all the settings that it takes."""
    with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
        _parsed([*words, "--help"], [each for each in arguments if each not in ("-h", "--help")])
    return shown.getvalue()


def refuse_contradictions(arguments: Sequence[str]) -> None:
    """Raise UserError for an option that is given twice with different values.

    The parser would take the last and drop the others. A script may add an option that says the same again.
    """
    given: dict[str, tuple[str, ...]] = {}
    name, values = "", list[str]()
    for argument in (*itertools.takewhile(lambda each: each != "--", arguments), "--"):
        if not argument.startswith("--"):
            values.append(argument)
            continue
        if name:
            flag = name.replace("_", "-")
            # `--no-x` and `--x` are one option, and so are `--section.no-x` and `--section.x`.
            option = flag.replace("--no-", "--", 1).replace(".no-", ".", 1)
            said = (flag, *values)
            if (before := given.setdefault(option, said)) != said:
                shown = " and ".join(" ".join(each[1:]) or each[0] for each in (before, said))
                raise UserError(
                    f"{option}: given twice ({shown}); give it once, with all its values behind it"
                )
        name, equals, value = argument.partition("=")
        values = [value] if equals else []


def subcommands(arguments: Sequence[str]) -> Any:
    """The subcommands in order of use, with the settings of the experiment that --config names."""
    name = _value_of("--config", arguments)
    required = tyro.MISSING
    settings = load_config(name) if name else RunConfig()
    # Only help hides settings: one set of flags may serve both stages.
    helps = not {"-h", "--help"}.isdisjoint(arguments)
    for_sft, for_rl, for_plan = (
        hide(settings) if helps else settings for hide in (sft_settings, rl_settings, plan_settings)
    )
    sft = Sft(config=name or required, run_folder=required, settings=for_sft)
    rl = Rl(config=name or required, run_folder=required, settings=for_rl)
    plan = Plan(config=name or required, settings=for_plan, stage=required, topology=required)
    return (
        Annotated[Quickstart, tyro.conf.subcommand("quickstart")]
        | Annotated[
            DataCommand, tyro.conf.subcommand("data", description="Build data sets, and mine hard negatives.")
        ]
        | Annotated[Sft, tyro.conf.subcommand("sft", default=sft)]
        | Annotated[Rl, tyro.conf.subcommand("rl", default=rl)]
        | Annotated[Indexer, tyro.conf.subcommand("indexer")]
        | Annotated[Eval, tyro.conf.subcommand("eval")]
        | Annotated[Compare, tyro.conf.subcommand("compare")]
        | Annotated[Budget, tyro.conf.subcommand("budget")]
        | Annotated[Perplexity, tyro.conf.subcommand("perplexity")]
        | Annotated[Mteb, tyro.conf.subcommand("mteb")]
        | Annotated[Curves, tyro.conf.subcommand("curves")]
        | Annotated[Report, tyro.conf.subcommand("report")]
        | Annotated[Export, tyro.conf.subcommand("export")]
        | Annotated[Embed, tyro.conf.subcommand("embed")]
        | Annotated[Think, tyro.conf.subcommand("think")]
        | Annotated[Plan, tyro.conf.subcommand("plan", default=plan)]
    )


def _value_of(option: str, arguments: Sequence[str]) -> str | None:
    for argument, following in itertools.pairwise([*arguments, ""]):
        if argument.startswith(f"{option}="):
            return argument.removeprefix(f"{option}=")
        if argument == option and following:
            return following
    return None


def _end_after(error: OSError) -> NoReturn:
    """Exit after an error of a disk or of standard output, with a line that names it."""
    try:
        sys.stdout.flush()
        where = str(error.filename or "a file")
    except OSError:
        where = "standard output"
        # The interpreter would try once more, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.EPIPE:
            # The reader has had enough, as `head` has.
            sys.exit(128 + signal.SIGPIPE)
    if error.errno == errno.EPIPE and error.filename is None:
        # The line that the reader of standard output did not want is lost already.
        sys.exit(128 + signal.SIGPIPE)
    print_line(f"search-r3: {where}: cannot be written ({error.strerror or error}); make room", sys.stderr)
    sys.exit(2)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
