"""Contrastive losses on unit vectors; each returns `(sum, count)`, divided once by the step."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def info_nce(
    queries_be: jax.Array,
    documents_pe: jax.Array,
    positive_b: jax.Array,
    excluded_bp: jax.Array,
    temperature: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """InfoNCE (arXiv 1807.03748): sum over queries of −log softmax of cos(q,d)/τ at the positive; with count and hits.

    `positive_b` int32 is each query's positive row of P; `excluded_bp` bool marks documents that are no negatives of a query
    (a copy of its positive, another known positive, a padded row). The positive itself is never excluded. Vectors are float32.
    """
    P = documents_pe.shape[0]
    scores_bp = jnp.matmul(queries_be, documents_pe.T, precision="highest") / temperature
    is_positive_bp = jax.nn.one_hot(positive_b, P, dtype=bool)
    scores_bp = jnp.where(excluded_bp & ~is_positive_bp, -jnp.inf, scores_bp)
    log_probs_bp = jax.nn.log_softmax(scores_bp, axis=-1)
    picked_b = jnp.take_along_axis(log_probs_bp, positive_b[:, None], axis=-1)[:, 0]
    hits = jnp.sum(jnp.argmax(scores_bp, axis=-1) == positive_b)
    return -jnp.sum(picked_b), jnp.asarray(queries_be.shape[0], jnp.float32), hits.astype(jnp.float32)
