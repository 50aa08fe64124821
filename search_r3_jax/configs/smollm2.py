"""Both stages of SmolLM2-135M-Instruct on one real collection, on two CPU cores.

search-r3 sft --config smollm2 --run runs/sft --data.sets DATA/strategyqa
search-r3 rl --config smollm2 --run runs/rl --model runs/sft --start-step best --data.sets DATA/strategyqa \\
    --rl.min-tokens 12
"""

from search_r3_jax.config import (
    DataConfig,
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
    data=DataConfig(dev_queries=96, dev_documents=400),
    text=TextConfig(max_query_tokens=32, max_document_tokens=96, max_thought_tokens=24),
    lora=LoraConfig(rank=16, alpha=32.0),
    sft=SftConfig(
        steps=50,
        global_batch=24,
        # At 1 the model never writes the embed token by itself: the base does not begin the closing, and
        # holds it back.
        kl_weight=0.1,
        reasoned_share=0.125,
        reasoning="key_terms",
        key_terms=6,
        eval_every=40,
        save_every=20,
        optimizer=OptimizerConfig(learning_rate=1e-3, row_scale=10.0, warmup_steps=6),
    ),
    rl=RlConfig(
        steps=100,
        global_queries=8,
        group_size=8,
        eval_every=25,
        save_every=25,
        sampler=SamplerConfig(max_think_tokens=32),
        optimizer=OptimizerConfig(learning_rate=2e-4, warmup_steps=5),
    ),
    index=IndexConfig(candidates=48, refresh_budget=96, overlay_max_age_steps=4),
)
