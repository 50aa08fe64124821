"""Stage 1 on a tiny model: the packed step equals a plain one, it learns, and a resumed run computes the same."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import plain_hidden, word_collection

from search_r3_jax.config import LoraConfig, OptimizerConfig, RunConfig, SftConfig, TextConfig
from search_r3_jax.errors import UserError
from search_r3_jax.hub.checkpoint import LoadedModel, load_model, with_lora
from search_r3_jax.models.embedding import unit
from search_r3_jax.models.lora import merge_lora
from search_r3_jax.text.prompts import Prompter
from search_r3_jax.training.optimizer import make_optimizer
from search_r3_jax.training.sft import SftState, make_pipeline, make_step, train_sft


def config_of(folder: Path, steps: int) -> RunConfig:
    return RunConfig(
        model=str(folder),
        compute_dtype="float32",
        remat="dots",
        text=TextConfig(max_query_tokens=16, max_document_tokens=32),
        lora=LoraConfig(rank=4),
        sft=SftConfig(
            steps=steps,
            global_batch=8,
            reasoned_share=0.25,
            reasoning="key_terms",
            key_terms=3,
            save_every=5,
            optimizer=OptimizerConfig(learning_rate=1e-2),
        ),
    )


def ready(folder: Path, config: RunConfig) -> LoadedModel:
    return with_lora(load_model(folder, remat=config.remat), config.lora, seed=config.seed)


def test_the_packed_loss_equals_one_text_at_a_time(tiny_folders: dict[str, Path]) -> None:
    config = config_of(tiny_folders["qwen2"], 10)
    model = ready(tiny_folders["qwen2"], config)
    prompter = Prompter(model.tokenizer)
    collection = word_collection(documents=20, queries=20)
    pipeline = make_pipeline(config, collection, prompter)
    batch = pipeline.batch(3)
    graph, params, frozen = nnx.split(model.decoder, nnx.All(nnx.Param, lambda path, x: "lora" in str(path) or "row" in str(path)), ...)
    optimizer = make_optimizer(config.sft.optimizer, 10)
    _, scalars = make_step(graph, prompter, optimizer, config.sft)(SftState(params, optimizer.init(params)), frozen, batch)

    decoder = merge_lora(model.decoder)
    pairs = pipeline.pairs(3)
    rows, replies = [], []
    for i, (query, document) in enumerate(pairs):
        text = collection.queries[query].text
        if i < 6:
            replies.append(len(prompter.direct.closing))
            rows.append([*prompter.direct.prefix, *prompter.direct_rows([text], 16)[0]])
        else:
            assert pipeline.key_terms is not None
            thought = prompter.thought_ids(pipeline.key_terms.thought(document))
            replies.append(len(thought))
            rows.append([*prompter.reason.prefix, *prompter.reason_rows([text], 16)[0], *thought])
    rows += [[*prompter.direct.prefix, *prompter.direct_rows([collection.documents[d].body], 32)[0]] for _, d in pairs]
    hidden = plain_hidden(decoder, rows)
    log_probs = np.asarray(jax.nn.log_softmax(decoder.logits(hidden), axis=-1))
    losses = [-log_probs[i, t - 1, rows[i][t]] for i, reply in enumerate(replies) for t in range(len(rows[i]) - reply, len(rows[i]))]
    vectors = np.asarray(unit(jnp.stack([hidden[i, len(row) - 1] for i, row in enumerate(rows)]))).astype(np.float64)
    scores = vectors[:8] @ vectors[8:].T / config.sft.temperature
    infonce = np.mean([np.log(np.exp(row - row.max()).sum()) + row.max() - row[i] for i, row in enumerate(scores)])
    np.testing.assert_allclose(float(scalars["infonce"]), infonce, rtol=1e-4)
    np.testing.assert_allclose(float(scalars["language"]), np.mean(losses), rtol=1e-4)


def test_it_learns_and_a_resumed_run_is_bit_equal(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tiny_folders["llama"]
    collection = word_collection(documents=24, queries=24)
    config = config_of(folder, 20)
    whole = train_sft(config, tmp_path / "whole", collection, ready(folder, config), lambda *_: None)
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
        train_sft(config, run, collection, ready(folder, config), stop_at_12)
    resumed = train_sft(config, run, collection, ready(folder, config), lambda *_: None)
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(whole), nnx.to_pure_dict(resumed))
    again = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in again] == [(line["step"], line["loss"]) for line in lines]


def test_a_run_directory_is_a_model(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tiny_folders["llama"]
    config = config_of(folder, 6)
    model = ready(folder, config)
    params = train_sft(config, tmp_path / "run", word_collection(documents=24, queries=24), model, lambda *_: None)
    nnx.update(model.decoder, params)
    expected = nnx.to_pure_dict(nnx.state(merge_lora(model.decoder)))
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(load_model(tmp_path / "run").decoder)), expected)


def test_another_config_in_the_same_folder_is_refused(tiny_folders: dict[str, Path], tmp_path: Path) -> None:

    folder = tiny_folders["llama"]
    config = config_of(folder, 2)
    collection = word_collection(documents=24, queries=24)
    train_sft(config, tmp_path / "run", collection, ready(folder, config), lambda *_: None)
    other = dataclasses.replace(config, sft=dataclasses.replace(config.sft, temperature=0.1))
    with pytest.raises(UserError, match=r"config\.sft\.temperature"):
        train_sft(other, tmp_path / "run", collection, ready(folder, other), lambda *_: None)
