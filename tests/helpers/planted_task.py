"""A retrieval task with a table planted in it, and a tiny model that can learn it: names in documents,
aliases as queries."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase as LETTERS

import numpy as np
from helpers.tiny_models import CHAT_TEMPLATE, SPECIAL, torch_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from search_r3_jax.config import EMBED_TOKEN
from search_r3_jax.data.collection import Collection, Document, Query
from search_r3_jax.text.prompts import CLOSING, DIRECT_SYSTEM, REASON_SYSTEM

NAMES = 16
DOCUMENTS_A_NAME = 4
NOISE_WORDS = 40
DISTRACTORS_A_NAME = 16


@dataclass(frozen=True, kw_only=True)
class PlantedTask:
    """Three sets of queries over one corpus, in which each name has `DOCUMENTS_A_NAME` documents, and the
    words of all texts.

    Attributes:
        warm: aliases, each with some name at random as its reasoning and that name's documents: nothing in an
            alias says which.
        planted: other aliases, a name each; only `positives` know which.
        named: the names themselves.
    """

    warm: Collection
    planted: Collection
    named: Collection
    words: tuple[str, ...]


def planted_task(seed: int, *, distractors: int = 0) -> PlantedTask:
    """The task of a seed; an alias is two letters, a name and a noise word four.

    `distractors` more documents have names that are never asked for.
    """
    generator = np.random.default_rng(seed)
    others_names = distractors // DISTRACTORS_A_NAME
    words: dict[str, None] = {}
    while len(words) < NAMES + NOISE_WORDS + others_names:
        words["".join(generator.choice(list(LETTERS), 4))] = None
    names, noise, strangers = (
        list(words)[:NAMES],
        list(words)[NAMES : NAMES + NOISE_WORDS],
        list(words)[NAMES + NOISE_WORDS :],
    )
    documents, positives = [], [{} for _ in names]
    for i in range(NAMES * DOCUMENTS_A_NAME):
        body = [str(word) for word in generator.choice(noise, 3)]
        body.insert(int(generator.integers(4)), names[i % NAMES])
        documents.append(Document(doc_id=f"d{i}", title="", text=" ".join(body)))
        positives[i % NAMES][f"d{i}"] = 1
    for i in range(distractors):
        body = [str(word) for word in generator.choice(noise, 3)]
        body.insert(int(generator.integers(4)), strangers[i % len(strangers)])
        documents.append(Document(doc_id=f"x{i}", title="", text=" ".join(body)))
    # No two of the planted aliases share a letter at the same place: the letters are known from other
    # aliases, and keep them apart.
    firsts, seconds = generator.permutation(list(LETTERS)), generator.permutation(list(LETTERS))
    aliases = [f"{first} {second}" for first, second in zip(firsts[:NAMES], seconds[:NAMES], strict=True)]
    others = [f"{first} {second}" for first in LETTERS for second in LETTERS]
    others = [others[i] for i in generator.permutation(len(others)) if others[i] not in aliases]

    def collection(name: str, queries: list[Query]) -> Collection:
        return Collection(name=name, split="train", documents=tuple(documents), queries=tuple(queries))

    def queries(texts: list[str]) -> list[Query]:
        return [
            Query(query_id=f"q{i}", text=text, positives=positives[i % NAMES], reasoning=names[i % NAMES])
            for i, text in enumerate(texts)
        ]

    planted = [
        Query(query_id=query.query_id, text=query.text, positives=query.positives)
        for query in queries(aliases)
    ]
    return PlantedTask(
        warm=collection("warm", queries(others)),
        planted=collection("planted", planted),
        named=collection("named", queries(names)),
        words=(*words, *LETTERS),
    )


def write_word_checkpoint(folder: Path, words: tuple[str, ...], *, seed: int) -> Path:
    """A tiny random Llama with a token for each word of the prompts and of `words`: replies take a few
    tokens. Returns the folder."""
    splitter = pre_tokenizers.Whitespace()
    prompts = " ".join(
        [DIRECT_SYSTEM, REASON_SYSTEM, CLOSING.removesuffix(EMBED_TOKEN), "system user assistant"]
    )
    known = dict.fromkeys(
        [*SPECIAL, EMBED_TOKEN, *(word for word, _ in splitter.pre_tokenize_str(prompts)), *words]
    )
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token=SPECIAL[0]))
    tokenizer.pre_tokenizer = splitter
    tokenizer.add_special_tokens([*SPECIAL, EMBED_TOKEN])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    torch_model("llama", vocab_size=len(known), seed=seed).save_pretrained(folder)
    return folder
