"""Is training held up by its checkpoints? Stage 1 of SmolLM2-135M with one every 20 steps: adapters, and all
parameters.

    python tests/benchmarks/checkpoint_stall.py [--out FOLDER]

`blocked` is what the loop waited for its saves (which is logged as `save_seconds`), as a share of all time;
`slowdown` compares the two steps after a save, beside which it is written, with the others. Small batches:
the shorter the steps, the larger both are.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers.tiny_models import word_collection

from search_r3_jax.config import LoraConfig
from search_r3_jax.configs.smollm2 import config as smollm2
from search_r3_jax.data.development import TrainingSet
from search_r3_jax.files import write_json
from search_r3_jax.hub.load_model import load_model, with_lora
from search_r3_jax.training.sft import train_sft

RESULT = Path(__file__).with_suffix(".json")
EVERY, PERIODS = 20, 3
BESIDE = 2


def measured(run: Path, rank: int) -> dict[str, Any]:
    """What a run's saves cost it."""
    config = dataclasses.replace(
        smollm2,
        lora=LoraConfig(rank=rank),
        text=dataclasses.replace(smollm2.text, max_query_tokens=16, max_document_tokens=32),
        sft=dataclasses.replace(
            smollm2.sft,
            steps=EVERY * PERIODS + BESIDE,
            global_batch=4,
            reasoned_share=0.0,
            reasoning="off",
            eval_every=0,
            save_every=EVERY,
        ),
    )
    collection = word_collection(documents=200, queries=200)
    model = with_lora(load_model("smollm2", compute_dtype="float32", remat="dots"), config.lora, seed=0)
    train_sft(config, run, sets=[TrainingSet(train=collection, dev=None)], model=model)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # The first steps compile.
    counted = lines[2:]
    saves = [line["save_seconds"] for line in counted if line["save_seconds"]]
    beside = [line["seconds"] for line in counted if line["step"] >= EVERY and line["step"] % EVERY < BESIDE]
    others = [line["seconds"] for line in counted if line["step"] < EVERY or line["step"] % EVERY >= BESIDE]
    more = statistics.mean(saves) + BESIDE * (statistics.mean(beside) - statistics.mean(others))
    newest = max((run / "checkpoints").iterdir(), key=lambda folder: int(folder.name))
    return {
        "checkpoint_bytes": sum(file.stat().st_size for file in newest.rglob("*") if file.is_file()),
        "step_seconds": round(statistics.median(others), 3),
        "saves": len(saves),
        "save_seconds": round(statistics.median(saves), 3),
        "blocked": round(sum(saves) / sum(line["seconds"] + line["save_seconds"] for line in counted), 5),
        "slowdown_beside_a_save": round(statistics.median(beside) / statistics.median(others) - 1, 3),
        # What a period of 20 steps takes more than 20 steps that nothing is written beside.
        "cost": round(more / (EVERY * statistics.mean(others)), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULT, help="file for the result")
    arguments = parser.parse_args()
    found = {}
    for name, rank in (("adapters", 16), ("all parameters", 0)):
        with tempfile.TemporaryDirectory() as folder:
            found[name] = measured(Path(folder) / "run", rank)
        print(name, found[name], flush=True)
    write_json(arguments.out, found)


if __name__ == "__main__":
    main()
