"""Stage 1 on a tiny model: the packed step equals a plain one, it learns, and a resumed run computes the
same."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers.sft_runs import config_of, ready, train
from helpers.tiny_models import plain_hidden, word_collection

from search_r3_jax.config import LoraConfig, RunConfig
from search_r3_jax.data.collection import Collection
from search_r3_jax.data.development import TrainingSet
from search_r3_jax.data.pipeline import PairPipeline
from search_r3_jax.errors import UserError
from search_r3_jax.hub.load_model import LoadedModel, load_model
from search_r3_jax.models.layers import LoraParam
from search_r3_jax.models.lora import merge_lora
from search_r3_jax.text.prompts import Prompter
from search_r3_jax.training.sft import make_pipeline, train_sft
from search_r3_jax.training.sft_step import make_step
from search_r3_jax.training.state import TrainState
from search_r3_jax.vectors import l2_normalize

BOTH = ("query_to_document", "document_to_query")


def disturbed(model: LoadedModel, seed: int = 0) -> LoadedModel:
    """Adapters that do something, so that current and base differ."""
    params = nnx.state(model.decoder, LoraParam)
    generator = np.random.default_rng(seed)
    nnx.update(
        model.decoder,
        jax.tree.map(lambda x: x + 0.05 * generator.standard_normal(x.shape).astype(np.float32), params),
    )
    return model


def one_step(
    config: RunConfig, folder: Path, collection: Collection, step: int = 3
) -> tuple[LoadedModel, PairPipeline, dict[str, float], Any]:
    """One update of a disturbed model: the model before, the pipeline, the scalars, the parameters after."""
    model = disturbed(ready(folder, config))
    prompter = Prompter(model.tokenizer)
    pipeline = make_pipeline(config, [collection], prompter)
    graph, params, frozen = nnx.split(model.decoder, LoraParam, ...)
    # Plain descent: the change is the gradient itself.
    optimizer = optax.sgd(1.0)
    state = TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))
    after, scalars = make_step(graph, prompter, optimizer, config.sft)(state, frozen, pipeline.batch(step))
    return (
        model,
        pipeline,
        {name: float(value) for name, value in scalars.items()},
        nnx.to_pure_dict(after.params),
    )


def test_a_batch_may_be_of_one_set(tiny_folders: dict[str, Path]) -> None:
    config = config_of(tiny_folders["llama"], 1)
    sets = [word_collection(documents=40, queries=40, seed=seed) for seed in range(3)]
    prompter = Prompter(load_model(tiny_folders["llama"]).tokenizer)
    of_steps = {}
    for batches in ("mixed", "one_set"):
        data = dataclasses.replace(config.data, batches=batches)
        pipeline = make_pipeline(dataclasses.replace(config, data=data), sets, prompter)
        of_steps[batches] = [{pair.set for pair in pipeline.pairs(step)} for step in range(12)]
    assert {len(found) for found in of_steps["one_set"]} == {1}
    assert set.union(*of_steps["one_set"]) == {0, 1, 2}
    assert {len(found) for found in of_steps["mixed"]} == {3}


@pytest.mark.slow
def test_all_four_losses_equal_one_text_at_a_time(tiny_folders: dict[str, Path]) -> None:
    """Packed behind shared prefixes in chunks, against whole rows through merged and untouched weights, in
    NumPy."""
    config = config_of(tiny_folders["qwen2"], 10)
    collection = word_collection(documents=20, queries=20)
    model, pipeline, scalars, _ = one_step(config, tiny_folders["qwen2"], collection)
    prompter = Prompter(model.tokenizer)
    rows, replies = [], []
    pairs = pipeline.pairs(3)
    for i, pair in enumerate(pairs):
        text = collection.queries[pair.query].text
        if i < 6:
            replies.append(len(prompter.direct.closing))
            rows.append([*prompter.direct.prefix, *prompter.direct_rows([text], 16)[0]])
        else:
            thought = prompter.thought_ids(pipeline.tfidf_reasoning[0].thought(pair.document))
            replies.append(len(thought))
            rows.append([*prompter.reason.prefix, *prompter.reason_rows([text], 16)[0], *thought])
    rows += [
        [*prompter.direct.prefix, *prompter.direct_rows([collection.documents[pair.document].body], 32)[0]]
        for pair in pairs
    ]
    decoder, base = merge_lora(model.decoder), load_model(tiny_folders["qwen2"]).decoder
    hidden = plain_hidden(decoder, rows)
    log_p = np.asarray(jax.nn.log_softmax(decoder.logits(hidden), axis=-1), np.float64)
    log_q = np.asarray(jax.nn.log_softmax(base.logits(plain_hidden(base, rows)), axis=-1), np.float64)
    read = [
        (i, t - 1, rows[i][t])
        for i, reply in enumerate(replies)
        for t in range(len(rows[i]) - reply, len(rows[i]))
    ]
    vectors = np.asarray(
        l2_normalize(jnp.stack([hidden[i, len(row) - 1] for i, row in enumerate(rows)]))
    ).astype(np.float64)
    cosines = vectors[:8] @ vectors[8:].T
    scores = cosines / config.sft.temperature
    expected = {
        "infonce": np.mean(
            [np.log(np.exp(row - row.max()).sum()) + row.max() - row[i] for i, row in enumerate(scores)]
        ),
        "triplet": np.mean(
            [max(0, np.delete(row, i).max() - row[i] + 0.15) for i, row in enumerate(cosines)]
        ),
        "language": -np.mean([log_p[i, t, token] for i, t, token in read]),
        # The base knows nothing of the embed token: where that is due it is not asked.
        "kl": np.mean(
            [
                np.sum(np.exp(log_p[i, t]) * (log_p[i, t] - log_q[i, t]))
                for i, t, token in read
                if token != model.embed_id
            ]
        ),
    }
    for name, value in expected.items():
        assert value > 1e-3
        assert scalars[name] == pytest.approx(value, rel=2e-4), name
    assert scalars["loss"] == pytest.approx(sum(expected.values()), rel=2e-4)


@pytest.mark.slow
def test_chunks_change_neither_loss_nor_gradient(tiny_folders: dict[str, Path]) -> None:
    folder, collection = tiny_folders["llama"], word_collection(documents=20, queries=20)
    whole = config_of(folder, 10)
    # The same texts in either format: which pairs are reasoned goes by chunk.
    sft = dataclasses.replace(
        whole.sft, reasoned_share=0.0, matryoshka=(16, 64), directions=BOTH, partition="per_direction"
    )
    whole = dataclasses.replace(whole, sft=sft)
    chunked = dataclasses.replace(whole, sft=dataclasses.replace(whole.sft, encode_chunk=2))
    before, _, expected, whole_after = one_step(whole, folder, collection)
    _, _, found, chunked_after = one_step(chunked, folder, collection)
    assert found == pytest.approx(expected, rel=1e-5)
    start = nnx.to_pure_dict(nnx.state(before.decoder, LoraParam))
    for mine, theirs, old in zip(*map(jax.tree.leaves, (chunked_after, whole_after, start)), strict=True):
        scale = float(jnp.abs(theirs - old).max())
        assert scale > 0
        np.testing.assert_allclose(mine, theirs, atol=1e-5 * max(scale, 1.0))


@pytest.mark.slow
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(
    tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    folder, collection = tiny_folders["llama"], word_collection(documents=20, queries=20)
    config = config_of(folder, 12)
    # The square of a gradient's norm is beyond float32.
    config = dataclasses.replace(
        config, sft=dataclasses.replace(config.sft, infonce_weight=1e30, max_skipped=4)
    )
    model, _, scalars, after = one_step(config, folder, collection)
    assert scalars["skipped_in_a_row"] == 1
    jax.tree.map(np.testing.assert_array_equal, after, nnx.to_pure_dict(nnx.state(model.decoder, LoraParam)))
    with pytest.raises(
        UserError,
        match=r"sft\.optimizer\.learning_rate: step 3: 4 steps in a row were not finite; lower the rate",
    ):
        train(config, tmp_path / "run", collection)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [1, 2, 3, 4]


@pytest.mark.slow
def test_full_fine_tuning_keeps_its_start_as_the_reference(
    tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    folder, collection = tiny_folders["llama"], word_collection(documents=24, queries=24)
    config = dataclasses.replace(config_of(folder, 4), lora=LoraConfig(rank=0))
    train(config, tmp_path / "run", collection)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert lines[-1]["kl"] > 1e-4


@pytest.mark.slow
def test_it_learns_and_a_resumed_run_is_bit_equal(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tiny_folders["llama"]
    collection = word_collection(documents=24, queries=24)
    config = config_of(folder, 20)
    # Without the term that holds it where it began, and the one whose margin no tiny model reaches.
    config = dataclasses.replace(
        config, sft=dataclasses.replace(config.sft, kl_weight=0.0, triplet_weight=0.0)
    )
    whole = train(config, tmp_path / "whole", collection)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(20))
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]

    class StopRunError(Exception):
        pass

    def stop_at_12(step: int, total: int, values: dict[str, float]) -> None:
        if step == 12:
            raise StopRunError

    run = tmp_path / "stopped"
    with pytest.raises(StopRunError):
        train(config, run, collection, stop_at_12)
    resumed = train(config, run, collection)
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)
    again = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in again] == [
        (line["step"], line["loss"]) for line in lines
    ]


@pytest.mark.slow
def test_a_run_directory_is_a_model(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tiny_folders["llama"]
    config = config_of(folder, 6)
    model = ready(folder, config)
    params = train(config, tmp_path / "run", word_collection(documents=24, queries=24))
    trained = nnx.state(model.decoder, LoraParam)
    nnx.replace_by_pure_dict(trained, params)
    nnx.update(model.decoder, trained)
    expected = nnx.to_pure_dict(nnx.state(merge_lora(model.decoder)))
    jax.tree.map(
        np.testing.assert_array_equal,
        nnx.to_pure_dict(nnx.state(load_model(tmp_path / "run").decoder)),
        expected,
    )


@pytest.mark.parametrize(
    ("data", "sft", "said"),
    [
        ({}, {"global_batch": 1}, r"sft\.global_batch: 1: a pair alone has nothing to be told apart from"),
        ({"sets": ("a", "./a")}, {}, r"data\.sets: the same one is there twice; name each once"),
        ({}, {"matryoshka": (8, 16, 8)}, r"sft\.matryoshka: 8 16 8: name each once"),
    ],
)
def test_settings_that_say_a_thing_twice_or_leave_nothing_to_learn_are_refused(
    tmp_path: Path, data: dict[str, Any], sft: dict[str, Any], said: str
) -> None:
    config = config_of(tmp_path / "no model is loaded", 1)
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, **data), sft=dataclasses.replace(config.sft, **sft)
    )
    sets = [TrainingSet(train=word_collection(documents=8, queries=8), dev=None)]
    with pytest.raises(UserError, match=said):
        train_sft(config, tmp_path / "run", sets=sets)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_another_config_in_the_same_folder_is_refused(tiny_folders: dict[str, Path], tmp_path: Path) -> None:

    folder = tiny_folders["llama"]
    config = config_of(folder, 2)
    collection = word_collection(documents=24, queries=24)
    train(config, tmp_path / "run", collection)
    other = dataclasses.replace(config, sft=dataclasses.replace(config.sft, temperature=0.1))
    with pytest.raises(UserError, match=r"sft\.temperature"):
        train(other, tmp_path / "run", collection)
