"""Reasoning for stage 1 without a teacher: the untrained model writes it greedily."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from flax import nnx

from search_r3_jax.config import RunConfig, SamplerConfig
from search_r3_jax.data.collection import Collection, Query
from search_r3_jax.data.pipeline import PairPipeline
from search_r3_jax.distributed.lockstep import Team
from search_r3_jax.distributed.runtime import is_first
from search_r3_jax.files import digest_of, read_json_lines, write_json_lines
from search_r3_jax.hub.load_model import LoadedModel
from search_r3_jax.rollout.sampler import Rollout, Sampler
from search_r3_jax.text.prompts import Prompter

QUERIES_PER_PASS = 64
logger = logging.getLogger(__name__)


def with_self_generated_reasoning(
    config: RunConfig,
    file: Path,
    collections: Sequence[Collection],
    wanted: Iterable[tuple[int, int]],
    model: LoadedModel,
    on_progress: Callable[[int, int], object],
    team: Team,
) -> tuple[Collection, ...]:
    """Fill in the model's text as `reasoning` of the wanted `(set, query row)`.

    The texts are kept in `file`, one a line, each with a hash of the query's text, the prompt and the limits:
    a pass whose texts are in it is skipped. `model` is untrained: new adapters add nothing.
    """
    missing = sorted(
        {(number, row) for number, row in wanted if not collections[number].queries[row].reasoning}
    )
    prompter = model.prompter()
    settings = _settings(config, prompter)
    # Of process 0 alone: another may see the file as it was before the last pass.
    known: Mapping[str, str] = team.lead(lambda: _read(file))
    thoughts = {
        (number, query.query_id): known[key]
        for number, row in missing
        for query in [collections[number].queries[row]]
        if (key := _key(settings, number, query)) in known
    }
    graph, state = nnx.split(model.decoder)
    greedy = SamplerConfig(max_think_tokens=config.text.max_thought_tokens, temperature=0.0, prefill_chunk=0)
    sampler = Sampler(graph, prompter, greedy, mesh=model.mesh)
    # Sorted by length, so that a pass holds prompts of one bucket.
    missing.sort(key=lambda at: (len(collections[at[0]].queries[at[1]].body), at))
    for start in range(0, len(missing), QUERIES_PER_PASS):
        chosen = missing[start : start + QUERIES_PER_PASS]
        # The passes are fixed: their composition must not depend on where an earlier attempt was interrupted.
        if all((number, collections[number].queries[row].query_id) in thoughts for number, row in chosen):
            continue
        filled = chosen + chosen[:1] * (QUERIES_PER_PASS - len(chosen))
        texts = [collections[number].queries[row].body for number, row in filled]
        rollout = sampler.sample(
            state, texts, np.zeros((len(texts), 1), np.uint32), max_tokens=config.text.max_query_tokens
        )
        for (number, row), thought in zip(chosen, _thoughts(rollout, prompter), strict=False):
            thoughts[number, collections[number].queries[row].query_id] = thought
        on_progress(start + len(chosen), len(missing))
        if not is_first():
            continue
        lines = [
            {
                "set": number,
                "query_id": query.query_id,
                "key": _key(settings, number, query),
                "reasoning": text,
            }
            for number, row in missing
            for query in [collections[number].queries[row]]
            if (text := thoughts.get((number, query.query_id))) is not None
        ]
        write_json_lines(file, lines)
    return tuple(_with(collection, number, thoughts) for number, collection in enumerate(collections))


def reasoned_pipeline(
    config: RunConfig, folder: Path, pipeline: PairPipeline, model: LoadedModel, team: Team
) -> PairPipeline:
    """The pipeline with the model's text as reasoning of the queries trained in the reasoned format."""
    wanted = {
        (pair.set, pair.query) for step in range(config.sft.steps) for pair in pipeline.reasoned_pairs(step)
    }
    collections = with_self_generated_reasoning(
        config,
        folder / "own_reasoning.jsonl",
        pipeline.mixture.collections,
        wanted,
        model,
        lambda done, total: logger.info(f"the model writes its own reasoning: {done}/{total} queries"),
        team,
    )
    return dataclasses.replace(
        pipeline, mixture=dataclasses.replace(pipeline.mixture, collections=collections)
    )


def _thoughts(rollout: Rollout, prompter: Prompter) -> list[str]:
    """The texts that the model chose, without the closing and without a truncated last word."""
    thoughts_written = []
    for ids, sampled, valid in zip(rollout.ids, rollout.sampled, rollout.valid, strict=True):
        chosen = ids[sampled].tolist()
        complete = not set(prompter.end_ids).isdisjoint(chosen)
        words = prompter.thought_text(chosen).split()
        # The token budget may end inside a word: the model would learn the truncated word.
        thoughts_written.append(" ".join(words if complete or valid or len(words) < 2 else words[:-1]))
    return thoughts_written


def _with(collection: Collection, number: int, thoughts: dict[tuple[int, str], str]) -> Collection:
    def written(query: Query) -> str:
        # Where the model writes nothing, the query is the reasoning.
        return query.reasoning or (
            thoughts[number, query.query_id] or query.text if (number, query.query_id) in thoughts else ""
        )

    queries = tuple(dataclasses.replace(query, reasoning=written(query)) for query in collection.queries)
    return dataclasses.replace(collection, queries=queries)


def _settings(config: RunConfig, prompter: Prompter) -> str:
    """What a text depends on beside the query and the model."""
    limits = (config.text.max_query_tokens, config.text.max_thought_tokens)
    return repr((prompter.reason, prompter.end_ids, limits))


def _key(settings: str, number: int, query: Query) -> str:
    return digest_of((settings, str(number), query.query_id, query.body))


def _read(file: Path) -> dict[str, str]:
    """Key → text; texts without a key are of an earlier version, and are written again."""
    return {record["key"]: record["reasoning"] for record in read_json_lines(file) if "key" in record}
