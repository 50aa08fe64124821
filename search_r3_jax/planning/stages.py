"""Lowering of each stage for a mesh, with shapes in place of arrays, and its model FLOPs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from search_r3_jax.config import ModelConfig, RunConfig
from search_r3_jax.data.collection import Collection, Document, Query
from search_r3_jax.hub.snapshot_reader import snapshot_dtype
from search_r3_jax.mesh import BATCH_AXES, axis_size, check_divisible
from search_r3_jax.models.flops import head_flops, layers_flops, training_flops
from search_r3_jax.models.lora import trainable_filter
from search_r3_jax.planning.models import planned_model
from search_r3_jax.retrieval.index.device import lower_search
from search_r3_jax.rollout.encoder import PASS_TOKENS, Encoder
from search_r3_jax.rollout.sampler import Rollout, Sampler
from search_r3_jax.text.packing import bucket_length
from search_r3_jax.text.prompts import Prompter
from search_r3_jax.training import rl_step, sharding
from search_r3_jax.training.optimizer import make_optimizer
from search_r3_jax.training.sft import make_pipeline
from search_r3_jax.training.sft_step import make_step
from search_r3_jax.training.state import TrainState, state_shardings
from search_r3_jax.training.throughput import Throughput

Stage = Literal["sft", "rl", "decode", "encode", "search"]


class LoweredStage(NamedTuple):
    """A stage ready to be compiled.

    Attributes:
        tokens: tokens that one run reads or writes, on all chips together; every text has the maximal length.
        model_flops: FLOPs of the mathematics on all chips together, without recomputation or padding.
        kept: arrays on the chips between runs, by kind: shapes with their shardings.
        batch: arguments of one run.
        gathered: number of parameters that a pass through the layers gathers, that a reference model's pass
            gathers, and that get a gradient.
        beside: other arrays on the chips, by kind, that are no arguments.
        open_rounds: largest trip count of a loop that ends when its work is done.
    """

    lowered: jax.stages.Lowered
    tokens: int
    model_flops: float
    kept: dict[str, Any]
    batch: Any
    gathered: tuple[float, float, float]
    beside: Mapping[str, Any] = MappingProxyType({})
    open_rounds: int | None = None


def lower_stage(config: RunConfig, stage: Stage, mesh: Mesh, *, documents: int = 0) -> LoweredStage:
    """Lower a stage of a config for a mesh.

    With `documents`, those of a `device` index are on the chips too; with `index.source trainer`, the
    parameters of the snapshot that is encoded. Raises UserError when the mesh does not divide the model.
    """
    if stage == "search":
        return _search(config, mesh, documents)
    lowered = {"sft": _sft, "rl": _rl, "decode": _decode, "encode": _encode}[stage](config, mesh)
    beside = dict(lowered.beside)
    encodes = config.index.source == "trainer" and stage != "sft"
    if documents:
        beside["index"] = _search_program(config, mesh, documents)[1]
    if documents or encodes:
        trained = _trained(config, mesh, _rl_optimizer(config))
        if stage == "encode":
            # The trainer encodes between two steps.
            beside["optimizer"] = trained.state.optimizer
            if encodes:
                beside["trained"] = trained.state.params
        elif encodes:
            beside["snapshot"] = _with_dtype(trained.state.params, snapshot_dtype(config))
    return lowered._replace(beside=beside)


def _with_dtype(params: Any, dtype: jnp.dtype) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding), params)


class _Trained(NamedTuple):
    graph: nnx.GraphDef
    state: TrainState
    frozen: nnx.State
    shardings: TrainState
    optimizer: Any
    prompter: Prompter
    model: ModelConfig
    kept: dict[str, Any]


def _trained(config: RunConfig, mesh: Mesh, optimizer: Any) -> _Trained:
    model = planned_model(config)
    check_divisible(model.decoder.config, mesh)
    graph, params, frozen = nnx.split(model.decoder, trainable_filter(model.decoder), ...)
    shardings = state_shardings(params, optimizer, mesh)
    moments = jax.eval_shape(optimizer.init, params)
    state = _with_shardings(TrainState(params, moments, jax.ShapeDtypeStruct((), jnp.int32)), shardings)
    frozen = _with_shardings(frozen, sharding.params_shardings(frozen, mesh))
    kept = {"parameters": (state.params, frozen), "optimizer": state.optimizer}
    return _Trained(graph, state, frozen, shardings, optimizer, model.prompter, model.decoder.config, kept)


def _sft(config: RunConfig, mesh: Mesh) -> LoweredStage:
    sft = config.sft
    trained = _trained(config, mesh, make_optimizer(sft.optimizer, sft.steps))
    full = dataclasses.replace(sft, reasoning="off" if sft.reasoned_share == 0 else "column")
    pipeline = make_pipeline(
        dataclasses.replace(config, sft=full), [_longest_texts(config)], trained.prompter
    )
    batch = pipeline.batch(0).padded(axis_size(mesh, BATCH_AXES))
    reference = trained.state.params if sft.kl_weight > 0 and config.lora.rank == 0 else None
    key = (
        _with_shardings(jax.eval_shape(lambda: jax.random.key(0)), _replicated(mesh))
        if config.lora.dropout > 0
        else None
    )
    step = make_step(trained.graph, trained.prompter, trained.optimizer, sft, trained.shardings, donate=True)
    placed = _with_shardings(batch, sharding.batch_shardings(batch, mesh))
    lowered = step.lower(trained.state, trained.frozen, placed, reference, key)
    counted = Throughput(model=trained.model, lora=config.lora, peak=1.0, with_base=sft.kl_weight > 0)
    of_step = counted.of(batch.queries, batch.documents, 1.0)
    kept = trained.kept | ({"reference": reference} if reference is not None else {})
    return LoweredStage(
        lowered,
        round(of_step["tokens_per_second"]),
        of_step["mfu"],
        kept,
        placed,
        _gathered_sizes(trained, reference is not None),
    )


def _rl(config: RunConfig, mesh: Mesh) -> LoweredStage:
    rl, text = config.rl, config.text
    trained = _trained(config, mesh, _rl_optimizer(config))
    prompt, Q, G = trained.prompter.reason, rl.global_queries, rl.group_size
    S, T = (
        bucket_length(text.max_query_tokens + len(prompt.suffix)),
        rl.sampler.max_think_tokens + len(prompt.closing),
    )
    rollout = Rollout(
        prompt_ids=np.zeros((Q, S), np.int32),
        prompt_lengths=np.zeros(Q, np.int32),
        ids=np.zeros((Q * G, T), np.int32),
        lengths=np.zeros(Q * G, np.int32),
        sampled=np.zeros((Q * G, T), bool),
        log_probs=np.zeros((Q * G, T), np.float32),
        entropies=np.zeros((Q * G, T), np.float32),
        vectors=np.zeros((Q * G, trained.model.hidden_size), np.float32),
        valid=np.zeros(Q * G, bool),
    )
    # One positive document per query, and the candidates.
    P = Q + rl.infonce.negatives
    documents = np.zeros((P, trained.model.hidden_size), np.float32)
    document_rows = (
        rl_step.tokenize_documents(trained.prompter, [""] * Q, text.max_document_tokens)
        if rl.infonce.train_documents
        else None
    )
    batch = rl_step.make_batch(
        rollout,
        np.zeros(Q * G),
        documents,
        np.zeros((Q, P)),
        trained=document_rows,
        micro_queries=rl.micro_queries,
    )
    placed = _with_shardings(batch, rl_step.batch_shardings(batch, mesh))
    log_probs = jax.ShapeDtypeStruct(
        batch.replies.ids.shape, np.float32, sharding=placed.replies.ids.sharding
    )
    update = rl_step.make_update(
        trained.graph, trained.prompter, trained.optimizer, rl, trained.shardings, donate=True
    )
    old, reference = (log_probs if rl.inner_epochs > 1 else None), (log_probs if rl.beta > 0 else None)
    lowered = update.lower(trained.state, trained.frozen, placed, old, reference)
    prefix, prompt_tokens = len(prompt.prefix), text.max_query_tokens + len(prompt.suffix)
    tokens = Q * prompt_tokens + Q * G * T
    attended = Q * _attended_pairs(prefix, prompt_tokens) + Q * G * _attended_pairs(prefix + prompt_tokens, T)
    if rl.infonce.train_documents:
        direct = trained.prompter.direct
        document = text.max_document_tokens + len(direct.suffix) + len(direct.closing)
        # Every micro-batch encodes the documents.
        times = Q * len(batch.replies.ids)
        tokens, attended = (
            tokens + times * document,
            attended + times * _attended_pairs(len(direct.prefix), document),
        )
    flops = training_flops(trained.model, config.lora, tokens, attended, Q * G * T)
    return LoweredStage(lowered, tokens, flops, trained.kept, placed, _gathered_sizes(trained, False))


def _decode(config: RunConfig, mesh: Mesh) -> LoweredStage:
    rl, text = config.rl, config.text
    trained = _trained(config, mesh, _rl_optimizer(config))
    # The policy samples with unmerged adapters, as in training.
    graph, state = nnx.split(nnx.merge(trained.graph, trained.state.params, trained.frozen))
    state = _with_shardings(state, sharding.params_shardings(state, mesh))
    Q, G = rl.global_queries, rl.group_size
    lowered = Sampler(graph, trained.prompter, rl.sampler, mesh=mesh).lower(
        state, Q, G, max_tokens=text.max_query_tokens
    )
    prompt = trained.prompter.reason
    prefix, prompt_tokens, T = (
        len(prompt.prefix),
        text.max_query_tokens + len(prompt.suffix),
        rl.sampler.max_think_tokens + len(prompt.closing),
    )
    attended = Q * _attended_pairs(prefix, prompt_tokens) + Q * G * _attended_pairs(prefix + prompt_tokens, T)
    flops = layers_flops(trained.model, Q * prompt_tokens + Q * G * T, attended) + head_flops(
        trained.model, Q + Q * G * T
    )
    return LoweredStage(
        lowered,
        Q * G * T,
        flops,
        {"parameters": state},
        (),
        (_parameter_count(state), 0.0, 0.0),
        beside={"optimizer": trained.state.optimizer},
        open_rounds=T,
    )


def _encode(config: RunConfig, mesh: Mesh) -> LoweredStage:
    model = planned_model(config, adapters=False)
    check_divisible(model.decoder.config, mesh)
    graph, state = nnx.split(model.decoder)
    state = _with_shardings(state, sharding.params_shardings(state, mesh))
    if config.index.source == "trainer" and not config.lora.rank:
        state = _with_dtype(state, snapshot_dtype(config))
    prompt = model.prompter.direct
    text_tokens = config.text.max_document_tokens + len(prompt.suffix) + len(prompt.closing)
    lowered = Encoder(graph, model.prompter, mesh=mesh).lower(
        state, text_tokens=text_tokens, pass_tokens=PASS_TOKENS
    )
    rows, length = lowered.in_avals[0][2].shape
    texts = rows * (length // text_tokens)
    flops = layers_flops(
        model.decoder.config, texts * text_tokens, texts * _attended_pairs(len(prompt.prefix), text_tokens)
    )
    layers = _parameter_count(nnx.to_pure_dict(state)["layers"])
    return LoweredStage(lowered, texts * text_tokens, flops, {"parameters": state}, (), (layers, 0.0, 0.0))


def _search(config: RunConfig, mesh: Mesh, documents: int) -> LoweredStage:
    """The first search of a step: every reply, and as many means as queries."""
    trained = _trained(config, mesh, _rl_optimizer(config))
    lowered, index = _search_program(config, mesh, documents)
    queries = lowered.in_avals[0][0].shape[0]
    flops = 2.0 * queries * documents * trained.model.hidden_size
    return LoweredStage(
        lowered,
        queries,
        flops,
        {"index": index},
        (),
        (0.0, 0.0, 0.0),
        beside={"parameters": (trained.state.params, trained.frozen), "optimizer": trained.state.optimizer},
    )


def _search_program(
    config: RunConfig, mesh: Mesh, documents: int
) -> tuple[jax.stages.Lowered, jax.ShapeDtypeStruct]:
    return lower_search(
        mesh.devices.ravel().tolist(),
        (documents, planned_model(config).decoder.config.hidden_size),
        jnp.dtype(config.index.vector_dtype),
        queries=config.rl.global_queries * config.rl.group_size,
        k=config.index.candidates,
        recall=config.index.recall_gate,
    )


def _rl_optimizer(config: RunConfig) -> Any:
    return make_optimizer(config.rl.optimizer, config.rl.steps)


def _longest_texts(config: RunConfig) -> Collection:
    """A collection in which every text has the maximal length and every query its positive and negatives."""
    text, count = config.text, config.sft.global_batch
    words = {
        kind: " text" * tokens
        for kind, tokens in (("query", text.max_query_tokens), ("document", text.max_document_tokens))
    }
    ids = [str(i) for i in range(count * (1 + config.sft.negatives))]
    queries = tuple(
        Query(
            query_id=str(i),
            text=words["query"],
            positives={ids[i]: 1},
            negatives=tuple(ids[count + i * config.sft.negatives + k] for k in range(config.sft.negatives)),
            reasoning=" text" * text.max_thought_tokens,
        )
        for i in range(count)
    )
    documents = tuple(Document(doc_id=each, title="", text=words["document"]) for each in ids)
    return Collection(name="longest", split="train", documents=documents, queries=queries)


def _gathered_sizes(trained: _Trained, reference: bool) -> tuple[float, float, float]:
    whole = _parameter_count(trained.kept["parameters"])
    return whole, whole if reference else 0.0, float(_parameter_count(trained.state.params))


def _parameter_count(tree: Any) -> float:
    return float(sum(np.prod(x.shape) for x in jax.tree.leaves(tree)))


def _attended_pairs(before: int, count: int) -> int:
    """Pairs of a token and one that it attends to, for `count` tokens after `before` others."""
    return count * before + count * (count + 1) // 2


def _with_shardings(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, sharding_of: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding_of), tree, shardings
    )


def _replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())
