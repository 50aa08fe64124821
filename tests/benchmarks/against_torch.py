"""Ours and torch on the same work in turn: encoding, LoRA step, full step, generation, and the matrix
products of a layer alone. Prints ratios of medians, and peak memory.

Command: python tests/benchmarks/against_torch.py --data FOLDER [--tasks encode lora full generate product]
`--data` is a BEIR folder (MedQuAD for the figures in the README); nothing else may run on the machine
meanwhile.

Each side is a process of its own: it loads, warms up on the shapes it will see, then works portion by portion
as it is told to.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import sides
import tyro
from products import gflop, our_products, torch_products

Task = Literal["encode", "lora", "full", "generate", "product"]
Work = Callable[[int], object]
SIDES = ("ours", "torch")
QUERY_TOKENS, TEMPERATURE, NEW_TOKENS, GROUP = 32, 0.05, 32, 8
LORA_RANK, LORA_ALPHA, LEARNING_RATE = 16, 32, 1e-4


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to run.

    Attributes:
        data: BEIR folder whose documents are encoded and whose training pairs are trained on.
        tasks: which of the five.
        passages: documents to encode, in `rounds` portions.
        max_tokens: a passage's own tokens when encoding.
        train_tokens: a passage's own tokens when training.
        pairs: (query, passage) pairs a training step.
        rounds: portions of work a session.
        sessions: how often each side is started; the ratio is that of the medians over all rounds.
        torch_batch: rows a batch of SentenceTransformer.
        remat: what our training keeps for the backward pass.
        out: JSON file for the result.
    """

    data: Path
    tasks: tuple[Task, ...] = ("encode", "lora", "full", "generate", "product")
    passages: int = 2000
    max_tokens: int = 512
    train_tokens: int = 128
    pairs: int = 32
    rounds: int = 3
    sessions: int = 2
    torch_batch: int = 32
    remat: Literal["dots", "none", "full"] = "dots"
    out: Path | None = None


def main() -> None:
    """Run each task on both sides in turn and print a line for it."""
    arguments = tyro.cli(Arguments, description=__doc__)
    from search_r3_jax.data.dataset import load_collection
    from search_r3_jax.hub.export import export_model
    from search_r3_jax.hub.load_model import load_model

    collection = load_collection(arguments.data, "train")
    bodies = {document.doc_id: document.body for document in collection.documents}
    pairs = [(query.text, bodies[min(query.positives)]) for query in collection.queries]
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = export_model(load_model("smollm2"), Path(temporary) / "model")
        for task in arguments.tasks:
            work = {
                "texts": list(bodies.values())[: arguments.passages],
                "pairs": pairs[: arguments.pairs * arguments.rounds],
                "prompts": [query for query, _ in pairs[:8]],
                "rounds": arguments.rounds,
                "max_tokens": arguments.max_tokens,
                "train_tokens": arguments.train_tokens,
                "torch_batch": arguments.torch_batch,
                "remat": arguments.remat,
            }
            file = Path(temporary) / "work.json"
            file.write_text(json.dumps(work))
            results[task] = measure(task, folder, file, arguments)
            print(f"{task:<9} {describe(results[task])}", flush=True)
            if task == "product":
                for side in SIDES:
                    rate = gflop(str(folder)) / statistics.median(results[task][side]["seconds"])
                    results[task][side]["gflop_per_second"] = rate
                    print(f"          {side} {rate:.0f} GFLOP/s", flush=True)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(results, indent=2) + "\n")


def describe(result: dict[str, Any]) -> str:
    ours, theirs = result["ours"], result["torch"]
    mine, other = (statistics.median(side["seconds"]) for side in (ours, theirs))
    return (
        f"ours {mine:7.2f} s  torch {other:7.2f} s  ratio {result['ratio']:.2f}  "
        f"peak memory {ours['peak_mib']:.0f} / {theirs['peak_mib']:.0f} MiB  start {min(ours['start']):.0f} "
        f"/ {min(theirs['start']):.0f} s"
    )


def measure(task: Task, folder: Path, file: Path, arguments: Arguments) -> dict[str, Any]:
    """Both sides in turn, `sessions` times; one process at a time, because each may want most of the
    machine's memory."""
    result: dict[str, Any] = {side: {"seconds": [], "peak_mib": 0.0, "start": []} for side in SIDES}
    for session in range(arguments.sessions):
        for side in SIDES if session % 2 == 0 else reversed(SIDES):
            started = time.perf_counter()
            process = sides.start(__file__, side, task, str(folder), str(file))
            sides.told(process)
            result[side]["start"].append(time.perf_counter() - started)
            result[side]["seconds"] += [sides.told(process, i)["seconds"] for i in range(arguments.rounds)]
            result[side]["peak_mib"] = max(result[side]["peak_mib"], sides.dismissed(process))
    ours, theirs = (statistics.median(result[side]["seconds"]) for side in SIDES)
    return result | {"ratio": theirs / ours}


def worker(side: str, task: str, folder: str, file: str) -> None:
    """Load, warm up, say so; then one portion of work a line."""
    from search_r3_jax.runtime_env import configure_libraries

    configure_libraries()
    given = json.loads(Path(file).read_text())
    makers: dict[tuple[str, str], Callable[..., Work]] = {
        ("ours", "encode"): our_encoding,
        ("torch", "encode"): torch_encoding,
        ("ours", "lora"): our_training,
        ("torch", "lora"): torch_training,
        ("ours", "full"): our_training,
        ("torch", "full"): torch_training,
        ("ours", "generate"): our_generation,
        ("torch", "generate"): torch_generation,
        ("ours", "product"): our_products,
        ("torch", "product"): torch_products,
    }
    make = makers[side, task]
    work = make(folder, given, task == "lora") if task in ("lora", "full") else make(folder, given)
    # Training shapes may differ from portion to portion; the others see all theirs in the first.
    for i in range(given["rounds"] if task in ("lora", "full") else 1):
        work(i)

    def timed(number: int) -> dict[str, float]:
        started = time.perf_counter()
        work(number)
        return {"seconds": time.perf_counter() - started}

    sides.serve(timed)


def portion(items: list[Any], number: int, rounds: int) -> list[Any]:
    """Every `rounds`-th item: each portion has texts of all lengths."""
    return items[number::rounds]


def our_encoding(folder: str, given: dict[str, Any]) -> Work:
    from search_r3_jax import Embedder

    embedder = Embedder.load(folder, max_tokens=given["max_tokens"])
    return lambda i: embedder.encode(
        portion(given["texts"], i, given["rounds"]), kind="document", progress=False
    )


def torch_encoding(folder: str, given: dict[str, Any]) -> Work:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(folder, device="cpu")
    room = model.max_seq_length
    assert room is not None
    # The folder is exported for 512 tokens of text.
    model.max_seq_length = room - 512 + given["max_tokens"]
    return lambda i: model.encode(
        portion(given["texts"], i, given["rounds"]),
        prompt_name="document",
        batch_size=given["torch_batch"],
        show_progress_bar=False,
    )


def our_training(folder: str, given: dict[str, Any], lora: bool) -> Work:
    import jax
    from flax import nnx

    from search_r3_jax.config import (
        LoraConfig,
        OptimizerConfig,
        RunConfig,
        SftConfig,
        TextConfig,
    )
    from search_r3_jax.data.collection import Collection, Document, Query
    from search_r3_jax.hub.load_model import load_model, with_lora
    from search_r3_jax.models.lora import trainable_filter
    from search_r3_jax.text.prompts import Prompter
    from search_r3_jax.training.optimizer import make_optimizer
    from search_r3_jax.training.sft import make_pipeline
    from search_r3_jax.training.sft_step import make_step
    from search_r3_jax.training.state import TrainState

    pairs = given["pairs"]
    collection = Collection(
        name="pairs",
        split="train",
        documents=tuple(Document(doc_id=str(i), title="", text=text) for i, (_, text) in enumerate(pairs)),
        queries=tuple(
            Query(query_id=str(i), text=text, positives={str(i): 1}) for i, (text, _) in enumerate(pairs)
        ),
    )
    config = RunConfig(
        compute_dtype="float32",
        remat=given["remat"],
        text=TextConfig(max_query_tokens=QUERY_TOKENS, max_document_tokens=given["train_tokens"]),
        lora=LoraConfig(rank=LORA_RANK if lora else 0, alpha=LORA_ALPHA),
        sft=SftConfig(
            steps=1000,
            global_batch=len(pairs) // given["rounds"],
            temperature=TEMPERATURE,
            # What torch computes here as well: InfoNCE and the cross-entropy.
            triplet_weight=0.0,
            kl_weight=0.0,
            optimizer=OptimizerConfig(learning_rate=LEARNING_RATE),
        ),
    )
    model = with_lora(
        load_model(folder, compute_dtype=config.compute_dtype, remat=config.remat), config.lora, seed=0
    )
    prompter = Prompter(model.tokenizer)
    pipeline = make_pipeline(config, [collection], prompter)
    graph, params, frozen = nnx.split(model.decoder, trainable_filter(model.decoder), ...)
    optimizer = make_optimizer(config.sft.optimizer, config.sft.steps)
    state = TrainState(params, optimizer.init(params), jax.numpy.zeros((), "int32"))
    step = make_step(graph, prompter, optimizer, config.sft)
    del model, params

    def work(i: int) -> None:
        nonlocal state
        state, scalars = step(state, frozen, pipeline.batch(i))
        jax.block_until_ready((state, scalars))

    return work


def torch_training(folder: str, given: dict[str, Any], lora: bool) -> Work:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from search_r3_jax.text.prompts import Prompter

    prompter = Prompter(AutoTokenizer.from_pretrained(folder))
    model: Any = AutoModelForCausalLM.from_pretrained(folder).train()
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(
            model,
            LoraConfig(
                r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
        )
    base = model.get_base_model() if lora else model
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    closing = len(prompter.direct.closing)

    def padded(texts: list[str], tokens: int) -> tuple[Any, Any, Any]:
        rows = [[*prompter.direct.prefix, *row] for row in prompter.direct_rows(texts, tokens)]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        lengths = torch.tensor([len(row) for row in rows])
        return ids, (torch.arange(longest)[None] < lengths[:, None]).long(), lengths

    def work(i: int) -> None:
        pairs = portion(given["pairs"], i, given["rounds"])
        hidden, vectors, batches = [], [], []
        for texts, tokens in (
            ([q for q, _ in pairs], QUERY_TOKENS),
            ([d for _, d in pairs], given["train_tokens"]),
        ):
            ids, mask, lengths = padded(texts, tokens)
            states = base.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            vectors.append(torch.nn.functional.normalize(states[torch.arange(len(ids)), lengths - 1], dim=-1))
            hidden.append(states)
            batches.append((ids, lengths))
        similarities = vectors[0] @ vectors[1].T / TEMPERATURE
        contrast = torch.nn.functional.cross_entropy(similarities, torch.arange(len(pairs)))
        ids, lengths = batches[0]
        at = lengths[:, None] - closing + torch.arange(closing)[None]
        row = torch.arange(len(ids))[:, None]
        # The head runs on the reply's positions only, as it does with us.
        logits = base.lm_head(hidden[0][row, at - 1])
        language = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[row, at].flatten())
        (contrast + language).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return work


def our_generation(folder: str, given: dict[str, Any]) -> Work:
    from flax import nnx

    from search_r3_jax.config import SamplerConfig
    from search_r3_jax.hub.load_model import load_model
    from search_r3_jax.rollout.sampler import Sampler, rollout_seeds
    from search_r3_jax.text.prompts import Prompter

    model = load_model(folder)
    graph, state = nnx.split(model.decoder)
    # Embedding included: the closing is forced behind the budget.
    sampler = Sampler(
        graph, Prompter(model.tokenizer), SamplerConfig(max_think_tokens=NEW_TOKENS, temperature=1.0)
    )

    def work(i: int) -> None:
        seeds = rollout_seeds(0, i, range(len(given["prompts"])), GROUP)
        rollout = sampler.sample(state, given["prompts"], seeds, max_tokens=QUERY_TOKENS)
        assert rollout.ids.shape[0] == len(given["prompts"]) * GROUP

    return work


def torch_generation(folder: str, given: dict[str, Any]) -> Work:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from search_r3_jax.text.prompts import Prompter

    prompter = Prompter(AutoTokenizer.from_pretrained(folder))
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    rows = [[*prompter.reason.prefix, *row] for row in prompter.reason_rows(given["prompts"], QUERY_TOKENS)]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])

    def work(i: int) -> None:
        torch.manual_seed(i)
        with torch.no_grad():
            out = model.generate(
                ids,
                attention_mask=mask,
                do_sample=True,
                top_k=0,
                num_return_sequences=GROUP,
                min_new_tokens=NEW_TOKENS,
                max_new_tokens=NEW_TOKENS,
                pad_token_id=0,
            )
        assert out.shape == (len(rows) * GROUP, longest + NEW_TOKENS)

    return work


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(*sys.argv[2:6])
    else:
        main()
