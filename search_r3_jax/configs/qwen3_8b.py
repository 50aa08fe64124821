"""Qwen3-8B with adapters, for a v5p-16 (8 chips): batches of 1,024 pairs through GradCache, then of 128
queries in parts.

search-r3 sft --config qwen3_8b --run SHARED/runs/sft --data.sets DATA/…
search-r3 rl --config qwen3_8b --run SHARED/runs/rl --model SHARED/runs/sft --start-step best \\
    --data.sets DATA/… --rl.min-tokens 12
"""

import dataclasses

from search_r3_jax.configs.qwen25_7b_lora import config as qwen25_7b_lora

config = dataclasses.replace(
    qwen25_7b_lora,
    model="Qwen/Qwen3-8B",
    sft=dataclasses.replace(qwen25_7b_lora.sft, encode_chunk=128),
    rl=dataclasses.replace(qwen25_7b_lora.rl, micro_queries=64),
)
