"""Stage 1 of Qwen3-8B with adapters, batches of 1,024 pairs through GradCache; a v5p-16 (8 chips).

search-r3 sft --config qwen3_8b --run SHARED/runs/qwen3_8b --data.sets DATA/…
"""

import dataclasses

from search_r3_jax.config import LoraConfig
from search_r3_jax.configs.qwen25_7b import config as qwen25_7b

config = dataclasses.replace(
    qwen25_7b,
    model="Qwen/Qwen3-8B",
    lora=LoraConfig(rank=32, alpha=64.0),
    sft=dataclasses.replace(
        qwen25_7b.sft,
        optimizer=dataclasses.replace(qwen25_7b.sft.optimizer, learning_rate=1e-4, weight_decay=0.0),
    ),
)
