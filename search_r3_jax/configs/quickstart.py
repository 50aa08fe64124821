"""The whole method, small: SmolLM2-135M on functions of the installed Python packages.

Command: search-r3 quickstart --out runs/quickstart
Chips: none; two CPU cores.
"""

from search_r3_jax.config import (
    DataConfig,
    FunctionsConfig,
    IndexConfig,
    LoraConfig,
    OptimizerConfig,
    RlConfig,
    RunConfig,
    SamplerConfig,
    SftConfig,
    TextConfig,
)

config = RunConfig(
    model="smollm2",
    compute_dtype="float32",
    remat="dots",
    data=DataConfig(functions=FunctionsConfig(train=384, dev=50, test=600, test_queries=128)),
    text=TextConfig(max_query_tokens=32, max_document_tokens=21, max_thought_tokens=24),
    lora=LoraConfig(rank=16, alpha=32.0),
    sft=SftConfig(
        steps=40,
        global_batch=16,
        triplet_weight=0.0,
        kl_weight=0.0,
        reasoned_share=0.125,
        reasoning="key_terms",
        key_terms=4,
        save_every=20,
        optimizer=OptimizerConfig(learning_rate=1.5e-3, row_scale=10.0, warmup_steps=2),
    ),
    rl=RlConfig(
        steps=6,
        global_queries=4,
        group_size=8,
        save_every=2,
        min_swaps=1,
        max_extra_steps=8,
        sampler=SamplerConfig(max_think_tokens=28),
        optimizer=OptimizerConfig(learning_rate=1e-4),
    ),
    index=IndexConfig(candidates=32, refresh_budget=64, overlay_max_age_steps=2),
)
