"""What stage 2 is made of before its first step, and whether that can work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from search_r3_jax.config import RlConfig, RunConfig
from search_r3_jax.data.collection import Collection
from search_r3_jax.errors import UserError
from search_r3_jax.hub.checkpoint_writer import latest_valid_checkpoint
from search_r3_jax.retrieval.environment.environment import EncodeDocuments, Environment
from search_r3_jax.retrieval.environment.rewards import RewardSettings, check_rewards
from search_r3_jax.retrieval.index.protocol import Index
from search_r3_jax.retrieval.indexer.follower import NONE, IndexFollower
from search_r3_jax.retrieval.indexer.schedule import IndexSchedule
from search_r3_jax.retrieval.indexer.worker import index_folder
from search_r3_jax.retrieval.store.versions import delete_version, list_versions
from search_r3_jax.rollout.sampler import Sampler
from search_r3_jax.text.prompts import Prompter


def load_or_copy_schedule(run: Path, step: int, *, replay: Path | None) -> IndexSchedule:
    """The record of index versions that a run goes by from `step` on: its own, or for one without, that of
    the run it replays.

    Raises UserError for a record that cannot be read, and for one that ends before `step`.
    """
    schedule = IndexSchedule(run)
    if replay is not None and not len(schedule):
        schedule.copy(replay)
    if len(schedule) < step:
        raise UserError(
            f"{run}: its record of index versions ends at step {len(schedule)}, its checkpoint is of {step}; "
            "give another --run"
        )
    return schedule


def discard_index_versions_after(run: Path, config: RunConfig, say: Callable[[str], object]) -> None:
    """From its newest checkpoint on it is another run: neither the indexes made since nor their order are to
    be taken up."""
    step = latest_valid_checkpoint(run, say) or 0
    IndexSchedule(run).truncate(step)
    root = index_folder(run, config.index.folder)
    for version in list_versions(root):
        if version > step:
            delete_version(root, version)


def open_initial_index(
    follower: IndexFollower,
    schedule: IndexSchedule,
    step: int,
    version: int,
    *,
    allow_other: bool,
    on_wait: Callable[[], object],
) -> Index:
    """The index in use before `step`, `version`, or before the first step the recorded one; where it is gone,
    another if allowed."""
    if step == 0:
        version = schedule.version_at(0) or 0
        follower.wait_for(version, on_wait=on_wait)
    try:
        return follower.recorded(version)
    except UserError:
        if not allow_other:
            raise
        schedule.truncate(step)
        return follower.wait_for_newer(NONE, at_most=step, on_wait=on_wait)


def check_settings(config: RunConfig, collection: Collection) -> None:
    """Raises UserError where the settings do not fit each other or the data."""
    rl, index = config.rl, config.index
    if jax.process_count() > 1:
        raise UserError(f"rl: {jax.process_count()} processes: stage 2 runs in one, over all of its devices")
    check_rewards(
        documents=len(collection.documents),
        candidates=index.candidates,
        group_size=rl.group_size,
        scale_rewards=rl.scale_rewards,
    )
    if rl.micro_queries < 0 or (rl.micro_queries and rl.global_queries % rl.micro_queries):
        raise UserError(
            f"rl.micro_queries: {rl.micro_queries}: does not divide rl.global_queries {rl.global_queries}; 0 "
            "is all at once"
        )
    if rl.global_queries < 1 or rl.global_queries > len(collection.queries):
        raise UserError(
            f"rl.global_queries: {rl.global_queries}: there are {len(collection.queries)} queries to train "
            "on; give 1 to that many"
        )
    most = len(collection.documents) - rl.global_queries
    if rl.infonce_negatives < 0 or rl.infonce_negatives > most:
        raise UserError(
            f"rl.infonce_negatives: {rl.infonce_negatives}: the corpus has {len(collection.documents)} "
            f"documents, {rl.global_queries} of"
            f" them the queries' own; give 0 to {most}"
        )
    if not -1 <= rl.near_duplicate_cosine <= 1:
        raise UserError(f"rl.infonce_alike: {rl.near_duplicate_cosine}: is a cosine; 1 keeps every candidate")
    if rl.inner_epochs < 1:
        raise UserError(
            f"rl.inner_epochs: {rl.inner_epochs}: a rollout is trained on at least once; give 1 or more"
        )
    if not 0 <= rl.min_tokens <= rl.sampler.max_think_tokens:
        raise UserError(
            f"rl.min_tokens: {rl.min_tokens}: at most rl.sampler.max_think_tokens "
            f"{rl.sampler.max_think_tokens} are written; give fewer"
        )
    if rl.sample_every < 1:
        raise UserError(f"rl.sample_every: {rl.sample_every}: counts rollouts; give 1 or more")
    if rl.variant == "dr_grpo" and rl.sampler.max_think_tokens < 1:
        raise UserError(
            "rl.sampler.max_think_tokens: 0: dr_grpo divides by the budget of a reply; give 1 or more"
        )
    for query in collection.queries:
        if not query.text.strip():
            raise UserError(
                f"{collection.name}: query {query.query_id!r}: is empty; remove it from the data set"
            )
        if not query.positives:
            raise UserError(
                f"{collection.name}: query {query.query_id!r}: has no relevant document, so no reward; "
                "remove it"
            )
    _reward_settings(rl)


def make_sampler(graph: nnx.GraphDef[Any], prompter: Prompter, rl: RlConfig, mesh: Mesh | None) -> Sampler:
    """Writes replies as the config says."""
    return Sampler(
        graph,
        prompter,
        max_think_tokens=rl.sampler.max_think_tokens,
        temperature=rl.sampler.temperature,
        top_k=rl.sampler.top_k,
        top_p=rl.sampler.top_p,
        prefill_chunk=rl.sampler.prefill_chunk,
        mesh=mesh,
    )


def make_environment(config: RunConfig, index: Index, encode_documents: EncodeDocuments) -> Environment:
    """Rewards replies as the config says, beginning with `index`."""
    return Environment(
        index,
        encode_documents,
        candidates=config.index.candidates,
        # The index's vectors as they are, for the scoring that asks for them.
        refresh_budget=config.index.refresh_budget if config.index.scoring == "fresh" else 0,
        neighbours=config.index.neighbours,
        overlay_max_age_steps=config.index.overlay_max_age_steps,
        reward=_reward_settings(config.rl),
    )


def _reward_settings(rl: RlConfig) -> RewardSettings:
    try:
        return RewardSettings(
            variant=rl.reward,
            temperature=rl.reward_temperature,
            margin_weight=rl.margin_weight,
            margin_width=rl.margin_width,
            hard_negatives=rl.hard_negatives,
            floor_gap=rl.floor_gap,
            length_weight=rl.length_weight,
            free_tokens=rl.free_tokens,
            max_tokens=rl.sampler.max_think_tokens,
        )
    except ValueError as error:
        raise UserError(f"config: rl: {error}") from None
