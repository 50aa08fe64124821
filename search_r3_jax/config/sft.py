"""Stage 1, and the optimiser of both stages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Direction = Literal["query_to_document", "query_to_query", "document_to_query", "document_to_document"]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW after a linear warm-up.

    Attributes:
        learning_rate: Peak learning rate.
        schedule: Decay after the warm-up: a cosine or a line down to `final_share`, none, or `wsd`: constant,
            then a line over the last fifth of the steps.
        final_share: Learning rate of the last step, as a share of the peak.
        row_scale: Multiplies the learning rate of the embed token's row. In stage 1 the row is new while all
            else is trained already, so a short run needs a large value.
        warmup_steps: Steps over which the rate rises from 0 to its peak.
        weight_decay: Decay of matrices. Norms, biases and the embed token's row are never decayed.
        b1: AdamW: decay of the first moment.
        b2: AdamW: decay of the second moment.
        clip_norm: Scale a longer gradient down to this norm. 0 never clips.
    """

    learning_rate: float = 1e-4
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    final_share: float = 0.1
    row_scale: float = 1.0
    warmup_steps: int = 0
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    clip_norm: float = 1.0


@dataclass(frozen=True, kw_only=True)
class SftConfig:
    """Stage 1: cross-entropy and KL on the reply, InfoNCE and triplet margin on the embeddings.

    Attributes:
        steps: Training steps.
        global_batch: (query, document) pairs per step, over all devices.
        encode_chunk: Pairs whose activations are in memory at a time (GradCache); the gradient is exact. 0:
            the whole batch at once.
        temperature: Temperature τ of InfoNCE.
        directions: What InfoNCE contrasts: queries with documents and other queries, documents with queries
            and other documents. `query_to_document` is always one of them.
        partition: `joint`: one softmax over all directions. `per_direction`: one softmax per direction, and
            their mean (symmetric InfoNCE).
        false_negative_margin: Drop negatives whose cosine is within this margin of the positive's, or above.
            None drops none.
        triplet_margin: Margin θ of the triplet loss, in cosine.
        infonce_weight: Weight of InfoNCE. 0 leaves it out.
        triplet_weight: Weight of the triplet loss. 0 leaves it out.
        language_weight: Weight of the cross-entropy of the reply: the reasoning, if any, and the closing with
            the embed token. 0 leaves it out.
        kl_weight: Weight of KL(current ‖ base) on the reply. 0 leaves it out.
        matryoshka: Dimensions to which vectors are cut for the contrastive losses, such as 64 256 576; the
            full one counts only if it is named. Empty: the full vector alone.
        negatives: Negatives per query from the data set (judged irrelevant, or from `data mine`). 0: only
            those of the batch.
        reasoned_share: Share of queries trained in the reasoned format, in [0, 1].
        reasoning: Where their reasoning comes from: `off`, nowhere; `column` of the data set, `self` (the
            untrained model writes it), or `key_terms` of the positive document (tf·idf).
        key_terms: Terms in a key-term reasoning.
        eval_every: Steps between evaluations on the development queries. 0 never evaluates.
        save_every: Steps between checkpoints. Every evaluation saves one too.
        keep: Newest checkpoints to keep. The best one is kept as well.
        keep_every: Also keep checkpoints at multiples of this many steps. 0 keeps none for that.
        max_skipped: A step whose loss or gradient is not finite is skipped; this many in a row end the run.
        optimizer: The optimiser of stage 1.
    """

    steps: int = 1000
    global_batch: int = 64
    encode_chunk: int = 0
    temperature: float = 0.05
    directions: tuple[Direction, ...] = ("query_to_document",)
    partition: Literal["joint", "per_direction"] = "joint"
    false_negative_margin: float | None = None
    triplet_margin: float = 0.15
    infonce_weight: float = 1.0
    triplet_weight: float = 1.0
    language_weight: float = 1.0
    kl_weight: float = 1.0
    matryoshka: tuple[int, ...] = ()
    negatives: int = 0
    reasoned_share: float = 0.0
    reasoning: Literal["off", "column", "self", "key_terms"] = "off"
    key_terms: int = 6
    eval_every: int = 0
    save_every: int = 100
    keep: int = 2
    keep_every: int = 0
    max_skipped: int = 10
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
