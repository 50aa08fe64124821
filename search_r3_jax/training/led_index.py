"""The index of stage 2 in every process: process 0 holds it, the others learn what it found and decided."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from search_r3_jax.distributed.lockstep import Message, Team
from search_r3_jax.hub.checkpoint_reader import read_checkpoint
from search_r3_jax.hub.snapshot_reader import read_snapshot, snapshot_steps
from search_r3_jax.retrieval.environment.environment import Environment, StepResult
from search_r3_jax.training.index_state import IndexedCorpus, IndexStart, IndexStatistics
from search_r3_jax.training.live_index import LiveIndex, index_roots
from search_r3_jax.training.rolling_index import RollingIndex, RollingVectors
from search_r3_jax.training.team_index import IndexShare
from search_r3_jax.training.trainer_encoding import SnapshotEncoder, TrainerEncoding

_TERM = "term "


class LedIndex:
    """What the index in process 0 decides, in every process; each calls the same methods in turn."""

    def __init__(
        self,
        team: Team,
        live: LiveIndex | RollingIndex | None,
        run: Path,
        statistics: IndexStatistics,
        *,
        drift_every: int,
    ):
        """`live` is the index in process 0, None in the others; `drift_every` is that of its config."""
        self._team, self._live, self._run, self._statistics = team, live, run, statistics
        self._drift_every = drift_every
        self._of_index: tuple[int, nnx.State] | None = None

    @classmethod
    def open(
        cls,
        team: Team,
        run: Path,
        corpus: IndexedCorpus,
        *,
        start: IndexStart,
        on_wait: Callable[[int], object],
    ) -> LedIndex:
        """Open the index in use at `start`; `on_wait` is called in process 0.

        See `LiveIndex.open` and `RollingIndex.open`.
        """
        config = corpus.config
        opened: list[LiveIndex | RollingIndex] = []
        if config.index.source == "rolling":
            open_index = partial(RollingIndex.open, run, corpus, RollingVectors(team, corpus))
        else:
            encoding = None
            if config.index.source == "trainer":
                encoding = TrainerEncoding(run, corpus, SnapshotEncoder(team, run, corpus))
            corpus = replace(corpus, encode=team.together("encode documents", corpus.encode))
            share = IndexShare(team, index_roots(run, config)).shared
            open_index = partial(LiveIndex.open, run, corpus, share=share, encoding=encoding)

        def work() -> Message:
            opened.append(open_index(start=start, on_wait=on_wait))
            return opened[0].statistics.to_json()

        statistics = IndexStatistics.from_json(team.lead(work))
        live = opened[0] if opened else None
        return cls(team, live, run, statistics, drift_every=config.index.drift_every)

    @property
    def statistics(self) -> IndexStatistics:
        """Version in use, swaps and versions up to now."""
        return self._statistics

    def before_step(self, step: int, save: Callable[[], object]) -> dict[str, float]:
        """Prepare the index for this step, as `LiveIndex.before_step`.

        `save` is called in process 0.
        """

        def work() -> Message:
            stalls = self._of_leader().before_step(step, save)
            return {"stalls": stalls, **self._of_leader().statistics.to_json()}

        told = self._team.lead(work)
        self._statistics = IndexStatistics.from_json(told)
        return dict(told["stalls"])

    def ask(self, work: Callable[[Environment], Message]) -> Message:
        """What `work` makes of the environment, which process 0 has; see `Team.lead`."""
        return self._team.lead(lambda: work(self._of_leader().environment))

    def checkpoint_arrays(self) -> dict[str, np.ndarray]:
        """Arrays for a checkpoint, as `LiveIndex.checkpoint_arrays`."""
        return dict(self._team.lead(lambda: self._of_leader().checkpoint_arrays()))

    def checkpoint_saved(self) -> None:
        """Restart the drift measurement: a checkpoint of the current parameters was saved."""
        if not self._drift_every:
            return

        def work() -> Message:
            self._of_leader().checkpoint_saved()
            return {}

        self._team.lead(work)

    def drifted(self, step: int) -> tuple[bool, dict[str, float]]:
        """Whether the corpus has drifted far enough for another checkpoint, and how far."""
        if not self._drift_every:
            return False, {}

        def work() -> Message:
            drifted, drift = self._of_leader().drifted(step)
            return {"drifted": drifted, "drift": drift}

        told = self._team.lead(work)
        return told["drifted"], dict(told["drift"])

    def snapshot_params(self, like: nnx.State) -> nnx.State:
        """The trainable parameters, shaped like `like`, that the index in use was built from."""
        version = self._statistics.version
        if self._of_index is None or self._of_index[0] != version:

            def find() -> Message:
                # A version of a run from before there were snapshots has its checkpoint, which is pinned.
                return {"snapshot": version in snapshot_steps(self._run)}

            read = read_snapshot if self._team.lead(find)["snapshot"] else read_checkpoint
            self._of_index = version, read(self._run, version, like)
        return self._of_index[1]

    def check(self) -> None:
        """Restart a dead indexer, and raise errors of the background thread; call between steps."""

        def work() -> Message:
            self._of_leader().check()
            return {}

        self._team.lead(work)

    def close(self) -> None:
        """Stop the indexer and the background thread."""
        if self._live is not None:
            self._live.close()

    def _of_leader(self) -> LiveIndex | RollingIndex:
        if self._live is None:
            raise RuntimeError("only process 0 has the index")
        return self._live


def result_message(result: StepResult) -> dict[str, Any]:
    """A step's result as a message."""
    return {
        "rewards": result.rewards,
        **{f"{_TERM}{name}": term for name, term in result.terms.items()},
        "top_rows": result.top_rows,
        "candidates": np.concatenate(result.candidates),
        "candidate_counts": np.array([len(rows) for rows in result.candidates], np.int32),
        "stats": result.stats,
    }


def result_of(message: Message) -> StepResult:
    """The inverse of `result_message`."""
    ends = np.cumsum(message["candidate_counts"])
    return StepResult(
        rewards=message["rewards"],
        terms={name.removeprefix(_TERM): value for name, value in message.items() if name.startswith(_TERM)},
        top_rows=message["top_rows"],
        candidates=np.split(message["candidates"], ends[:-1]),
        stats=dict(message["stats"]),
    )
