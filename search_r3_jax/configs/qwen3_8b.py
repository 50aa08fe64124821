"""Stage 1 of Qwen3-8B with adapters, batches of 1,024 pairs through GradCache; a v5p-16 (8 chips).

search-r3 sft --config qwen3_8b --run SHARED/runs/qwen3_8b --data.sets DATA/…
"""

import dataclasses

from search_r3_jax.configs.qwen25_7b_lora import config as qwen25_7b_lora

config = dataclasses.replace(
    qwen25_7b_lora, model="Qwen/Qwen3-8B", sft=dataclasses.replace(qwen25_7b_lora.sft, encode_chunk=128)
)
