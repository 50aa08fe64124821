import gzip
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from search_r3_jax.config import DataConfig
from search_r3_jax.data.beir import read_beir_splits
from search_r3_jax.data.collection import Collection, trainable
from search_r3_jax.data.dataset import load_collection
from search_r3_jax.data.development import load_training_sets
from search_r3_jax.data.mixture import Mixture
from search_r3_jax.data.subsample import sample_corpus
from search_r3_jax.errors import UserError
from search_r3_jax.lines import Problems

REAL_DATA = Path(os.environ.get("SEARCH_R3_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
CORPUS = [
    '{"_id": "d1", "title": "Cats", "text": "A cat\\u2028purrs."}',
    '{"_id": "d2", "title": "", "text": "Dogs bark."}',
    '{"_id": "d3", "text": "Owls hoot."}',
]
QUERIES = [
    '{"_id": "q1", "text": "what purrs"}',
    '{"_id": "q2", "text": "what barks"}',
    '{"_id": "q3", "text": "unjudged"}',
]
QRELS = ["query-id\tcorpus-id\tscore", "q2\td2\t2", "q2\td1\t0", "q1\td1\t1"]


def read_beir(folder: Path, split: str) -> Collection:
    return read_beir_splits(folder, [split], Problems())[split]


def write(
    folder: Path,
    corpus: Sequence[str] = CORPUS,
    queries: Sequence[str] = QUERIES,
    qrels: Sequence[str] = QRELS,
) -> Path:
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text("\n".join(corpus) + "\n", encoding="utf-8")
    (folder / "queries.jsonl").write_text("\n".join(queries) + "\n", encoding="utf-8")
    (folder / "qrels" / "test.tsv").write_text("\n".join(qrels) + "\n", encoding="utf-8")
    return folder


def test_reads_only_judged_queries_and_takes_zero_scores_as_negatives(tmp_path: Path) -> None:
    collection = read_beir(write(tmp_path / "pets"), "test")
    assert (collection.name, collection.split) == ("pets", "test")
    assert [document.body for document in collection.documents] == [
        "Cats\nA cat\u2028purrs.",
        "Dogs bark.",
        "Owls hoot.",
    ]
    assert [query.query_id for query in collection.queries] == ["q1", "q2"]
    assert collection.qrels() == {"q1": {"d1": 1}, "q2": {"d2": 2, "d1": 0}}
    assert [query.negatives for query in collection.queries] == [(), ("d1",)]
    assert collection.row_of == {"d1": 0, "d2": 1, "d3": 2}


def test_gzipped_folder_reads_the_same(tmp_path: Path) -> None:
    plain, zipped = write(tmp_path / "plain" / "pets"), write(tmp_path / "zipped" / "pets")
    for name in ("corpus.jsonl", "queries.jsonl"):
        (zipped / f"{name}.gz").write_bytes(gzip.compress((zipped / name).read_bytes()))
        (zipped / name).unlink()
    assert read_beir(zipped, "test") == read_beir(plain, "test")


@pytest.mark.parametrize("header", [[], ["query_id\tdoc_id\tRelevance"]])
def test_a_header_may_be_missing_or_of_other_words(tmp_path: Path, header: list[str]) -> None:
    expected = read_beir(write(tmp_path / "a" / "pets"), "test")
    assert read_beir(write(tmp_path / "b" / "pets", qrels=[*header, *QRELS[1:]]), "test") == expected


def test_a_repeated_row_says_nothing_new(tmp_path: Path) -> None:
    expected = read_beir(write(tmp_path / "a" / "pets"), "test")
    assert (
        read_beir(write(tmp_path / "b" / "pets", qrels=[*QRELS, QRELS[1], "q2\td1\t-1"]), "test") == expected
    )


def test_negatives_are_read_for_the_queries_of_the_split(tmp_path: Path) -> None:
    folder = write(tmp_path)
    (folder / "neg").mkdir()
    (folder / "neg" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td3\t0\nq3\td1\t0\nq1\td2\t0\n")
    assert [query.negatives for query in read_beir(folder, "test").queries] == [("d3", "d2"), ("d1",)]
    (folder / "neg" / "test.tsv").write_text("q2\td3\t0\nq1\td1\t0\n")
    with pytest.raises(
        UserError,
        match=r"neg/test\.tsv, line 2: the pair 'q1', 'd1' is judged twice, 1 and 0; remove one row",
    ):
        read_beir(folder, "test")
    (folder / "neg" / "test.tsv").write_text("q2\td3\t1\n")
    with pytest.raises(UserError, match=r"neg/test\.tsv, line 1: field 'score': 1 in a file of negatives"):
        read_beir(folder, "test")


PUBLISHED_CORPUS = [*CORPUS, '{"_id": "d4", "title": "", "text": ""}']
PUBLISHED_QUERIES = [*QUERIES, '{"_id": "q4", "text": "what hoots"}']
# q3 is judged irrelevant only, d8 and d9 are not in the corpus, nor q9 among the queries.
PUBLISHED_QRELS = [*QRELS, "q1\td9\t2", "q3\td8\t0", "q4\td4\t1", "q9\td1\t1"]


def test_a_published_folder_loads_with_all_its_judgements(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write(tmp_path / "pets", PUBLISHED_CORPUS, PUBLISHED_QUERIES, PUBLISHED_QRELS)
    collection = load_collection(folder, "test")
    assert [document.doc_id for document in collection.documents] == ["d1", "d2", "d3", "d4"]
    assert collection.qrels() == {
        "q1": {"d1": 1, "d9": 2},
        "q2": {"d2": 2, "d1": 0},
        "q3": {"d8": 0},
        "q4": {"d4": 1},
    }
    assert caplog.messages == [
        f"{folder}: 1 texts are empty: kept, as in BEIR",
        f"{folder}: 2 judgements name documents that are not there: kept, never found, as in BEIR",
        f"{folder}: 1 judgements name queries that are not there: dropped, as in BEIR",
    ]
    # Nothing is learnt from what is empty or not there.
    assert trainable(collection).qrels() == {"q1": {"d1": 1}, "q2": {"d2": 2, "d1": 0}}
    training = load_training_sets(DataConfig(sets=(str(folder),), split="test", dev_queries=0))[0]
    assert training.train == trainable(collection)
    assert Mixture(collections=(training.train,), seed=0).size() == 2
    assert sample_corpus(collection, 4)[1].documents == 4
    with pytest.raises(UserError, match=r"corpus\.jsonl, line 4: .* or pass --skip-bad to data build"):
        read_beir(folder, "test")


def test_judgements_of_another_corpus_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"test\.tsv: no row with score > 0 and a known document"):
        load_collection(write(tmp_path, qrels=["q1\td9\t1", "q2\td1\t0"]), "test")


def test_corpus_hash_sees_order_and_field_borders(tmp_path: Path) -> None:
    original = read_beir(write(tmp_path / "a"), "test").corpus_hash()
    moved = read_beir(write(tmp_path / "b", corpus=CORPUS[::-1]), "test").corpus_hash()
    border = [line.replace('"d2"', '"d2D"').replace("Dogs", "ogs") for line in CORPUS]
    shifted = read_beir(
        write(tmp_path / "c", corpus=border, qrels=[*QRELS[:1], "q1\td1\t1"]), "test"
    ).corpus_hash()
    assert len({original, moved, shifted}) == 3


@pytest.mark.parametrize(
    ("part", "lines", "message"),
    [
        ("corpus", [*CORPUS, "{"], r"corpus\.jsonl, line 4: not valid JSON"),
        ("corpus", [*CORPUS, "[]"], r"corpus\.jsonl, line 4: expected a JSON object"),
        ("corpus", [*CORPUS, '{"_id": "d9"}'], r"corpus\.jsonl, line 4: field 'text' is missing"),
        ("corpus", [*CORPUS, '{"text": "x"}'], r"corpus\.jsonl, line 4: field '_id' is missing"),
        (
            "corpus",
            [*CORPUS, '{"_id": 7, "text": "x"}'],
            r"corpus\.jsonl, line 4: field '_id' must be a string",
        ),
        ("corpus", [*CORPUS, '{"_id": "d9", "text": " "}'], r"corpus\.jsonl, line 4: .*empty"),
        ("corpus", [*CORPUS, CORPUS[0]], r"corpus\.jsonl, line 4: field '_id': 'd1' appears twice"),
        (
            "corpus",
            [*CORPUS, '{"_id": "d9", "text": "\\ud800"}'],
            r"corpus\.jsonl, line 4: field 'text' holds an unpaired",
        ),
        (
            "queries",
            [*QUERIES, '{"_id": "q9", "text": ""}'],
            r"queries\.jsonl, line 4: field 'text' is empty",
        ),
        ("queries", [*QUERIES, QUERIES[1]], r"queries\.jsonl, line 4: field '_id': 'q2' appears twice"),
        ("queries", [" "], r"queries\.jsonl: no queries"),
        ("corpus", [""], r"corpus\.jsonl: no documents"),
        ("qrels", [""], r"test\.tsv: no row with score > 0"),
        ("qrels", ["q1\td1\thigh", *QRELS[1:]], r"test\.tsv, line 1: field 'score': expected an integer"),
        ("qrels", [*QRELS, "q1\td2\t1_0"], r"test\.tsv, line 5: field 'score': expected an integer"),
        (
            "qrels",
            [*QRELS, f"q1\td2\t{'9' * 5000}"],
            r"test\.tsv, line 5: field 'score': expected an integer",
        ),
        (
            "qrels",
            [*QRELS, "q1\td2\t2147483648"],
            r"test\.tsv, line 5: field 'score': expected an integer of 32 bits",
        ),
        (
            "qrels",
            [*QRELS, QRELS[0]],
            r"test\.tsv, line 5: field 'score': expected an integer of 32 bits, got 'score'",
        ),
        (
            "qrels",
            [*QRELS, "q1\td9\t1"],
            r"test\.tsv, line 5: field 'corpus-id': 'd9' is not in corpus\.jsonl",
        ),
        (
            "qrels",
            [*QRELS, "q9\td1\t1"],
            r"test\.tsv, line 5: field 'query-id': 'q9' is not in queries\.jsonl",
        ),
        ("qrels", [*QRELS, "q1\td1\t2"], r"test\.tsv, line 5: the pair 'q1', 'd1' is judged twice, 1 and 2"),
        ("qrels", [*QRELS, "q1\td2"], r"test\.tsv, line 5: expected 3 tab-separated fields"),
        ("qrels", [*QRELS, "q1\td2\thigh"], r"test\.tsv, line 5: field 'score': expected an integer"),
        ("qrels", [QRELS[0], "q1\td1\t0"], r"test\.tsv: no row with score > 0"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, part: str, lines: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_beir(write(tmp_path, **{part: lines}), "test")
    assert "\n" not in str(caught.value)


def test_bad_bytes_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path)
    (folder / "corpus.jsonl").write_bytes(CORPUS[0].encode() + b'\n{"_id": "d2", "text": "caf\xe9"}\n')
    with pytest.raises(UserError, match=r"corpus\.jsonl, line 2: not UTF-8"):
        read_beir(folder, "test")
    (folder / "corpus.jsonl.gz").write_bytes(gzip.compress("\n".join(CORPUS).encode())[:-12])
    (folder / "corpus.jsonl").unlink()
    with pytest.raises(UserError, match=r"corpus\.jsonl\.gz, after line \d: damaged gzip"):
        read_beir(folder, "test")


def test_missing_files_name_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape("no qrels/dev.tsv; splits found: test")):
        read_beir(write(tmp_path / "a"), "dev")
    with pytest.raises(UserError, match=r"neither corpus\.jsonl nor corpus\.jsonl\.gz"):
        read_beir(tmp_path / "nothing", "test")


@pytest.mark.parametrize(("name", "split"), [("cosqa", "train"), ("scifact", "test")])
def test_real_folder_agrees_with_a_plain_reading(name: str, split: str) -> None:
    folder = REAL_DATA / name
    if not folder.is_dir():
        pytest.skip(f"no {name} in SEARCH_R3_DATA")
    collection = read_beir(folder, split)
    with gzip.open(folder / "corpus.jsonl.gz", "rt", encoding="utf-8") as file:
        assert [document.doc_id for document in collection.documents] == [
            json.loads(line)["_id"] for line in file
        ]
    expected: dict[str, dict[str, int]] = {}
    for line in (folder / "qrels" / f"{split}.tsv").read_text().splitlines()[1:]:
        query_id, doc_id, score = line.split("\t")
        expected.setdefault(query_id, {})[doc_id] = int(score)
    assert collection.qrels() == expected
