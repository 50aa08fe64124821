"""Stage 2's index between its steps: newer ones taken in, old ones waited for, checkpoints asked for when the
embeddings have drifted."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from flax import nnx

from search_r3_jax.config import IndexConfig
from search_r3_jax.errors import UserError
from search_r3_jax.hub.checkpoint_reader import checkpoint_steps, pin_checkpoints, read_checkpoint
from search_r3_jax.retrieval.environment.drift import measure_drift, probe_rows
from search_r3_jax.retrieval.environment.environment import EncodeDocuments, Environment
from search_r3_jax.retrieval.index.protocol import Index
from search_r3_jax.retrieval.indexer.follower import IndexFollower
from search_r3_jax.retrieval.indexer.schedule import IndexSchedule
from search_r3_jax.rollout.encoder import ReasonedEncoder
from search_r3_jax.rollout.sampler import Rollout

Say = Callable[[str], object]
PIN = "trainer"
PROBE = "drift_probe"


class MovingIndex:
    """Decides, before each step, by which index its rewards are given, and counts what training waited for
    it."""

    def __init__(
        self,
        config: IndexConfig,
        run: Path,
        follower: IndexFollower,
        environment: Environment,
        encode_documents: EncodeDocuments,
        *,
        schedule: IndexSchedule,
        needed: Callable[[], set[int]],
        swaps: list[list[int]],
        index_versions: list[dict[str, float]],
        say: Say,
        on_wait: Callable[[int], object] = lambda step: None,
    ):
        """Steps that `schedule` has are given the index it names; the others the newest there is, which it
        then has too.

        `needed` are the versions that steps may be taken with again; `swaps` and `index_versions` are the
        run's statistics, which are added to; `on_wait` hears, again and again, at which step training waits,
        and may raise.
        """
        self._config, self._run, self._follower, self._say = config, run, follower, say
        self._environment, self._encode = environment, encode_documents
        self._schedule, self._needed, self._on_wait = schedule, needed, on_wait
        self._swaps, self._index_versions = swaps, index_versions
        self._rows = (
            probe_rows(environment.index.shape[0], config.drift_documents)
            if config.drift_every
            else np.zeros(0, np.int32)
        )
        self._probe: np.ndarray | None = None
        self._checkpoint: tuple[int, nnx.State] | None = None
        self._warned_of = -1
        self._began, self._stalled = time.perf_counter(), 0.0
        # What a record names and no index has, or no checkpoint of this run: it comes to the same parameters
        # and makes it itself.
        own = config.scoring == "consistent_stale"
        self._to_make = {
            version for version in schedule.versions_from(0) if not follower.is_there(version, own=own)
        }
        self._note(environment.index)

    def before_step(self, step: int, save: Callable[[], object]) -> dict[str, float]:
        """Take in the index that is this step's; returns the seconds that took.

        `save` commits a checkpoint of this step, for the indexer. Raises UserError where an old index is to
        stop the run, waiting for another would be in vain, or the record names one that is gone.
        """
        started = time.perf_counter()
        if step in self._to_make:
            save()
            self._pin(step)
            self._follower.wait_for(step, on_wait=lambda: self._on_wait(step))
        recorded, in_use = self._schedule.version_at(step), self._environment.index.version
        chosen, waited = None, 0.0
        if recorded is None:
            chosen, waited = self._newest(step, save)
            # On the disk before it has any effect.
            self._schedule.record(step, in_use if chosen is None else chosen.version)
        elif recorded != in_use:
            chosen = self._follower.recorded(recorded)
        if chosen is not None:
            self._swap(step, chosen)
        took = time.perf_counter() - started
        self._stalled += took
        share = self._stalled / max(time.perf_counter() - self._began, 1e-9)
        return {"swap_seconds": took - waited, "index_wait_seconds": waited, "index_stall_share": share}

    def state(self) -> dict[str, np.ndarray]:
        """Arrays for a checkpoint: what drift is counted from."""
        return {} if self._probe is None else {PROBE: self._probe}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Take up what `state` gave."""
        self._probe = state.get(PROBE)

    def drifted(self, step: int) -> tuple[bool, dict[str, float]]:
        """Whether the corpus has moved so far since the last checkpoint that another is due, and how far."""
        if not self._config.drift_every or step % self._config.drift_every:
            return False, {}
        now = self._encode(self._rows)
        if self._probe is None:
            self._probe = now
        drift = measure_drift(self._probe, now)
        far = drift.cosine < self._config.drift_cosine or drift.overlap < self._config.drift_overlap
        return far, {"drift_cosine": drift.cosine, "drift_overlap": drift.overlap}

    def checkpoint_saved(self) -> None:
        """A checkpoint was taken of the present parameters: drift counts from here."""
        if self._config.drift_every:
            self._probe = self._encode(self._rows)

    def checkpoint_params(self, like: nnx.State) -> nnx.State:
        """The trainable parameters, shaped like `like`, that the index in use was made from."""
        version = self._environment.index.version
        if self._checkpoint is None or self._checkpoint[0] != version:
            self._checkpoint = version, read_checkpoint(self._run, version, like)
        return self._checkpoint[1]

    def _newest(self, step: int, save: Callable[[], object]) -> tuple[Index | None, float]:
        """A newer index than the one in use, if there is one, and the seconds waited for it; minds how old
        the newest is."""
        config, in_use = self._config, self._environment.index.version
        newer = self._follower.newer_than(in_use, at_most=step)
        version = in_use if newer is None else newer.version
        if not config.max_age or step - version <= config.max_age:
            return newer, 0.0
        told = (
            f"step {step}: the index is {step - version} steps old, more than index.max_age {config.max_age}"
        )
        if config.on_stale_index == "stop":
            save()
            raise UserError(
                f"{told}; a checkpoint was saved; give the indexer more room, or let it wait (index.when_old)"
            )
        if config.on_stale_index == "warn":
            if self._warned_of != version:
                self._warned_of = version
                self._say(f"warning: {told}")
            return newer, 0.0
        self._say(f"{told}; waiting for a newer one")
        started = time.perf_counter()
        save()
        while newer is None or step - newer.version > config.max_age:
            version = in_use if newer is None else newer.version
            newer = self._follower.wait_for_newer(version, at_most=step, on_wait=lambda: self._on_wait(step))
        return newer, time.perf_counter() - started

    def _swap(self, step: int, index: Index) -> None:
        self._environment.swap(index)
        self._swaps.append([step, index.version])
        self._note(index)
        self._say(f"step {step}: the index built from step {index.version} is in use")

    def _note(self, index: Index) -> None:
        self._pin(index.version)
        if index.version not in [version["step"] for version in self._index_versions]:
            self._index_versions.append(self._follower.measured(index.version))

    def _pin(self, version: int) -> None:
        """Keep the checkpoints that queries may have to be embedded with again."""
        if self._config.scoring == "consistent_stale":
            pin_checkpoints(self._run, PIN, {*self._needed(), version})


def versions_to_keep(run: Path, schedule: IndexSchedule, keep: int) -> set[int]:
    """The index versions a run may need again: those since the oldest of the `keep` newest checkpoints, and
    those in use at the others."""
    steps = checkpoint_steps(run)
    in_use = {schedule.version_at(max(step - 1, 0)) for step in steps}
    return schedule.versions_from(min(steps[-keep:], default=0)) | {
        version for version in in_use if version is not None
    }


def reencode_rollout(
    encoder: ReasonedEncoder, state: nnx.State, texts: Sequence[str], rollout: Rollout, max_tokens: int
) -> np.ndarray:
    """The replies' vectors [B,E] under other parameters than wrote them; zero where a reply is not valid.
    `texts` [Q] are the queries."""
    group = len(rollout.lengths) // len(texts)
    valid = np.flatnonzero(rollout.valid).tolist()
    replies = [rollout.ids[b, : rollout.lengths[b]].tolist() for b in valid]
    vectors = np.zeros_like(rollout.vectors)
    vectors[valid] = encoder.encode(state, [texts[b // group] for b in valid], replies, max_tokens=max_tokens)
    return vectors
