"""Fewer bits, against sentence-transformers."""

from typing import Any

import numpy as np
import pytest

from search_r3_jax.errors import UserError
from search_r3_jax.precision import PRECISIONS, Precision, quantize


@pytest.fixture
def vectors() -> np.ndarray:
    x = np.random.default_rng(0).standard_normal((50, 20)).astype(np.float32)
    # One dimension is always the same.
    x[:, 3] = 0.25
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("count", [0, 2, 50])
def test_as_sentence_transformers(vectors: np.ndarray, precision: Precision, count: int) -> None:
    from sentence_transformers.util import quantize_embeddings

    expected = np.asarray(quantize_embeddings(vectors[:count], precision))
    found = quantize(vectors[:count], precision)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("precision", ["int8", "uint8"])
def test_the_ranges_of_a_corpus_serve_a_query(vectors: np.ndarray, precision: Precision) -> None:
    from sentence_transformers.util import quantize_embeddings

    ranges = np.stack([vectors[:40].min(axis=0), vectors[:40].max(axis=0)])
    found = quantize(vectors[40:41], precision, ranges_2e=ranges)
    np.testing.assert_array_equal(found, np.asarray(quantize_embeddings(vectors[40:41], precision, ranges)))
    with pytest.raises(UserError, match=f"precision: {precision}: one vector has no range"):
        quantize(vectors[:1], precision)
    with pytest.raises(UserError, match=r"ranges: shape \[2, 19\]: .* \[2, 20\]"):
        quantize(vectors, precision, ranges_2e=ranges[:, 1:])


def test_binary_keeps_what_is_near_near(vectors: np.ndarray) -> None:
    bits = np.unpackbits(quantize(vectors, "ubinary"), axis=-1)[:, :20]
    np.testing.assert_array_equal(bits, vectors > 0)
    signed = quantize(vectors, "binary").astype(np.int64) + 128
    np.testing.assert_array_equal(signed, quantize(vectors, "ubinary"))


def test_an_unknown_precision_is_named(vectors: np.ndarray) -> None:
    unknown: Any = "float16"
    with pytest.raises(UserError, match="precision: 'float16': give one of float32, int8"):
        quantize(vectors, unknown)
