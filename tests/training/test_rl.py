"""Stage 2 from its first checkpoint to its last: the index really moves, what is logged is true, and what
cannot work is refused."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.command_folder import computed, equal
from helpers.tiny_models import word_collection

from search_r3_jax.config import (
    CollapseConfig,
    DataConfig,
    IndexConfig,
    InfoNceConfig,
    LoraConfig,
    OptimizerConfig,
    RewardConfig,
    RlConfig,
    RunConfig,
    SamplerConfig,
    TextConfig,
)
from search_r3_jax.data.collection import Collection
from search_r3_jax.data.dataset import build_dataset, load_collection
from search_r3_jax.data.development import TrainingSet, for_stage_2
from search_r3_jax.errors import StoppedError, UserError
from search_r3_jax.hub.checkpoint_reader import best_checkpoint, latest_checkpoint
from search_r3_jax.hub.load_model import LoadedModel, load_model, with_lora
from search_r3_jax.retrieval.indexer.worker import index_folder
from search_r3_jax.retrieval.store.versions import list_versions, open_version
from search_r3_jax.rollout.encoder import Encoder
from search_r3_jax.rollout.sampler import Rollout, RunningRollout, Sampler
from search_r3_jax.rollout.sampling_program import Replies
from search_r3_jax.text.prompts import Prompter
from search_r3_jax.training import rl_acts
from search_r3_jax.training.rl import RlResult, train_rl
from search_r3_jax.training.rl_session import RlSession
from search_r3_jax.training.rl_setup import make_stage
from search_r3_jax.training.run import RlRecord

CONFIG = RunConfig(
    compute_dtype="float32",
    remat="none",
    text=TextConfig(max_query_tokens=16, max_document_tokens=32),
    lora=LoraConfig(rank=4),
    rl=RlConfig(
        steps=6,
        global_queries=3,
        group_size=4,
        save_every=2,
        # A tiny random model hardly ever writes the embed token.
        collapse=CollapseConfig(steps=0),
        sampler=SamplerConfig(max_think_tokens=8),
        optimizer=OptimizerConfig(learning_rate=1e-3),
    ),
    index=IndexConfig(candidates=12, refresh_budget=8, overlay_max_age_steps=2),
)


def start_of_run(tmp_path: Path, folder: Path, **rl: Any) -> tuple[RunConfig, TrainingSet, LoadedModel]:
    config = dataclasses.replace(CONFIG, model=str(folder), rl=dataclasses.replace(CONFIG.rl, **rl))
    build_dataset(
        {"train": word_collection(documents=40, queries=20)},
        tmp_path / "data",
        name="words",
        source={"kind": "test"},
    )
    data = TrainingSet(train=load_collection(tmp_path / "data", "train"), dev=None)
    return config, data, with_lora(load_model(folder), config.lora, seed=0)


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


def run_it(
    config: RunConfig,
    folder: Path,
    data: TrainingSet,
    model: LoadedModel,
    *,
    pause: float = 0.0,
    **named: Any,
) -> RlResult:
    record = RlRecord(data="../data", split="train")
    options: dict[str, Any] = {"on_step": lambda *_: time.sleep(pause)} | named
    return train_rl(config, folder, data=data, model=model, record=record, **options)


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.slow
def test_a_run_swaps_to_an_index_built_meanwhile_and_resumes(
    tiny_folders: dict[str, Path], tmp_path: Path, log_lines: list[str]
) -> None:
    config, data, model = start_of_run(tmp_path, tiny_folders["llama"], min_swaps=1, max_extra_steps=400)
    run = tmp_path / "run"
    result = run_it(config, run, data, model, pause=0.1)
    assert result.swaps, (log_lines, (run / "indexer.log").read_text(), list_versions(index_folder(run)))
    assert result.swaps[0][1] > 0
    versions = list_versions(index_folder(run))
    assert result.swaps[-1][1] in versions

    # A version is what its checkpoint's parameters say of the corpus.
    step = versions[-1]
    index = open_version(index_folder(run), step, expect_corpus_hash=data.train.corpus_hash())
    checkpoint = load_model(run, step=step)
    graph, state = nnx.split(checkpoint.decoder)
    texts = [document.body for document in data.train.documents]
    np.testing.assert_allclose(
        index.vectors,
        Encoder(graph, Prompter(checkpoint.tokenizer)).encode(state, texts, max_tokens=32),
        atol=1e-5,
    )

    lines = lines_of(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(result.steps))
    assert all(0 <= line["reward"] <= 1 and line["index_age"] >= 0 for line in lines)
    assert result.valid_rate == pytest.approx(
        np.mean([line["valid_rate"] for line in lines[-max(1, len(lines) // 4) :]])
    )
    again = run_it(config, run, data, model)
    assert again.steps == result.steps
    assert again.swaps == result.swaps


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
    assert begun[-1].ended.done()


@pytest.mark.slow
def test_the_indexer_ends_with_a_killed_trainer(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tiny_folders["llama"]
    start_of_run(tmp_path, folder)
    code = (
        "import sys, time; from pathlib import Path; from search_r3_jax.retrieval.indexer.follower import "
        "IndexFollower\n"
        "follower = IndexFollower(Path(sys.argv[1]), 'x', 0); follower.start()\n"
        "print(follower.indexer_pid, flush=True)\n"
        "time.sleep(60)"
    )
    run = tmp_path / "run"
    run.mkdir()
    record = {
        "stage": "rl",
        "config": dataclasses.asdict(dataclasses.replace(CONFIG, model=str(folder))),
        "data": "../data",
        "split": "train",
    }
    (run / "config.json").write_text(json.dumps(record))
    trainer = subprocess.Popen([sys.executable, "-c", code, str(run)], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    indexer = int(trainer.stdout.readline())
    time.sleep(8)
    os.kill(indexer, 0)
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline and Path(f"/proc/{indexer}").exists() and "Z" not in state_of(indexer):
        time.sleep(0.2)
    assert not Path(f"/proc/{indexer}").exists() or "Z" in state_of(indexer)


def state_of(process: int) -> str:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "Z"


@pytest.mark.slow
def test_everything_turned_on_and_what_is_logged_of_it(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    """Two passes over a rollout in micro-batches, importance weights, length, gain over direct; watched on
    development queries."""
    config, data, model = start_of_run(
        tmp_path,
        tiny_folders["qwen3"],
        steps=4,
        inner_epochs=2,
        micro_queries=1,
        importance_cap=2.0,
        infonce=InfoNceConfig(negatives=5, near_duplicate_cosine=0.9, train_documents=True),
        reward=RewardConfig(variant="gain_over_direct", length_weight=0.1, free_tokens=2),
        eval_every=2,
        sample_every=5,
        save_every=10,
    )
    dev = word_collection(documents=30, queries=6, seed=1, split="dev")
    run = tmp_path / "run"
    run_it(config, run, dataclasses.replace(data, dev=dev), model)
    lines = lines_of(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    for line in lines:
        assert line["reward"] == pytest.approx(
            line["reward_retrieval"] + line["reward_length"] + line["reward_format"], abs=1e-6
        )
        assert line["reward_format_variance"] >= 0
        assert 0 <= line["zero_group_share"] <= 1
        # What sampled the tokens and what trains on them compute the same; after a first pass the policy has
        # moved.
        assert 1 - 1e-5 <= line["sampler_ratio_min"] <= line["sampler_ratio_max"] <= 1 + 1e-5
        assert line["ratio_max"] - line["ratio_min"] > 1e-5
        assert line["importance_capped_share"] == 0
        assert (
            line["seconds"]
            == line["swap_seconds"]
            + line["index_wait_seconds"]
            + line["rollout_wait_seconds"]
            + line["environment_seconds"]
            + line["update_seconds"]
        )
        assert min(line["rollout_seconds"], line["environment_seconds"], line["update_seconds"]) > 0
        assert {
            "kl",
            "entropy",
            "distinct_2",
            "repetition",
            "rollout_tokens_per_second",
            "skipped",
        } <= line.keys()
    # Of the first of every 16 steps.
    assert ["effective_rank" in line for line in lines] == [True, False, False, False]
    assert 1 <= lines[0]["effective_rank"] <= 12
    watched = [line["step"] for line in lines if "dev_reason_ndcg@10" in line]
    assert watched == [1, 3]
    assert sorted(file.name for file in (run / "eval").iterdir()) == [
        "dev_000000.json",
        "dev_000002.json",
        "dev_000004.json",
    ]
    assert all(
        -1 <= lines[step]["dev_swap_gain"] <= 1 and 0 <= lines[step]["dev_swap_wins"] <= 1 for step in watched
    )
    scores = {
        0: json.loads((run / "eval" / "dev_000000.json").read_text())["results"]["words"]["reason"]["ndcg@10"]
    }
    record = json.loads((run / "config.json").read_text())
    assert record["data_sizes"] == {
        "queries": len(data.train.queries),
        "documents": len(data.train.documents),
    }
    scores |= {line["step"] + 1: line["dev_reason_ndcg@10"] for line in lines if "dev_reason_ndcg@10" in line}
    assert best_checkpoint(run) == max(scores, key=lambda step: (scores[step], step))

    # Every fifth of the 12 rollouts a step, counted through the run.
    rollouts = [sample for sample in lines_of(run / "samples.jsonl") if "reward" in sample]
    assert Counter(sample["step"] for sample in rollouts) == Counter(n // 12 for n in range(0, 48, 5))
    texts = {query.query_id: query.text for query in data.train.queries}
    for sample in rollouts:
        assert sample["query"] == texts[sample["query_id"]]
        assert sample["reward"] == pytest.approx(sum(sample["terms"].values()), abs=1e-6)
        assert len(sample["top"]) == (3 if sample["valid"] else 0)


@pytest.mark.slow
@pytest.mark.parametrize("scoring", ["stale", "consistent_stale"])
def test_rewards_by_the_index_alone_encode_nothing_anew(
    tiny_folders: dict[str, Path], tmp_path: Path, scoring: Any
) -> None:
    config, data, model = start_of_run(tmp_path, tiny_folders["llama"], steps=3)
    index = dataclasses.replace(
        config.index, scoring=scoring, drift_every=1, drift_documents=20, drift_cosine=1.0
    )
    run = tmp_path / "run"
    run_it(dataclasses.replace(config, index=index), run, data, model)
    lines = lines_of(run / "metrics.jsonl")
    assert [line["reencoded"] for line in lines] == [0, 0, 0]
    assert all(line["index_stall_share"] >= 0 and 0 < line["drift_cosine"] <= 1 + 1e-6 for line in lines)
    # Any change counts as drift by such a limit.
    assert latest_checkpoint(run) == 3
    assert [path.name for path in (run / "pins").glob("trainer")] == (
        ["trainer"] if scoring == "consistent_stale" else []
    )


@pytest.mark.slow
def test_a_collapse_stops_the_run_and_keeps_its_checkpoint(
    tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    config, data, model = start_of_run(
        tmp_path, tiny_folders["llama"], collapse=CollapseConfig(steps=2, valid_rate=0.9), save_every=50
    )
    run = tmp_path / "run"
    with pytest.raises(
        UserError,
        match=r"stage 2, step 1: valid_rate: below 0\.9 for 2 steps in a row .* \(checkpoints are in .*run\)",
    ):
        run_it(config, run, data, model)
    assert latest_checkpoint(run) == 2
    # The same command does not forget how low it had sunk.
    with pytest.raises(UserError, match=r"step 2: valid_rate: below 0\.9 for 3 steps in a row"):
        run_it(config, run, data, model)
    assert [line["step"] for line in lines_of(run / "metrics.jsonl")] == [0, 1, 2]


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


def with_first_query(**changes: Any) -> Collection:
    collection = word_collection(documents=40, queries=20)
    first, *others = collection.queries
    return dataclasses.replace(collection, queries=(dataclasses.replace(first, **changes), *others))


@pytest.mark.parametrize(
    ("change", "collection", "named"),
    [
        ({"rl": {"group_size": 1}}, {}, "rl.group_size"),
        ({"rl": {"sampler": SamplerConfig(temperature=0.0)}}, {}, "rl.sampler.temperature: 0.0: give"),
        ({"index": {"candidates": 1000}}, {}, "index.candidates"),
        ({"rl": {"micro_queries": 2}}, {}, "rl.micro_queries: 2: does not divide rl.global_queries 3"),
        ({"rl": {"global_queries": 21}}, {}, "rl.global_queries: 21: there are 20"),
        (
            {"rl": {"infonce": InfoNceConfig(negatives=38)}},
            {},
            "rl.infonce.negatives: 38: the corpus has 40 documents.*give 0 to 37",
        ),
        ({"rl": {"infonce": InfoNceConfig(negatives=-1)}}, {}, "rl.infonce.negatives: -1"),
        (
            {"rl": {"infonce": InfoNceConfig(near_duplicate_cosine=1.1)}},
            {},
            "near_duplicate_cosine: 1.1: give a number from -1 to 1",
        ),
        ({"rl": {"inner_epochs": 0}}, {}, "rl.inner_epochs: 0"),
        (
            {"rl": {"min_tokens": 9}},
            {},
            "rl.min_tokens: 9: at most rl.sampler.max_think_tokens 8 are written",
        ),
        ({"rl": {"sample_every": 0}}, {}, "rl.sample_every: 0"),
        ({"rl": {"reward": RewardConfig(length_weight=0.1, free_tokens=8)}}, {}, "free_tokens 8"),
        ({"rl": {"reward": RewardConfig(floor_gap=0.0)}}, {}, "floor_gap: 0"),
        ({}, {"text": " \t"}, "words: query 'q0': is empty"),
        ({}, {"positives": {}}, "words: query 'q0': has no relevant document"),
    ],
)
def test_impossible_settings_are_refused_before_the_first_step(
    tiny_model: LoadedModel,
    tmp_path: Path,
    change: dict[str, dict[str, Any]],
    collection: dict[str, Any],
    named: str,
) -> None:
    rl, index = (
        dataclasses.replace(CONFIG.rl, **change.get("rl", {})),
        dataclasses.replace(CONFIG.index, **change.get("index", {})),
    )
    data = TrainingSet(train=with_first_query(**collection), dev=None)
    with pytest.raises(UserError, match=named):
        run_it(dataclasses.replace(CONFIG, rl=rl, index=index), tmp_path / "run", data, tiny_model)
    assert not (tmp_path / "run").exists()


def test_a_model_that_embeds_no_numbers_is_refused(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    model = load_model(tiny_folders["llama"])
    scale = nnx.state(model.decoder, nnx.PathContains("final_norm"))
    nnx.update(model.decoder, jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), scale))
    data = TrainingSet(train=word_collection(documents=40, queries=20), dev=None)
    with pytest.raises(UserError, match="embeddings are not finite"):
        run_it(CONFIG, tmp_path / "run", data, with_lora(model, CONFIG.lora, seed=0))
    assert not (tmp_path / "run").exists()


def test_stage_2_trains_on_fewer_queries_and_searches_what_they_judge() -> None:
    whole = TrainingSet(train=word_collection(documents=40, queries=20), dev=None)
    small = for_stage_2(whole, DataConfig(rl_queries=5, rl_documents=12)).train
    assert len(small.queries) == 5
    assert len(small.documents) == 12
    assert {doc_id for query in small.queries for doc_id in query.positives} <= {
        document.doc_id for document in small.documents
    }
    assert all(query in whole.train.queries for query in small.queries)
    unjudged = TrainingSet(train=with_first_query(positives={}), dev=None)
    kept = for_stage_2(unjudged, DataConfig()).train
    assert [query.query_id for query in kept.queries] == [f"q{i}" for i in range(1, 20)]
    assert len(kept.documents) == 40
