"""Both indexes against brute force in float64, on seeded clustered unit vectors."""

import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.platforms import needs_scann

from search_r3_jax.errors import UserError
from search_r3_jax.retrieval.index.build import build_index
from search_r3_jax.retrieval.index.device import DeviceIndex
from search_r3_jax.retrieval.index.exact import ExactIndex
from search_r3_jax.retrieval.index.protocol import LocalIndex, probe_recall, recall_at_k
from search_r3_jax.retrieval.index.scann import ScannIndex, ScannSettings

KINDS = ["exact", "device", pytest.param("scann", marks=needs_scann)]


def clustered(rows: int, dim: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(25, dim))
    vectors = centres[rng.integers(25, size=rows)] + 0.7 * rng.normal(size=(rows, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def brute_force(queries: np.ndarray, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    scores = queries.astype(np.float64) @ vectors.astype(np.float64).T
    rows = np.argsort(-scores, axis=1)[:, :k]
    return np.take_along_axis(scores, rows, axis=1), rows


def make(kind: str, vectors: np.ndarray) -> LocalIndex:
    ids = [f"doc{row}" for row in range(len(vectors))]
    if kind == "scann":
        return ScannIndex.build(vectors, ids, 7)
    if kind == "device":
        return DeviceIndex(vectors, ids, 7, chunk_rows=256, query_chunk=16)
    return ExactIndex(vectors, ids, 7, corpus_chunk=256, query_chunk=16)


@pytest.mark.parametrize("kind", KINDS)
class TestEveryIndex:
    @pytest.mark.parametrize("count", [1, 7, 50])
    def test_equals_brute_force(self, kind: str, count: int) -> None:
        vectors, queries = clustered(700, 48), clustered(count, 48, seed=1)
        scores, rows = make(kind, vectors).search(queries, 20)
        expected_scores, expected_rows = brute_force(queries, vectors, 20)
        np.testing.assert_array_equal(rows, expected_rows)
        np.testing.assert_allclose(scores, expected_scores, atol=1e-6)
        assert scores.dtype == np.float32
        assert rows.dtype == np.int32

    def test_more_wanted_than_there_is(self, kind: str) -> None:
        vectors, queries = clustered(5, 16), clustered(3, 16, seed=1)
        scores, rows = make(kind, vectors).search(queries, 9)
        np.testing.assert_array_equal(rows[:, :5], brute_force(queries, vectors, 5)[1])
        np.testing.assert_array_equal(rows[:, 5:], -1)
        np.testing.assert_array_equal(scores[:, 5:], -np.inf)

    def test_no_queries(self, kind: str) -> None:
        scores, rows = make(kind, clustered(5, 16)).search(np.empty((0, 16), np.float32), 3)
        assert scores.shape == rows.shape == (0, 3)

    def test_knows_what_it_is(self, kind: str) -> None:
        index = make(kind, clustered(5, 16))
        assert (index.kind, index.version, list(index.ids)[:2], index.vectors.shape) == (
            kind,
            7,
            ["doc0", "doc1"],
            (5, 16),
        )

    def test_refuses_another_width(self, kind: str) -> None:
        with pytest.raises(ValueError, match="want"):
            make(kind, clustered(5, 16)).search(np.zeros((1, 15), np.float32), 3)


@needs_scann
@pytest.mark.parametrize(
    "settings",
    [
        ScannSettings(method="ah"),
        ScannSettings(method="tree_ah", leaves=40, leaves_to_search=20),
        ScannSettings(method="tree_ah", leaves=40, leaves_to_search=10, spherical=True, soar_lambda=1.0),
    ],
    ids=["ah", "tree_ah", "soar"],
)
def test_hashed_methods_reach_the_gate(settings: ScannSettings) -> None:
    # Queries of the same clusters as the corpus, as embeddings of real queries are.
    vectors, queries = np.split(clustered(3060, 32), [3000])
    scores, rows = ScannIndex.build(
        vectors, [str(row) for row in range(3000)], 0, settings, threads=2
    ).search(queries, 10)
    expected_scores, expected_rows = brute_force(queries, vectors, 10)
    assert recall_at_k(rows, expected_rows, 10) >= 0.99
    found = rows == expected_rows
    np.testing.assert_allclose(scores[found], expected_scores[found], atol=1e-5)


@needs_scann
@pytest.mark.parametrize("soar_lambda", [0.0, 1.0])
def test_tree_looks_further_until_k_are_found(soar_lambda: float) -> None:
    vectors = clustered(1000, 32)
    settings = ScannSettings(method="tree_ah", leaves=30, leaves_to_search=1, soar_lambda=soar_lambda)
    _, rows = ScannIndex.build(vectors, [str(row) for row in range(1000)], 0, settings).search(
        vectors[:4], 900
    )
    assert all(len(set(found)) == 900 and -1 not in found for found in rows.tolist())


@needs_scann
def test_scann_saved_and_moved_finds_the_same(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, queries = clustered(2000, 32), clustered(9, 32, seed=1)
    ids = [str(row) for row in range(2000)]
    settings = ScannSettings(
        method="tree_ah", leaves=40, leaves_to_search=10, spherical=True, soar_lambda=1.0
    )
    built = ScannIndex.build(vectors, ids, 3, settings)
    (tmp_path / "before").mkdir()
    monkeypatch.chdir(tmp_path)
    built.save("before")
    (tmp_path / "before").rename(tmp_path / "after")
    loaded = ScannIndex.load("after", vectors, ids, 3)
    assert loaded.settings == built.settings
    np.testing.assert_array_equal(loaded.search(queries, 10)[1], built.search(queries, 10)[1])
    with pytest.raises(UserError, match="rebuild"):
        ScannIndex.load("after", vectors[:-1], ids[:-1], 3)
    (tmp_path / "after" / "scann_docids.pkl").write_bytes(b"")
    with pytest.raises(UserError, match="pkl"):
        ScannIndex.load("after", vectors, ids, 3)


def test_settings_follow_the_guide() -> None:
    methods = [ScannSettings.for_corpus(rows, 64).method for rows in (19_999, 20_000, 99_999, 100_000)]
    assert methods == ["brute_force", "ah", "ah", "tree_ah"]
    settings = ScannSettings.for_corpus(1_000_000, 64)
    assert (settings.leaves, settings.leaves_to_search, settings.spherical, settings.soar_lambda) == (
        1000,
        125,
        True,
        1.0,
    )


def test_auto_says_what_it_became(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, ids = clustered(5, 16), list("abcde")
    monkeypatch.setattr("search_r3_jax.retrieval.index.build.scann_available", lambda: False)
    assert build_index("auto", vectors, ids, 0).kind == "exact"
    monkeypatch.setattr("search_r3_jax.retrieval.index.scann.scann_available", lambda: False)
    with pytest.raises(UserError, match="exact"):
        build_index("scann", vectors, ids, 0)


@needs_scann
def test_auto_takes_scann() -> None:
    assert build_index("auto", clustered(5, 16), list("abcde"), 0).kind == "scann"


def test_exact_compiles_once_a_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[tuple[int, ...]] = []
    einsum = jnp.einsum

    def counting(spec: str, queries: jax.Array, corpus: jax.Array, **options: Any) -> jax.Array:
        traced.append(queries.shape)
        return einsum(spec, queries, corpus, **options)

    monkeypatch.setattr(jnp, "einsum", counting)
    index = ExactIndex(clustered(61, 24), [str(row) for row in range(61)], 0)
    for count in (5, 6, 7, 8, 9):
        index.search(clustered(count, 24), 3)
    assert traced == [(8, 24), (16, 24)]


def test_approximate_is_close() -> None:
    vectors, queries = clustered(700, 48), clustered(9, 48, seed=1)
    _, rows = ExactIndex(vectors, [str(row) for row in range(700)], 0, approximate=True).search(queries, 10)
    assert recall_at_k(rows, brute_force(queries, vectors, 10)[1], 10) >= 0.9


def test_recall_counts_hits_in_any_order() -> None:
    exact = np.array([[1, 2, 3], [4, 5, -1]])
    assert recall_at_k(np.array([[3, 9, 1], [5, 4, -1]]), exact, 3) == pytest.approx(4 / 5)
    assert recall_at_k(exact, exact, 3) == 1.0
    assert recall_at_k(np.array([[2], [5]]), exact, 1) == 0.0


class Fixed:
    """An index that always answers the same rows."""

    kind, version = "exact", 0

    def __init__(self, vectors: np.ndarray, rows: list[int]) -> None:
        self._vectors, self._rows, self.ids_hash, self.shape = (
            vectors,
            np.array([rows], np.int32),
            "",
            vectors.shape,
        )

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros((1, k), np.float32), self._rows

    def take(self, rows: np.ndarray) -> np.ndarray:
        return self._vectors[rows]


def test_probe_recall_forgives_copies_and_nothing_else() -> None:
    angles = np.array([0.0, 0.1, 0.2, 0.2, 0.9])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    exact, query = ExactIndex(vectors, list("abcde"), 0), vectors[:1]
    recall = {
        rows: probe_recall(Fixed(vectors, list(rows)), exact, query, 3)
        for rows in [(0, 1, 3), (0, 2, 3), (0, 0, 1), (0, 1, 4)]
    }
    assert recall == {(0, 1, 3): 1.0, (0, 2, 3): 2 / 3, (0, 0, 1): 2 / 3, (0, 1, 4): 2 / 3}


@needs_scann
def test_import_is_silent_and_without_tensorflow(tmp_path) -> None:
    # A TensorFlow that shouts, should anything reach for it.
    (tmp_path / "tensorflow.py").write_text("print('TENSORFLOW IMPORTED')\n")
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import numpy as np\n"
        "from search_r3_jax.retrieval.index.build import build_index\n"
        "build_index('scann', np.eye(3, dtype=np.float32), list('abc'), 0).search(np.eye(3, "
        "dtype=np.float32), 1)\n"
        "assert 'tensorflow' not in sys.modules and 'scann' in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
