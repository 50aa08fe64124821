"""Qwen2.5-1.5B-Instruct, all parameters, for a v5e-16: batches of 4,096 pairs through GradCache, then of 128
queries in parts.

search-r3 sft --config qwen25_1p5b --run SHARED/runs/sft --data.sets DATA/…
search-r3 rl --config qwen25_1p5b --run SHARED/runs/rl --model SHARED/runs/sft --start-step best \\
    --data.sets DATA/… --rl.min-tokens 12
"""

from search_r3_jax.config import (
    DataConfig,
    LoraConfig,
    OptimizerConfig,
    RlConfig,
    RunConfig,
    SamplerConfig,
    SftConfig,
    TextConfig,
)

config = RunConfig(
    model="Qwen/Qwen2.5-1.5B-Instruct",
    compute_dtype="bfloat16",
    remat="dots",
    attention="splash",
    data=DataConfig(dev_queries=512, dev_documents=10_000),
    text=TextConfig(max_query_tokens=128, max_document_tokens=384, max_thought_tokens=96),
    lora=LoraConfig(rank=0),
    sft=SftConfig(
        steps=2000,
        global_batch=4096,
        encode_chunk=64,
        negatives=1,
        reasoned_share=0.125,
        reasoning="key_terms",
        key_terms=8,
        eval_every=200,
        save_every=100,
        optimizer=OptimizerConfig(learning_rate=2e-5, row_scale=10.0, warmup_steps=100, weight_decay=0.01),
    ),
    rl=RlConfig(
        steps=1000,
        global_queries=128,
        # All at once would not fit a v5e-16.
        micro_queries=32,
        group_size=16,
        # Without a penalty no reference is read.
        beta=0.0,
        eval_every=100,
        save_every=50,
        sampler=SamplerConfig(max_think_tokens=96),
        optimizer=OptimizerConfig(learning_rate=1e-6, warmup_steps=20),
    ),
)
