"""Memory of a stage-1 step whose batch grows while its chunks do not: `python tests/benchmarks/step_memory.py
[--out FILE]`.

SmolLM2-135M, adapters of rank 16, float32, all four losses, encode_chunk 16. Every batch size has a process
of its own, which compiles the step; counted is the compiler's plan of temporary memory. Up to 1,024 pairs the
process takes a step too, and the peak of its anonymous pages counts, as it is and above what is there before
the step.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

SIZES = (64, 1024, 4096)
LARGEST_STEP = 1024
CHUNK = 16


def measure(global_batch: int, *, planned_only: bool) -> dict[str, Any]:
    """A step of so many pairs."""
    import jax
    from flax import nnx
    from helpers.peak_memory import PeakMemory
    from helpers.tiny_models import word_collection

    from search_r3_jax.config import LoraConfig, OptimizerConfig, RunConfig, SftConfig, TextConfig
    from search_r3_jax.hub.load_model import load_model, with_lora
    from search_r3_jax.models.lora import trainable_filter
    from search_r3_jax.text.prompts import Prompter
    from search_r3_jax.training.optimizer import make_optimizer
    from search_r3_jax.training.sft import make_pipeline
    from search_r3_jax.training.sft_step import make_step
    from search_r3_jax.training.state import TrainState

    config = RunConfig(
        compute_dtype="float32",
        remat="dots",
        text=TextConfig(max_query_tokens=8, max_document_tokens=16),
        lora=LoraConfig(),
        sft=SftConfig(
            global_batch=global_batch, encode_chunk=CHUNK, optimizer=OptimizerConfig(learning_rate=1e-4)
        ),
    )
    model = with_lora(
        load_model("smollm2", compute_dtype=config.compute_dtype, remat=config.remat), config.lora, seed=0
    )
    prompter = Prompter(model.tokenizer)
    pipeline = make_pipeline(config, [word_collection(documents=SIZES[-1], queries=SIZES[-1])], prompter)
    graph, params, frozen = nnx.split(model.decoder, trainable_filter(model.decoder), ...)
    del model
    optimizer = make_optimizer(config.sft.optimizer, 10)
    state = TrainState(params, optimizer.init(params), jax.numpy.zeros((), "int32"))
    batch = pipeline.batch(0)
    compiled = (
        jax.jit(make_step(graph, prompter, optimizer, config.sft)).lower(state, frozen, batch).compile()
    )
    planned = compiled.memory_analysis()
    assert planned is not None
    found = {"global_batch": global_batch, "planned_mib": round(planned.temp_size_in_bytes / 2**20, 1)}
    if global_batch > LARGEST_STEP or planned_only:
        return found
    with PeakMemory() as memory:
        _, scalars = compiled(state, frozen, batch)
        loss = float(scalars["loss"])
    measured = {"step_mib": memory.peak - memory.start, "peak_mib": memory.peak}
    return (
        found | {name: round(size / 2**20, 1) for name, size in measured.items()} | {"loss": round(loss, 4)}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", type=int, help="this batch size alone, in this process")
    parser.add_argument("--planned-only", action="store_true", help="compile, and take no step")
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(measure(arguments.only, planned_only=arguments.planned_only)))
        return
    results = []
    for size in SIZES:
        flags = ["--planned-only"] if arguments.planned_only else []
        done = subprocess.run(
            [sys.executable, __file__, "--only", str(size), *flags],
            capture_output=True,
            text=True,
            check=True,
        )
        results.append(json.loads(done.stdout.splitlines()[-1]))
        growth = {
            name: round(value / results[0][name], 3)
            for name, value in results[-1].items()
            if name.endswith("_mib")
        }
        print(results[-1], "relative to the first:", growth, flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps({"encode_chunk": CHUNK, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
