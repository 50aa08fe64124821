"""Whatever the files hold: a data set that reads back as it was built, or one line for the user."""

import gzip
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from search_r3_jax.data.build import TableOptions, build_beir, build_jsonl, build_table
from search_r3_jax.data.collection import Collection, trainable
from search_r3_jax.data.dataset import load_collection
from search_r3_jax.errors import UserError

IDS = st.sampled_from(["a", "b", "c", "", "é", "query-id"])
TEXTS = st.one_of(st.sampled_from(["", " ", "text", "a\tb\r\n\u2028", "\0", "\ud800"]), st.text(max_size=8))
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)
DOCUMENTS = st.one_of(
    TEXTS,
    st.fixed_dictionaries(
        {"text": st.one_of(TEXTS, VALUES)},
        optional={"title": VALUES | TEXTS, "relevance": st.integers(-1, 3) | VALUES},
    ),
)
BYTES = st.one_of(
    st.binary(max_size=20),
    st.text(alphabet='{}[]":,\\u0d8_idtextqry \t\r', max_size=30).map(lambda text: text.encode()),
    st.sampled_from(
        [b"", b"\0", b"\xff", b"\xef\xbb\xbf{}", b"[" * 5000, b'{"a": ' + b"9" * 5000 + b"}", b"x" * 300_000]
    ),
)


def line(record: object) -> bytes:
    return json.dumps(record).encode()


def sometimes_wrong(right: st.SearchStrategy[object], chance: int = 12) -> st.SearchStrategy[object]:
    return st.integers(0, chance).flatmap(lambda draw: VALUES if draw == 0 else right)


def file_of(records: st.SearchStrategy[bytes], good: list[bytes]) -> st.SearchStrategy[bytes]:
    """Good lines, then mostly records, now and then other bytes; or nothing but bytes."""
    lines = st.lists(
        st.integers(0, 15).flatmap(lambda draw: BYTES if draw == 0 else records), max_size=5
    ).map(lambda each: [*good, *each])
    whole = st.one_of(lines.map(b"\n".join), lines.map(lambda each: b"\r\n".join(each) + b"\n"))
    return st.integers(0, 15).flatmap(lambda draw: st.binary(max_size=60) if draw == 0 else whole)


CORPUS = file_of(
    st.fixed_dictionaries(
        {"_id": sometimes_wrong(IDS)}, optional={"title": sometimes_wrong(TEXTS), "text": TEXTS}
    ).map(line),
    [b'{"_id": "a", "text": "x"}', b'{"_id": "b", "title": "y", "text": ""}'],
)
QUERIES = file_of(
    st.fixed_dictionaries({"_id": sometimes_wrong(IDS)}, optional={"text": sometimes_wrong(TEXTS)}).map(line),
    [b'{"_id": "a", "text": "x"}', b'{"_id": "c", "text": "z"}'],
)
SCORES = st.sampled_from(["1", "2", "0", "-1", "high", "1.0", " 1", "9" * 5000, "score"])
ROWS = st.tuples(IDS, IDS, SCORES).map(lambda row: "\t".join(row).encode())
QRELS = file_of(ROWS, [b"a\ta\t1", b"c\tb\t2"])
NEGATIVES = st.none() | file_of(ROWS, [b"a\tb\t0"])
PAIRS = file_of(
    st.fixed_dictionaries(
        {"query": sometimes_wrong(TEXTS), "positive": st.one_of(DOCUMENTS, st.lists(DOCUMENTS, max_size=3))},
        optional={
            "negative": st.one_of(DOCUMENTS, st.lists(DOCUMENTS, max_size=3)),
            "instruction": sometimes_wrong(TEXTS),
            "reasoning": sometimes_wrong(TEXTS),
            "split": sometimes_wrong(st.sampled_from(["train", "dev", "all", "a b"])),
            "query_id": sometimes_wrong(IDS),
        },
    ).map(line),
    [b'{"query": "x", "positive": "y"}'],
)
PLENTY = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


def write(file: Path, content: bytes, zipped: bool, cut: int) -> None:
    file.parent.mkdir(exist_ok=True)
    if zipped:
        packed = gzip.compress(content, mtime=0)
        file.with_name(file.name + ".gz").write_bytes(packed[: len(packed) - cut])
    else:
        file.write_bytes(content)


def check(build, source: Path, out: Path, skip_bad: bool) -> None:
    built, refusal = None, ""
    try:
        built = build(source, out, skip_bad=skip_bad)
    except UserError as error:
        refusal = str(error)
    event("refused" if built is None else "built")
    assert (built is None) == bool(refusal) == (not out.exists())
    assert "\n" not in refusal
    for split, collection in (built or {}).items():
        assert collection.queries
        assert all(collection.qrels().values())
        assert all(query.positives for query in trainable(collection).queries)
        assert trainable(collection).queries
        assert load_collection(out, split) == collection
    assert {path.name for path in out.parent.iterdir()} <= {source.name, out.name}


@PLENTY
@given(
    corpus=CORPUS,
    queries=QUERIES,
    qrels=QRELS,
    negatives=NEGATIVES,
    zipped=st.booleans(),
    cut=st.integers(0, 9),
    skip=st.booleans(),
)
@pytest.mark.slow
def test_any_beir_folder(
    corpus: bytes, queries: bytes, qrels: bytes, negatives: bytes | None, zipped: bool, cut: int, skip: bool
) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "made"
        folder.mkdir()
        for name, content in {
            "corpus.jsonl": corpus,
            "queries.jsonl": queries,
            "qrels/train.tsv": qrels,
        }.items():
            write(folder / name, content, zipped, cut if cut < 2 and name == "corpus.jsonl" else 0)
        if negatives is not None:
            write(folder / "neg" / "train.tsv", negatives, False, 0)
        check(build_beir, folder, Path(place) / "set", skip)


@pytest.mark.slow
@PLENTY
@given(content=PAIRS, zipped=st.booleans(), cut=st.integers(0, 9), skip=st.booleans())
def test_any_jsonl_file(content: bytes, zipped: bool, cut: int, skip: bool) -> None:
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "pairs.jsonl"
        write(file, content, zipped, cut if cut < 2 else 0)
        check(build_jsonl, file.with_name(file.name + ".gz") if zipped else file, Path(place) / "set", skip)


GOOD_CELLS = st.sampled_from([b"text", b"other", b'"a ""b"" c"', b'"two\r\nlines"', b"1", b"\xc3\xa9"])
BAD_CELLS = st.sampled_from([b"", b" ", b'"open', b'"a"b', b"\0", b"\xff", b"NaN", b"a,b;c\td", b"x\ry"])
CELLS = st.integers(0, 12).flatmap(lambda draw: BAD_CELLS if draw == 0 else GOOD_CELLS)
OPTIONAL = st.lists(st.sampled_from([b"negative", b"relevance", b"query_id", b"note"]), max_size=2)


def table(columns: list[bytes]) -> st.SearchStrategy[bytes]:
    """A header, a good row, and rows that mostly have as many cells."""
    width = len(columns)
    right = st.lists(CELLS, min_size=width, max_size=width)
    rows = st.lists(
        st.integers(0, 15).flatmap(lambda draw: st.lists(CELLS, max_size=4) if draw == 0 else right),
        max_size=6,
    )
    good = [b"how", b"so", b"", b""][:width]
    return st.tuples(rows, st.sampled_from([b",", b";", b"\t"]), st.sampled_from([b"\n", b"\r\n"])).map(
        lambda drawn: drawn[2].join(drawn[1].join(row) for row in [columns, good, *drawn[0]])
    )


TABLES = st.one_of(
    st.just([b"query", b"positive"]), OPTIONAL.map(lambda more: [b"query", b"positive", *more])
).flatmap(table)


@PLENTY
@given(
    content=st.integers(0, 15).flatmap(lambda draw: st.binary(max_size=60) if draw == 0 else TABLES),
    share=st.none() | st.sampled_from([0.1, 0.5]),
    zipped=st.booleans(),
    cut=st.integers(0, 9),
    skip=st.booleans(),
)
@pytest.mark.slow
def test_any_table(content: bytes, share: float | None, zipped: bool, cut: int, skip: bool) -> None:
    def build(source: Path, out: Path, *, skip_bad: bool) -> dict[str, Collection]:
        options = TableOptions(shares={} if share is None else {"test": share})
        return build_table(source, out, options=options, skip_bad=skip_bad).collections

    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "pairs.csv"
        write(file, content, zipped, cut if cut < 2 else 0)
        check(build, file.with_name(file.name + ".gz") if zipped else file, Path(place) / "set", skip)
