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
from helpers.clock import set_day
from helpers.tiny_models import CHAT_TEMPLATE, plain_hidden, word_collection, write_tiny_checkpoint

from search_r3_jax.config import LoraConfig, OptimizerConfig, RunConfig, SamplerConfig, SftConfig, TextConfig
from search_r3_jax.data.collection import Collection
from search_r3_jax.data.development import TrainingSet
from search_r3_jax.data.pipeline import PairPipeline
from search_r3_jax.errors import UserError
from search_r3_jax.evaluation.evaluate import Evaluator
from search_r3_jax.hub.checkpoint_reader import best_checkpoint, read_checkpoint
from search_r3_jax.hub.checkpoint_writer import CheckpointWriter
from search_r3_jax.hub.load_model import LoadedModel, load_model, with_lora
from search_r3_jax.models.layers import LoraParam
from search_r3_jax.models.lora import merge_lora
from search_r3_jax.rollout.encoder import Encoder
from search_r3_jax.text.prompts import Prompter
from search_r3_jax.training.sft import OnStep, make_pipeline, train_sft
from search_r3_jax.training.sft_step import make_step
from search_r3_jax.training.state import TrainState
from search_r3_jax.vectors import l2_normalize

BOTH = ("query_to_document", "document_to_query")


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


def train(
    config: RunConfig,
    run: Path,
    collection: Collection,
    on_step: OnStep = lambda *_: None,
    *,
    dev: Collection | None = None,
) -> Any:
    """The trained parameters of a fresh model, as plain arrays."""
    sets = [TrainingSet(train=collection, dev=dev)]
    return nnx.to_pure_dict(
        train_sft(config, run, sets=sets, model=ready(Path(config.model), config), on_step=on_step)
    )


def ready(folder: Path, config: RunConfig) -> LoadedModel:
    return with_lora(load_model(folder, remat=config.remat), config.lora, seed=config.seed)


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
    config = dataclasses.replace(
        config, sft=dataclasses.replace(config.sft, temperature=1e-45, max_skipped=4)
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


def test_another_config_in_the_same_folder_is_refused(tiny_folders: dict[str, Path], tmp_path: Path) -> None:

    folder = tiny_folders["llama"]
    config = config_of(folder, 2)
    collection = word_collection(documents=24, queries=24)
    train(config, tmp_path / "run", collection)
    other = dataclasses.replace(config, sft=dataclasses.replace(config.sft, temperature=0.1))
    with pytest.raises(UserError, match=r"sft\.temperature"):
        train(other, tmp_path / "run", collection)


def watched(folder: Path, steps: int) -> RunConfig:
    """A config that evaluates every third step and keeps one checkpoint and the best."""
    config = config_of(folder, steps)
    sampler = SamplerConfig(max_think_tokens=4)
    sft = dataclasses.replace(
        config.sft, eval_every=3, save_every=100, keep=1, kl_weight=0.0, triplet_weight=0.0
    )
    return dataclasses.replace(config, sft=sft, rl=dataclasses.replace(config.rl, sampler=sampler))


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


@pytest.mark.slow
def test_a_run_keeps_the_prompts_that_it_was_started_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, run = write_tiny_checkpoint(tmp_path / "model", "llama"), tmp_path / "run"
    collection = word_collection(documents=8, queries=8)
    template = folder / "chat_template.jinja"
    template.write_text("{{ strftime_now('%d') }}" + CHAT_TEMPLATE)
    set_day(monkeypatch, 1)
    train(config_of(folder, 1), run, collection)
    started = load_model(folder).prompter()
    set_day(monkeypatch, 2)
    template.write_text("{{ 'other' }}" + CHAT_TEMPLATE)
    assert load_model(folder).prompter().prompts != started.prompts
    assert load_model(run).prompter().prompts == started.prompts
    record = json.loads((run / "config.json").read_text())
    assert record["prompts"]["direct"]["before"].startswith("26<|im_start|>")
    assert record["end_ids"] == list(started.end_ids)
    # A second call does not find a change; a run of an older version gets its record.
    train(config_of(folder, 1), run, collection)
    assert json.loads((run / "config.json").read_text()) == record
    older = {key: value for key, value in record.items() if key not in ("prompts", "end_ids")}
    (run / "config.json").write_text(json.dumps(older))
    train(config_of(folder, 1), run, collection)
    again = json.loads((run / "config.json").read_text())
    assert again == older | {
        "prompts": load_model(folder).prompter().prompts.to_json(),
        "end_ids": list(started.end_ids),
    }


@pytest.mark.slow
def test_the_models_own_reasoning_is_what_it_writes(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    folder, run = tiny_folders["llama"], tmp_path / "run"
    collection = word_collection(documents=24, queries=24)
    config = watched(folder, 3)
    text = dataclasses.replace(config.text, max_thought_tokens=6)
    config = dataclasses.replace(
        config, text=text, sft=dataclasses.replace(config.sft, reasoning="self", eval_every=0)
    )
    train(config, run, collection)
    written = {
        line["query_id"]: line["reasoning"]
        for line in map(json.loads, (run / "own_reasoning.jsonl").read_text().splitlines())
    }
    base = load_model(folder)
    prompter = Prompter(base.tokenizer)
    pipeline = make_pipeline(
        dataclasses.replace(config, sft=dataclasses.replace(config.sft, reasoning="off")),
        [collection],
        prompter,
    )
    pipeline = dataclasses.replace(pipeline, reasoned=2)
    rows = {pair.query for step in range(3) for pair in pipeline.pairs(step)[6:]}
    asked = [collection.queries[row] for row in sorted(rows)]
    assert written.keys() == {query.query_id for query in asked}
    for query in asked:
        row = [*prompter.reason.prefix, *prompter.reason_rows([query.text], 16)[0]]
        chosen: list[int] = []
        # Greedy, a whole forward pass a token.
        while len(chosen) < 6 and prompter.end_ids[0] not in chosen:
            hidden = plain_hidden(base.decoder, [row + chosen])[0, len(row) + len(chosen) - 1]
            chosen.append(int(jnp.argmax(base.decoder.logits(hidden))))
        ended = prompter.end_ids[0] in chosen
        words = str(
            base.tokenizer.decode([token for token in chosen if token != prompter.end_ids[0]])
        ).split()
        assert written[query.query_id] == " ".join(words if ended or len(words) < 2 else words[:-1])
