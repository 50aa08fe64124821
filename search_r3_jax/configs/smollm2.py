"""Stage 1 of SmolLM2-135M-Instruct on one real collection, on two CPU cores.

search-r3 sft --config smollm2 --run runs/cosqa --data.sets DATA/cosqa
"""

from search_r3_jax.config import DataConfig, LoraConfig, OptimizerConfig, RunConfig, SftConfig, TextConfig

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
        # At 1 the model never writes the embed token by itself: the base does not begin the closing, and holds it back.
        kl_weight=0.1,
        reasoned_share=0.125,
        reasoning="key_terms",
        key_terms=6,
        eval_every=40,
        save_every=20,
        optimizer=OptimizerConfig(learning_rate=1e-3, row_scale=10.0, warmup_steps=6),
    ),
)
