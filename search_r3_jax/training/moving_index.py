"""Stage 2's index between its steps: newer ones taken in, old ones waited for, snapshots asked for when the embeddings have drifted."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from flax import nnx

from search_r3_jax.config import IndexConfig
from search_r3_jax.errors import UserError
from search_r3_jax.hub.snapshots import pin_snapshot, read_snapshot
from search_r3_jax.retrieval.drift import measure_drift, probe_rows
from search_r3_jax.retrieval.environment import EncodeDocuments, Environment
from search_r3_jax.retrieval.follower import IndexFollower
from search_r3_jax.retrieval.index import Index
from search_r3_jax.rollout.encoder import ReasonedEncoder
from search_r3_jax.rollout.sampler import Rollout

Say = Callable[[str], object]
PIN = "trainer"


class MovingIndex:
    """Decides, before each step, by which index its rewards are given, and counts what training waited for it."""

    def __init__(
        self,
        config: IndexConfig,
        run: Path,
        follower: IndexFollower,
        environment: Environment,
        encode_documents: EncodeDocuments,
        *,
        swaps: list[list[int]],
        index_versions: list[dict[str, float]],
        say: Say,
    ):
        """`swaps` and `index_versions` are the run's record, which is added to."""
        self._config, self._run, self._follower, self._say = config, run, follower, say
        self._environment, self._encode = environment, encode_documents
        self._swaps, self._index_versions = swaps, index_versions
        self._rows = probe_rows(environment.index.shape[0], config.drift_documents) if config.drift_every else np.zeros(0, np.int32)
        self._probe: np.ndarray | None = None
        self._snapshot: tuple[int, nnx.State] | None = None
        self._warned_of = -1
        self._began, self._stalled = time.perf_counter(), 0.0
        self._note(environment.index)

    def before_step(self, step: int, save: Callable[[], object]) -> dict[str, float]:
        """Take in a newer index, if there is one; do what is to be done of one that is too old; returns the seconds that took.

        `save` commits a snapshot of this step, for the indexer. Raises UserError where an old index is to stop the run, or waiting for
        another would be in vain.
        """
        started = time.perf_counter()
        newer = self._follower.newer_than(self._environment.index.version)
        if newer is not None:
            self._swap(step, newer)
        swapped = time.perf_counter()
        self._mind_age(step, save)
        waited = time.perf_counter()
        self._stalled += waited - started
        share = self._stalled / max(waited - self._began, 1e-9)
        return {"swap_seconds": swapped - started, "index_wait_seconds": waited - swapped, "index_stall_share": share}

    def drifted(self, step: int) -> tuple[bool, dict[str, float]]:
        """Whether the corpus has moved so far since the last snapshot that another is due, and how far."""
        if not self._config.drift_every or step % self._config.drift_every:
            return False, {}
        now = self._encode(self._rows)
        if self._probe is None:
            self._probe = now
        drift = measure_drift(self._probe, now)
        far = drift.cosine < self._config.drift_cosine or drift.overlap < self._config.drift_overlap
        return far, {"drift_cosine": drift.cosine, "drift_overlap": drift.overlap}

    def snapshot_saved(self) -> None:
        """A snapshot was taken of the present parameters: drift counts from here."""
        if self._config.drift_every:
            self._probe = self._encode(self._rows)

    def snapshot_params(self, like: nnx.State) -> nnx.State:
        """The trainable parameters, shaped like `like`, that the index in use was made from."""
        version = self._environment.index.version
        if self._snapshot is None or self._snapshot[0] != version:
            self._snapshot = version, read_snapshot(self._run, version, like)
        return self._snapshot[1]

    def _mind_age(self, step: int, save: Callable[[], object]) -> None:
        config, index = self._config, self._environment.index
        age = step - index.version
        if not config.max_age or age <= config.max_age:
            return
        told = f"step {step}: the index is {age} steps old, more than index.max_age {config.max_age}"
        if config.when_old == "stop":
            save()
            raise UserError(f"{told}; a checkpoint was saved; give the indexer more room, or let it wait (index.when_old)")
        if config.when_old == "warn":
            if self._warned_of != index.version:
                self._warned_of = index.version
                self._say(f"warning: {told}")
            return
        self._say(f"{told}; waiting for a newer one")
        save()
        while step - self._environment.index.version > config.max_age:
            self._swap(step, self._follower.wait_for_newer(self._environment.index.version))

    def _swap(self, step: int, index: Index) -> None:
        self._environment.swap(index)
        self._swaps.append([step, index.version])
        self._note(index)
        self._say(f"step {step}: the index built from step {index.version} is in use")

    def _note(self, index: Index) -> None:
        if self._config.scoring == "consistent_stale":
            pin_snapshot(self._run, PIN, index.version)
        if index.version not in [version["step"] for version in self._index_versions]:
            self._index_versions.append(self._follower.measured(index.version))


def reembedded(encoder: ReasonedEncoder, state: nnx.State, texts: Sequence[str], rollout: Rollout, max_tokens: int) -> np.ndarray:
    """The replies' vectors [B,E] under other parameters than wrote them; zero where a reply is not valid. `texts` [Q] are the queries."""
    group = len(rollout.lengths) // len(texts)
    valid = np.flatnonzero(rollout.valid).tolist()
    replies = [rollout.ids[b, : rollout.lengths[b]].tolist() for b in valid]
    vectors = np.zeros_like(rollout.vectors)
    vectors[valid] = encoder.encode(state, [texts[b // group] for b in valid], replies, max_tokens=max_tokens)
    return vectors
