"""The acts of a step of stage 2: whose replies are written, when they are begun, and which of them count."""

import dataclasses
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.command_folder import computed, equal
from helpers.rl_runs import CONFIG, lines_of, run_it, start_of_run
from helpers.tiny_models import word_collection

from search_r3_jax.data.development import TrainingSet
from search_r3_jax.errors import StoppedError
from search_r3_jax.hub.load_model import load_model, with_lora
from search_r3_jax.rollout.sampler import Rollout, RunningRollout, Sampler
from search_r3_jax.rollout.sampling_program import Replies
from search_r3_jax.training import rl_acts
from search_r3_jax.training.rl import RlResult
from search_r3_jax.training.rl_session import RlSession
from search_r3_jax.training.rl_setup import make_stage


class _NoSampler(Sampler):
    """Stands in for a sampler whose replies do not matter; keeps the texts."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def start(
        self, state: nnx.State, texts: Sequence[str], seeds_qg: np.ndarray, **named: Any
    ) -> RunningRollout:
        self.texts += texts
        B = seeds_qg.size
        tokens, flags = np.zeros((B, 1), np.int32), np.zeros((B, 1), bool)
        replies = Replies(
            ids=jnp.asarray(tokens),
            lengths=jnp.asarray(tokens[:, 0]),
            sampled=jnp.asarray(flags),
            log_probs=jnp.zeros((B, 1)),
            entropies=jnp.zeros((B, 1)),
            vectors=jnp.zeros((B, 4)),
            valid=jnp.asarray(flags[:, 0]),
        )
        return RunningRollout(
            prompt_ids=tokens, prompt_lengths=tokens[:, 0], replies=replies, name=lambda row: str(row)
        )


def test_copies_and_twins_are_relevant_and_instructions_are_read(tiny_folders: dict[str, Path]) -> None:
    plain = word_collection(documents=8, queries=4)
    documents, queries = list(plain.documents), list(plain.queries)
    documents[7] = dataclasses.replace(documents[7], text=documents[2].text)
    queries[1] = dataclasses.replace(queries[1], text=queries[0].text)
    queries[3] = dataclasses.replace(queries[3], instruction="find code")
    collection = dataclasses.replace(plain, documents=tuple(documents), queries=tuple(queries))
    config = dataclasses.replace(CONFIG, rl=dataclasses.replace(CONFIG.rl, global_queries=4))
    model = with_lora(load_model(tiny_folders["llama"]), config.lora, seed=0)
    stage, _ = make_stage(config, TrainingSet(train=collection, dev=None), model)
    stage.sampler = sampler = _NoSampler()
    sampled = rl_acts.sample(stage, 0)
    relevant = {
        query.query_id: dict(grades) for query, grades in zip(sampled.queries, sampled.positives, strict=True)
    }
    assert relevant == {"q0": {0: 1, 1: 1}, "q1": {1: 1, 0: 1}, "q2": {2: 1, 7: 1}, "q3": {3: 1}}
    assert sorted(sampler.texts) == sorted(query.body for query in queries)
    assert f"Instruct: find code\nQuery: {queries[3].text}" in sampler.texts


@pytest.mark.slow
def test_the_next_rollout_is_begun_before_a_step_is_counted_and_is_the_same(
    tiny_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for where a checkpoint lies between them: with one after every step, none is begun early."""
    events, start, finish = list[str](), Sampler.start, RlSession.finish_step

    def started(sampler: Sampler, *arguments: Any, **named: Any) -> RunningRollout:
        events.append("rollout")
        return start(sampler, *arguments, **named)

    def finished(session: RlSession, *arguments: Any) -> None:
        events.append("counted")
        finish(session, *arguments)

    monkeypatch.setattr(Sampler, "start", started)
    monkeypatch.setattr(RlSession, "finish_step", finished)
    found, results, replay = list[list[str]](), list[RlResult](), None
    for save_every in (4, 1):
        config, data, model = start_of_run(
            tmp_path / str(save_every), tiny_folders["llama"], save_every=save_every
        )
        run = tmp_path / str(save_every) / "run"
        events.clear()
        results.append(run_it(config, run, data, model, replay=replay))
        found.append(list(events))
        replay = run
    step, early = ["rollout", "counted"], ["rollout", "rollout", "counted"]
    assert found == [[*early, *step, *step, "counted", *early, "counted"], step * 6]
    ours, theirs = (lines_of(tmp_path / str(save_every) / "run" / "metrics.jsonl") for save_every in (4, 1))
    assert [computed(line) for line in ours] == [computed(line) for line in theirs]
    equal(*(nnx.to_pure_dict(result.params) for result in results))


@pytest.mark.slow
def test_a_run_that_is_stopped_waits_for_the_rollout_that_is_begun(
    tiny_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, start = list[RunningRollout](), Sampler.start

    def started(sampler: Sampler, *arguments: Any, **named: Any) -> RunningRollout:
        begun.append(start(sampler, *arguments, **named))
        return begun[-1]

    def stop(done: int, total: int, metrics: dict[str, float]) -> None:
        if done == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Sampler, "start", started)
    config, data, model = start_of_run(tmp_path, tiny_folders["llama"], save_every=10)
    with pytest.raises(StoppedError):
        run_it(config, tmp_path / "run", data, model, on_step=stop)
    # That of the next step was begun, and nobody asked for it.
    assert len(begun) == len(lines_of(tmp_path / "run" / "metrics.jsonl")) + 1
    assert all(cast(Any, array).is_ready() for array in begun[-1].replies)


@pytest.mark.slow
def test_replies_that_are_too_short_earn_nothing(
    tiny_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = RunningRollout.result

    def every_other_is_short(running: RunningRollout) -> Rollout:
        rollout = result(running)
        lengths = np.where(np.arange(len(rollout.lengths)) % 2, 6, 7).astype(np.int32)
        return dataclasses.replace(rollout, lengths=lengths, valid=np.ones(len(lengths), bool))

    monkeypatch.setattr(RunningRollout, "result", every_other_is_short)
    config, data, model = start_of_run(tmp_path, tiny_folders["llama"], steps=1, min_tokens=7, sample_every=1)
    run_it(config, tmp_path / "run", data, model)
    assert [line["valid_rate"] for line in lines_of(tmp_path / "run" / "metrics.jsonl")] == [0.5]
    for reply in lines_of(tmp_path / "run" / "samples.jsonl"):
        assert reply["valid"] == (reply["tokens"] == 7) == (reply["reward"] > 0)
