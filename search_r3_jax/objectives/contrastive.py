"""Contrastive losses on unit vectors; each returns `(sum, count, scalars)` for one global division."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from search_r3_jax.vectors import l2_normalize

Direction = Literal["query_to_document", "query_to_query", "document_to_query", "document_to_document"]
Loss = tuple[jax.Array, jax.Array, dict[str, jax.Array]]

# A score that contributes nothing. Finite, so that neither values nor gradients contain ∞ − ∞ or 0 · ∞.
FLOOR = -1e30


def exclusions(document_ids_p: jax.Array, known_positive_ids_bk: jax.Array) -> jax.Array:
    """Excluded [B,P] bool: rows that hold a known positive of the query, and padded rows.

    `document_ids_p` int32 is −1 at padding; `known_positive_ids_bk` int32 holds all known positives of a
    query among them, copies included, padded with −1.
    """
    known_bp = jnp.any(known_positive_ids_bk[:, :, None] == document_ids_p, axis=1)
    return known_bp | (document_ids_p < 0)


class _Pairs(NamedTuple):
    """Inputs that the losses share.

    A positive's `share_bp` is its part of its query's loss; `weight_b` is 0 for queries that do not count.
    """

    queries_be: jax.Array
    documents_pe: jax.Array
    cosine_bp: jax.Array
    positive_bp: jax.Array
    negative_bp: jax.Array
    share_bp: jax.Array
    valid_b: jax.Array
    weight_b: jax.Array


def _pairs(
    queries_be: jax.Array,
    documents_pe: jax.Array,
    relevance_bp: jax.Array,
    excluded_bp: jax.Array,
    valid_b: jax.Array | None,
    query_weight_b: jax.Array | None,
) -> _Pairs:
    valid_b = jnp.ones(relevance_bp.shape[0], bool) if valid_b is None else valid_b
    relevance_bp = jnp.where(valid_b[:, None], relevance_bp, 0).astype(jnp.float32)
    positive_bp = relevance_bp > 0
    negative_bp = ~positive_bp & ~excluded_bp & valid_b[:, None]
    # Padded rows may hold anything: 0 · NaN in a matrix product would reach the others.
    queries_be = jnp.where(valid_b[:, None], queries_be, 0).astype(jnp.float32)
    documents_pe = jnp.where(jnp.any(positive_bp | negative_bp, axis=0)[:, None], documents_pe, 0).astype(
        jnp.float32
    )
    total_b = jnp.sum(relevance_bp, axis=-1)
    counted_b = total_b > 0
    return _Pairs(
        queries_be=queries_be,
        documents_pe=documents_pe,
        cosine_bp=_products(queries_be, documents_pe),
        positive_bp=positive_bp,
        negative_bp=negative_bp,
        share_bp=relevance_bp / jnp.where(counted_b, total_b, 1.0)[:, None],
        valid_b=valid_b,
        weight_b=counted_b.astype(jnp.float32)
        if query_weight_b is None
        else jnp.where(counted_b, query_weight_b, 0.0),
    )


def _products(x_re: jax.Array, y_ne: jax.Array) -> jax.Array:
    return jnp.matmul(x_re, y_ne.T, precision="highest")


def info_nce(
    queries_be: jax.Array,
    documents_pe: jax.Array,
    relevance_bp: jax.Array,
    excluded_bp: jax.Array,
    *,
    temperature: float,
    directions: Sequence[Direction] = ("query_to_document",),
    partition: Literal["joint", "per_direction"] = "joint",
    mined_bp: jax.Array | None = None,
    false_negative_margin: float | None = None,
    valid_b: jax.Array | None = None,
    query_weight_b: jax.Array | None = None,
) -> Loss:
    """InfoNCE (arXiv 1807.03748): −log e^{s⁺} / (e^{s⁺} + Σ e^{s⁻}) with s = cos/τ.

    Summed over each query's positives; the negatives are all documents that are neither positive nor
    excluded.

    Args:
        queries_be, documents_pe: unit vectors, float32.
        relevance_bp: float32 ≥ 0, the weight of each positive of each query; normalised to 1 per query. The
            other positives of a query are not in the denominator; a document may be a positive of several
            queries.
        excluded_bp: bool, documents that are no negatives of a query (see `exclusions`). A positive is never
            excluded.
        directions: negatives of the pair (q, d): q with documents; q with the other queries; d with queries;
            d with the other documents [P,P]. Queries and documents that share a positive are no negatives of
            each other.
        partition: one softmax over all directions (GTE, arXiv 2308.03281; with "document_to_query" the pair
            itself is in it twice, as there), or one for each direction and their mean (symmetric InfoNCE,
            arXiv 2310.19923).
        mined_bp: bool, mined negatives of each query: no negatives of its positive in "document_to_document".
        false_negative_margin: in cosine; for each positive, negatives with cos⁻ > cos⁺ − margin are dropped.
            None is off.
        valid_b: bool, False at padded queries. They do not count, nor do queries without a positive.
        query_weight_b: float32, the weight of a query in the sum and in the count; 1 by default.

    Scalars are sums over the count: `hits` (the best document is a positive) and `negatives` (documents in
    the denominator). Raises ValueError for directions and a partition that do not go together.
    """
    _check_directions(directions, partition)
    pairs = _pairs(queries_be, documents_pe, relevance_bp, excluded_bp, valid_b, query_weight_b)
    scores_bp = pairs.cosine_bp / temperature
    ceiling_bp = (
        None
        if false_negative_margin is None
        else jax.lax.stop_gradient(scores_bp - false_negative_margin / temperature)
    )
    ceiling_pb = None if ceiling_bp is None else ceiling_bp.T

    log_z, kept = _log_partition(scores_bp, pairs.negative_bp, ceiling_bp)
    partitions = [log_z]
    # A query's positives and exclusions are no negatives, in any direction, of the query and its positives.
    related_bp = (pairs.positive_bp | excluded_bp).astype(jnp.float32)
    positive_bp = pairs.positive_bp.astype(jnp.float32)
    if "query_to_query" in directions:
        negative_bb = (positive_bp @ related_bp.T == 0) & ~jnp.eye(len(scores_bp), dtype=bool) & pairs.valid_b
        partitions.append(
            _log_partition(
                _products(pairs.queries_be, pairs.queries_be) / temperature, negative_bb, ceiling_bp
            )[0]
        )
    if "document_to_query" in directions:
        partitions.append(_log_partition(scores_bp.T, pairs.negative_bp.T, ceiling_pb)[0].T)
    if "document_to_document" in directions:
        near_bp = related_bp if mined_bp is None else jnp.maximum(related_bp, mined_bp)
        used_p = jnp.any(pairs.positive_bp | pairs.negative_bp, axis=0)
        negative_pp = (positive_bp.T @ near_bp == 0) & ~jnp.eye(scores_bp.shape[1], dtype=bool) & used_p
        scores_pp = _products(pairs.documents_pe, pairs.documents_pe) / temperature
        partitions.append(_log_partition(scores_pp, negative_pp, ceiling_pb)[0].T)

    if partition == "per_direction":
        loss_bp = sum(jax.nn.softplus(log_z - scores_bp) for log_z in partitions) / len(partitions)
    else:
        if "document_to_query" in directions:
            partitions.append(scores_bp)
        log_z = partitions[0]
        for other in partitions[1:]:
            log_z = jnp.logaddexp(log_z, other)
        loss_bp = jax.nn.softplus(log_z - scores_bp)

    total = jnp.sum(pairs.weight_b * jnp.sum(pairs.share_bp * loss_bp, axis=-1))
    return total, jnp.sum(pairs.weight_b), _info_nce_scalars(pairs, scores_bp, kept)


def _info_nce_scalars(pairs: _Pairs, scores_bp: jax.Array, kept: jax.Array) -> dict[str, jax.Array]:
    best_positive_b = jnp.max(jnp.where(pairs.positive_bp, scores_bp, FLOOR), axis=-1)
    best_negative_b = jnp.max(jnp.where(pairs.negative_bp, scores_bp, FLOOR), axis=-1)
    return {
        "hits": jnp.sum(pairs.weight_b * (best_positive_b > best_negative_b)),
        "negatives": jnp.sum(pairs.weight_b * jnp.sum(pairs.share_bp * kept, axis=-1)),
    }


def _check_directions(directions: Sequence[Direction], partition: str) -> None:
    if "query_to_document" not in directions:
        raise ValueError(f"directions {tuple(directions)}: the pair itself stands in query_to_document")
    if partition == "per_direction" and {"query_to_query", "document_to_document"} & set(directions):
        raise ValueError(
            f"directions {tuple(directions)}: query_to_query and document_to_document need partition 'joint'"
        )


def _log_partition(
    scores_rn: jax.Array, negative_rn: jax.Array, ceiling_rk: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """log Σ exp over a row's negatives and their number, [R,1]; about FLOOR without negatives.

    With ceilings, [R,K] over the negatives that do not exceed each ceiling.
    """
    scores_rn = jnp.where(negative_rn, scores_rn, FLOOR)
    if ceiling_rk is None:
        return jax.nn.logsumexp(scores_rn, axis=-1, keepdims=True), jnp.sum(
            negative_rn, axis=-1, keepdims=True
        )
    # Each positive has its own ceiling: running sums over the sorted row replace an array [R,K,N].
    ascending_rn = jnp.sort(scores_rn, axis=-1)
    running_rn = jax.lax.cumlogsumexp(ascending_rn, axis=1)
    below_rk = jax.vmap(partial(jnp.searchsorted, side="right"))(ascending_rn, ceiling_rk)
    log_z = jnp.take_along_axis(running_rn, jnp.maximum(below_rk - 1, 0), axis=-1)
    kept = below_rk - jnp.sum(~negative_rn, axis=-1, keepdims=True)
    return jnp.where(kept > 0, log_z, FLOOR), kept


def triplet_margin(
    queries_be: jax.Array,
    documents_pe: jax.Array,
    relevance_bp: jax.Array,
    excluded_bp: jax.Array,
    *,
    margin: float,
    mined_bk: jax.Array | None = None,
    valid_b: jax.Array | None = None,
    query_weight_b: jax.Array | None = None,
) -> Loss:
    """Triplet loss max(0, cos(q,d⁻) − cos(q,d⁺) + margin).

    Over each query's positives and its mined negatives, or the hardest negative of the batch.

    `mined_bk` int32 are rows of P, −1 filled, with equal weight; None takes the not excluded document with
    the highest cosine. Exclusions, relevance, `valid_b` and `query_weight_b` are those of `info_nce`. A query
    without a negative counts nothing. The scalar `active` over the count is the share of triplets with a loss
    above 0.
    """
    pairs = _pairs(queries_be, documents_pe, relevance_bp, excluded_bp, valid_b, query_weight_b)
    if mined_bk is None:
        rows_bk = jnp.argmax(jnp.where(pairs.negative_bp, pairs.cosine_bp, FLOOR), axis=-1, keepdims=True)
    else:
        rows_bk = jnp.maximum(mined_bk, 0)
    negative_bk = jnp.take_along_axis(pairs.negative_bp, rows_bk, axis=-1)
    if mined_bk is not None:
        negative_bk &= mined_bk >= 0
    share_bk = negative_bk / jnp.maximum(jnp.sum(negative_bk, axis=-1, keepdims=True), 1)
    weight_b = jnp.where(jnp.any(negative_bk, axis=-1), pairs.weight_b, 0.0)
    share_bpk = pairs.share_bp[:, :, None] * share_bk[:, None, :] * weight_b[:, None, None]
    excess_bpk = (
        jnp.take_along_axis(pairs.cosine_bp, rows_bk, axis=-1)[:, None, :]
        - pairs.cosine_bp[:, :, None]
        + margin
    )
    # relu, not maximum: at exactly 0 the gradient is 0.
    return (
        jnp.sum(share_bpk * jax.nn.relu(excess_bpk)),
        jnp.sum(weight_b),
        {"active": jnp.sum(share_bpk * (excess_bpk > 0))},
    )


def matryoshka(
    loss_of_vectors: Callable[..., Loss], dims: Sequence[int], weights: Sequence[float] | None = None
) -> Callable[..., Loss]:
    """Weighted sum of a loss over vectors truncated to `dims` and normalised (arXiv 2205.13147).

    Weights are 1 by default.

    `loss_of_vectors` takes arrays [..., E] only; its scalars come back once for each dimension, as
    `name_dim`. Raises ValueError for a dimension that the vectors do not have.
    """
    chosen = [1.0] * len(dims) if weights is None else list(weights)

    def loss(*vectors: jax.Array) -> Loss:
        total, count, named = jnp.zeros(()), jnp.zeros(()), {}
        for dim, weight in zip(dims, chosen, strict=True):
            part, count, scalars = loss_of_vectors(*[_truncated(x, dim) for x in vectors])
            total += weight * part
            named |= {f"{name}_{dim}": value for name, value in scalars.items()}
        return total, count, named

    return loss


def _truncated(x: jax.Array, dim: int) -> jax.Array:
    if not 0 < dim <= x.shape[-1]:
        raise ValueError(f"matryoshka dimension {dim}: the vectors have {x.shape[-1]}")
    return l2_normalize(x[..., :dim])
