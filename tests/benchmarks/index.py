"""The index beside exact search on real vectors: recall, seconds, bytes; and what a billion passages would
take.

Command: python tests/benchmarks/index.py --data FOLDER [FOLDER …] [--decoder-data FOLDER] [--work DIR]
`--data` are BEIR folders or built sets, of 100,000 different texts together; nothing else may run on the
machine meanwhile.

Real vectors: the documents of --data, then their queries, each text once and cut to 32 tokens, from
all-MiniLM-L6-v2; 1,000 test queries that are none of them search. With --decoder-data also the documents of a
collection from --model, and 1,000 of its queries. Vectors stay in --work, so that a second call encodes
nothing.

An index is built by its default settings, written and opened again, as readers of a run's index have it.
Beside it stand the same with bfloat16 vectors, our exact search, and exact search by NumPy: a float32
product, `argpartition`, the ten sorted, in blocks of queries of the fastest size. All search in turn in one
process, after a warm-up; medians count. Files are read while still in the page cache. What is measured
replaces what --out says of the same vectors.

`--sweep` tries other settings on the real vectors and prints a table. `--plan` measures nothing: from what
--out holds it computes what `--assumed.passages` would take, and prints that as a table.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import tyro
from index_plan import Assumptions, plan
from real_vectors import Embedded, embed_decoder, embed_real

from search_r3_jax.files import write_json
from search_r3_jax.retrieval.index.exact import ExactIndex
from search_r3_jax.retrieval.index.protocol import Index, probe_recall, recall_at_k
from search_r3_jax.retrieval.index.scann import ScannIndex, ScannSettings
from search_r3_jax.retrieval.store.versions import (
    CALLER_FIELDS,
    PublishOptions,
    open_version,
    publish_version,
)
from search_r3_jax.runtime_env import configure_libraries

K = 10
CLOCKS = ("seconds", "cpu_seconds")
OUT = Path(__file__).with_suffix(".json")
NUMPY_BLOCKS = (1_000, 128, 16)
LEAF_SHARES, REORDERED = (0.05, 0.1, 0.125, 0.2, 0.3), (100, 200)
Dtype = Literal["float32", "bfloat16"]
DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to run.

    Attributes:
        data: BEIR folders or built sets whose texts all-MiniLM-L6-v2 embeds.
        decoder_data: one whose documents `model` embeds.
        model: whatever `--model` of search-r3 opens.
        max_document_tokens: of a document, for `model`.
        max_documents: of `decoder_data`; 0 takes all.
        vectors: how many of `data`.
        queries: that search.
        runs: of each search.
        work: folder of the vectors.
        out: JSON file for the result.
        sweep: try other settings on the real vectors.
        plan: compute the plan from `out`.
        assumed: what the plan is told.
    """

    data: tuple[Path, ...] = ()
    decoder_data: Path | None = None
    model: str = "smollm2"
    max_document_tokens: int = 24
    max_documents: int = 0
    vectors: int = 100_000
    queries: int = 1_000
    runs: int = 7
    work: Path = Path("index_bench")
    out: Path = OUT
    sweep: bool = False
    plan: bool = False
    assumed: Assumptions = field(default_factory=Assumptions)


def main() -> None:
    """Measure what is asked for, or plan."""
    configure_libraries()
    arguments = tyro.cli(Arguments, description=__doc__)
    record: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
    if arguments.plan:
        print("\n".join(plan(record, arguments.assumed)))
        return
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.data:
        real = embed_real(
            arguments.data, arguments.work, vectors=arguments.vectors, queries=arguments.queries
        )
        record["real"] = measure(real, arguments)
        write_json(arguments.out, record)
        print(described("real", record["real"]), flush=True)
        if arguments.sweep:
            for line in sweep(real, arguments.runs):
                print(line, flush=True)
    if arguments.decoder_data is not None:
        decoded = embed_decoder(
            arguments.decoder_data,
            arguments.work,
            name=arguments.model,
            max_document_tokens=arguments.max_document_tokens,
            max_documents=arguments.max_documents,
            queries=arguments.queries,
        )
        record["decoder"] = measure(decoded, arguments)
        write_json(arguments.out, record)
        print(described("decoder", record["decoder"]))


def measure(embedded: Embedded, arguments: Arguments) -> dict[str, Any]:
    """Recall, seconds and bytes of the index over these vectors, by dtype, beside exact searches."""
    vectors, queries = embedded.vectors, embedded.queries
    ids = [str(row) for row in range(len(vectors))]
    exact = ExactIndex(vectors, ids, 0)
    versions: dict[str, dict[str, Any]] = {}
    searches: dict[str, Callable[[], object]] = {}
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        for step, dtype in enumerate(DTYPES):
            settings = dataclasses.replace(ScannSettings.for_corpus(*vectors.shape), reorder_dtype=dtype)
            # ScaNN asks for an absolute path.
            index, versions[dtype] = written(Path(folder).absolute(), step, vectors, ids, settings)
            versions[dtype] |= recalls(index, exact, queries)
            searches[f"scann_{dtype}"] = partial(index.search, queries, K)
        searches["exact"] = partial(exact.search, queries, K)
        for block in NUMPY_BLOCKS:
            searches[f"numpy_{block}"] = partial(numpy_search, vectors, queries, K, block)
        spent = timed(searches, arguments.runs)
    return {
        "rows": len(vectors),
        "dimension": vectors.shape[1],
        "queries": len(queries),
        "k": K,
        "cores": os.cpu_count(),
        "encoding": embedded.encoding,
        "index": versions,
        **{clock: {"runs": some, **summary(some)} for clock, some in spent.items()},
    }


def written(
    root: Path, step: int, vectors: np.ndarray, ids: Sequence[str], settings: ScannSettings
) -> tuple[Index, dict[str, Any]]:
    """A version of the index as it comes from its files, with vectors of the settings' dtype; its bytes and
    seconds."""
    fields: dict[str, Any] = {name: 0 for name in CALLER_FIELDS}
    # Whatever its recall is: that is to be measured.
    info = publish_version(
        root,
        step=step,
        vectors=vectors,
        ids=ids,
        manifest_fields=fields,
        options=PublishOptions(settings=settings, recall_gate=0.0, vector_dtype=settings.reorder_dtype),
    )
    started = time.perf_counter()
    open_version(root, step, verify=False)
    opened = time.perf_counter()
    index = open_version(root, step)
    verified = time.perf_counter()
    sizes = {
        file.relative_to(info.path).as_posix(): file.stat().st_size
        for file in Path(info.path).rglob("*")
        if file.is_file()
    }
    return index, {
        "kind": index.kind,
        "settings": info.manifest["settings"],
        "build_seconds": info.manifest["build_seconds"],
        "build_milliseconds_per_document": round(1000 * info.manifest["build_seconds"] / len(vectors), 4),
        "open_seconds": round(opened - started, 3),
        "verify_and_open_seconds": round(verified - opened, 3),
        "vector_bytes": sizes["vectors.npy"],
        "scann_bytes": sum(size for name, size in sizes.items() if name.startswith("scann/")),
        "bytes": dict(sorted(sizes.items())),
    }


def recalls(index: Index, exact: Index, queries: np.ndarray) -> dict[str, float]:
    """Recall@10 as a version's gate has it, where ties count, and of the very rows."""
    rows = recall_at_k(index.search(queries, K)[1], exact.search(queries, K)[1], K)
    return {
        "recall@10": round(probe_recall(index, exact, queries, K), 5),
        "recall@10_of_rows": round(rows, 5),
    }


def numpy_search(
    vectors: np.ndarray, queries: np.ndarray, k: int, block: int
) -> tuple[np.ndarray, np.ndarray]:
    """Exact search of queries [Q,E], `block` at a time, in vectors [N,E]: inner products [Q,k], descending,
    and rows [Q,k]."""
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for start in range(0, len(queries), block):
        scores = queries[start : start + block] @ vectors.T
        rows = np.argpartition(scores, -k, axis=1)[:, -k:]
        best = np.take_along_axis(scores, rows, axis=1)
        order = np.argsort(-best, axis=1)
        found.append((np.take_along_axis(best, order, axis=1), np.take_along_axis(rows, order, axis=1)))
    return np.concatenate([scores for scores, _ in found]), np.concatenate([rows for _, rows in found])


def timed(searches: Mapping[str, Callable[[], object]], runs: int) -> dict[str, dict[str, list[float]]]:
    """Every run's seconds, of the clock and of the processor, by search: all take turns, so that what
    disturbs one disturbs the others."""
    for search in searches.values():
        search()
    spent: dict[str, dict[str, list[float]]] = {clock: {name: [] for name in searches} for clock in CLOCKS}
    for _ in range(runs):
        for name, search in searches.items():
            started = time.perf_counter(), time.process_time()
            search()
            ended = time.perf_counter(), time.process_time()
            for clock, since, until in zip(CLOCKS, started, ended, strict=True):
                spent[clock][name].append(round(until - since, 5))
    return spent


def summary(spent: Mapping[str, list[float]]) -> dict[str, dict[str, float]]:
    """Medians of each search, and how much NumPy's best is of each other."""
    medians = {name: median(some) for name, some in spent.items()}
    best = min(value for name, value in medians.items() if name.startswith("numpy"))
    return {
        "median": medians,
        "numpy_by": {
            name: round(best / value, 2) for name, value in medians.items() if not name.startswith("numpy")
        },
    }


def described(name: str, found: dict[str, Any]) -> str:
    """A few lines for the terminal."""
    lines = [
        f"{name}: {found['rows']:,} vectors of {found['dimension']}, {found['queries']:,} queries, encoding "
        f"{found['encoding']}"
    ]
    for dtype, version in found["index"].items():
        lines.append(
            f"  {dtype:<9} {version['kind']} {version['settings']['method']}  recall@10 "
            f"{version['recall@10']:.4f}"
            f" (rows {version['recall@10_of_rows']:.4f})  build {version['build_seconds']:.1f} s  open "
            f"{version['open_seconds']:.2f} s,"
            f" with checksums {version['verify_and_open_seconds']:.2f} s  vectors "
            f"{version['vector_bytes'] / 2**20:.0f} MiB,"
            f" ScaNN {version['scann_bytes'] / 2**20:.0f} MiB"
        )
    cpu = found["cpu_seconds"]["median"]
    lines += [
        f"  {search:<15} {seconds:8.4f} s  (cpu {cpu[search]:8.4f} s)"
        for search, seconds in found["seconds"]["median"].items()
    ]
    lines += [f"  NumPy's {clock} by theirs: {found[clock]['numpy_by']}" for clock in CLOCKS]
    return "\n".join(lines)


def sweep(embedded: Embedded, runs: int) -> Iterator[str]:
    """Markdown, a line for each of other settings: the bases are built, leaves to search and candidates are
    chosen at every search."""
    vectors, queries = embedded.vectors, embedded.queries
    ids = [str(row) for row in range(len(vectors))]
    exact_rows = numpy_search(vectors, queries, K, NUMPY_BLOCKS[1])[1]
    root = round(math.sqrt(len(vectors)))
    plain = ScannSettings(method="tree_ah", leaves=root)
    tree = dataclasses.replace(plain, spherical=True, soar_lambda=1.0)
    bases = [
        ScannSettings(method="ah"),
        plain,
        dataclasses.replace(plain, spherical=True),
        dataclasses.replace(plain, soar_lambda=1.0),
        tree,
        dataclasses.replace(tree, leaves=3 * root),
        dataclasses.replace(tree, dims_per_block=4),
        # ScaNN takes it for none.
        dataclasses.replace(tree, anisotropic_threshold=math.nan),
    ]
    yield (
        "| method | leaves | searched | spherical | SOAR | reorder | dims | threshold | build s | "
        "recall@10 | s | NumPy by it | cpu |"
    )
    yield "|---" * 13 + "|"
    for base in bases:
        started = time.perf_counter()
        index = ScannIndex.build(vectors, ids, 0, base)
        built = time.perf_counter() - started
        shares = LEAF_SHARES if base.method == "tree_ah" else (1.0,)
        variants = {
            f"{leaves} {reorder}": dataclasses.replace(base, leaves_to_search=leaves, reorder=reorder)
            for leaves in [math.ceil(share * base.leaves) for share in shares]
            for reorder in REORDERED
        }
        searches = {name: partial(search_by, index, settings, queries) for name, settings in variants.items()}
        spent = timed(searches | {"numpy": partial(numpy_search, vectors, queries, K, NUMPY_BLOCKS[1])}, runs)
        seconds, cpu_seconds = (summary(spent[clock]) for clock in CLOCKS)
        for name, settings in variants.items():
            recall = recall_at_k(searches[name]()[1], exact_rows, K)
            yield (
                f"| {base.method} | {base.leaves} | {settings.leaves_to_search} | {base.spherical} | "
                f"{base.soar_lambda:g}"
                f" | {settings.reorder} | {base.dims_per_block} | {base.anisotropic_threshold} | {built:.1f} "
                f"| {recall:.4f}"
                f" | {seconds['median'][name]:.4f} | {seconds['numpy_by'][name]:.1f} | "
                f"{cpu_seconds['numpy_by'][name]:.1f} |"
            )


def search_by(
    index: ScannIndex, settings: ScannSettings, queries: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A search of queries [Q,E] with other settings of searching than those the index was built by: scores
    and rows [Q,k]."""
    index.settings = settings
    return index.search(queries, K)


if __name__ == "__main__":
    main()
