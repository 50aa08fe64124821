"""TFDS data sets of collections (array_record, no TensorFlow): `corpus/`, `queries/`, `dataset.json`."""

import hashlib
import itertools
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from tensorflow_datasets.core.dataset_info import DatasetIdentity
from tensorflow_datasets.core.example_serializer import ExampleSerializer
from tensorflow_datasets.core.file_adapters import FileFormat
from tensorflow_datasets.core.naming import ShardedFileTemplate
from tensorflow_datasets.core.splits import SplitDict, SplitInfo

from search_r3_jax.data.beir import EMPTY, NO_DOCUMENT, NO_QUERY, find_splits, read_beir_splits
from search_r3_jax.data.collection import SHARED_CORPUS, Collection, Document, Query, usable_split_name
from search_r3_jax.data.corpus_facts import write_facts
from search_r3_jax.data.stored import StoredDocuments, document_of, facts_file
from search_r3_jax.errors import UserError
from search_r3_jax.files import file_sha256, target_of
from search_r3_jax.lines import Problems
from search_r3_jax.outputs import check_not_mounted, check_output_folder

FORMAT_VERSION = 2
MANIFEST = "dataset.json"
MAX_EXAMPLES_PER_SHARD = 100_000
SHARD_NAME = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}"
EXAMPLES_PER_CALL = 1_000
# What becomes of a line that a published folder may hold, by the reason it is counted under.
_PUBLISHED = {
    EMPTY: "texts are empty: kept",
    NO_QUERY: "judgements name queries that are not there: dropped",
    NO_DOCUMENT: "judgements name documents that are not there: kept, never found",
}
T = TypeVar("T")
logger = logging.getLogger(__name__)


def build_dataset(
    collections: Mapping[str, Collection],
    out: Path | str,
    *,
    name: str,
    source: Mapping[str, object],
    skipped: Mapping[str, int] | None = None,
) -> Path:
    """Build `out` from split name → collection, or reuse an equal data set that is already there.

    `skipped` counts the lines of the source that were left out, by reason; it is stored in the manifest.
    Raises UserError if `out` holds anything else.
    """
    # Through a symbolic link, which stays.
    out = target_of(Path(out))
    _check_split_names(collections, out)
    description = {**_describe(collections, name, source), "skipped": dict(skipped or {})}
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        _check_reusable(out, description)
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    building = out.parent / f".{out.name}.tmp-{os.getpid()}"
    shutil.rmtree(building, ignore_errors=True)
    try:
        _write_parts(collections, description, building)
        manifest = {**description, "files": {file: file_sha256(building / file) for file in _files(building)}}
        (building / MANIFEST).write_text(
            json.dumps(manifest, indent=2, sort_keys=True) + "\n", encoding="utf-8"
        )
        building.rename(out)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return out


def check_new_dataset(out: Path) -> None:
    """Raise UserError, before any work, where a data set cannot be built, or something else lies."""
    if out.is_file():
        raise UserError(f"{out}: already exists and is no data set; remove it or choose another --out")
    check_output_folder("--out", out)
    if out.is_dir() and any(out.iterdir()):
        if not (out / MANIFEST).is_file():
            raise UserError(f"{out}: already exists and is no data set; remove it or choose another --out")
    elif out.is_dir():
        check_not_mounted("--out", out)


def load_collection(path: Path | str, split: str, *, stored: bool = False) -> Collection:
    """One split of a built data set or of a BEIR folder, in its original order.

    With `stored`, the documents of a built data set stay on disk and are read on access. Raises UserError for
    any other path.
    """
    return _load(Path(path), [split], stored=stored)[split]


def load_collections(path: Path | str) -> dict[str, Collection]:
    """All splits by name; otherwise like `load_collection`."""
    return _load(Path(path), None)


def ordered_queries_hash(queries: Iterable[Query]) -> str:
    """Hexadecimal sha256 over all fields of the queries in order; changes when their order does."""
    digest = hashlib.sha256()
    for query in queries:
        judgements = [list(query.positives.items()), query.negatives]
        fields = [query.query_id, query.text, query.instruction, query.reasoning, *judgements]
        digest.update(json.dumps(fields).encode() + b"\n")
    return digest.hexdigest()


def _load(path: Path, splits: Sequence[str] | None, *, stored: bool = False) -> dict[str, Collection]:
    """The named splits; all splits when `splits` is None."""
    if (path / MANIFEST).is_file():
        manifest = _read_manifest(path)
        return _read_splits(
            path, manifest, sorted(manifest["splits"]) if splits is None else splits, stored=stored
        )
    if any((path / name).is_file() for name in ("corpus.jsonl", "corpus.jsonl.gz")):
        problems = Problems(as_published=True)
        collections = read_beir_splits(path, find_splits(path) if splits is None else splits, problems)
        for reason, count in sorted(problems.counts.items()):
            logger.warning(f"{path}: {count} {_PUBLISHED[reason]}, as in BEIR")
        return collections
    raise UserError(
        f"{path}: expected a built data set (with {MANIFEST}) or a BEIR folder (with corpus.jsonl or "
        "corpus.jsonl.gz)"
    )


def splits_of(path: Path | str) -> list[str]:
    """The splits of a built data set or of a BEIR folder; raises UserError when there are none."""
    path = Path(path)
    return sorted(_read_manifest(path)["splits"]) if (path / MANIFEST).is_file() else find_splits(path)


def _describe(
    collections: Mapping[str, Collection], name: str, source: Mapping[str, object]
) -> dict[str, Any]:
    corpus_hashes = {split: collection.corpus_hash() for split, collection in collections.items()}
    shared = len(collections) > 1 and len(set(corpus_hashes.values())) == 1
    return {
        "format_version": FORMAT_VERSION,
        "name": name,
        "source": json.loads(json.dumps(source)),
        "splits": {
            split: {
                "documents": len(collection.documents),
                "queries": len(collection.queries),
                "corpus_split": SHARED_CORPUS if shared else split,
                "corpus_hash": corpus_hashes[split],
                "queries_hash": ordered_queries_hash(collection.queries),
            }
            for split, collection in collections.items()
        },
    }


def _check_split_names(collections: Mapping[str, Collection], out: Path) -> None:
    if not collections:
        raise UserError(f"{out}: nothing to build; give at least one split")
    for split, collection in collections.items():
        if not usable_split_name(split):
            raise UserError(
                f"{out}: split name {split!r} is not usable; use letters, digits and '_', not 'all' or "
                "'shared'"
            )
        if not collection.documents or not collection.queries:
            raise UserError(f"{out}: split {split!r} has no documents or no queries; leave it out")


def _check_reusable(out: Path, description: Mapping[str, Any]) -> None:
    remedy = "remove it or choose another --out"
    if not (out / MANIFEST).is_file():
        raise UserError(f"{out}: already exists and is no data set; {remedy}")
    manifest = _read_manifest(out)
    differing = sorted(key for key in description if manifest.get(key) != description[key])
    if differing:
        raise UserError(
            f"{out / MANIFEST}: holds another data set (differs in {', '.join(differing)}); {remedy}"
        )
    _check_files(out, manifest)


def _check_files(path: Path, manifest: Mapping[str, Any]) -> None:
    for file, expected in manifest["files"].items():
        if not (path / file).is_file():
            raise UserError(f"{path / file}: missing; remove {path} and build it again")
        if file_sha256(path / file) != expected:
            raise UserError(
                f"{path / file}: content differs from its sha256 in {MANIFEST}; remove {path} and build it "
                "again"
            )


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error}); remove {path} and build it again") from None
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{file}: field 'format_version': expected {FORMAT_VERSION}, got {version}; build the data set "
            "again"
        )
    missing = [key for key in ("name", "splits", "files") if key not in manifest]
    if missing:
        raise UserError(f"{file}: field {missing[0]!r} is missing; remove {path} and build it again")
    return manifest


def _write_parts(
    collections: Mapping[str, Collection], description: Mapping[str, Any], building: Path
) -> None:
    documents_of = {
        description["splits"][split]["corpus_split"]: each.documents for split, each in collections.items()
    }
    facts_of = {description["splits"][split]["corpus_split"]: each for split, each in collections.items()}
    queries_of = {split: each.queries for split, each in collections.items()}
    text, texts = tfds.features.Text(), tfds.features.Sequence(tfds.features.Text())
    _write_part(
        building / "corpus",
        "corpus",
        {"row": np.int64, "doc_id": text, "title": text, "text": text},
        {
            split: map(_document_example, itertools.count(), documents)
            for split, documents in documents_of.items()
        },
    )
    _write_part(
        building / "queries",
        "queries",
        {
            **{"row": np.int64, "query_id": text, "text": text, "instruction": text, "reasoning": text},
            **{"positives": texts, "relevance": tfds.features.Sequence(np.int32), "negatives": texts},
        },
        {split: map(_query_example, itertools.count(), queries) for split, queries in queries_of.items()},
    )
    for split, collection in facts_of.items():
        write_facts(facts_file(building / "corpus", split), collection.facts)


def _write_part(
    folder: Path, name: str, features: dict[str, Any], splits: Mapping[str, Iterator[dict[str, Any]]]
) -> None:
    folder.mkdir(parents=True)
    identity = DatasetIdentity(
        name=name, version=tfds.core.Version("1.0.0"), data_dir=str(folder), module_name="search_r3_jax"
    )
    # Any: the type that TFDS declares here is wider than the one it accepts below.
    described: Any = tfds.features.FeaturesDict(features)
    info = tfds.core.DatasetInfo(builder=identity, features=described)
    info.set_file_format(FileFormat.ARRAY_RECORD)
    serializer = ExampleSerializer(described.get_serialized_info())

    def serialized(example: dict[str, Any]) -> bytes:
        # The writers of TFDS leave out `deterministic`: the fields' order then differs from process to
        # process. A builder would also shuffle, and need TensorFlow above 1 GB.
        return serializer.get_tf_example(described.encode_example(example)).SerializeToString(
            deterministic=True
        )

    info.set_splits(
        SplitDict(
            [
                _write_split(folder, name, split, map(serialized, examples))
                for split, examples in splits.items()
            ]
        )
    )
    info.write_to_directory(folder)


def _write_split(folder: Path, name: str, split: str, examples: Iterator[bytes]) -> SplitInfo:
    template = ShardedFileTemplate(
        dataset_name=name,
        data_dir=epath.Path(folder),
        split=split,
        filetype_suffix="array_record",
        template=SHARD_NAME,
    )
    shard_lengths: list[int] = []
    num_bytes = 0
    while (first := next(examples, None)) is not None:
        path = template.sharded_filepath(shard_index=len(shard_lengths), num_shards=None)
        count = 0
        try:
            writer = ArrayRecordWriter(str(path), "group_size:1")
            for example in itertools.chain([first], itertools.islice(examples, MAX_EXAMPLES_PER_SHARD - 1)):
                writer.write(example)
                count, num_bytes = count + 1, num_bytes + len(example)
            writer.close()
        except RuntimeError as error:
            # array_record reports a full disk as a RuntimeError.
            raise OSError(str(error)) from error
        shard_lengths.append(count)
    return SplitInfo(name=split, shard_lengths=shard_lengths, num_bytes=num_bytes, filename_template=template)


def _document_example(row: int, document: Document) -> dict[str, Any]:
    return {"row": row, "doc_id": document.doc_id, "title": document.title, "text": document.text}


def _query_example(row: int, query: Query) -> dict[str, Any]:
    return {
        "row": row,
        "query_id": query.query_id,
        "text": query.text,
        "instruction": query.instruction,
        "reasoning": query.reasoning,
        "positives": list(query.positives),
        "relevance": list(query.positives.values()),
        "negatives": list(query.negatives),
    }


def _read_splits(
    path: Path, manifest: Mapping[str, Any], splits: Sequence[str], *, stored: bool
) -> dict[str, Collection]:
    for split in splits:
        if split not in manifest["splits"]:
            raise UserError(
                f"{path}: no split {split!r}; splits found: {', '.join(sorted(manifest['splits']))}"
            )
    _check_files(path, manifest)
    corpus_of = {split: manifest["splits"][split]["corpus_split"] for split in splits}
    # A corpus that several splits share is read once.
    documents: dict[str, Sequence[Document]] = {
        corpus: StoredDocuments(path / "corpus", corpus)
        if stored
        else _read_part(path / "corpus", corpus, document_of)
        for corpus in set(corpus_of.values())
    }
    return {
        split: Collection(
            name=manifest["name"],
            split=split,
            documents=documents[corpus_of[split]],
            queries=_read_part(path / "queries", split, _query),
        )
        for split in splits
    }


def _read_part(folder: Path, split: str, decode: Callable[[dict[str, Any]], T]) -> tuple[T, ...]:
    # Any: a decorator of TFDS hides the signature of as_data_source from type checkers.
    builder: Any = tfds.builder_from_directory(folder)
    examples = builder.as_data_source(split)
    numbered: list[tuple[int, T]] = []
    for start in range(0, len(examples), EXAMPLES_PER_CALL):
        chunk = examples.__getitems__(range(start, min(start + EXAMPLES_PER_CALL, len(examples))))
        numbered.extend((int(example["row"]), decode(example)) for example in chunk)
    return tuple(item for _, item in sorted(numbered, key=lambda pair: pair[0]))


def _query(example: dict[str, Any]) -> Query:
    positives = [doc_id.decode() for doc_id in example["positives"]]
    return Query(
        query_id=example["query_id"].decode(),
        text=example["text"].decode(),
        positives=dict(zip(positives, map(int, example["relevance"]), strict=True)),
        negatives=tuple(doc_id.decode() for doc_id in example["negatives"]),
        instruction=example["instruction"].decode(),
        reasoning=example["reasoning"].decode(),
    )


def _files(folder: Path) -> list[str]:
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
