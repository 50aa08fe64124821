"""Vectors without a direction: whatever scores, writes or indexes them names the first text and stops."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.log_lines import collect_log_lines
from helpers.tiny_models import byte_tokenizer
from safetensors.torch import load_file, save_file

from search_r3_jax.commands.models import Embed
from search_r3_jax.data.collection import Collection, Document, Query
from search_r3_jax.embedder import Embedder
from search_r3_jax.errors import EmbeddingError, UserError
from search_r3_jax.evaluation.evaluate import EmbeddedQueries, average_queries, exact_index, search_result
from search_r3_jax.evaluation.perplexity import perplexity
from search_r3_jax.hub.export import export_model
from search_r3_jax.hub.load_model import load_model
from search_r3_jax.retrieval.index.build import build_index
from search_r3_jax.vectors import require_directions, unit_vectors

Check = Callable[[np.ndarray, Callable[[int], str]], np.ndarray]
TEXTS = ["plain", "another text", "café", "a cup of café crème"]


@pytest.fixture(scope="module")
def broken(tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that only embeds texts without an accent: one row of its table is no number."""
    folder = tmp_path_factory.mktemp("broken") / "model"
    shutil.copytree(tiny_folders["llama"], folder)
    tensors = load_file(folder / "model.safetensors")
    accent = byte_tokenizer()("é")["input_ids"][0]
    tensors["model.embed_tokens.weight"][accent] = np.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("value", "what"), [(np.nan, "not finite"), (np.inf, "not finite"), (0.0, "is zero")]
)
@pytest.mark.parametrize("check", [require_directions, unit_vectors])
def test_the_first_row_without_a_direction_is_named(check: Check, value: float, what: str) -> None:
    vectors = np.eye(5, dtype=np.float32)
    np.testing.assert_array_equal(check(vectors, str), vectors)
    vectors[3, 3] = vectors[2, 2] = value
    with pytest.raises(EmbeddingError, match=f"^row 2: its embedding .*{what}"):
        check(vectors, lambda row: f"row {row}")


def test_the_embedder_names_the_first_text(broken: Path) -> None:
    embedder = Embedder.load(broken)
    assert np.isfinite(embedder.encode(TEXTS[:2])).all()
    named = r"^text 3 \('café'\): its embedding holds numbers that are not finite"
    with pytest.raises(EmbeddingError, match=named):
        embedder.encode(TEXTS, kind="document")
    # Tied logits of the row are no numbers either: no text can be thought about.
    with pytest.raises(EmbeddingError, match=r"^text \d"):
        embedder.encode(TEXTS, mode="reason")


def test_no_file_of_such_vectors_is_written(broken: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    with pytest.raises(UserError, match=r"^text 3 "):
        Embed(model=str(broken), input=tmp_path / "texts.txt", out=tmp_path / "out.npy").run()
    with pytest.raises(UserError, match=r"^model.embed_tokens.weight: .* not finite"):
        export_model(load_model(broken), tmp_path / "export")
    assert [path.name for path in tmp_path.iterdir()] == ["texts.txt"]


def test_weights_that_overflow_bfloat16_are_not_exported(broken: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(broken, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"].nan_to_num_(0.0)
    tensors["model.norm.weight"][0] = 3.4e38
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = load_model(folder)
    export_model(model, tmp_path / "float32")
    with pytest.raises(UserError, match=r"^model.norm.weight: .* as bfloat16"):
        export_model(model, tmp_path / "bfloat16", dtype="bfloat16")


def test_perplexity_names_the_first_text(broken: Path) -> None:
    model = load_model(broken)
    decoder, rows = model.decoder, [list(model.tokenizer(text)["input_ids"]) for text in ["x", *TEXTS]]
    with collect_log_lines(), pytest.raises(UserError, match=r"^text \d: the log-probabilities"):
        perplexity(decoder, rows)


def test_an_index_of_such_vectors_is_not_built() -> None:
    vectors = np.eye(4, dtype=np.float32)
    vectors[2] = np.nan
    with pytest.raises(EmbeddingError, match=r"^document c: its embedding"):
        build_index("exact", vectors, list("abcd"), 0)


def test_queries_that_cancel_out_are_not_searched() -> None:
    documents = tuple(Document(doc_id=f"d{i}", title="", text="") for i in range(3))
    queries = tuple(Query(query_id=f"q{i}", text="", positives={"d0": 1}) for i in range(3))
    collection = Collection(name="c", split="test", documents=documents, queries=queries)
    direct = EmbeddedQueries(
        vectors=np.eye(3, dtype=np.float32), seconds=1.0, warm_seconds=1.0, tokens=[1] * 3
    )
    opposite = EmbeddedQueries(
        vectors=np.diag([1.0, -1.0, 1.0]).astype(np.float32), seconds=1.0, warm_seconds=1.0, tokens=[1] * 3
    )
    index = exact_index(collection, np.eye(3, dtype=np.float32))
    search_result(collection, index, direct)
    with pytest.raises(EmbeddingError, match=r"^query q1: its embedding is zero"):
        search_result(collection, index, average_queries(direct, opposite))
