"""The head: the state at the one embed token, as a float32 unit vector."""

import jax
import jax.numpy as jnp
import numpy as np

from search_r3_jax.models.embedding import pool_embedding
from search_r3_jax.vectors import l2_normalize

EMBED = 7


def test_picks_the_state_at_the_token_wherever_it_stands() -> None:
    generator = np.random.default_rng(0)
    hidden = generator.standard_normal((4, 6, 5)).astype(np.float32)
    ids = generator.integers(0, 7, (4, 6))
    at = np.array([0, 5, 2, 3])
    ids[np.arange(4), at] = EMBED
    found = pool_embedding(jnp.asarray(hidden), jnp.asarray(ids), EMBED)
    expected = hidden[np.arange(4), at].astype(np.float64)
    expected /= np.linalg.norm(expected, axis=-1, keepdims=True)
    assert np.asarray(found.valid).all()
    np.testing.assert_allclose(np.asarray(found.vectors), expected, atol=1e-6)


def test_absent_or_doubled_token_is_not_valid_and_gives_zeros() -> None:
    hidden = jnp.ones((2, 4, 3))
    ids = jnp.asarray([[1, 2, 3, 4], [EMBED, 1, EMBED, 2]])
    found = pool_embedding(hidden, ids, EMBED)
    assert not np.asarray(found.valid).any()
    np.testing.assert_array_equal(np.asarray(found.vectors), 0.0)


def test_gradient_of_a_zero_vector_is_finite() -> None:
    gradient = jax.grad(lambda x: jnp.sum(l2_normalize(x) ** 2))(jnp.zeros((2, 3)))
    assert np.isfinite(np.asarray(gradient)).all()
