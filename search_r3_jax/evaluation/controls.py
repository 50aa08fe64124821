"""Controls of reasoning: replies with another query's reasoning, none, or meaningless tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from search_r3_jax.data.collection import Collection
from search_r3_jax.text.prompts import Prompter
from search_r3_jax.text.words import plain_words

CONTROLS = {
    "own": "its own",
    "swapped": "another query's",
    "empty": "none",
    "repeated": "query repeated",
    "random": "random words",
}
"""Name of each control → its reasoning."""

# Enough words for any budget of tokens, without reading a corpus of millions.
_DOCUMENTS_READ = 2_000


def control_replies(
    prompter: Prompter,
    texts: Sequence[str],
    replies: Sequence[Sequence[int]],
    words: Sequence[str],
    *,
    seed: int,
    step: int = 0,
) -> dict[str, list[list[int]]]:
    """Complete replies [Q·G] under each name of `CONTROLS`.

    From the texts [Q] and the model's replies [Q·G] (ids, closing included). `repeated` and `random` (of
    `words`) have as many thinking tokens as the original reply, so that they cost the same. `swapped`
    exchanges sample g with sample g of another query. A pure function of its arguments; raises ValueError for
    fewer than two queries, without words, or if the replies are no multiple of the texts.
    """
    Q, B = len(texts), len(replies)
    if not words or not Q or B % Q:
        raise ValueError(
            f"{Q} queries, {B} replies, {len(words)} words: want a multiple of the queries, and words"
        )
    G = B // Q
    other_q = derangement(Q, seed, step)
    tokens_b = [thought_tokens(prompter, reply) for reply in replies]
    return {
        "own": [list(reply) for reply in replies],
        "swapped": [list(replies[other_q[b // G] * G + b % G]) for b in range(B)],
        "empty": [list(prompter.reason.closing) for _ in range(B)],
        # A word has at least one token, so `tokens` words are enough; the surplus is cut.
        "repeated": [
            _thought(prompter, [texts[b // G]] * tokens, tokens) for b, tokens in enumerate(tokens_b)
        ],
        "random": [
            _thought(prompter, _random_words(words, tokens, [seed, step, b]), tokens)
            for b, tokens in enumerate(tokens_b)
        ],
    }


def thought_tokens(prompter: Prompter, reply: Sequence[int]) -> int:
    """Number of tokens of a complete reply before its closing."""
    closing = prompter.reason.closing
    return len(reply) - (len(closing) if tuple(reply[-len(closing) :]) == closing else 1)


def corpus_words(collection: Collection) -> list[str]:
    """The distinct words of the corpus, sorted; only the first documents of a large corpus are read."""
    return sorted(
        {word for document in collection.documents[:_DOCUMENTS_READ] for word in plain_words(document.body)}
    )


def derangement(count: int, seed: int, step: int) -> np.ndarray:
    """A seeded permutation [count] int64 of a single cycle: no fixed points; raises ValueError below 2."""
    if count < 2:
        raise ValueError(f"{count} queries: there is nobody to exchange with")
    around = np.random.default_rng([seed, step]).permutation(count)
    exchanged = np.empty(count, dtype=np.int64)
    exchanged[around] = np.roll(around, 1)
    return exchanged


def _thought(prompter: Prompter, parts: Sequence[str], tokens: int) -> list[int]:
    return prompter.thought_ids(" ".join(parts), tokens)


def _random_words(words: Sequence[str], count: int, seeds: Sequence[int]) -> list[str]:
    return [words[int(at)] for at in np.random.default_rng(seeds).integers(len(words), size=count)]
