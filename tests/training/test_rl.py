"""Stage 2 on a tiny model: the update sees what the sampler saw, the gradient is the plain one, and the index really moves."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import plain_hidden, word_collection

from search_r3_jax.config import IndexConfig, LoraConfig, OptimizerConfig, RlConfig, RunConfig, SamplerConfig, TextConfig
from search_r3_jax.data.dataset import build_dataset, load_collection
from search_r3_jax.errors import UserError
from search_r3_jax.hub.checkpoint import LoadedModel, load_model, with_lora
from search_r3_jax.models.decoder import LoraParam
from search_r3_jax.objectives.policy_gradient import group_advantages
from search_r3_jax.retrieval.indexer import index_folder
from search_r3_jax.retrieval.versions import list_versions, open_version
from search_r3_jax.rollout.encoder import Encoder
from search_r3_jax.rollout.sampler import Sampler, rollout_seeds
from search_r3_jax.text.prompts import Prompter
from search_r3_jax.training.optimizer import make_optimizer
from search_r3_jax.training.rl import RlState, make_batch, make_scorer, make_update, train_rl

CONFIG = RunConfig(
    compute_dtype="float32",
    remat="none",
    text=TextConfig(max_query_tokens=16, max_document_tokens=32),
    lora=LoraConfig(rank=4),
    rl=RlConfig(
        steps=6,
        global_queries=3,
        group_size=4,
        snapshot_every=2,
        sampler=SamplerConfig(max_think_tokens=8),
        optimizer=OptimizerConfig(learning_rate=1e-3),
    ),
    index=IndexConfig(candidates=12, refresh_budget=8, overlay_max_age=2),
)


TEXTS = ["one", "another query", "a third"]


@pytest.fixture(scope="module")
def prepared(tiny_folders: dict[str, Path]):
    """A model whose adapters do something, one rollout of it and the batch made of that."""
    model = with_lora(load_model(tiny_folders["llama"]), CONFIG.lora, seed=0)
    generator = np.random.default_rng(0)
    params = nnx.state(model.decoder, LoraParam)
    nnx.update(model.decoder, jax.tree.map(lambda x: x + 0.05 * generator.standard_normal(x.shape).astype(np.float32), params))
    prompter = Prompter(model.tokenizer)
    graph, state = nnx.split(model.decoder)
    sampler = Sampler(graph, prompter, max_think_tokens=8, temperature=1.0)
    rollout = sampler.sample(state, TEXTS, rollout_seeds(0, 0, range(3), 4), max_tokens=16)
    rewards = generator.random((3, 4)).astype(np.float32)
    advantages, _ = group_advantages(jnp.asarray(rewards).reshape(-1), jnp.repeat(jnp.arange(3), 4), groups=3)
    documents = generator.standard_normal((3, 64))
    batch = make_batch(rollout, np.asarray(advantages), documents / np.linalg.norm(documents, axis=-1, keepdims=True))
    return model, prompter, rollout, batch


def test_step_zero_ratio_is_one_on_every_token(prepared) -> None:
    model, prompter, rollout, batch = prepared
    graph, params, frozen = nnx.split(model.decoder, LoraParam, ...)
    log_probs = np.asarray(make_scorer(graph, prompter, CONFIG.rl)(params, frozen, batch, adapters=True))
    live = batch.read >= 0
    assert live.sum() == rollout.sampled.sum() > 12
    np.testing.assert_allclose(np.exp(log_probs[live] - batch.old_log_probs[live]), 1.0, atol=1e-5)
    optimizer = make_optimizer(CONFIG.rl.optimizer, 6)
    reference = make_scorer(graph, prompter, CONFIG.rl)(params, frozen, batch, adapters=False)
    _, scalars = make_update(graph, prompter, optimizer, CONFIG.rl)(RlState(params, optimizer.init(params)), frozen, batch, reference)
    assert abs(float(scalars["ratio_min"]) - 1) <= 1e-5
    assert abs(float(scalars["ratio_max"]) - 1) <= 1e-5
    assert float(scalars["kl"]) > 1e-3


def test_the_reference_is_the_model_without_adapters(prepared, tiny_folders: dict[str, Path]) -> None:
    model, prompter, rollout, batch = prepared
    graph, params, frozen = nnx.split(model.decoder, LoraParam, ...)
    reference = np.asarray(make_scorer(graph, prompter, CONFIG.rl)(params, frozen, batch, adapters=False))
    base = load_model(tiny_folders["llama"]).decoder
    prompts = [[*prompter.reason.prefix, *row] for row in prompter.reason_rows(TEXTS, 16)]
    rows = [prompts[b // 4] + reply for b, reply in enumerate(rollout.replies())]
    log_probs = np.asarray(jax.nn.log_softmax(base.logits(plain_hidden(base, rows)), axis=-1))
    T = batch.ids.shape[1]
    for at, position in enumerate(batch.read[batch.read >= 0]):
        b, t = divmod(int(position), T)
        place = len(prompts[b // 4]) + t
        np.testing.assert_allclose(reference[at], log_probs[b, place - 1, rows[b][place]], atol=2e-5)


def test_gradient_equals_one_row_at_a_time(prepared) -> None:
    """Shared prompts, compaction and groups against a loop over whole rows through the same decoder."""
    model, prompter, rollout, batch = prepared
    config = dataclasses.replace(CONFIG.rl, beta=0.0, infonce_weight=0.0)
    graph, params, frozen = nnx.split(model.decoder, LoraParam, ...)
    optimizer = make_optimizer(dataclasses.replace(config.optimizer, clip_norm=1e9), 6)
    _, scalars = make_update(graph, prompter, optimizer, config)(RlState(params, optimizer.init(params)), frozen, batch, None)

    prompts = [[*prompter.reason.prefix, *row] for row in prompter.reason_rows(TEXTS, 16)]
    rows = [prompts[b // 4] + reply for b, reply in enumerate(rollout.replies())]

    @jax.jit
    def plain(params: nnx.State) -> jax.Array:
        decoder = nnx.merge(graph, params, frozen)
        log_probs = jax.nn.log_softmax(decoder.logits(plain_hidden(decoder, rows)), axis=-1)
        total = jnp.zeros(())
        for b, row in enumerate(rows):
            start, own = len(prompts[b // 4]), int(rollout.sampled[b].sum())
            places = np.arange(start, start + own)
            new = log_probs[b, places - 1, np.array(row)[places]]
            total -= jnp.mean(jnp.exp(new - jnp.asarray(rollout.log_probs[b, :own]))) * batch.advantages[b]
        return total / len(rows)

    gradient = jax.grad(plain)(params)
    norm = float(jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(gradient))))
    assert norm > 1e-3
    np.testing.assert_allclose(float(scalars["gradient_norm"]), norm, rtol=1e-4)


def start_of_run(tmp_path: Path, folder: Path) -> tuple[RunConfig, LoadedModel, dict[str, str]]:
    config = dataclasses.replace(CONFIG, model=str(folder))
    build_dataset({"train": word_collection(documents=40, queries=20)}, tmp_path / "data", name="words", source={"kind": "test"})
    return config, with_lora(load_model(folder), config.lora, seed=0), {"data": "../data", "split": "train"}


@pytest.mark.slow
def test_a_run_swaps_to_an_index_built_meanwhile_and_resumes(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tiny_folders["llama"]
    config, model, extra = start_of_run(tmp_path, folder)
    config = dataclasses.replace(config, rl=dataclasses.replace(config.rl, min_swaps=1, max_extra_steps=400))
    collection = load_collection(tmp_path / "data", "train")
    said: list[str] = []
    result = train_rl(config, tmp_path / "run", collection, model, lambda *_: time.sleep(0.1), say=said.append, extra=extra)
    assert result.swaps, said
    assert result.swaps[0][1] > 0
    versions = list_versions(index_folder(tmp_path / "run"))
    assert result.swaps[-1][1] in versions

    # The version in use is what its snapshot's parameters say of the corpus.
    step = versions[-1]
    index = open_version(index_folder(tmp_path / "run"), step, expect_corpus_hash=collection.corpus_hash())
    snapshot = load_model(tmp_path / "run", step=step)
    graph, state = nnx.split(snapshot.decoder)
    texts = [document.body for document in collection.documents]
    np.testing.assert_allclose(index.vectors, Encoder(graph, Prompter(snapshot.tokenizer)).encode(state, texts, max_tokens=32), atol=1e-5)

    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(result.steps))
    assert all(0 <= line["reward"] <= 1 and line["index_age"] >= 0 for line in lines)
    assert result.valid_rate == pytest.approx(np.mean([line["valid_rate"] for line in lines[-max(1, len(lines) // 4) :]]))
    again = train_rl(config, tmp_path / "run", collection, model, lambda *_: None, say=said.append, extra=extra)
    assert again.steps == result.steps
    assert again.swaps == result.swaps


@pytest.mark.slow
def test_the_indexer_ends_with_a_killed_trainer(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tiny_folders["llama"]
    start_of_run(tmp_path, folder)
    code = (
        "import sys, time; from pathlib import Path; from search_r3_jax.retrieval.supervisor import IndexFollower\n"
        "follower = IndexFollower(Path(sys.argv[1]), 'x', 0, say=print); follower.start(); print(follower._process.pid, flush=True)\n"
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


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"rl": dataclasses.replace(CONFIG.rl, group_size=1)}, "rl.group_size"),
        ({"index": dataclasses.replace(CONFIG.index, candidates=1000)}, "index.candidates"),
    ],
)
def test_impossible_settings_are_refused_before_the_first_step(
    tiny_model: LoadedModel, tmp_path: Path, change: dict[str, object], field: str
) -> None:
    config = dataclasses.replace(CONFIG, **change)
    with pytest.raises(UserError, match=field):
        train_rl(config, tmp_path / "run", word_collection(documents=40, queries=20), tiny_model, lambda *_: None, say=print, extra={})
    assert not (tmp_path / "run").exists()
