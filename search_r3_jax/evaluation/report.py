"""One evaluation, from its settings to its table, result file and TREC files."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from search_r3_jax import __version__
from search_r3_jax.console import TextConsole
from search_r3_jax.data.collection import Collection
from search_r3_jax.data.dataset import load_collection
from search_r3_jax.data.subsample import (
    CorpusSample,
    QuerySample,
    sample_corpus,
    sample_queries,
    unordered_documents_hash,
    unordered_queries_hash,
)
from search_r3_jax.distributed.runtime import is_first
from search_r3_jax.errors import UserError
from search_r3_jax.evaluation.controls import CONTROLS
from search_r3_jax.evaluation.evaluate import DEPTH, ModeResult, QueryMode
from search_r3_jax.evaluation.metrics import check_trec_ids, qrels_text, run_text
from search_r3_jax.evaluation.settings import BudgetSettings, EvalSettings
from search_r3_jax.evaluation.significance import bootstrap_interval
from search_r3_jax.evaluation.systems import SystemResult, check_installed, is_baseline, open_system
from search_r3_jax.files import is_written_in_place
from search_r3_jax.hub.model_names import check_model_name
from search_r3_jax.outputs import (
    check_output_folder,
    check_outputs,
    message_stream,
    write_all,
    write_json_result,
    write_text_result,
)
from search_r3_jax.profiling import ENCODE, parse_steps, trace_steps

FORMAT_VERSION = 1
TOP = 10
MODES: dict[str, tuple[QueryMode, ...]] = {
    "direct": ("direct",),
    "reason": ("reason",),
    "both": ("direct", "reason"),
    "all": ("direct", "reason", "average"),
}

ROWS = (
    ("nDCG@10", "ndcg@10", "{:.4f}"),
    ("recall@10", "recall@10", "{:.4f}"),
    ("recall@100", "recall@100", "{:.4f}"),
    ("MRR", "mrr", "{:.4f}"),
    ("MAP", "map", "{:.4f}"),
    ("valid", "valid_rate", "{:.1%}"),
    ("tokens/query", "reply_tokens", "{:.1f}"),
    ("queries/s", "queries_per_second", "{:.1f}"),
    ("ms/query", "milliseconds_per_query", "{:.1f}"),
)
# Of encoding the corpus; baselines have none of these, and devices without a published peak no MFU.
ENCODING_ROWS = (("tokens/s a chip", "tokens_per_second_per_chip", "{:,.0f}"), ("MFU", "mfu", "{:.1%}"))
# Of the bootstrap behind an interval.
SAMPLES = 10_000


class Subset(NamedTuple):
    """The part of a collection that was searched; None where all of it was."""

    queries: QuerySample | None
    corpus: CorpusSample | None


def run_evaluation(settings: EvalSettings) -> dict[str, Any]:
    """Evaluate, print the table and write the requested files; return the content of the result file.

    Of several processes all compute, and process 0 prints and writes. Raises UserError before any long work
    where it can.
    """
    check_evaluation(settings)
    check_installed(settings.model)
    # Bars and notes go to standard error: standard output is the table.
    notes = TextConsole(sys.stderr, quiet=not is_first())
    collection, subset = open_collection(settings, notes)
    if settings.run_file is not None:
        check_trec_ids("--run-file", collection)
    if settings.controls and len(collection.queries) < 2:
        raise UserError(
            f"--controls: {settings.data} has a single query in {settings.split}: nobody to exchange "
            "reasoning with; leave it out"
        )
    steps = parse_steps(settings.profile_steps)
    with trace_steps(ENCODE, steps, settings.profile_folder, say=partial(notes.print, markup=False)):
        system = open_system(settings)
        result = system.evaluate(collection, MODES[settings.mode], notes)
    content = _eval_content(settings, system.identity(), collection, subset, result)
    if not is_first():
        return content
    try:
        # Before the table: a result must not be lost with the reader of standard output.
        _write_files(settings, content, collection, result.modes)
    finally:
        _show(content, message_stream(settings.out, settings.run_file))
    return content


def _write_files(
    settings: EvalSettings,
    content: Mapping[str, Any],
    collection: Collection,
    modes: Mapping[QueryMode, ModeResult],
) -> None:
    writes = [] if settings.out is None else [partial(write_json_result, "--out", settings.out, content)]
    for file, mode in _trec_files(settings).items():
        text = qrels_text(collection.qrels())
        if mode is not None:
            text = run_text(modes[mode].run, f"search_r3_jax-{mode}")
        writes.append(partial(write_text_result, "--run-file", file, text))
    write_all(*writes)


def _trec_files(settings: EvalSettings) -> dict[Path, QueryMode | None]:
    """Each file that `run_file` stands for, with its mode; None for the judgements."""
    path, modes = settings.run_file, MODES[settings.mode]
    if path is None:
        return {}
    if path.is_dir():
        raise UserError(f"--run-file: {path}: is a folder; name a file")
    # Beside a pipe or a device there is no place for another file.
    alone = is_written_in_place(path) and not path.is_file()
    if alone and len(modes) > 1:
        raise UserError(
            f"--run-file: {path}: takes one mode, --mode {settings.mode} has {len(modes)}; name a file"
        )
    files: dict[Path, QueryMode | None] = {
        path if len(modes) == 1 else path.with_name(f"{path.name}.{mode}"): mode for mode in modes
    }
    return files if alone else files | {path.with_name(f"{path.name}.qrels"): None}


def check_evaluation(settings: EvalSettings) -> None:
    """Raise UserError for contradictory settings, or for files that cannot be written."""
    check_outputs(
        ("--out", settings.out),
        *(("--run-file", file) for file in _trec_files(settings)),
        inputs=[settings.model, settings.data],
    )
    check_limits(settings)
    if not is_baseline(settings.model):
        check_model_name(settings.model)
    if settings.max_think_tokens < 0:
        raise UserError(
            f"--max-think-tokens: {settings.max_think_tokens} is below 0; 0 forces the embed token at once"
        )
    if parse_steps(settings.profile_steps) is not None:
        if is_baseline(settings.model):
            raise UserError(f"--profile-steps: {settings.model} does not run in JAX; leave it out")
        check_output_folder("--profile-folder", settings.profile_folder)
    if settings.controls and settings.mode == "direct":
        raise UserError("--controls: there is no reasoning in direct mode; give --mode reason or both")


def check_limits(settings: EvalSettings | BudgetSettings) -> None:
    """Raise UserError for a limit of the corpus or of its texts that is below 1."""
    counts = {
        "--max-queries": settings.max_queries,
        "--max-documents": settings.max_documents,
        "--max-query-tokens": settings.max_query_tokens,
        "--max-document-tokens": settings.max_document_tokens,
    }
    for flag, count in counts.items():
        if count is not None and count < 1:
            raise UserError(f"{flag}: {count} is less than 1; give a positive number")


def open_collection(settings: EvalSettings | BudgetSettings, notes: Console) -> tuple[Collection, Subset]:
    """The split, sampled as `max_queries` and `max_documents` say; prints a note if more is judged."""
    collection, query_sample = load_collection(settings.data, settings.split), None
    collection = dataclasses.replace(collection, ignore_identical_ids=settings.ignore_identical_ids)
    if settings.max_queries is not None:
        collection, query_sample = sample_queries(collection, settings.max_queries, seed=settings.seed)
    if settings.max_documents is None:
        return collection, Subset(query_sample, None)
    collection, corpus_sample = sample_corpus(collection, settings.max_documents, seed=settings.seed)
    if corpus_sample.documents > corpus_sample.asked:
        notes.print(
            f"{corpus_sample.judged} documents are judged: all of them stay, more than the "
            f"{corpus_sample.asked} asked for",
            markup=False,
        )
    return collection, Subset(query_sample, corpus_sample)


def _eval_content(
    settings: EvalSettings,
    identity: Mapping[str, Any],
    collection: Collection,
    subset: Subset,
    result: SystemResult,
) -> dict[str, Any]:
    modes: dict[str, dict[str, Any]] = {
        mode: each.as_dict()
        | {"ndcg@10_interval": ndcg_interval(collection, each, settings.seed)}
        | {"per_query": per_query(collection, each)}
        for mode, each in result.modes.items()
    }
    if result.controls:
        modes["reason"]["controls"] = _controls(collection, result.controls, settings.seed)
    content = common_content(settings, identity, collection, subset, result.document_seconds)
    return content | {"encoding": result.encoding, "modes": modes}


def common_content(
    settings: EvalSettings | BudgetSettings,
    identity: Mapping[str, Any],
    collection: Collection,
    subset: Subset,
    document_seconds: float,
) -> dict[str, Any]:
    """The part of a result file that `eval` and `budget` share: system, data and cost of the corpus."""
    return {
        "format_version": FORMAT_VERSION,
        "search_r3_jax": __version__,
        "model": settings.model,
        "system": dict(identity),
        "data": {
            "path": str(settings.data),
            "name": collection.name,
            "split": collection.split,
            "documents": len(collection.documents),
            "queries": len(collection.queries),
            "documents_sha256": unordered_documents_hash(collection),
            "queries_sha256": unordered_queries_hash(collection),
            "cut": None if subset.corpus is None else dataclasses.asdict(subset.corpus),
            "query_cut": None if subset.queries is None else dataclasses.asdict(subset.queries),
            "ignore_identical_ids": collection.ignore_identical_ids,
        },
        "depth": DEPTH,
        "document_seconds": document_seconds,
        "documents_per_second": len(collection.documents) / document_seconds,
    }


def query_values(collection: Collection, result: ModeResult) -> np.ndarray:
    """nDCG@10 of each query [Q], in the collection's order."""
    return np.array([result.of_query[query.query_id].ndcg_at_10 for query in collection.queries], np.float64)


def ndcg_interval(collection: Collection, result: ModeResult, seed: int) -> dict[str, float]:
    """Mean of nDCG@10 with the ends of its bootstrap interval over queries."""
    return dataclasses.asdict(
        bootstrap_interval(query_values(collection, result), samples=SAMPLES, seed=seed)
    )


def _controls(
    collection: Collection, controls: Mapping[str, ModeResult], seed: int
) -> dict[str, dict[str, Any]]:
    """Of each control: metrics, tokens, nDCG@10 with interval, and the paired difference to own reasoning."""
    reasoned_q = query_values(collection, controls["own"])
    results: dict[str, dict[str, Any]] = {}
    for name, result in controls.items():
        values_q = query_values(collection, result)
        results[name] = {
            **result.metrics.as_dict(),
            "reply_tokens": result.reply_tokens,
            "ndcg@10_interval": ndcg_interval(collection, result, seed),
            "own_minus_this": dataclasses.asdict(
                bootstrap_interval(reasoned_q - values_q, samples=SAMPLES, seed=seed)
            ),
            "per_query": {
                query.query_id: float(value)
                for query, value in zip(collection.queries, values_q, strict=True)
            },
        }
    return results


def per_query(collection: Collection, result: ModeResult) -> dict[str, dict[str, Any]]:
    """Query id → text, metrics, reasoning, and the best documents with their scores."""
    of_query: dict[str, dict[str, Any]] = {}
    for row, query in enumerate(collection.queries):
        top = sorted(result.run.get(query.query_id, {}).items(), key=lambda pair: (-pair[1], pair[0]))[:TOP]
        entry: dict[str, Any] = {
            "text": query.text,
            **result.of_query[query.query_id].as_dict(),
            "top": [list(pair) for pair in top],
        }
        if result.tokens:
            entry |= {"valid": result.valid[row], "tokens": result.tokens[row]}
        if result.thoughts:
            entry["thought"] = result.thoughts[row]
        of_query[query.query_id] = entry
    return of_query


def _show(content: Mapping[str, Any], stream: TextIO) -> None:
    table = Table(title=Text(title_of(content)), title_justify="left", box=SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for mode in content["modes"]:
        table.add_column(mode, justify="right", no_wrap=True)
    for name, key, shape in ROWS:
        table.add_row(name, *(shape.format(values[key]) for values in content["modes"].values()))
        if key == "ndcg@10":
            intervals = (interval_text(values[f"{key}_interval"]) for values in content["modes"].values())
            table.add_row("  95 % interval", *intervals)
    table.add_row("documents/s", *(f"{content['documents_per_second']:.1f}" for _ in content["modes"]))
    for name, key, shape in ENCODING_ROWS:
        if key in content["encoding"]:
            table.add_row(name, *(shape.format(content["encoding"][key]) for _ in content["modes"]))
    console = TextConsole(stream)
    console.print(table)
    if "controls" in content["modes"].get("reason", {}):
        console.print(_controls_table(content["modes"]["reason"]["controls"]))


def title_of(content: Mapping[str, Any]) -> str:
    """One line about model, queries and documents."""
    data, corpus_sample = content["data"], content["data"]["cut"]
    query_cut = data.get("query_cut")
    of_all_documents = f" of {corpus_sample['whole']}" if corpus_sample is not None else ""
    of_all_queries = f" of {query_cut['whole']}" if query_cut is not None else ""
    queries = f"{data['queries']}{of_all_queries} queries of {data['name']} ({data['split']})"
    return f"{content['model']}: {queries} over {data['documents']}{of_all_documents} documents"


def interval_text(interval: Mapping[str, float], shape: str = "{:.3f}") -> str:
    """Both ends of an interval."""
    return f"{shape.format(interval['low'])} … {shape.format(interval['high'])}"


def _controls_table(controls: Mapping[str, Mapping[str, Any]]) -> Table:
    # 80 columns hold it.
    table = Table(
        title="reason, with this reasoning written for it:",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("", no_wrap=True)
    for name in ("nDCG@10", "95 % interval", "own − this", "95 % interval", "tokens"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, values in controls.items():
        gain = values["own_minus_this"]
        compared = ("", "") if name == "own" else (f"{gain['mean']:+.4f}", interval_text(gain, "{:+.3f}"))
        interval = interval_text(values["ndcg@10_interval"])
        table.add_row(
            CONTROLS[name], f"{values['ndcg@10']:.4f}", interval, *compared, f"{values['reply_tokens']:.1f}"
        )
    return table
