"""Qwen2.5-7B-Instruct, all parameters, for a v5p-16 (8 chips): batches of 1,024 pairs through GradCache, then
of 128 queries in parts.

search-r3 sft --config qwen25_7b --run SHARED/runs/sft --data.sets DATA/…
search-r3 rl --config qwen25_7b --run SHARED/runs/rl --model SHARED/runs/sft --start-step best \\
    --data.sets DATA/… --rl.min-tokens 12
"""

import dataclasses

from search_r3_jax.configs.qwen25_1p5b import config as smaller

config = dataclasses.replace(
    smaller,
    model="Qwen/Qwen2.5-7B-Instruct",
    sft=dataclasses.replace(
        smaller.sft,
        global_batch=1024,
        encode_chunk=64,
        optimizer=dataclasses.replace(smaller.sft.optimizer, learning_rate=1e-5),
    ),
    rl=dataclasses.replace(smaller.rl, micro_queries=64),
)
