"""Stage 2: sampling, rewards and the policy update."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from search_r3_jax.config.sft import OptimizerConfig

RewardVariant = Literal["dcg", "log_rank", "rank_margin", "gain_over_direct"]


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How replies are sampled.

    Attributes:
        max_think_tokens: Longest reasoning, in tokens. Then the embed token is forced and the reply invalid.
        temperature: Sampling temperature, above 0 in training. Evaluations are greedy.
        top_k: Sample from the k most likely tokens only. 0 samples from all.
        top_p: Then sample from the most likely tokens that together have this probability. 1 keeps all.
        prefill_chunk: Read longer prompts in chunks of this many tokens. 0 reads any prompt at once.
        slots: Replies to write at a time: a finished one makes room for the next, so one long reply does not
            hold up all. 0 writes all at once.
    """

    max_think_tokens: int = 32
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    prefill_chunk: int = 1024
    slots: int = 0


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """What a reply earns: a value in [0, 1] for its documents' ranks, less a price for its length.

    Attributes:
        variant: `dcg`: soft nDCG. `log_rank`: logarithm of the best relevant document's rank. `rank_margin`:
            reciprocal ranks, and the margin to the hardest negatives. `gain_over_direct`: 0.5 + half of
            what `dcg` gains over the query embedded without reasoning.
        temperature: Temperature of the soft ranks, in cosine.
        margin_weight: `rank_margin`: share of the margin, in [0, 1]; the ranks have the rest.
        margin_width: `rank_margin`: margin (cosine) at which the margin term reaches its maximum.
        hard_negatives: `rank_margin`: the margin is taken to this many highest negatives.
        floor_gap: The worst valid reply earns this much; an invalid one earns 0. In (0, 1).
        length_weight: Weight of the length term; retrieval has weight 1. 0: off.
        free_tokens: Tokens of a reply that cost nothing. Beyond them the cost grows linearly, and is full at
            the longest reply. Without effect where length_weight is 0.
    """

    variant: RewardVariant = "dcg"
    temperature: float = 0.02
    margin_weight: float = 0.5
    margin_width: float = 0.5
    hard_negatives: int = 4
    floor_gap: float = 0.1
    length_weight: float = 0.0
    free_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class InfoNceConfig:
    """Auxiliary InfoNCE on the sampled queries' embeddings, which the policy gradient does not reach.

    Attributes:
        weight: Weight of the loss. 0 leaves it out.
        temperature: Temperature τ.
        negatives: Extra negatives: this many of the step's candidates, best-ranked first. 0: only the other
            queries' documents.
        near_duplicate_cosine: Drop a candidate from the InfoNCE negatives when its cosine to any positive of
            the step exceeds this: probably an unjudged duplicate. 1 keeps all.
        train_documents: Encode the queries' own documents inside the update, so that they are trained too.
            Otherwise all documents are constants.
    """

    weight: float = 0.1
    temperature: float = 0.05
    negatives: int = 0
    near_duplicate_cosine: float = 1.0
    train_documents: bool = False


@dataclass(frozen=True, kw_only=True)
class CollapseConfig:
    """When to stop a run whose replies have collapsed.

    Attributes:
        steps: Stop after this many steps in a row under one of the thresholds. 0 never stops.
        valid_rate: A step counts as collapsed below this share of valid replies.
        entropy: A step counts as collapsed below this entropy, in nats per token.
    """

    steps: int = 20
    valid_rate: float = 0.1
    entropy: float = 0.01


@dataclass(frozen=True, kw_only=True)
class RlConfig:
    """Stage 2: GRPO with a retrieval reward.

    Attributes:
        steps: Training steps: one rollout and `inner_epochs` updates each.
        global_queries: Queries per step, over all devices; each gets `group_size` replies.
        micro_queries: Queries whose replies' activations are in memory at a time. 0: all at once.
        group_size: Replies sampled per query (G).
        min_tokens: A reply of fewer tokens, closing included, is invalid. 0: off; a policy then soon learns
            to write nothing.
        variant: How tokens are weighted. `grpo`: mean per reply. `dr_grpo`: sum over tokens, divided by
            replies × `max_think_tokens`. `dapo`: mean over the batch's tokens. `gspo`: one ratio per reply;
            use clips of about 3e-4.
        clip_low: The ratio of a token's probability to that before the step's first update is clipped below
            at 1 − clip_low.
        clip_high: That ratio is clipped above at 1 + clip_high. More than clip_low is clip-higher (DAPO).
        beta: Weight of the KL to the model that stage 2 started from. 0 never runs that model.
        kl_estimator: `k3` is never negative and has low variance; `k2` has the gradient of the KL; `k1` is
            unbiased, but its gradient is zero on average.
        scale_rewards: Divide advantages by the standard deviation of their `group` or of the `batch`; `none`:
            do not divide.
        inner_epochs: Updates on the same rollout.
        importance_cap: Weight tokens by trainer probability / sampler probability, up to this. 0: off.
        off_policy_steps: 1: sample a step's replies while the step before is rewarded and updated, with the
            parameters from before that update. Needs importance_cap. 0: on policy.
        eval_every: Steps between evaluations on the development queries, direct and reasoned. 0 never.
        save_every: Steps between checkpoints. The indexer builds its next version from the newest one.
            Evaluations save too.
        keep: Newest checkpoints to keep. The best one is kept as well.
        keep_every: Also keep checkpoints at multiples of this many steps. 0 keeps none for that.
        sample_every: Write one in this many rollouts to `samples.jsonl`.
        max_skipped: Updates that are not finite are skipped; this many in a row end the run.
        min_swaps: Go on past `steps`, by at most max_extra_steps, until this many new index versions have
            come into use.
        max_extra_steps: Most steps past `steps` that min_swaps may add. 0: min_swaps has no effect.
        sampler: How replies are sampled.
        reward: What a reply earns.
        infonce: The auxiliary InfoNCE.
        collapse: When to stop a collapsed run.
        optimizer: The optimiser of stage 2.
    """

    steps: int = 1000
    global_queries: int = 8
    micro_queries: int = 0
    group_size: int = 8
    min_tokens: int = 0
    variant: Literal["grpo", "dr_grpo", "dapo", "gspo"] = "grpo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    beta: float = 0.04
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    scale_rewards: Literal["group", "batch", "none"] = "group"
    inner_epochs: int = 1
    importance_cap: float = 0.0
    off_policy_steps: int = 0
    eval_every: int = 0
    save_every: int = 50
    keep: int = 3
    keep_every: int = 0
    sample_every: int = 16
    max_skipped: int = 10
    min_swaps: int = 0
    max_extra_steps: int = 0
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    infonce: InfoNceConfig = field(default_factory=InfoNceConfig)
    collapse: CollapseConfig = field(default_factory=CollapseConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
