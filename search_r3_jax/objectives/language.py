"""Token log-probabilities, cross-entropy and KL to the base model, in rematerialised chunks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Floor of the logits: e^−10⁴ is 0, and differences of a masked column (−inf) stay finite.
LOWEST = -1e4


def token_log_probs(
    logits_of: Callable[[jax.Array], jax.Array],
    hidden_md: jax.Array,
    targets_m: jax.Array,
    *,
    temperature: float = 1.0,
    chunk: int = 256,
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities of the targets, and entropies, of softmax(logits/temperature): [M] float32, nats.

    M is cut into chunks that are recomputed in the backward pass: at most `chunk × V` logits exist at a time.
    """

    @jax.checkpoint
    def one_chunk(hidden_cd: jax.Array, targets_c: jax.Array) -> tuple[jax.Array, jax.Array]:
        log_probs_cv = jax.nn.log_softmax(logits_of(hidden_cd) / temperature, axis=-1)
        picked = jnp.take_along_axis(log_probs_cv, targets_c[:, None], axis=-1)[:, 0]
        # A column of −inf adds nothing to the entropy; 0 · −inf would be NaN.
        entropy = -jnp.sum(jnp.exp(log_probs_cv) * jnp.maximum(log_probs_cv, LOWEST), axis=-1)
        return picked, jax.lax.stop_gradient(entropy)

    def body(
        _: None, chunk_arguments: tuple[jax.Array, jax.Array]
    ) -> tuple[None, tuple[jax.Array, jax.Array]]:
        return None, one_chunk(*chunk_arguments)

    M = hidden_md.shape[0]
    _, (log_probs, entropies) = jax.lax.scan(body, None, (_cut(hidden_md, chunk), _cut(targets_m, chunk)))
    return _joined(log_probs, M), _joined(entropies, M)


def masked_token_log_probs(
    logits_of: Callable[[jax.Array], jax.Array],
    hidden_md: jax.Array,
    targets_m: jax.Array,
    mask_m: jax.Array,
    *,
    temperature: float = 1.0,
    chunk: int = 256,
) -> tuple[jax.Array, jax.Array]:
    """`token_log_probs` where `mask_m` bool [M] is true, 0 elsewhere; skips chunks without such a token.

    One compiled shape for any mask, and a time proportional to its tokens. For a single device: rows are
    gathered from all of M.
    """
    M, D = hidden_md.shape
    chunk = min(chunk, M)
    # Masked rows first, in their order, so that chunks are full of them or empty.
    order_m = jnp.argsort(~mask_m, stable=True)
    padded = -(-M // chunk) * chunk
    hidden = jnp.pad(hidden_md[order_m], ((0, padded - M), (0, 0))).reshape(-1, chunk, D)
    targets = jnp.pad(targets_m[order_m], (0, padded - M)).reshape(-1, chunk)
    first = jnp.arange(0, padded, chunk)

    def compute(hidden_cd: jax.Array, targets_c: jax.Array) -> tuple[jax.Array, jax.Array]:
        return token_log_probs(logits_of, hidden_cd, targets_c, temperature=temperature, chunk=chunk)

    def nothing(hidden_cd: jax.Array, targets_c: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.zeros(chunk, jnp.float32), jnp.zeros(chunk, jnp.float32)

    def body(
        _: None, part: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[None, tuple[jax.Array, jax.Array]]:
        hidden_cd, targets_c, start = part
        return None, jax.lax.cond(start < jnp.sum(mask_m), compute, nothing, hidden_cd, targets_c)

    _, results = jax.lax.scan(body, None, (hidden, targets, first))

    def in_input_order(values_nc: jax.Array) -> jax.Array:
        values_m = jnp.zeros(M, values_nc.dtype).at[order_m].set(values_nc.reshape(-1)[:M])
        return jnp.where(mask_m, values_m, 0)

    return in_input_order(results[0]), in_input_order(results[1])


def cross_entropy(log_probs_m: jax.Array, mask_m: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`(sum, count)` of −log p over the masked tokens, in nats."""
    return -jnp.sum(jnp.where(mask_m, log_probs_m, 0.0)), jnp.sum(mask_m, dtype=jnp.float32)


def _cut(x_m: jax.Array, chunk: int) -> jax.Array:
    """[M, ...] → [number, chunk, ...], padded with zeros.

    A chunk takes every number-th row, not neighbours: if M is sharded, all devices work on each chunk.
    """
    M = x_m.shape[0]
    chunk = min(chunk, M)
    padded = jnp.pad(x_m, ((0, -M % chunk), *((0, 0),) * (x_m.ndim - 1)))
    return padded.reshape(chunk, -1, *x_m.shape[1:]).swapaxes(0, 1)


def _joined(x_nc: jax.Array, M: int) -> jax.Array:
    return x_nc.swapaxes(0, 1).reshape(-1)[:M]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Head:
    """The weights that map hidden states to logits, read in slices of the vocabulary.

    Attributes:
        weight: [V,D] (a tied head: the embedding) or [D,V] (a free one); used in the hidden states' dtype, as
            the decoder does.
        vocab_axis: which axis of the weight is V.
        row_d: the weight [D] of token `row_id`, if this token's row is a separate parameter.
    """

    weight: jax.Array
    vocab_axis: int = field(default=0, metadata={"static": True})
    row_d: jax.Array | None = None
    row_id: int = field(default=-1, metadata={"static": True})

    @property
    def vocab_size(self) -> int:
        """V, columns of the logits."""
        return self.weight.shape[self.vocab_axis]

    def logits(self, hidden_md: jax.Array) -> jax.Array:
        """Logits [M,V] float32 of hidden states [M,D]."""
        return _logits(hidden_md, _Slice(self.weight, self.row_d), self, jnp.zeros((), jnp.int32))


class _Slice(NamedTuple):
    """A part of a head: `weight` [S,D] or [D,S], and the separate row of one token; both get gradients."""

    weight: jax.Array
    row_d: jax.Array | None


def _slice(head: Head, start: jax.Array, size: int) -> _Slice:
    return _Slice(jax.lax.dynamic_slice_in_dim(head.weight, start, size, axis=head.vocab_axis), head.row_d)


def _logits(hidden_cd: jax.Array, part: _Slice, head: Head, start: jax.Array) -> jax.Array:
    """Logits [C,S] float32 of the tokens from `start` on; `head` gives the layout of the slice only."""
    weight = part.weight.astype(hidden_cd.dtype)
    over_d = (((1,), (1 - head.vocab_axis,)), ((), ()))
    logits_cs = jax.lax.dot_general(hidden_cd, weight, over_d, preferred_element_type=jnp.float32)
    if part.row_d is not None:
        column_c = jnp.matmul(
            hidden_cd, part.row_d.astype(hidden_cd.dtype), preferred_element_type=jnp.float32
        )
        logits_cs = jnp.where(
            start + jnp.arange(logits_cs.shape[-1]) == head.row_id, column_c[:, None], logits_cs
        )
    return jnp.maximum(logits_cs, LOWEST)


def _starts(V: int, size: int) -> jax.Array:
    return jnp.arange(0, V, size, dtype=jnp.int32)


def _fitted(start: jax.Array, V: int, size: int) -> tuple[jax.Array, jax.Array]:
    """Start of a full-size slice that holds the tokens from `start` on, and a mask [S] of these tokens."""
    first = jnp.minimum(start, V - size)
    return first, first + jnp.arange(size) >= start


def token_kl(
    hidden_md: jax.Array,
    head: Head,
    base_hidden_md: jax.Array,
    base_head: Head,
    *,
    chunk: int = 256,
    vocab_chunk: int = 16384,
) -> jax.Array:
    """KL(current ‖ base) [M] float32 in nats of the next-token distributions, over the whole vocabulary.

    Gradients flow into `hidden_md` and `head` only. At most `chunk × vocab_chunk` logits of each model exist
    at a time, forward and backward. Raises ValueError where the two vocabularies differ in size.
    """
    V = head.vocab_size
    if base_head.vocab_size != V:
        raise ValueError(f"the vocabularies differ in size: {V} and {base_head.vocab_size}")
    kl_nc = jnp.asarray(
        _kl(min(vocab_chunk, V), _cut(hidden_md, chunk), head, _cut(base_hidden_md, chunk), base_head)
    )
    return _joined(kl_nc, hidden_md.shape[0])


def kl_to_base(
    hidden_md: jax.Array,
    head: Head,
    base_hidden_md: jax.Array,
    base_head: Head,
    mask_m: jax.Array,
    *,
    chunk: int = 256,
    vocab_chunk: int = 16384,
) -> tuple[jax.Array, jax.Array]:
    """`(sum, count)` of `token_kl` over the masked tokens."""
    # States outside of the mask may hold NaN; 0 · NaN would reach the head's gradient.
    hidden_md, base_hidden_md = (jnp.where(mask_m[:, None], x, 0) for x in (hidden_md, base_hidden_md))
    kl_m = token_kl(hidden_md, head, base_hidden_md, base_head, chunk=chunk, vocab_chunk=vocab_chunk)
    return jnp.sum(jnp.where(mask_m, kl_m, 0.0)), jnp.sum(mask_m, dtype=jnp.float32)


def _kl_value(
    size: int, hidden_ncd: jax.Array, head: Head, base_hidden_ncd: jax.Array, base_head: Head
) -> jax.Array:
    return _kl_forward(size, hidden_ncd, head, base_hidden_ncd, base_head)[0]


class _Normaliser(NamedTuple):
    """log Σ exp of all logits, as their maximum and the rest: subtracted in turn they lose no digits."""

    top: jax.Array
    rest: jax.Array

    def log_probs(self, logits_cs: jax.Array) -> jax.Array:
        return (logits_cs - self.top[:, None]) - self.rest[:, None]


def _normaliser(size: int, hidden_ncd: jax.Array, head: Head) -> _Normaliser:
    """The normaliser of every state, [n,C] each."""

    def add_slice(
        carry: tuple[jax.Array, jax.Array], start: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        first, fresh_s = _fitted(start, head.vocab_size, size)
        part = _slice(head, first, size)

        def of_chunk(xs: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
            hidden_cd, top_c, sum_c = xs
            logits_cs = _logits(hidden_cd, part, head, first)
            higher_c = jnp.maximum(top_c, jnp.max(logits_cs, axis=-1))
            more_c = jnp.sum(jnp.exp(logits_cs - higher_c[:, None]), where=fresh_s, axis=-1)
            return higher_c, sum_c * jnp.exp(top_c - higher_c) + more_c

        return jax.lax.map(of_chunk, (hidden_ncd, *carry)), None

    nothing = (
        jnp.full(hidden_ncd.shape[:2], LOWEST, jnp.float32),
        jnp.zeros(hidden_ncd.shape[:2], jnp.float32),
    )
    (top_nc, sum_nc), _ = jax.lax.scan(add_slice, nothing, _starts(head.vocab_size, size))
    return _Normaliser(top_nc, jnp.log(sum_nc))


def _kl_forward(
    size: int, hidden_ncd: jax.Array, head: Head, base_hidden_ncd: jax.Array, base_head: Head
) -> tuple[jax.Array, tuple[Any, ...]]:
    V = head.vocab_size
    log_z, base_log_z = _normaliser(size, hidden_ncd, head), _normaliser(size, base_hidden_ncd, base_head)

    def add_slice(kl_nc: jax.Array, start: jax.Array) -> tuple[jax.Array, None]:
        first, fresh_s = _fitted(start, V, size)
        part, base_part = _slice(head, first, size), _slice(base_head, first, size)

        def of_chunk(xs: tuple[jax.Array, jax.Array, _Normaliser, _Normaliser]) -> jax.Array:
            hidden_cd, base_hidden_cd, log_z, base_log_z = xs
            log_p_cs = log_z.log_probs(_logits(hidden_cd, part, head, first))
            log_q_cs = base_log_z.log_probs(_logits(base_hidden_cd, base_part, base_head, first))
            return jnp.sum(_kl_terms(log_p_cs, log_q_cs), where=fresh_s, axis=-1)

        return kl_nc + jax.lax.map(of_chunk, (hidden_ncd, base_hidden_ncd, log_z, base_log_z)), None

    kl_nc, _ = jax.lax.scan(add_slice, jnp.zeros(hidden_ncd.shape[:2], jnp.float32), _starts(V, size))
    return kl_nc, (hidden_ncd, head, base_hidden_ncd, base_head, log_z, base_log_z, kl_nc)


def _kl_terms(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """p·(log p − log q) − p + q: its sum is the KL divergence, and no term is negative.

    Without − p + q, which cancels in the sum, rounding in log p − log q would swamp a small divergence.
    """
    difference = log_p - log_q
    p = jnp.exp(log_p)
    near = jnp.abs(difference) < 0.5
    close = p * (jnp.expm1(-jnp.where(near, difference, 0.0)) + difference)
    return jnp.where(near, close, p * difference - p + jnp.exp(log_q))


def _kl_backward(
    size: int, saved: tuple[Any, ...], gradient_nc: jax.Array
) -> tuple[jax.Array, Head, None, None]:
    """d KL / d logit = p·(log p − log q − KL), pulled back one slice and one chunk at a time."""
    hidden_ncd, head, base_hidden_ncd, base_head, log_z, base_log_z, kl_nc = saved
    V = head.vocab_size

    def add_slice(total: tuple[jax.Array, _Slice], start: jax.Array) -> tuple[tuple[jax.Array, _Slice], None]:
        d_hidden_ncd, d_head = total
        first, fresh_s = _fitted(start, V, size)
        part, base_part = _slice(head, first, size), _slice(base_head, first, size)

        def add_chunk(d_part: _Slice, xs: tuple[Any, ...]) -> tuple[_Slice, jax.Array]:
            hidden_cd, base_hidden_cd, log_z, base_log_z, kl_c, gradient_c = xs
            logits_cs, pull = jax.vjp(lambda h, w: _logits(h, w, head, first), hidden_cd, part)
            log_p_cs = log_z.log_probs(logits_cs)
            log_q_cs = base_log_z.log_probs(_logits(base_hidden_cd, base_part, base_head, first))
            d_logits_cs = gradient_c[:, None] * jnp.exp(log_p_cs) * (log_p_cs - log_q_cs - kl_c[:, None])
            d_hidden_cd, more = pull(jnp.where(fresh_s, d_logits_cs, 0.0))
            return jax.tree.map(jnp.add, d_part, more), d_hidden_cd.astype(jnp.float32)

        xs = (hidden_ncd, base_hidden_ncd, log_z, base_log_z, kl_nc, gradient_nc)
        d_part, more_ncd = jax.lax.scan(add_chunk, jax.tree.map(jnp.zeros_like, part), xs)
        # The last slice overlaps the one before it: add, do not replace.
        before = jax.lax.dynamic_slice_in_dim(d_head.weight, first, size, axis=head.vocab_axis)
        d_weight = jax.lax.dynamic_update_slice_in_dim(
            d_head.weight, before + d_part.weight, first, axis=head.vocab_axis
        )
        d_row = None if d_head.row_d is None or d_part.row_d is None else d_head.row_d + d_part.row_d
        return (d_hidden_ncd + more_ncd, _Slice(d_weight, d_row)), None

    nothing = (
        jnp.zeros(hidden_ncd.shape, jnp.float32),
        jax.tree.map(jnp.zeros_like, _Slice(head.weight, head.row_d)),
    )
    (d_hidden_ncd, d_head), _ = jax.lax.scan(add_slice, nothing, _starts(V, size))
    d_head = Head(weight=d_head.weight, vocab_axis=head.vocab_axis, row_d=d_head.row_d, row_id=head.row_id)
    return d_hidden_ncd.astype(hidden_ncd.dtype), d_head, None, None


_kl = jax.custom_vjp(_kl_value, nondiff_argnums=(0,))
_kl.defvjp(_kl_forward, _kl_backward)
