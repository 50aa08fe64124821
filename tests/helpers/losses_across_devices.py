"""A program for tests: losses and gradients with the batch across all devices, beside those of one device;
prints JSON.

Arguments: process index, number of processes, port of the coordinator.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from helpers.jax_processes import joined
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from search_r3_jax.objectives.contrastive import exclusions, info_nce, matryoshka, triplet_margin
from search_r3_jax.objectives.grad_cache import cached_value_and_grad
from search_r3_jax.objectives.language import Head, cross_entropy, kl_to_base, token_log_probs

B, P, M, INPUTS, E, V, CHUNKS = 16, 32, 64, 12, 24, 40, 2
Arrays = dict[str, Any]


def arrays() -> tuple[Arrays, Arrays]:
    """Parameters and a batch, the same in every process."""
    generator = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape).astype(np.float32)

    params = {"weight": normal(INPUTS, E), "head": normal(V, E)}
    document_ids = np.arange(P)
    document_ids[20], document_ids[31] = 3, -1
    batch = {
        "queries": normal(B, INPUTS),
        "documents": normal(P, INPUTS),
        "relevance": np.eye(B, P, dtype=np.float32) + 2 * np.eye(B, P, 5, dtype=np.float32),
        "document_ids": document_ids.astype(np.int32),
        "known": np.stack([np.arange(B), np.arange(B) + 5], 1).astype(np.int32),
        "hidden": normal(M, E),
        "targets": generator.integers(0, V, M).astype(np.int32),
        "mask": generator.random(M) < 0.7,
    }
    return params, batch


def encode(params: Arrays, inputs: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    vectors = jnp.tanh(inputs @ params["weight"])
    return vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True), {"sum": jnp.sum(vectors**2)}


def contrastive(batch: Arrays) -> Callable[..., tuple[jax.Array, Arrays]]:
    """The loss `(sums, queries, documents) → (value, scalars)` of a batch."""
    excluded = exclusions(batch["document_ids"], batch["known"])

    def loss(sums: Arrays, queries: jax.Array, documents: jax.Array) -> tuple[jax.Array, Arrays]:
        def both(queries: jax.Array, documents: jax.Array) -> Any:
            total, count, scalars = info_nce(
                queries,
                documents,
                batch["relevance"],
                excluded,
                temperature=0.05,
                directions=(
                    "query_to_document",
                    "query_to_query",
                    "document_to_query",
                    "document_to_document",
                ),
                false_negative_margin=-0.5,
            )
            more, _, active = triplet_margin(queries, documents, batch["relevance"], excluded, margin=0.15)
            return total + more, count, scalars | active

        total, count, scalars = matryoshka(both, (8, E))(queries, documents)
        return total / count + sums["sum"] / B, scalars

    return loss


def whole(params: Arrays, batch: Arrays) -> tuple[jax.Array, Arrays]:
    """Every loss of stage 1, the batch encoded at once."""
    (queries, one), (documents, two) = encode(params, batch["queries"]), encode(params, batch["documents"])
    value, scalars = contrastive(batch)(jax.tree.map(jnp.add, one, two), queries, documents)
    log_probs, _ = token_log_probs(
        lambda h: h @ params["head"].T, batch["hidden"], batch["targets"], chunk=16
    )
    language, tokens = cross_entropy(log_probs, batch["mask"])
    base = Head(weight=jax.lax.stop_gradient(params["head"]) * 0.9)
    kl, _ = kl_to_base(
        batch["hidden"],
        Head(weight=params["head"]),
        batch["hidden"],
        base,
        batch["mask"],
        chunk=16,
        vocab_chunk=16,
    )
    return value + (language + kl) / tokens, scalars


def cached(params: Arrays, batch: Arrays) -> tuple[tuple[jax.Array, Arrays], Arrays]:
    """The contrastive part through GradCache."""
    chunked = (batch["queries_chunked"], batch["documents_chunked"])
    return cached_value_and_grad(encode, contrastive(batch))(params, *chunked)


def per_device(mesh: Mesh) -> Callable[[Arrays, Arrays], jax.Array]:
    """The mistake: InfoNCE where every device sees its own documents only."""

    def own(weight: jax.Array, queries: jax.Array, documents: jax.Array) -> jax.Array:
        params, rows = {"weight": weight}, queries.shape[0]
        q, d = encode(params, queries)[0], encode(params, documents)[0]
        total, count, _ = info_nce(q, d, jnp.eye(rows), jnp.zeros((rows, rows), bool), temperature=0.05)
        return jax.lax.psum(total, "data") / jax.lax.psum(count, "data")

    data, everywhere = PartitionSpec("data"), PartitionSpec()
    sharded = jax.shard_map(own, mesh=mesh, in_specs=(everywhere, data, data), out_specs=everywhere)
    return lambda params, batch: sharded(params["weight"], batch["queries"], batch["pairs"])


def whole_infonce(params: Arrays, batch: Arrays) -> jax.Array:
    """What `per_device` should have been."""
    q, d = encode(params, batch["queries"])[0], encode(params, batch["pairs"])[0]
    total, count, _ = info_nce(q, d, jnp.eye(B), jnp.zeros((B, B), bool), temperature=0.05)
    return total / count


def difference(ours: Any, expected: Any) -> float:
    """The largest difference of two pytrees, relative to the largest number of each leaf."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True)
    return max(
        float(np.abs(np.asarray(a) - np.asarray(b)).max() / max(np.abs(np.asarray(b)).max(), 1.0))
        for a, b in pairs
    )


def main() -> None:
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    params, batch = arrays()
    batch["pairs"] = batch["documents"][:B]
    batch |= {f"{name}_chunked": batch[name].reshape(CHUNKS, -1, INPUTS) for name in ("queries", "documents")}

    def placed(x: np.ndarray, spec: PartitionSpec) -> jax.Array:
        return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda index: x[index])

    everywhere = {name: placed(x, PartitionSpec()) for name, x in params.items()}
    across = {
        name: placed(x, PartitionSpec(None, "data") if name.endswith("chunked") else PartitionSpec("data"))
        for name, x in batch.items()
    }
    report: dict[str, Any] = {"devices": jax.device_count(), "processes": jax.process_count()}
    functions: dict[str, Any] = {
        "whole": jax.value_and_grad(whole, has_aux=True),
        "cached": cached,
        "infonce": whole_infonce,
    }
    for name, function in functions.items():
        expected = jax.device_get(jax.jit(function)(params, batch))
        ours = jax.jit(function, out_shardings=NamedSharding(mesh, PartitionSpec()))(everywhere, across)
        report[name] = difference(jax.tree.map(lambda x: x.addressable_data(0), ours), expected)
    wrong = jax.jit(per_device(mesh))(everywhere, across)
    report["per_device"] = difference(
        wrong.addressable_data(0), jax.device_get(jax.jit(whole_infonce)(params, batch))
    )
    print(json.dumps(report))


if __name__ == "__main__":
    with joined(sys.argv[-3:]):
        main()
