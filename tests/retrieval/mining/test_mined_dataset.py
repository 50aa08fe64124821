"""`data mine` as a whole: what it writes, that it goes on after a kill, that its negatives reach a training
batch, and what it refuses."""

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.tiny_models import byte_tokenizer, word_collection

from search_r3_jax.cli import parse
from search_r3_jax.commands.data import DataMine
from search_r3_jax.data.collection import Collection
from search_r3_jax.data.dataset import build_dataset, load_collection, load_collections
from search_r3_jax.data.mixture import Mixture
from search_r3_jax.data.pipeline import PAD, PairPipeline
from search_r3_jax.embedder import Embedder
from search_r3_jax.errors import UserError
from search_r3_jax.files import write_array
from search_r3_jax.retrieval.mining.dataset import MiningCounts, mine_dataset
from search_r3_jax.retrieval.mining.select import MiningOptions
from search_r3_jax.text.prompts import Prompter

QUICK_E = 64
TOKENS: dict[str, Any] = {"max_query_tokens": 16, "max_document_tokens": 24}


def source_collections() -> dict[str, Collection]:
    """Two splits over one corpus; every third query has judged negatives."""
    train, test = (
        word_collection(documents=50, queries=12),
        word_collection(documents=50, queries=5, split="test"),
    )
    queries = tuple(
        replace(query, negatives=("d40", "d41") if row % 3 == 0 else ())
        for row, query in enumerate(train.queries)
    )
    return {"train": replace(train, queries=queries), "test": test}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return build_dataset(source_collections(), tmp_path / "data", name="words", source={"kind": "made up"})


class QuickEncoder:
    """Vectors at random for each text: nothing to compile where it does not matter what they are."""

    def __init__(self, graph: object, prompter: object, *, mesh: object = None):
        pass

    def encode(
        self, state: object, texts: list[str], *, max_tokens: int, on_progress: Callable[[int], object]
    ) -> np.ndarray:
        vectors = [np.random.default_rng([max_tokens, *text.encode()]).normal(size=QUICK_E) for text in texts]
        on_progress(len(texts))
        return np.stack([vector / np.linalg.norm(vector) for vector in vectors]).astype(np.float32)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("search_r3_jax.retrieval.mining.dataset.Encoder", QuickEncoder)


def mine(model: Path, data: Path, out: Path, **changed: Any) -> MiningCounts:
    options = {
        "split": "train",
        "options": MiningOptions(num_negatives=3, margin=0.0),
        "index": "exact",
        "shard_documents": 16,
    }
    return mine_dataset(str(model), data, out, **(TOKENS | options | changed))


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def write_beir(folder: Path, collections: dict[str, Collection]) -> Path:
    (folder / "qrels").mkdir(parents=True)
    corpus = [json.dumps({"_id": each.doc_id, "text": each.text}) for each in collections["train"].documents]
    (folder / "corpus.jsonl").write_text("\n".join(corpus))
    asked = {
        query.query_id: query.text for collection in collections.values() for query in collection.queries
    }
    (folder / "queries.jsonl").write_text(
        "\n".join(json.dumps({"_id": key, "text": text}) for key, text in asked.items())
    )
    for split, collection in collections.items():
        rows = [(query.query_id, doc_id, 1) for query in collection.queries for doc_id in query.positives]
        rows += [(query.query_id, doc_id, 0) for query in collection.queries for doc_id in query.negatives]
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join("\t".join(map(str, row)) for row in rows))
    return folder


def test_only_the_negatives_of_the_split_change(
    tiny_folders: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    model, out, before = tiny_folders["llama"], tmp_path / "deep" / "mined", source_collections()
    counts = mine(model, data, out, options=MiningOptions(num_negatives=3, last_rank=6, margin=0.0))
    after = load_collections(out)
    assert after["test"] == before["test"]
    assert after["train"].documents == before["train"].documents
    assert [replace(query, negatives=()) for query in after["train"].queries] == [
        replace(query, negatives=()) for query in before["train"].queries
    ]
    assert sorted(path.name for path in out.parent.iterdir()) == ["mined"]

    # The same by the embedder and a sort.
    embedder = {key: Embedder.load(model, max_tokens=tokens) for key, tokens in TOKENS.items()}
    documents = embedder["max_document_tokens"].encode(
        [document.body for document in before["train"].documents], kind="document"
    )
    queries = embedder["max_query_tokens"].encode([query.text for query in before["train"].queries])
    mined = 0
    for query, found, scores in zip(
        before["train"].queries, after["train"].queries, queries @ documents.T, strict=True
    ):
        limit = scores[before["train"].row_of[next(iter(query.positives))]]
        known = {*query.positives, *query.negatives}
        ranked = [f"d{row}" for row in np.argsort(-scores) if f"d{row}" not in known]
        left = [doc_id for doc_id in ranked[:6] if scores[before["train"].row_of[doc_id]] <= limit]
        assert found.negatives == query.negatives + tuple(left[:3])
        mined += len(found.negatives) - len(query.negatives)
    assert 0 < mined == counts.mined < 36
    assert (counts.queries, counts.documents) == (12, 50)
    assert counts.too_close > 0

    manifest = json.loads((out / "dataset.json").read_text())
    source, original = manifest["source"], json.loads((data / "dataset.json").read_text())
    assert manifest["name"] == source["data"]["name"] == "words"
    for split, each in original["splits"].items():
        assert source["data"]["splits"][split] == {key: each[key] for key in ("corpus_hash", "queries_hash")}
    assert {each["corpus_split"] for each in manifest["splits"].values()} == {"shared"}
    assert (source["kind"], source["split"], source["index"], source["model"]["name"]) == (
        "mined",
        "train",
        "exact",
        "llama",
    )
    assert source["options"] == {
        **{
            "num_negatives": 3,
            "first_rank": 0,
            "last_rank": 6,
            "margin": 0.0,
            "relative_margin": None,
            "max_score": None,
        },
        **{"sampling": "top", "seed": 0},
    }
    assert source["counts"]["mined"] == mined


@pytest.mark.usefixtures("quick")
def test_a_beir_folder_gives_the_same_queries(
    tiny_folders: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    mine(tiny_folders["llama"], data, tmp_path / "one")
    mine(tiny_folders["llama"], write_beir(tmp_path / "beir", source_collections()), tmp_path / "two")
    assert (
        load_collection(tmp_path / "one", "train").queries
        == load_collection(tmp_path / "two", "train").queries
    )


@pytest.mark.usefixtures("quick")
def test_the_same_command_gives_the_same_bytes_anywhere(
    tiny_folders: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    mine(tiny_folders["llama"], data, tmp_path / "one")
    (tmp_path / "moved").mkdir()
    model = shutil.copytree(tiny_folders["llama"], tmp_path / "moved" / "llama")
    mine(model, shutil.copytree(data, tmp_path / "moved" / "data"), tmp_path / "moved" / "two")
    assert files(tmp_path / "one") == files(tmp_path / "moved" / "two")


def writes_of(monkeypatch: pytest.MonkeyPatch, *, stop_before: int | None = None) -> list[Path]:
    """The arrays that are written from now on; the one numbered `stop_before` is not."""
    written: list[Path] = []

    def write(path: Path, array: np.ndarray) -> None:
        if len(written) == stop_before:
            raise KeyboardInterrupt
        write_array(path, array)
        written.append(path)

    monkeypatch.setattr("search_r3_jax.retrieval.store.corpus_vectors.write_array", write)
    return written


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("stop_before", range(5))
def test_after_an_interruption_the_same_command_goes_on(
    tiny_folders: dict[str, Path],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop_before: int,
) -> None:
    model, out = tiny_folders["llama"], tmp_path / "mined"
    writes_of(monkeypatch, stop_before=stop_before)
    with pytest.raises(KeyboardInterrupt):
        mine(model, data, out)
    assert not out.exists()
    written = writes_of(monkeypatch)
    mine(model, data, out)
    assert len(written) == 5 - stop_before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "mined"]
    mine(model, data, tmp_path / "straight")
    assert files(out) == files(tmp_path / "straight")


KILLED = """
import os, signal, sys
from pathlib import Path
import search_r3_jax.data.dataset as dataset
import search_r3_jax.retrieval.store.corpus_vectors as corpus
import search_r3_jax.retrieval.mining.dataset as mined_dataset
from search_r3_jax.retrieval.mining.select import MiningOptions

kill_at, written, write = sys.argv[4], [], corpus.write_array

def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)

def write_and_perhaps_die(path, array):
    if kill_at == str(len(written)):
        path.with_name(f".{path.name}.{os.getpid()}.tmp").write_bytes(b"half")
        die()
    write(path, array)
    written.append(path)

def build_then_only_die(*arguments, **options):
    built = build(*arguments, **options)
    built.rename(sys.argv[3])
    die()

corpus.write_array = write_and_perhaps_die
build = mined_dataset.build_dataset
if kill_at == "build":
    dataset.file_sha256 = die
if kill_at == "clean-up":
    mined_dataset.build_dataset = build_then_only_die
mined_dataset.mine_dataset(
    sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), split="train",
    options=MiningOptions(num_negatives=3, margin=0.0), index="exact",
    max_query_tokens=16, max_document_tokens=24, shard_documents=16,
)
"""


# Two of the corpus' four shards are there; or all, and none of the queries; or half a data set; or a whole
# one, with the vectors.
@pytest.mark.slow
@pytest.mark.parametrize(("kill_at", "kept"), [("2", 2), ("4", 4), ("build", 5), ("clean-up", 5)])
def test_after_a_kill_the_same_command_goes_on(
    tiny_folders: dict[str, Path],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kill_at: str,
    kept: int,
) -> None:
    model, out = tiny_folders["llama"], tmp_path / "mined"
    if kill_at == "build":
        # Its check of the source comes first, and would be where it dies.
        data = write_beir(tmp_path / "beir", source_collections())
    command = [sys.executable, "-c", KILLED, str(model), str(data), str(out), kill_at]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert out.exists() == (kill_at == "clean-up")
    work = tmp_path / ".mined.mining"
    assert len(list(work.rglob("shard-*.npy"))) == kept
    assert len(list(work.glob(".built.tmp-*"))) == (kill_at == "build")
    written = writes_of(monkeypatch)
    mine(model, data, out)
    assert len(written) == 5 - kept
    assert {path.name for path in tmp_path.iterdir()} <= {"beir", "data", "mined"}
    mine(model, data, tmp_path / "straight")
    assert files(out) == files(tmp_path / "straight")


@pytest.mark.usefixtures("quick")
def test_vectors_of_another_model_beside_out_are_refused(
    tiny_folders: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    def stop(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("search_r3_jax.retrieval.mining.dataset.build_dataset", stop)
        with pytest.raises(KeyboardInterrupt):
            mine(tiny_folders["llama"], data, tmp_path / "mined")
    with pytest.raises(UserError, match="model_hash"):
        mine(tiny_folders["qwen3"], data, tmp_path / "mined")
    with pytest.raises(UserError, match="max_tokens"):
        mine(tiny_folders["llama"], data, tmp_path / "mined", max_query_tokens=12)
    # Other options of the choice ask for no other vectors.
    mine(tiny_folders["llama"], data, tmp_path / "mined", options=MiningOptions(num_negatives=1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "mined"]


@pytest.mark.usefixtures("quick")
def test_mined_negatives_reach_the_training_batch(
    tiny_folders: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    mine(tiny_folders["llama"], data, tmp_path / "mined", options=MiningOptions(num_negatives=2))
    collection = load_collection(tmp_path / "mined", "train")
    pipeline = PairPipeline(
        mixture=Mixture(collections=(collection,), seed=0),
        prompter=Prompter(byte_tokenizer(embed_token=True)),
        global_batch=12,
        encode_chunk=4,
        negatives=2,
        **TOKENS,
    )
    batch, pairs = pipeline.batch(0), pipeline.pairs(0)
    for pair, rows in zip(pairs, batch.mined, strict=True):
        assert (rows != PAD).all()
        found = {collection.documents[int(batch.document_ids[row])].doc_id for row in rows}
        wanted = collection.queries[pair.query].negatives
        # Where there are judged ones too, two of the four.
        assert found <= set(wanted)
        assert len(found) == 2
        assert len(wanted) == (4 if pair.query % 3 == 0 else 2)


@pytest.mark.usefixtures("quick")
def test_the_command_says_what_it_did(
    tiny_folders: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mined"
    options = [
        "--model",
        str(tiny_folders["llama"]),
        "--data",
        str(data),
        "--out",
        str(out),
        "--num-negatives",
        "2",
        "--first-rank",
        "1",
    ]
    command = parse(["data", "mine", *options, "--index", "exact"])
    assert isinstance(command, DataMine)
    command.run()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "12 queries of split train, 50 different documents"
    assert lines[1] == "24 negatives mined; 0 queries have fewer than 2"
    assert re.fullmatch(
        r"left out: \d+ known to be relevant, \d+ negatives already, 0 within a limit", lines[2]
    )
    assert lines[3:] == [f"written to {out}"]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"split": "dev"}, r"--split: .* has no split 'dev'; splits found: test, train"),
        ({"out": "data"}, r"--out: .*data: already exists"),
        ({"out": "file"}, r"--out: .*file: already exists"),
        ({"data": "file"}, "expected a built data set"),
        ({"data": "nowhere"}, "expected a built data set"),
        ({"model": "nowhere"}, "model: "),
        ({"step": 3}, "--step: .*: is no run"),
        ({"num_negatives": 0}, "--num-negatives: 0"),
        ({"first_rank": 9, "last_rank": 3}, "--last-rank: 3"),
        ({"margin": 3.0}, "--margin: 3"),
        ({"max_query_tokens": 0}, "--max-query-tokens: 0"),
        ({"max_document_tokens": -1}, "--max-document-tokens: -1"),
        ({"out": "file/below"}, "file"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    tiny_folders: dict[str, Path], data: Path, tmp_path: Path, changed: dict[str, Any], named: str
) -> None:
    (tmp_path / "file").write_text("")
    fields: dict[str, Any] = {"model": "llama", "data": "data", "out": "mined"} | changed
    fields["model"] = str(tiny_folders.get(fields["model"], tmp_path / fields["model"]))
    fields |= {key: tmp_path / fields[key] for key in ("data", "out")}
    with pytest.raises(UserError, match=named) as caught:
        DataMine(**fields).run()
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "file"]
