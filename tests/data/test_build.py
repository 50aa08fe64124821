"""Building data sets: what is in them, that a rebuild is the same bytes, and that bad input leaves nothing
behind."""

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from search_r3_jax.data.build import FunctionCounts, build_beir, build_jsonl, build_python_functions
from search_r3_jax.data.collection import trainable
from search_r3_jax.data.dataset import load_collection
from search_r3_jax.errors import UserError

REPOSITORY = Path(__file__).parents[2]


def write_beir(folder: Path, *, documents: int = 40, zipped: bool = False, header: bool = True) -> Path:
    """Documents d0 …, queries q0 …; `train` judges even queries, `dev` odd ones: 2 for their own document, 0
    for the next."""
    corpus = [
        {"_id": f"d{i}", "title": f"title {i}" * (i % 2), "text": f"text {i * 7 % documents} é"}
        for i in range(documents)
    ]
    queries = [{"_id": f"q{i}", "text": f"query {i}"} for i in range(10)]
    contents = {
        "corpus.jsonl": [json.dumps(each) for each in corpus],
        "queries.jsonl": [json.dumps(each) for each in queries],
        **{
            f"qrels/{split}.tsv": ["query-id\tcorpus-id\tscore"] * header
            + [
                f"q{i}\td{(i + other) % documents}\t{2 - 2 * other}"
                for i in range(first, 10, 2)
                for other in (0, 1)
            ]
            for split, first in (("train", 0), ("dev", 1))
        },
    }
    (folder / "qrels").mkdir(parents=True)
    for name, lines in contents.items():
        content = ("\n".join(lines) + "\n").encode()
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
    return folder


def append(file: Path, line: bytes) -> None:
    with file.open("ab") as opened:
        opened.write(line + b"\n")


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file()
    }


@pytest.mark.parametrize(("zipped", "header"), [(False, True), (True, False)])
def test_a_beir_folder_becomes_a_data_set_of_all_its_splits(
    tmp_path: Path, zipped: bool, header: bool
) -> None:
    folder = write_beir(tmp_path / "made", zipped=zipped, header=header)
    built = build_beir(folder, tmp_path / "set")
    assert list(built) == ["dev", "train"]
    for split, first in (("train", 0), ("dev", 1)):
        collection = load_collection(tmp_path / "set", split)
        assert collection == built[split] == load_collection(folder, split)
        assert collection.name == "made"
        assert [document.doc_id for document in collection.documents] == [f"d{i}" for i in range(40)]
        assert collection.qrels() == {f"q{i}": {f"d{i}": 2, f"d{i + 1}": 0} for i in range(first, 10, 2)}
        assert [query.negatives for query in collection.queries] == [
            (f"d{i + 1}",) for i in range(first, 10, 2)
        ]
    manifest = json.loads((tmp_path / "set" / "dataset.json").read_text())
    assert {each["corpus_split"] for each in manifest["splits"].values()} == {"shared"}
    assert (manifest["format_version"], manifest["source"], manifest["skipped"]) == (2, {"kind": "beir"}, {})


def test_chosen_splits_alone_are_built(tmp_path: Path) -> None:
    folder = write_beir(tmp_path / "made")
    (folder / "qrels" / "test.tsv").write_text("not read\n")
    (folder / "qrels" / "dev.tsv.orig").write_text("no split\n")
    assert list(build_beir(folder, tmp_path / "set", splits=["dev"])) == ["dev"]
    with pytest.raises(UserError, match="no split 'train'; splits found: dev"):
        load_collection(tmp_path / "set", "train")
    with pytest.raises(UserError, match=r"no qrels/other\.tsv; splits found: dev, test, train"):
        build_beir(folder, tmp_path / "more", splits=["other"])
    (tmp_path / "a.jsonl").write_text(
        '{"query": "a", "positive": "b", "split": "dev"}\n{"query": "a", "positive": "c"}\n'
    )
    built = build_jsonl(tmp_path / "a.jsonl", tmp_path / "of_lines", splits=["dev"])
    assert {split: len(each.documents) for split, each in built.items()} == {"dev": 2}
    with pytest.raises(UserError, match=r"--split: .*a\.jsonl has no split 'test'; splits found: dev, train"):
        build_jsonl(tmp_path / "a.jsonl", tmp_path / "other", splits=["test"])


def test_a_jsonl_file_becomes_a_data_set(tmp_path: Path) -> None:
    lines = [
        {
            "query": f"q{i}",
            "positive": f"text {i}",
            "instruction": "Find it.",
            "reasoning": "é\n" * i,
            "split": "test" if i % 3 else "dev",
        }
        for i in range(9)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    built = build_jsonl(tmp_path / "a.jsonl", tmp_path / "set")
    for split in ("test", "dev"):
        loaded = load_collection(tmp_path / "set", split)
        assert loaded == built[split]
        text_of = {document.doc_id: document.text for document in loaded.documents}
        assert [
            {
                "query": query.text,
                "positive": text_of[doc_id],
                "instruction": query.instruction,
                "reasoning": query.reasoning,
                "split": split,
            }
            for query in loaded.queries
            for doc_id in query.positives
        ] == [line for line in lines if line["split"] == split]


def test_python_packages_become_a_data_set(tmp_path: Path) -> None:
    body = "".join(f"    step_{i} = [value * {i} for value in numbers if value > {i}]\n" for i in range(4))
    for number, word in enumerate(["alpha", "bravo", "cedar"]):
        (tmp_path / "packages" / word).mkdir(parents=True)
        names = f"def {word}_sum(numbers):\n    '''Sum up the {word} of all numbers given.'''\n"
        (tmp_path / "packages" / word / "__init__.py").write_text(
            f"{names}{body.replace('step', word)}    return {word}_{number}\n"
        )
    counts = FunctionCounts(seed=1, train_functions=1, dev_functions=1, test_functions=1)
    built = build_python_functions(
        tmp_path / "packages", tmp_path / "set", counts=counts, splits=["train", "test"]
    )
    assert list(built) == ["test", "train"]
    assert {split: load_collection(tmp_path / "set", split) for split in built} == built
    assert json.loads((tmp_path / "set" / "dataset.json").read_text())["source"]["train_functions"] == 1
    with pytest.raises(UserError, match="no such folder"):
        build_python_functions(tmp_path / "nowhere", tmp_path / "other", counts=counts)


PROGRAM = """
import sys, time
from pathlib import Path
time.time = lambda: 1e9
from search_r3_jax.data.build import build_beir, build_jsonl
build_beir(Path(sys.argv[1]), Path(sys.argv[3]), skip_bad=True)
build_jsonl(Path(sys.argv[2]), Path(sys.argv[4]), skip_bad=True)
"""


def test_a_rebuild_elsewhere_later_in_another_process_is_the_same_bytes(tmp_path: Path) -> None:
    folder, file = write_beir(tmp_path / "in" / "made", documents=3000), tmp_path / "in" / "pairs.jsonl"
    append(folder / "corpus.jsonl", b"{")
    file.write_text(
        "".join(
            json.dumps({"query": f"q{i}", "positive": [f"p{i}", "x"], "split": f"s{i % 3}"}) + "\n"
            for i in range(300)
        )
    )
    append(file, b"\xff")
    build_beir(folder, tmp_path / "beir", skip_bad=True)
    build_jsonl(file, tmp_path / "jsonl", skip_bad=True)
    expected = hashes(tmp_path / "beir"), hashes(tmp_path / "jsonl")
    for seed in ("1", "2"):
        elsewhere = tmp_path / f"elsewhere{seed}" / "a longer way down"
        shutil.copytree(tmp_path / "in", elsewhere / "in")
        environment = {
            **os.environ,
            "PYTHONHASHSEED": seed,
            "TZ": "Asia/Tokyo",
            "PYTHONPATH": str(REPOSITORY),
            "TMPDIR": str(elsewhere),
        }
        paths = [
            elsewhere / "in" / "made",
            elsewhere / "in" / "pairs.jsonl",
            elsewhere / "other",
            elsewhere / "names",
        ]
        command = [sys.executable, "-c", PROGRAM, *map(str, paths)]
        subprocess.run(command, env=environment, cwd=elsewhere, check=True, capture_output=True)
        assert (hashes(paths[2]), hashes(paths[3])) == expected
    # The manifest; facts and TFDS's two beside a corpus of one file, TFDS's two beside queries of two.
    assert len(expected[0]) == 1 + (1 + 2 + 1) + (2 + 2)
    # Nothing of the machine or the moment is in what can be read.
    for document in tmp_path.glob("beir/**/*.json"):
        text = document.read_text()
        assert str(tmp_path) not in text
        assert "tmp" not in text


def cut_short(file: Path) -> None:
    content = gzip.compress(file.read_bytes())
    file.unlink()
    file.with_name(file.name + ".gz").write_bytes(content[: len(content) // 2])


def remove_qrels(folder: Path) -> None:
    shutil.rmtree(folder / "qrels")


def empty_qrels(folder: Path) -> None:
    for file in (folder / "qrels").iterdir():
        file.write_bytes(b"")


DEEP = b'{"_id": "x", "text": ' + b"[" * 10_000 + b"]" * 10_000 + b"}"
# (what is done to the folder, the error, what --skip-bad counts; None where nothing is left to skip to)
BAD_BEIR: list[tuple[Callable[[Path], object], str, dict[str, int] | None]] = [
    (
        lambda f: append(f / "corpus.jsonl", b'{"_id"'),
        "corpus.jsonl, line 41: not valid JSON",
        {"malformed JSON": 1},
    ),
    (
        lambda f: append(f / "corpus.jsonl", b'{"_id": "x"}'),
        "corpus.jsonl, line 41: field 'text' is missing",
        {"missing field": 1},
    ),
    (
        lambda f: append(f / "corpus.jsonl", b'{"_id": 1, "text": "a"}'),
        "corpus.jsonl, line 41: field '_id' must be",
        {"wrong type": 1},
    ),
    (
        lambda f: append(f / "corpus.jsonl", b'{"_id": "x", "text": ""}'),
        "corpus.jsonl, line 41: fields 'title' and",
        {"empty text": 1},
    ),
    (
        lambda f: append(f / "corpus.jsonl", b'{"_id": "d0", "text": "a"}'),
        "corpus.jsonl, line 41: field '_id': 'd0'",
        {"duplicate id": 1},
    ),
    (
        lambda f: append(f / "corpus.jsonl", b'{"_id": "x", "text": "\xff"}'),
        "corpus.jsonl, line 41: not UTF-8",
        {"not UTF-8": 1},
    ),
    (
        lambda f: append(f / "corpus.jsonl", b"\0" * 9),
        "corpus.jsonl, line 41: holds a NUL byte",
        {"NUL byte": 1},
    ),
    (
        lambda f: append(f / "corpus.jsonl", DEEP),
        "corpus.jsonl, line 41: not valid JSON",
        {"malformed JSON": 1},
    ),
    (
        lambda f: append(f / "queries.jsonl", b'{"_id": "q0", "text": "a"}'),
        "queries.jsonl, line 11: field '_id'",
        {"duplicate id": 1},
    ),
    (
        lambda f: append(f / "queries.jsonl", b'{"_id": "x", "text": "\\ud800"}'),
        "queries.jsonl, line 11:",
        {"unpaired surrogate": 1},
    ),
    (
        lambda f: append(f / "queries.jsonl", b"1" * 5000),
        "queries.jsonl, line 11: not valid JSON",
        {"malformed JSON": 1},
    ),
    (
        lambda f: append(f / "qrels/dev.tsv", b"x\td1\t1"),
        "dev.tsv, line 12: field 'query-id': 'x'",
        {"unknown or skipped query": 1},
    ),
    (
        lambda f: append(f / "qrels/dev.tsv", b"q1\td1\t1"),
        "dev.tsv, line 12: the pair",
        {"contradictory judgement": 1},
    ),
    (
        lambda f: append(f / "qrels/dev.tsv", b"q1 0 d1 1"),
        "dev.tsv, line 12: expected 3",
        {"wrong number of fields": 1},
    ),
    (
        lambda f: append(f / "qrels/dev.tsv", b"q1\td9\t" + b"1" * 99),
        "dev.tsv, line 12: field 'score'",
        {"bad score": 1},
    ),
    (lambda f: cut_short(f / "queries.jsonl"), "queries.jsonl.gz, after line", None),
    (lambda f: cut_short(f / "qrels/train.tsv"), "train.tsv.gz, after line", None),
    (lambda f: (f / "corpus.jsonl").write_bytes(b""), "corpus.jsonl: no documents", None),
    (lambda f: (f / "queries.jsonl").write_bytes(b"\n"), "queries.jsonl: no queries", None),
    (lambda f: (f / "queries.jsonl").unlink(), "neither queries.jsonl nor queries.jsonl.gz found", None),
    (remove_qrels, "no qrels/<split>.tsv", None),
    (empty_qrels, "dev.tsv: no row with score > 0", None),
    (lambda f: (f / "qrels/dev.tsv").rename(f / "qrels/all.tsv"), "split name 'all' is not usable", None),
]


@pytest.mark.parametrize(
    ("spoil", "message", "skipped"), BAD_BEIR, ids=[message for _, message, _ in BAD_BEIR]
)
def test_bad_beir_folders(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Path], object],
    message: str,
    skipped: dict[str, int] | None,
) -> None:
    expected = build_beir(write_beir(tmp_path / "good" / "made"), tmp_path / "good" / "set")
    folder = write_beir(tmp_path / "bad" / "made")
    spoil(folder)
    with pytest.raises(UserError) as caught:
        build_beir(folder, tmp_path / "bad" / "set")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "bad").iterdir()) == [folder]
    assert capsys.readouterr() == ("", "")
    if skipped is None:
        with pytest.raises(UserError):
            build_beir(folder, tmp_path / "bad" / "set", skip_bad=True)
        assert list((tmp_path / "bad").iterdir()) == [folder]
    else:
        assert build_beir(folder, tmp_path / "bad" / "set", skip_bad=True) == expected
        assert json.loads((tmp_path / "bad" / "set" / "dataset.json").read_text())["skipped"] == skipped
        ((reason, count),) = skipped.items()
        assert capsys.readouterr() == ("", f"skipped: {caught.value}\nskipped 1 in all: {reason} {count}\n")


def test_judgements_of_skipped_documents_count_in_evaluations_and_not_in_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_beir(tmp_path / "made")
    corpus = (folder / "corpus.jsonl").read_bytes().split(b"\n")
    (folder / "corpus.jsonl").write_bytes(
        b"\n".join([b"{", *corpus[1:4], b'{"_id": "d4", "text": " "}', *corpus[5:]])
    )
    queries = (folder / "queries.jsonl").read_bytes().split(b"\n")
    (folder / "queries.jsonl").write_bytes(b"\n".join([*queries[:2], b'{"_id": "q2"}', *queries[3:]]))
    built = build_beir(folder, tmp_path / "set", skip_bad=True)
    # The documents of q0 and q4 are gone, and so is q2 itself; q3 has lost the negative d4.
    assert load_collection(tmp_path / "set", "train") == built["train"]
    assert built["train"].qrels() == {f"q{i}": {f"d{i}": 2, f"d{i + 1}": 0} for i in (0, 4, 6, 8)}
    assert built["dev"].qrels() == {f"q{i}": {f"d{i}": 2, f"d{i + 1}": 0} for i in (1, 3, 5, 7, 9)}
    assert trainable(built["train"]).qrels() == {f"q{i}": {f"d{i}": 2, f"d{i + 1}": 0} for i in (6, 8)}
    assert trainable(built["dev"]).qrels() == {
        **{f"q{i}": {f"d{i}": 2, f"d{i + 1}": 0} for i in (1, 5, 7, 9)},
        "q3": {"d3": 2},
    }
    assert json.loads((tmp_path / "set" / "dataset.json").read_text())["skipped"] == {
        **{"malformed JSON": 1, "empty text": 1, "missing field": 1},
        **{"unknown or skipped document": 3, "unknown or skipped query": 2},
    }
    assert "skipped 8 in all: " in capsys.readouterr().err


def test_the_first_twenty_are_listed_and_all_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_beir(tmp_path / "made")
    append(folder / "corpus.jsonl", b"\n".join([b"{"] * 30))
    build_beir(folder, tmp_path / "set", skip_bad=True)
    shown = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[:2] for line in shown[:-1]] == [
        ["skipped", f"{folder}/corpus.jsonl, line {n}"] for n in range(41, 61)
    ]
    assert shown[-1] == "skipped 30 in all: malformed JSON 30"


def test_when_nothing_is_left_the_list_still_comes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_beir(tmp_path / "made")
    (folder / "queries.jsonl").write_text('{"_id": "x", "text": "unjudged"}\n')
    with pytest.raises(UserError, match="no row with score > 0"):
        build_beir(folder, tmp_path / "set", skip_bad=True)
    assert "skipped 10 in all: unknown or skipped query 10" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("there", [False, True])
def test_a_link_to_a_folder_stays(tmp_path: Path, there: bool) -> None:
    folder = write_beir(tmp_path / "made")
    (tmp_path / "share").mkdir()
    (tmp_path / "link").symlink_to("share/set")
    if there:
        (tmp_path / "share" / "set").mkdir()
    built = build_beir(folder, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert load_collection(tmp_path / "share" / "set", "train") == built["train"]
    assert [each.name for each in (tmp_path / "share").iterdir()] == ["set"]


def test_a_place_that_cannot_be_written_is_found_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("search_r3_jax.data.build.read_beir_splits", lambda *_: pytest.fail("read the input"))
    folder = write_beir(tmp_path / "made")
    with pytest.raises(UserError, match="already exists and is no data set"):
        build_beir(folder, folder)
    with pytest.raises(UserError, match=r"--out: .*corpus\.jsonl: is a file; name a folder"):
        build_beir(folder, folder / "corpus.jsonl" / "set")


def test_a_place_that_cannot_be_written_is_a_user_error(tmp_path: Path) -> None:
    folder = write_beir(tmp_path / "made")
    (tmp_path / "file").write_text("keep")
    with pytest.raises(UserError, match=r"--out: .*file: is a file; name a folder"):
        build_beir(folder, tmp_path / "file" / "set")
    with pytest.raises(UserError, match="already exists and is no data set"):
        build_beir(folder, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "keep"
    for missing in (tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(UserError, match=r"--input: .*no such folder"):
            build_beir(missing, tmp_path / "set")
    with pytest.raises(UserError, match=r"--input: .*no such file"):
        build_jsonl(folder, tmp_path / "set")


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    folder = write_beir(tmp_path / "made", documents=3000)
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000));"
        f"sys.argv[1:] = ['data', 'build', '--source', 'beir', '--input', {str(folder)!r}, '--out', "
        f"{str(tmp_path / 'set')!r}];"
        "from search_r3_jax.cli import main; main()"
    )
    shown = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY, check=False
    )
    assert (shown.returncode, shown.stdout) == (2, "")
    assert "cannot be written (write() failed: File too large" in shown.stderr
    assert shown.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == [folder]
