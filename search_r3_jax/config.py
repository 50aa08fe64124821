"""Every setting, as frozen keyword-only dataclasses. Imports no jax."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

EMBED_TOKEN = "<|embed_token|>"

Direction = Literal["query_to_document", "query_to_query", "document_to_query", "document_to_document"]
Step = int | Literal["best"] | None
"""A checkpoint of a run: its number, the best on the development queries, or None for the newest."""


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the length a model was first trained at.

    Attributes:
        factor: how many times longer positions may become.
        original_positions: the length before stretching (`llama3`, `yarn`).
        low_frequency, high_frequency: turns within that length under which a frequency is stretched, over
            which it is kept (`llama3`).
        beta_fast, beta_slow: turns within that length between which stretching fades in (`yarn`).
        truncate: round the fading range to whole dimensions (`yarn`).
        attention_factor: cosines and sines are multiplied by it (`yarn`); 1 for the other kinds.
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    original_positions: int = 0
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture of one decoder.

    Attributes:
        family: `llama`, `qwen2` or `qwen3`: decides names on import and export, never the mathematics.
        vocab_size: rows of the embedding matrix, padding rows included.
        hidden_size: D, also the dimension of the embedding.
        head_dim: H, apart from D/N.
        qkv_bias: biases on q, k and v (Qwen2).
        qk_norm: RMSNorm over H on q and k (Qwen3).
        rope_scaling: None is plain rotary positions.
        sliding_window: a query sees this many positions, its own included, in layers where `windowed` says
            so.
        windowed: one flag a layer; empty where no layer has a window.
    """

    family: Literal["llama", "qwen2", "qwen3"]
    vocab_size: int
    hidden_size: int
    feed_forward: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float
    norm_eps: float
    max_positions: int
    qkv_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = True
    rope_scaling: RopeScaling | None = None
    sliding_window: int = 0
    windowed: tuple[bool, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters; rank 0 means full fine-tuning.

    Attributes:
        alpha: the update is scaled by alpha / rank.
        dropout: share of an adapter's inputs that are zeroed in training.
        targets: linear layers of the decoder that get an adapter.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """How texts become tokens.

    Attributes:
        max_query_tokens: a query's own tokens; the prompt around it is never cut.
        max_document_tokens: a document's own tokens.
        max_thought_tokens: tokens of a given reasoning; the closing behind it is never cut.
    """

    max_query_tokens: int = 64
    max_document_tokens: int = 256
    max_thought_tokens: int = 64


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which data sets, and how large a set is when the quickstart builds it from installed packages.

    Attributes:
        sets: folders of data sets, built ones or in BEIR's layout.
        weights: each set's share of the training pairs; empty is by their numbers.
        batches: of stage 1: `mixed` draws each pair from any set, `one_set` all pairs of a step from one,
            whose documents are harder negatives of each other than those of other sets.
        split: the split to train on.
        dev_split: the split that training is watched on; a set that has none gives up some of its training
            queries.
        dev_queries: of each set, so many at most; 0 watches nothing.
        dev_documents: of each set: all those judged for these queries, filled up with others to so many.
        rl_queries: stage 2 trains on so many of the training queries; 0 is all.
        rl_documents: stage 2 searches all documents judged for these, filled up with others to so many; 0 is
            the whole corpus.
        test_queries: of the test functions so many are searched for (quickstart).
    """

    sets: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    batches: Literal["mixed", "one_set"] = "mixed"
    split: str = "train"
    dev_split: str = "dev"
    dev_queries: int = 128
    dev_documents: int = 1000
    rl_queries: int = 0
    rl_documents: int = 0
    source: str = "python-functions"
    train_functions: int = 0
    dev_functions: int = 0
    test_functions: int = 0
    test_queries: int = 0


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW after a linear warm-up.

    Attributes:
        schedule: how the rate goes from its peak to the last step: a cosine or a line to its end, constant,
            or `wsd`, which is constant and falls along a line over the last fifth of the steps.
        final_share: the last step's share of the peak rate.
        weight_decay: of matrices; norms, biases and the embed token's row are never decayed.
        clip_norm: gradients longer than this are scaled down to it; 0 never does.
        row_scale: the embed token's row learns at this multiple of the rate: it starts from nothing while all
            else is trained, and a short run must move it as far as a token's row lies from the mean of the
            rows.
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
    """Stage 1: cross-entropy on the reply + KL to the base + InfoNCE + triplet margin; a weight of 0 leaves a
    term out.

    Attributes:
        global_batch: (query, document) pairs a step.
        encode_chunk: pairs whose activations are in memory at a time (GradCache); 0 is the whole batch,
            encoded once.
        temperature: τ of InfoNCE.
        directions: what InfoNCE holds a query and its document against: the query against documents and other
            queries, the document against queries and other documents.
        partition: one softmax over all directions, or one for each of the first and third, and their mean
            (symmetric InfoNCE).
        false_negative_margin: negatives within this cosine of the positive, or above it, are left out; None
            leaves none out.
        triplet_margin: θ, in cosine.
        matryoshka: dimensions at which the contrastive losses are taken too, the whole vector included; empty
            is the whole alone.
        negatives: judged irrelevant or mined documents a query.
        reasoned_share: share of queries in the reasoned format, in [0, 1].
        reasoning: where their reasoning text comes from: a column of the data set, what the untrained model
            writes itself, or key terms of the positive document.
        key_terms: how many terms a key-term reasoning names.
        eval_every: steps from one evaluation on the development queries to the next; 0 never looks.
        save_every: steps from one checkpoint to the next; there is one after every evaluation too.
        keep: so many of the newest checkpoints stay, and the best.
        keep_every: checkpoints of multiples of so many steps stay too; 0 keeps none for that.
        max_skipped: steps with a loss or gradient that is not finite are skipped; so many in a row end the
            run.
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


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How reasoning is written.

    Attributes:
        max_think_tokens: budget of generated tokens before the embed token is forced.
        temperature: 0 is greedy.
        top_k: only the so many best tokens are sampled; 0 leaves all.
        top_p: after `top_k`, only the best tokens that together have this probability; 1 leaves all.
        prefill_chunk: prompts longer than this many tokens are read in chunks; 0 reads any at once.
    """

    max_think_tokens: int = 32
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    prefill_chunk: int = 1024


@dataclass(frozen=True, kw_only=True)
class RlConfig:
    """Stage 2 (GRPO).

    Attributes:
        global_queries: queries a step; each is sampled `group_size` times.
        micro_queries: queries whose replies' activations are in memory at a time, whole groups; 0 is all at
            once.
        variant: how tokens are weighed: `grpo` by row, `dr_grpo` by the budget of a reply, `dapo` over the
            whole batch; `gspo` has one ratio a reply and wants clips of about 3e-4.
        clip_low, clip_high: the ratio is clipped to 1 − clip_low … 1 + clip_high; a higher clip_high is
            clip-higher.
        beta: weight of the KL term to the reference; 0 runs no reference.
        kl_estimator: k3 is never negative and low in variance, k2 has the gradient of the KL, k1 has none on
            average.
        scale_rewards: advantages are divided by the standard deviation of their group, of the batch, or not.
        inner_epochs: passes over the same rollouts; the ratio is to the policy before the first.
        importance_cap: tokens are weighed by how much likelier the trainer finds them than the sampler did,
            up to this; 0 does not.
        reward: `dcg` is a soft nDCG, `log_rank` the logarithm of the best positive's rank, `rank_margin`
            ranks and the margin to the hardest negatives, `gain_over_direct` the gain in dcg over the query's
            direct embedding.
        reward_temperature: of the soft ranks, in cosine.
        margin_weight: share of the margin in `rank_margin`, in [0, 1].
        margin_width: the margin, in cosine, from which on a larger one earns no more (`rank_margin`).
        hard_negatives: how many of the highest negatives the margin is taken to (`rank_margin`).
        floor_gap: the worst valid reply is so far above an invalid one, of a reward in [0, 1].
        min_tokens: a reply of fewer tokens, its closing words included, is invalid: a policy whose reasoning
            does not help yet learns first of all to write none, and then cannot learn to reason.
        length_weight: weight of brevity beside retrieval's 1; 0 leaves it out.
        free_tokens: so many tokens of a reply cost nothing; from there to `sampler.max_think_tokens` the cost
            rises along a line.
        infonce_weight: auxiliary InfoNCE on the group's query embeddings.
        infonce_negatives: so many of the step's candidates, the best of each query first, are what they are
            told apart from, beside the other queries' documents; 0 leaves these alone.
        infonce_alike: but no candidate whose cosine to one of these documents is higher: it says the same,
            and only nobody judged it.
        infonce_train_documents: the update encodes the queries' own documents itself, so that their
            embeddings are trained as well; otherwise all documents' are constants in it, which parameters
            that were moved for the queries alone move along.
        eval_every: steps from one evaluation on the development queries, direct and reasoned, to the next; 0
            never looks.
        snapshot_every: steps from one checkpoint, which the indexer makes an index of, to the next;
            evaluations make one too.
        keep: so many of the newest checkpoints stay, and the best.
        keep_every: checkpoints of multiples of so many steps stay too; 0 keeps none for that.
        sample_every: every so many rollouts one is written to `samples.jsonl`.
        max_skipped: updates with a loss or gradient that is not finite are skipped; so many in a row end the
            run.
        collapse_steps: a valid rate below `collapse_valid`, or an entropy (nats a token) below
            `collapse_entropy`, for so many steps in a row ends the run; 0 never does.
        min_swaps: the run goes on past `steps` until so many new index versions were taken in.
    """

    steps: int = 1000
    global_queries: int = 8
    micro_queries: int = 0
    group_size: int = 8
    variant: Literal["grpo", "dr_grpo", "dapo", "gspo"] = "grpo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    beta: float = 0.04
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    scale_rewards: Literal["group", "batch", "none"] = "group"
    inner_epochs: int = 1
    importance_cap: float = 0.0
    reward: Literal["dcg", "log_rank", "rank_margin", "gain_over_direct"] = "dcg"
    reward_temperature: float = 0.02
    margin_weight: float = 0.5
    margin_width: float = 0.5
    hard_negatives: int = 4
    floor_gap: float = 0.1
    min_tokens: int = 0
    length_weight: float = 0.0
    free_tokens: int = 0
    infonce_weight: float = 0.1
    infonce_negatives: int = 0
    near_duplicate_cosine: float = 1.0
    infonce_train_documents: bool = False
    infonce_temperature: float = 0.05
    eval_every: int = 0
    save_every: int = 50
    keep: int = 3
    keep_every: int = 0
    sample_every: int = 16
    max_skipped: int = 10
    collapse_steps: int = 20
    collapse_valid: float = 0.1
    collapse_entropy: float = 0.01
    min_swaps: int = 0
    max_extra_steps: int = 0
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Over how many devices each axis goes; one of them may be -1 and takes the devices that the others
    leave.

    Attributes:
        slice: rows of a batch, over TPU slices that a slower network joins; parameters are repeated, so that
            gradients alone cross it.
        data: rows of a batch; parameters are repeated.
        fsdp: rows of a batch, and the parameters' hidden dimension.
        tensor: heads, the feed-forward dimension and the vocabulary.
        sequence: tokens of a row, where they divide; keys and values are gathered. For rows too long for one
            device.
    """

    slice: int = 1
    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    sequence: int = 1


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """The retrieval environment.

    Attributes:
        kind: `auto` is ScaNN where it is installed, else exact search.
        scoring: by what documents are ranked: `fresh` encodes candidates anew with the current parameters,
            `stale` takes the index's vectors as they are, `consistent_stale` embeds the queries with the
            index's checkpoint as well.
        candidates: documents ranked per query.
        neighbours: for each candidate, so many of the documents nearest to it are candidates too.
        refresh_budget: documents re-encoded a step at most.
        overlay_max_age: steps after which a re-encoded vector counts as stale.
        drift_every: every so many steps a fixed part of the corpus is encoded, and a checkpoint saved where
            it has drifted; 0 never.
        drift_documents: how many documents that part has.
        drift_cosine: mean cosine to the last checkpoint's vectors under which they have drifted.
        drift_overlap: share of the ten nearest documents still the same under which they have.
        max_age: steps; where the index is older, `when_old` is done; 0 is no limit.
        when_old: `wait` for a newer one, `warn` and go on, or `stop` with a checkpoint.
        recall_gate: recall@10 against exact search under which a version is not published.
        vector_dtype: how a version keeps its vectors.
        folder: where versions are kept, a folder or a bucket (`gs://…`); empty is the run's `index`.
        keep_versions: how many versions stay there.
        local: the trainer starts an indexer beside it; without, one has to be started elsewhere (`search-r3
            indexer`).
        silent_seconds: an indexer that gives no sign of life for so long is ended and started again.
        nice: added to the indexer's CPU priority, 0 to 19.
        threads: CPU threads of the indexer; 0 leaves the choice to XLA.
        cores: CPU cores that the indexer keeps to; none is all.
        mesh: the devices of an indexer process, over which it encodes.
    """

    kind: Literal["auto", "scann", "exact"] = "auto"
    scoring: Literal["fresh", "stale", "consistent_stale"] = "fresh"
    candidates: int = 64
    neighbours: int = 0
    refresh_budget: int = 256
    overlay_max_age_steps: int = 4
    drift_every: int = 0
    drift_documents: int = 1000
    drift_cosine: float = 0.95
    drift_overlap: float = 0.7
    max_age: int = 0
    on_stale_index: Literal["wait", "warn", "stop"] = "wait"
    recall_gate: float = 0.99
    vector_dtype: Literal["float32", "bfloat16"] = "float32"
    folder: str = ""
    keep_versions: int = 2
    local: bool = True
    silent_seconds: float = 600.0
    nice: int = 10
    threads: int = 0
    cores: tuple[int, ...] = ()
    mesh: MeshConfig = field(default_factory=MeshConfig)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One experiment: everything that decides what a run computes.

    Attributes:
        model: what training starts from: for stage 2 mostly a run of stage 1.
        start_step: where the model is a run, which of its checkpoints.
        remat: what the backward pass finds saved of a layer: everything, its matrix products, its input in
            the host's memory, its input.
        attention: `splash` is the TPU kernel; elsewhere it is interpreted, slowly.
    """

    model: str = "smollm2"
    start_step: Step = None
    seed: int = 0
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    remat: Literal["none", "dots", "offload", "full"] = "full"
    attention: Literal["xla", "splash"] = "xla"
    data: DataConfig = field(default_factory=DataConfig)
    text: TextConfig = field(default_factory=TextConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    rl: RlConfig = field(default_factory=RlConfig)
    index: IndexConfig = field(default_factory=IndexConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)


def config_from_dict(kind: Any, fields: dict[str, Any]) -> Any:
    """A config dataclass from the plain values that `dataclasses.asdict` and JSON left of it; a setting that
    is missing has its default."""
    values = {}
    for entry in dataclasses.fields(kind):
        default = (
            entry.default_factory() if entry.default_factory is not dataclasses.MISSING else entry.default
        )
        if entry.name not in fields and default is not dataclasses.MISSING:
            values[entry.name] = default
            continue
        value = fields[entry.name]
        if dataclasses.is_dataclass(default):
            value = config_from_dict(type(default), value)
        elif isinstance(value, list):
            value = tuple(value)
        values[entry.name] = value
    return kind(**values)
