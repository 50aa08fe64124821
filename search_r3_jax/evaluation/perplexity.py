"""Token-level perplexity of plain text, as a check that training keeps language ability."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from transformers import PreTrainedTokenizerBase

from search_r3_jax.config import InferenceConfig, Step
from search_r3_jax.console import TextConsole, progress_bar
from search_r3_jax.data.dataset import load_collection
from search_r3_jax.data.subsample import sample_corpus, unordered_documents_hash
from search_r3_jax.errors import UserError
from search_r3_jax.hub.checkpoint_reader import read_run
from search_r3_jax.hub.load_model import load_for_inference, pinned_step
from search_r3_jax.hub.model_names import check_model_name, resolve
from search_r3_jax.models.decoder import Decoder, positions_from_lengths
from search_r3_jax.objectives.language import cross_entropy, token_log_probs
from search_r3_jax.outputs import check_outputs, write_json_result
from search_r3_jax.text.packing import PaddedBatch, length_batches

BATCH_TOKENS = 1024


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Perplexity over the tokens of some texts.

    Attributes:
        perplexity: exp of the mean −log p of a token, all texts together.
        nats: the sum of −log p.
        tokens: how many were predicted: all but the first of each text.
        texts: how many had at least two tokens.
    """

    perplexity: float
    nats: float
    tokens: int
    texts: int


def text_rows(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
    """Token ids of plain texts, cut to `max_tokens`.

    With a beginning-of-text token if the tokenizer adds one.
    """
    return [list(tokenizer(text)["input_ids"])[:max_tokens] for text in texts]


def perplexity(
    decoder: Decoder, rows: Sequence[Sequence[int]], *, on_progress: Callable[[int], object] | None = None
) -> Perplexity:
    """Perplexity of token rows; log-probabilities are float32.

    Logits are computed in chunks of positions to save memory. Raises ValueError when no row has two tokens,
    UserError naming the first row of a batch whose log-probabilities are not finite.
    """
    numbers = [number for number, row in enumerate(rows) if len(row) > 1]
    usable = [list(rows[number]) for number in numbers]
    if not usable:
        raise ValueError("no row has two tokens, so none is predicted")
    graph, state = nnx.split(decoder)
    nats, tokens = 0.0, 0
    for batch in length_batches(usable, tokens=BATCH_TOKENS, pad_id=0):
        batch_nats, batch_tokens = _batch_nats(graph, state, batch.ids, batch.lengths)
        if not math.isfinite(float(batch_nats)):
            raise UserError(_not_finite(graph, state, batch, numbers))
        # Summed on the host in float64.
        nats, tokens = nats + float(batch_nats), tokens + int(batch_tokens)
        if on_progress is not None:
            on_progress(len(batch.rows))
    # Above this mean, exp is no finite number.
    mean = min(nats / tokens, math.log(sys.float_info.max))
    return Perplexity(perplexity=math.exp(mean), nats=nats, tokens=tokens, texts=len(usable))


def _not_finite(
    graph: nnx.GraphDef[Decoder], state: nnx.State, batch: PaddedBatch, numbers: Sequence[int]
) -> str:
    """The message for a batch whose log-probabilities are not finite: its first text of which that is so."""
    rows = [
        at
        for at in np.argsort(batch.rows)
        if not math.isfinite(
            float(_batch_nats(graph, state, batch.ids[at : at + 1], batch.lengths[at : at + 1])[0])
        )
    ]
    first = numbers[int(batch.rows[rows[0] if rows else 0])]
    return (
        f"text {first + 1}: the log-probabilities of its tokens are not finite, so it has no perplexity; "
        "look for weights that diverged or that overflow"
    )


@jax.jit(static_argnums=0)
def _batch_nats(
    graph: nnx.GraphDef[Decoder], state: nnx.State, ids_bt: jax.Array, lengths_b: jax.Array
) -> tuple[jax.Array, jax.Array]:
    decoder = nnx.merge(graph, state)
    T = ids_bt.shape[1]
    hidden_btd, _ = decoder(ids_bt, positions_from_lengths(lengths_b, T))
    log_probs_m, _ = token_log_probs(
        decoder.logits, hidden_btd[:, :-1].reshape(-1, hidden_btd.shape[-1]), ids_bt[:, 1:].reshape(-1)
    )
    predicted_bt = jnp.arange(1, T)[None] < lengths_b[:, None]
    return cross_entropy(log_probs_m, predicted_bt.reshape(-1))


def measure_perplexity(
    model: str,
    data: Path,
    *,
    split: str,
    max_documents: int,
    max_tokens: int,
    step: Step,
    seed: int,
    out: Path | None,
    inference: InferenceConfig | None = None,
) -> dict[str, Any]:
    """Perplexity of a model on random documents of a collection; writes and returns the result.

    Raises UserError for bad input.
    """
    check_outputs(("--out", out), inputs=[model, data])
    if max_documents < 1 or max_tokens < 2:
        raise UserError("--max-documents, --max-tokens: give at least 1 document and 2 tokens")
    check_model_name(model)
    whole = load_collection(data, split)
    # Without queries no document counts as judged, so all are drawn at random.
    collection, sample = sample_corpus(dataclasses.replace(whole, queries=()), max_documents, seed=seed)
    pinned = pinned_step(model, step)
    run_config = None if pinned is None else read_run(resolve(model))[1]["config"]
    loaded = load_for_inference(model, inference or InferenceConfig(), step=pinned)
    limit = min(max_tokens, loaded.decoder.config.max_positions)
    rows = text_rows(loaded.tokenizer, [document.body for document in collection.documents], limit)
    usable = sum(len(row) > 1 for row in rows)
    if not usable:
        raise UserError(f"{data}: no document of at least two tokens, so there is none to predict")
    with progress_bar(TextConsole(sys.stderr), "documents", usable) as bar:
        measured = perplexity(loaded.decoder, rows, on_progress=bar.advance)
    result = {
        "model": model,
        "step": pinned,
        "run_config": run_config,
        "data": {
            "path": str(data),
            "name": whole.name,
            "split": split,
            "documents_sha256": unordered_documents_hash(collection),
        },
        "cut": dataclasses.asdict(sample),
        "max_tokens": limit,
        **dataclasses.asdict(measured),
    }
    if out is not None:
        write_json_result("--out", out, result)
    return result
