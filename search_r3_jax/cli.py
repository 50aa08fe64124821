"""`search-r3`: one subcommand a stage; thin."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated

import tyro

from search_r3_jax.errors import UserError
from search_r3_jax.quiet import quiet

INTERRUPTED = 130


@dataclass(frozen=True, kw_only=True)
class Quickstart:
    """The whole method, small, with nothing but installed packages.

    Attributes:
        out: folder for data, runs, the exported model and summary.json; a second call goes on from what is there.
        debug: show the traceback of an error.
    """

    out: Path = Path("runs/quickstart")
    debug: bool = False

    def run(self) -> None:
        from search_r3_jax.configs.quickstart import config
        from search_r3_jax.quickstart import Quickstart as Work

        Work(self.out, config).run()


@dataclass(frozen=True, kw_only=True)
class Indexer:
    """Follow a run of stage 2: encode its corpus with each new snapshot and publish an index version.

    Attributes:
        run_folder: directory of the run.
        parent: process that started this one; the indexer ends with it.
        debug: show the traceback of an error.
    """

    run_folder: Annotated[Path, tyro.conf.arg(name="run")]
    parent: int | None = None
    debug: bool = False

    def run(self) -> None:
        from search_r3_jax.retrieval.indexer import run_indexer

        run_indexer(self.run_folder, parent=self.parent)


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a run or a model as a Hugging Face folder.

    Attributes:
        model: a run directory, a Hugging Face folder, a GGUF file, or `smollm2`.
        out: folder to write; must not exist, or be an earlier export.
        step: checkpoint of a run; the newest by default.
        debug: show the traceback of an error.
    """

    model: str
    out: Path
    step: int | None = None
    debug: bool = False

    def run(self) -> None:
        from search_r3_jax.hub.checkpoint import load_model
        from search_r3_jax.hub.export import export_model

        print(export_model(load_model(self.model, step=self.step), self.out))


Command = (
    Annotated[Quickstart, tyro.conf.subcommand("quickstart")]
    | Annotated[Indexer, tyro.conf.subcommand("indexer")]
    | Annotated[Export, tyro.conf.subcommand("export")]
)


def main() -> None:
    """Parse the command line and run one subcommand; exit status 2 for a user's mistake, 130 when interrupted."""
    quiet()
    command = tyro.cli(Command, prog="search-r3", config=(tyro.conf.OmitSubcommandPrefixes,))
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        command.run()
    except UserError as error:
        if command.debug:
            raise
        print(f"search-r3: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("search-r3: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.stderr.flush()
        # Threads of the libraries beneath may still be busy; nothing of ours is unwritten.
        os._exit(INTERRUPTED)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
