"""Development queries during stage 1: evaluated, sampled once, and the best checkpoint stays."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.sft_runs import ready, train, watched
from helpers.tiny_models import word_collection

from search_r3_jax.config import OptimizerConfig, RunConfig
from search_r3_jax.data.collection import Collection
from search_r3_jax.evaluation.card_facts import card_facts
from search_r3_jax.evaluation.evaluate import Evaluator
from search_r3_jax.hub.checkpoint_reader import best_checkpoint, read_checkpoint
from search_r3_jax.hub.checkpoint_writer import CheckpointWriter
from search_r3_jax.hub.load_model import load_model
from search_r3_jax.models.layers import LoraParam
from search_r3_jax.models.lora import merge_lora
from search_r3_jax.rollout.encoder import Encoder
from search_r3_jax.text.prompts import Prompter


def at_odds(config: RunConfig, collection: Collection) -> tuple[Collection, Collection]:
    """The collection twice: each query's positive is the document after the one that the untrained model
    finds first, and that one."""
    model = ready(Path(config.model), config)
    graph, state = nnx.split(model.decoder)
    encoder = Encoder(graph, Prompter(model.tokenizer))
    texts = [
        [query.text for query in collection.queries],
        [document.body for document in collection.documents],
    ]
    queries_qe, documents_de = (encoder.encode(state, each, max_tokens=16) for each in texts)
    first = np.argmax(queries_qe @ documents_de.T, axis=1)

    def judged(rows: np.ndarray) -> Collection:
        pairs = zip(collection.queries, (rows % len(collection.documents)).tolist(), strict=True)
        queries = (
            dataclasses.replace(query, positives={collection.documents[row].doc_id: 1})
            for query, row in pairs
        )
        return dataclasses.replace(collection, queries=tuple(queries))

    return judged(first + 1), judged(first)


@pytest.mark.slow
def test_development_queries_are_evaluated_and_the_best_checkpoint_stays(
    tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    folder, run = tiny_folders["llama"], tmp_path / "run"
    config = watched(folder, 9)
    config = dataclasses.replace(
        config,
        sft=dataclasses.replace(config.sft, optimizer=OptimizerConfig(learning_rate=0.05, warmup_steps=9)),
    )
    # What the model finds first is what is watched, and it is trained to find something else: the last
    # checkpoint is not the best.
    collection, dev = at_odds(config, word_collection(documents=24, queries=16))
    train(config, run, collection, dev=dev)
    lines = {line["step"]: line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())}
    scores = {
        step + 1: line["dev_direct_ndcg@10"] for step, line in lines.items() if "dev_direct_ndcg@10" in line
    }
    assert list(scores) == [3, 6, 9]
    best = max(scores, key=lambda step: (scores[step], step))
    assert best != 9
    assert {int(path.name) for path in (run / "checkpoints").iterdir()} == {best, 9}
    assert best_checkpoint(run) == best
    # What was logged is what the checkpoint gives, opened and evaluated apart.
    loaded = ready(folder, config)
    nnx.update(loaded.decoder, read_checkpoint(run, best, nnx.state(loaded.decoder, LoraParam)))
    evaluator = Evaluator(
        nnx.split(loaded.decoder)[0], Prompter(loaded.tokenizer), config.text, config.rl.sampler
    )
    state = nnx.state(loaded.decoder)
    assert evaluator.direct(state, dev, evaluator.documents(state, dev)).metrics.ndcg_at_10 == scores[best]
    merged, named = (
        nnx.to_pure_dict(nnx.state(model))
        for model in (merge_lora(loaded.decoder), load_model(run, step="best").decoder)
    )
    jax.tree.map(np.testing.assert_array_equal, merged, named)
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert {(sample["step"], sample["mode"]) for sample in samples} == {
        (step, mode) for step in (2, 5, 8) for mode in ("direct", "reason")
    }
    assert sorted(path.name for path in (run / "eval").iterdir()) == [
        f"dev_{step:06d}.json" for step in (0, 3, 6, 9)
    ]
    # For the cards of its exports.
    assert json.loads((run / "config.json").read_text())["data_sizes"] == [{"queries": 16, "documents": 24}]
    facts = card_facts(str(run), best, loaded)
    assert [(each.queries, each.documents) for each in facts.data] == [(16, 24)]
    direct, reasoned = facts.scores
    assert direct.ndcg_at_10 == pytest.approx(scores[best])
    assert (direct.split, direct.documents, direct.queries) == (dev.split, 24, 16)
    assert (reasoned.mode, reasoned.development) == ("reason", True)


def test_the_best_checkpoint_survives_a_restart(tmp_path: Path) -> None:
    params: Any = nnx.State({"w": nnx.Param(jnp.ones(3))})
    for step, score in [(1, 0.2), (2, 0.9), (3, None), (4, 0.5), (5, 0.9), (6, 0.1), (7, None)]:
        # Opened anew for every step: what was the best has to be read from the disk.
        writer = CheckpointWriter(tmp_path, keep=2)
        writer.save(step, params, {"count": jnp.zeros(1)}, {"stage": "sft"}, score=score)
        writer.close()
    # Of two that are equally good the newer one.
    assert {int(path.name) for path in (tmp_path / "checkpoints").iterdir()} == {5, 6, 7}
    assert best_checkpoint(tmp_path) == 5


@pytest.mark.slow
def test_a_kill_between_evaluations_leaves_each_sample_once(
    tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    folder, run = tiny_folders["llama"], tmp_path / "run"
    collection = word_collection(documents=24, queries=24)
    config = watched(folder, 6)

    class StopRunError(Exception):
        pass

    def stop_after_the_last(step: int, total: int, values: dict[str, float]) -> None:
        if step == 6:
            raise StopRunError

    # Step 6 was evaluated and logged, and its checkpoint never written.
    with pytest.raises(StopRunError):
        train(config, run, collection, stop_after_the_last, dev=collection)
    train(config, run, collection, dev=collection)
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    told = [(sample["step"], sample["mode"], sample["query"]) for sample in samples]
    assert len(told) == len(set(told)) == 2 * 2 * 3
