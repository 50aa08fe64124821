"""Qwen2.5-7B-Instruct with adapters, for a v5e-16: batches of 1,024 pairs through GradCache, then of 128
queries in parts.

search-r3 sft --config qwen25_7b_lora --run SHARED/runs/sft --data.sets DATA/…
search-r3 rl --config qwen25_7b_lora --run SHARED/runs/rl --model SHARED/runs/sft --start-step best \\
    --data.sets DATA/… --rl.min-tokens 12
"""

import dataclasses

from search_r3_jax.config import LoraConfig
from search_r3_jax.configs.qwen25_7b import config as qwen25_7b

config = dataclasses.replace(
    qwen25_7b,
    lora=LoraConfig(rank=32, alpha=64.0),
    sft=dataclasses.replace(
        qwen25_7b.sft,
        encode_chunk=32,
        optimizer=dataclasses.replace(qwen25_7b.sft.optimizer, learning_rate=1e-4, weight_decay=0.0),
    ),
    rl=dataclasses.replace(
        qwen25_7b.rl,
        micro_queries=16,
        optimizer=dataclasses.replace(qwen25_7b.rl.optimizer, learning_rate=1e-5),
    ),
)
