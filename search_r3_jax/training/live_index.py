"""The index of stage 2 during training: the version of each step, time spent waiting, and drift."""

from __future__ import annotations

import functools
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from etils import epath

from search_r3_jax.config import RunConfig
from search_r3_jax.errors import UserError
from search_r3_jax.hub.checkpoint_reader import checkpoint_steps, read_run
from search_r3_jax.hub.checkpoint_writer import newest_valid_checkpoint
from search_r3_jax.hub.snapshot_reader import pin_snapshots, snapshot_steps
from search_r3_jax.hub.snapshot_writer import discard_snapshots_from
from search_r3_jax.retrieval.environment.drift import measure_drift, probe_rows
from search_r3_jax.retrieval.environment.environment import EncodeDocuments, Environment
from search_r3_jax.retrieval.index.protocol import Index
from search_r3_jax.retrieval.indexer.follower import Follower, IndexFollower
from search_r3_jax.retrieval.indexer.publishing import encoding_folder, index_folder
from search_r3_jax.retrieval.indexer.schedule import IndexSchedule
from search_r3_jax.retrieval.store.rolling_dumps import discard_dumps_after
from search_r3_jax.retrieval.store.versions import delete_version, list_versions
from search_r3_jax.training.index_state import IndexedCorpus, IndexStart, IndexStatistics
from search_r3_jax.training.trainer_encoding import TrainerEncoding

PIN = "trainer"
PROBE = "drift_probe"
logger = logging.getLogger(__name__)


class LiveIndex:
    """Decides before each step which index version it uses; owns follower, schedule, pins, statistics.

    Of several processes only process 0 has one; `LedIndex` tells the others.
    """

    def __init__(
        self,
        run: Path,
        config: RunConfig,
        follower: Follower,
        environment: Environment,
        schedule: IndexSchedule,
        *,
        statistics: IndexStatistics | None = None,
        on_wait: Callable[[int], object] = lambda step: None,
        share: Callable[[Index], Index] = lambda index: index,
        encoding: TrainerEncoding | None = None,
    ):
        """Use the versions in `schedule` for its steps, and the newest for later ones.

        The version of a later step is added to the schedule. `on_wait` is called repeatedly with the step
        while training waits; it may raise. `share` makes of an index that comes into use the one that all
        processes search. `encoding` encodes the corpus here, where no indexer does.
        """
        self.environment = environment
        self._run, self._config, self._follower, self._schedule = run, config.index, follower, schedule
        self._on_wait, self._share, self._encoding = on_wait, share, encoding
        self._statistics = statistics or IndexStatistics()
        rows, drift_every = environment.index.shape[0], self._config.drift_every
        self._probe_rows = (
            probe_rows(rows, self._config.drift_documents) if drift_every else np.zeros(0, np.int32)
        )
        self._probe: np.ndarray | None = None
        self._warned_version: int | None = None
        self._started, self._stalled = time.perf_counter(), 0.0
        self._to_build = {version for version in schedule.versions_from(0) if self._must_build(version)}
        self._record_version(environment.index)

    @classmethod
    def open(
        cls,
        run: Path,
        corpus: IndexedCorpus,
        *,
        start: IndexStart | None = None,
        on_wait: Callable[[int], object] = lambda step: None,
        share: Callable[[Index], Index] = lambda index: index,
        encoding: TrainerEncoding | None = None,
    ) -> LiveIndex:
        """Start the indexer and open the index in use at `start`; blocks until it is published.

        The schedule is that of the run folder (see `load_or_copy_schedule`). Raises UserError where that
        index is gone, or none can be published.
        """
        start, config = start or IndexStart(), corpus.config
        if encoding is not None:
            on_wait = _encoding_first(encoding, on_wait)
        schedule = IndexSchedule(run)
        follower = IndexFollower(
            run,
            corpus.collection.corpus_hash(),
            corpus.embed_id,
            settings=config.index,
            versions_to_keep=functools.partial(versions_to_keep, run, schedule, config.rl.keep),
            replayed=index_roots(run, config)[:-1],
            share=(jax.process_index(), jax.process_count()),
        )
        follower.start()
        try:
            index = open_initial_index(follower, schedule, start, on_wait=lambda: on_wait(start.step))
            environment = make_environment(config, share(index), corpus.encode)
            live = cls(
                run,
                config,
                follower,
                environment,
                schedule,
                statistics=replace(start.statistics, version=index.version),
                on_wait=on_wait,
                share=share,
                encoding=encoding,
            )
            if start.arrays and index.version == start.statistics.version:
                live.restore(start.arrays)
            else:
                live.checkpoint_saved()
        except BaseException:
            follower.close()
            raise
        return live

    @property
    def statistics(self) -> IndexStatistics:
        """Version in use, swaps and versions up to now."""
        return self._statistics

    def before_step(self, step: int, save: Callable[[], object]) -> dict[str, float]:
        """Swap in the version that this step uses; returns the seconds that training waited.

        `save` commits a checkpoint of this step for the indexer. Raises UserError where a stale index shall
        stop the run, where no new version can come, and where a scheduled version is gone.
        """
        started = time.perf_counter()
        if self._encoding is not None:
            self._encoding.advance()
        if step in self._to_build:
            save()
            self._pin_snapshot(step)
            self._follower.wait_for(step, on_wait=lambda: self._on_wait(step))
        scheduled, current = self._schedule.version_at(step), self.environment.index.version
        newer, waited = None, 0.0
        if scheduled is None:
            newer, waited = self._select_index(step, save)
            # Written first, so that an interrupted step is repeated with the same version.
            self._schedule.record(step, current if newer is None else newer.version)
        elif scheduled != current:
            newer = self._follower.open_version(scheduled)
        if newer is not None:
            self._swap(step, newer)
        took = time.perf_counter() - started
        self._stalled += took
        share = self._stalled / max(time.perf_counter() - self._started, 1e-9)
        return {"swap_seconds": took - waited, "index_wait_seconds": waited, "index_stall_share": share}

    def checkpoint_arrays(self) -> dict[str, np.ndarray]:
        """Arrays for a checkpoint: fresh document vectors, and the reference vectors of the drift."""
        probe = {} if self._probe is None else {PROBE: self._probe}
        return self.environment.state() | probe

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Resume from the arrays of `checkpoint_arrays`."""
        self.environment.restore(arrays)
        self._probe = arrays.get(PROBE)

    def checkpoint_saved(self) -> None:
        """Restart the drift measurement: a checkpoint of the current parameters was saved."""
        if self._config.drift_every:
            self._probe = self.environment.encode_documents(self._probe_rows)

    def drifted(self, step: int) -> tuple[bool, dict[str, float]]:
        """Whether the corpus has drifted far enough for another checkpoint, and how far."""
        if not self._config.drift_every or step % self._config.drift_every:
            return False, {}
        vectors = self.environment.encode_documents(self._probe_rows)
        if self._probe is None:
            self._probe = vectors
        drift = measure_drift(self._probe, vectors)
        far = drift.cosine < self._config.drift_cosine or drift.overlap < self._config.drift_overlap
        return far, {"drift_cosine": drift.cosine, "drift_overlap": drift.overlap}

    def check(self) -> None:
        """Restart a dead indexer, and raise errors of the background thread; call between steps."""
        self._follower.check()

    def close(self) -> None:
        """Stop the indexer and the background thread."""
        self._follower.close()

    def _select_index(self, step: int, save: Callable[[], object]) -> tuple[Index | None, float]:
        """Return a newer index, if any, and the seconds waited; act on a stale one as configured."""
        config, current = self._config, self.environment.index.version
        newer = self._follower.newer_than(current, at_most=step)
        version = current if newer is None else newer.version
        if not config.max_index_age_steps or step - version <= config.max_index_age_steps:
            return newer, 0.0
        problem = (
            f"step {step}: the index is {step - version} steps old, more than index.max_index_age_steps "
            f"{config.max_index_age_steps}"
        )
        if config.on_stale_index == "stop":
            save()
            raise UserError(
                f"{problem}; a checkpoint was saved; give the indexer more resources, or let training wait "
                "(index.on_stale_index)"
            )
        if config.on_stale_index == "warn":
            if self._warned_version != version:
                self._warned_version = version
                logger.warning(problem)
            return newer, 0.0
        logger.info("%s; waiting for a newer one", problem)
        started = time.perf_counter()
        save()
        while newer is None or step - newer.version > config.max_index_age_steps:
            version = current if newer is None else newer.version
            newer = self._follower.wait_for_newer(version, at_most=step, on_wait=lambda: self._on_wait(step))
        return newer, time.perf_counter() - started

    def _must_build(self, version: int) -> bool:
        """Whether the step of a scheduled version must be saved when the run reaches it (again)."""
        if self._config.scoring != "consistent_stale":
            return not self._follower.is_published(version)
        # The parameters are needed beside the index. A replay has only those of the other run; a run that
        # went back behind a damaged checkpoint has lost them.
        saved = version in snapshot_steps(self._run) or version in checkpoint_steps(self._run)
        return not saved or not self._follower.is_published(version, local_only=True)

    def _swap(self, step: int, index: Index) -> None:
        self.environment.swap(self._share(index))
        swaps = (*self._statistics.swaps, (step, index.version))
        self._statistics = replace(self._statistics, version=index.version, swaps=swaps)
        self._record_version(index)
        logger.info("step %d: the index built from step %d is in use", step, index.version)

    def _record_version(self, index: Index) -> None:
        self._pin_snapshot(index.version)
        if index.version not in [version["step"] for version in self._statistics.versions]:
            versions = (*self._statistics.versions, self._follower.version_stats(index.version))
            self._statistics = replace(self._statistics, versions=versions)

    def _pin_snapshot(self, version: int) -> None:
        """Keep the snapshots whose parameters may re-encode queries (`consistent_stale`)."""
        if self._config.scoring == "consistent_stale":
            pin_snapshots(self._run, PIN, {*self._follower.versions_to_keep(), version})


def load_or_copy_schedule(run: Path, step: int, *, replay: Path | None) -> IndexSchedule:
    """Load the run's schedule of index versions; a new run copies that of the run it replays.

    Raises UserError for a schedule that cannot be read, and for one that ends before `step`.
    """
    schedule = IndexSchedule(run)
    if replay is not None and not len(schedule):
        schedule.copy(replay)
    if len(schedule) < step:
        raise UserError(
            f"{run}: its index schedule ends at step {len(schedule)}, its checkpoint is of {step}; "
            "give another --run"
        )
    return schedule


def discard_index_versions_after(run: Path, config: RunConfig) -> None:
    """Discard what the index has of steps after the newest checkpoint: other settings, another run."""
    step = newest_valid_checkpoint(run) or 0
    IndexSchedule(run).truncate(step)
    # That of the newest checkpoint too: the settings may ask for another dtype. It is written again.
    discard_snapshots_from(run, step)
    discard_dumps_after(run, step)
    shutil.rmtree(encoding_folder(run), ignore_errors=True)
    # Another source has readers of its own.
    shutil.rmtree(run / "pins", ignore_errors=True)
    root = index_folder(run, config.index.folder)
    for version in list_versions(root):
        if version > step:
            delete_version(root, version)


def open_initial_index(
    follower: Follower, schedule: IndexSchedule, start: IndexStart, *, on_wait: Callable[[], object]
) -> Index:
    """Open the index in use at `start`, or another if it is gone and that is allowed.

    Blocks until it is published.
    """
    version = start.statistics.version
    if start.step == 0:
        version = schedule.version_at(0) or 0
        follower.wait_for(version, on_wait=on_wait)
    try:
        return follower.open_version(version)
    except UserError:
        if not start.allow_other_version:
            raise
        schedule.truncate(start.step)
        return follower.wait_for_newer(None, at_most=start.step, on_wait=on_wait)


def versions_to_keep(run: Path, schedule: IndexSchedule, keep: int) -> set[int]:
    """Index versions that a run may use again.

    These are the versions since the oldest of its `keep` newest checkpoints, and those in use at the other
    checkpoints.
    """
    steps = checkpoint_steps(run)
    used = {schedule.version_at(max(step - 1, 0)) for step in steps}
    since = schedule.versions_from(min(steps[-keep:], default=0))
    return since | {version for version in used if version is not None}


def index_folder_of(run: Path) -> epath.Path:
    """The folder where another run keeps its index versions."""
    return index_folder(run, read_run(run)[0].index.folder)


def index_roots(run: Path, config: RunConfig) -> list[epath.Path]:
    """The folders that a run's versions may be in: that of a run it replays, then its own."""
    replay = read_run(run)[1].get("replay")
    replayed = [] if replay is None else [index_folder_of(Path(replay))]
    return [*replayed, index_folder(run, config.index.folder)]


def make_environment(config: RunConfig, index: Index, encode_documents: EncodeDocuments) -> Environment:
    """The environment of a config, beginning with `index`."""
    return Environment(
        index,
        encode_documents,
        candidates=config.index.candidates,
        # Stale scoring uses the index's vectors and refreshes none.
        refresh_budget=config.index.refresh_budget if config.index.scoring == "fresh" else 0,
        neighbours=config.index.neighbours,
        overlay_max_age_steps=config.index.overlay_max_age_steps,
        reward=config.rl.reward,
        max_tokens=config.rl.sampler.max_think_tokens,
    )


def _encoding_first(encoding: TrainerEncoding, on_wait: Callable[[int], object]) -> Callable[[int], object]:
    """Encode documents while training waits, beside what else is done then."""

    def waiting(step: int) -> None:
        encoding.wait()
        on_wait(step)

    return waiting
