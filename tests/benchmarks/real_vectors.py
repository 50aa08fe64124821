"""Vectors of real texts for benchmarks of the index, encoded once into a folder, and how fast that went."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from search_r3_jax.config import ModelConfig
from search_r3_jax.data.collection import Document
from search_r3_jax.data.dataset import load_collections
from search_r3_jax.files import file_sha256, write_json
from search_r3_jax.models.flops import layers_flops
from search_r3_jax.retrieval.store.corpus_vectors import EncodeTexts, EncodingSettings, encode_corpus

MINILM_TOKENS, MINILM_DIMENSION = 32, 384


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """Unit vectors [N,E] and queries [Q,E] float32, and how encoding the former went."""

    vectors: np.ndarray
    queries: np.ndarray
    encoding: dict[str, Any]


class TimedEncoder:
    """An `EncodeTexts` that adds up in a file what it does, so that an interrupted call's share counts."""

    def __init__(
        self, encode: Callable[[list[str]], np.ndarray], lengths: Callable[[list[str]], list[int]], file: Path
    ) -> None:
        """`encode` says nothing of its progress; `lengths` are the tokens that it reads of each text."""
        self._encode, self._lengths, self._file = encode, lengths, file

    def __call__(
        self, texts: Sequence[str], *, on_progress: Callable[[int], object] | None = None
    ) -> np.ndarray:
        """Texts → vectors [N,E] float32 in their order."""
        tokens = sum(self._lengths(list(texts)))
        started = time.perf_counter()
        vectors = self._encode(list(texts))
        done = {"documents": len(texts), "tokens": tokens, "seconds": time.perf_counter() - started}
        before = json.loads(self._file.read_text()) if self._file.exists() else dict.fromkeys(done, 0)
        write_json(self._file, {name: before[name] + value for name, value in done.items()})
        print(f"encoded {before['documents'] + len(texts):,} documents", flush=True)
        return vectors

    def rates(self) -> dict[str, float]:
        """Documents a second, and tokens of a document."""
        total = json.loads(self._file.read_text())
        return {
            "documents_per_second": round(total["documents"] / total["seconds"], 1),
            "tokens_per_document": round(total["tokens"] / total["documents"], 2),
        }


def real_texts(folders: Sequence[Path], wanted: int, held_out: int) -> tuple[list[str], list[str]]:
    """Different texts to be found, documents first, and test queries that are none of them; raises SystemExit
    when there are too few."""
    documents: dict[str, None] = {}
    asked: dict[str, None] = {}
    tested: dict[str, None] = {}
    for folder in folders:
        for split, collection in load_collections(folder).items():
            documents.update(dict.fromkeys(document.body.strip() for document in collection.documents))
            (tested if split == "test" else asked).update(
                dict.fromkeys(query.text.strip() for query in collection.queries)
            )
    unseen = [text for text in tested if text not in documents and text not in asked]
    # Spread over the collections, which come one after another.
    queries = unseen[:: max(1, len(unseen) // held_out)][:held_out]
    held = set(queries)
    texts = [text for text in documents | asked | tested if text not in held][:wanted]
    if len(texts) < wanted or len(queries) < held_out:
        raise SystemExit(
            f"--data: {len(texts)} texts and {len(queries)} test queries; name more folders, or ask for fewer"
        )
    return texts, queries


def encode(
    encoder: TimedEncoder,
    plain: EncodeTexts,
    texts: Sequence[str],
    queries: Sequence[str],
    folder: Path,
    settings: EncodingSettings,
) -> Embedded:
    """Both through `encode_corpus`, which keeps them; the queries' time does not count."""
    documents, asked = (
        [Document(doc_id=str(i), title="", text=text) for i, text in enumerate(some)]
        for some in (texts, queries)
    )
    vectors = encode_corpus(encoder, documents, folder / "documents", settings)
    return Embedded(
        vectors=vectors,
        queries=encode_corpus(plain, asked, folder / "queries", settings),
        encoding=encoder.rates(),
    )


def embed_real(folders: Sequence[Path], work: Path, *, vectors: int, queries: int) -> Embedded:
    """So many vectors of the texts in `folders` from all-MiniLM-L6-v2; kept in `work`."""
    import torch
    from sentence_transformers import SentenceTransformer

    from search_r3_jax.evaluation.systems import minilm_folder

    found, asked = real_texts(folders, vectors, queries)
    # As many cores as this process may use, which `taskset` limits.
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = SentenceTransformer(
        str(minilm_folder()), local_files_only=True, model_kwargs={"use_safetensors": True}
    )
    model.max_seq_length = MINILM_TOKENS

    def embed(texts: Sequence[str], *, on_progress: Callable[[int], object] | None = None) -> np.ndarray:
        # It sorts by length itself.
        return np.asarray(
            model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False), np.float32
        )

    def lengths(some: list[str]) -> list[int]:
        return [
            len(ids) for ids in model.tokenizer(some, truncation=True, max_length=MINILM_TOKENS)["input_ids"]
        ]

    embed(found[:64])
    folder = work / f"minilm_{vectors}_{queries}"
    folder.mkdir(exist_ok=True)
    weights = file_sha256(minilm_folder() / "model.safetensors")
    settings = EncodingSettings(model_hash=weights, max_tokens=MINILM_TOKENS, dimension=MINILM_DIMENSION)
    return encode(
        TimedEncoder(embed, lengths, folder / "encoding.json"), embed, found, asked, folder, settings
    )


def embed_decoder(
    data: Path, work: Path, *, name: str, max_document_tokens: int, max_documents: int, queries: int
) -> Embedded:
    """Vectors of the first `max_documents` (0: all) in `data` from what `load_model` opens by `name`; kept in
    `work`."""
    from flax import nnx

    from search_r3_jax.hub.load_model import load_model
    from search_r3_jax.hub.weights import parameter_hash
    from search_r3_jax.rollout.encoder import Encoder
    from search_r3_jax.text.prompts import Prompter

    splits = load_collections(data)
    collection = splits.get("test") or next(iter(splits.values()))
    found = [document.body for document in collection.documents][: max_documents or None]
    asked = list(dict.fromkeys(query.text for split in splits.values() for query in split.queries))
    asked = asked[:: max(1, len(asked) // queries)][:queries]
    model = load_model(name)
    prompter = Prompter(model.tokenizer)
    graph, state = nnx.split(model.decoder)
    encoder, limit = Encoder(graph, prompter), max_document_tokens

    def embed(texts: Sequence[str], *, on_progress: Callable[[int], object] | None = None) -> np.ndarray:
        return encoder.encode(state, texts, max_tokens=limit, on_progress=on_progress)

    def lengths(some: list[str]) -> list[int]:
        # Before the clock starts: compiling is no part of a document's time.
        encoder.compile(state, some, max_tokens=limit)
        return [len(ids) for ids in prompter.text_ids(some, limit)]

    model_hash = parameter_hash(state)
    folder = work / f"decoder_{model_hash[:8]}_{data.name}_{len(found)}_{len(asked)}_{limit}"
    folder.mkdir(exist_ok=True)
    settings = EncodingSettings(
        model_hash=model_hash, max_tokens=limit, dimension=model.decoder.config.hidden_size
    )
    embedded = encode(
        TimedEncoder(embed, lengths, folder / "encoding.json"), embed, found, asked, folder, settings
    )
    prompt = {
        "prefix_tokens": len(prompter.direct.prefix),
        "tail_tokens": len(prompter.direct.suffix) + len(prompter.direct.closing),
    }
    flops = row_flops(model.decoder.config, embedded.encoding["tokens_per_document"], **prompt)
    embedded.encoding.update(prompt, flops_per_second=embedded.encoding["documents_per_second"] * flops)
    return embedded


def row_flops(config: ModelConfig, tokens: float, *, prefix_tokens: int, tail_tokens: int) -> float:
    """One text's forward pass: its tokens and the prompt's behind them, attending to each other and to a
    prefix that is there."""
    row = tokens + tail_tokens
    return layers_flops(config, 1, 0) * row + layers_flops(config, 0, 1) * (
        row * prefix_tokens + row * (row + 1) / 2
    )
