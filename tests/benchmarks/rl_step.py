"""A whole step of stage 2 beside trl's GRPOTrainer on the same work: rollout, reward, update. Prints medians,
shares and ratios.

Command: python tests/benchmarks/rl_step.py --data FOLDER [--out FILE] `--data` is a BEIR folder (MedQuAD for
the figures in the README); nothing else may run on the machine meanwhile.

SmolLM2-135M-Instruct in float32, untrained, so that hardly a reply ends before its budget. Each side is a
process; both load, take a step that is not counted, and then take the same steps in turn. A step: Q queries ×
G replies of 32 tokens at temperature 1, a reward each, one AdamW update of adapters (rank 16, all linear
layers) by the GRPO loss with the k3 KL to the base: the same weights without them.

The same on both sides: weights, prompts token for token, queries, documents, `Environment` with its reward
and its budget of documents that are encoded anew in every step, an exact search. Not the same:
- Our sampler writes the five tokens of the closing behind the 32 and has the embedding with them; they are
part of our update's forward
  pass, but not of its loss. trl's reward function is given texts: it runs the model over prompt, reply and
  closing for that embedding.
- trl suppresses the end of a reply (`min_new_tokens`). Ours may end, but every row is as long as the budget
in each array and pass.
- Documents: ours share the prompt's prefix and go in batches of 1,024 tokens; torch's are whole texts,
`torch_documents` at a time.
- On a CPU trl's own head scores the prompt's positions too, and drops them; ours runs on the sampled tokens
alone.
- Ours also trains the embed token's row, and adds InfoNCE over the embeddings it has anyway. All replies are
scored as if the policy had ended them itself: else none would be, and the reward would have nothing to do.
The index holds vectors of each document's first tokens only, to be there soon; what it costs to search is the
same.

`--trl-rows` and `--trl-checkpointing` are by default what was fastest for trl.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import sides
import tyro
from sides import Clock

PHASES = ("rollout", "reward", "update")
SIDES = ("ours", "trl")
SHARED = {
    "temperature": 1.0,
    "beta": 0.04,
    "learning_rate": 1e-5,
    "lora_rank": 16,
    "lora_alpha": 32,
    "query_tokens": 32,
}
"""What both sides are told beside the arguments."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to run.

    Attributes:
        data: BEIR folder with the queries and the documents.
        steps: steps that count, of each side.
        queries: queries a step.
        group: replies a query.
        new_tokens: tokens a reply.
        documents: how many there are to be found.
        candidates: documents ranked a query, beside its positives.
        refresh: documents encoded anew a step.
        document_tokens: each document's own tokens; shorter ones are left out, so that neither side pads or
            compiles more than once.
        index_tokens: tokens of a document that its vector in the index is of.
        trl_rows: replies of a forward and backward pass of trl, which adds up gradients over a step's passes.
        trl_checkpointing: whether trl recomputes activations.
        torch_documents: documents a batch of torch's.
        threads: of torch; 0 leaves it to torch. Beside other work on the machine its threads wait for each
            other: then 1, under `taskset`.
        only: one side alone, to look for its best settings.
        out: JSON file for the result.
    """

    data: Path
    steps: int = 3
    queries: int = 8
    group: int = 8
    new_tokens: int = 32
    documents: int = 2000
    candidates: int = 64
    refresh: int = 64
    document_tokens: int = 96
    index_tokens: int = 4
    trl_rows: int = 16
    trl_checkpointing: bool = False
    torch_documents: int = 16
    threads: int = 0
    only: str = ""
    out: Path | None = None


def main() -> None:
    """Run both sides step by step and print what each phase took."""
    arguments = tyro.cli(Arguments, description=__doc__)
    running = [side for side in SIDES if arguments.only in ("", side)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = prepare(arguments, Path(temporary))
        processes = {}
        for side in running:
            processes[side] = sides.start(__file__, side, str(folder))
            sides.told(processes[side])
        steps: dict[str, list[dict[str, Any]]] = {side: [] for side in running}
        for number in range(1, arguments.steps + 1):
            for side in running if number % 2 else running[::-1]:
                steps[side].append(sides.told(processes[side], number))
        peaks = {side: sides.dismissed(processes[side]) for side in running}
    # Where the data lay is nobody else's business.
    told = asdict(arguments) | {"data": arguments.data.name}
    result: dict[str, Any] = {"arguments": {name: value for name, value in told.items() if name != "out"}}
    result |= {
        side: {"steps": steps[side], "peak_mib": peaks[side]} | summary(steps[side]) for side in running
    }
    for side in running:
        print(f"{side:<5} {described(result[side])}")
    if len(running) == 2:
        result["ratio"] = ratios(result)
        print("\n".join(f"ratio {name:<18} {ratio:.2f}" for name, ratio in result["ratio"].items()))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


def summary(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the steps, of wall-clock and of processor seconds: of each phase, of the whole, of all but
    the reward."""
    found: dict[str, Any] = {}
    for clock in ("seconds", "cpu_seconds"):
        by_phase = {phase: median(step[clock][phase] for step in steps) for phase in PHASES}
        whole = median(sum(step[clock].values()) for step in steps)
        without_reward = median(sum(step[clock].values()) - step[clock]["reward"] for step in steps)
        found[clock] = by_phase | {"step": whole, "without_reward": without_reward}
    return found


def described(side: dict[str, Any]) -> str:
    """One line: seconds and share of each phase."""
    seconds = side["seconds"]
    phases = "  ".join(
        f"{phase} {seconds[phase]:6.2f} s ({seconds[phase] / seconds['step']:4.0%})" for phase in PHASES
    )
    written = median(step["reply_tokens"] for step in side["steps"])
    return (
        f"{phases}  step {seconds['step']:6.2f} s (cpu {side['cpu_seconds']['step']:.1f} s)"
        f"  reply {written:.1f} tokens  peak memory {side['peak_mib']:.0f} MiB"
    )


def ratios(result: dict[str, Any]) -> dict[str, float]:
    """trl's time by ours; the processor's time beside the clock's, which other work on the machine distorts
    more."""
    return {
        f"{prefix}{name}": result["trl"][clock][name] / result["ours"][clock][name]
        for clock, prefix in (("seconds", ""), ("cpu_seconds", "cpu_"))
        for name in ("step", "without_reward", *PHASES)
    }


def prepare(arguments: Arguments, temporary: Path) -> Path:
    """A folder with the model, `work.json` and the vectors that both sides search."""
    from flax import nnx

    from search_r3_jax.data.dataset import load_collection
    from search_r3_jax.hub.export import export_model
    from search_r3_jax.hub.load_model import load_model
    from search_r3_jax.rollout.encoder import Encoder
    from search_r3_jax.text.prompts import Prompter

    model = load_model("smollm2")
    prompter = Prompter(model.tokenizer)
    collection = load_collection(arguments.data, "train")
    wanted = arguments.queries * (arguments.steps + 1)

    def usable(text: str) -> bool:
        return len(prompter.text_ids([text], arguments.document_tokens)[0]) == arguments.document_tokens

    bodies: dict[str, str] = {}
    queries: list[tuple[str, str]] = []
    # Spread over the collection, whose neighbours are often about one thing.
    for query in collection.queries[:: max(1, len(collection.queries) // (4 * wanted))]:
        doc_id = min(query.positives)
        body = collection.documents[collection.row_of[doc_id]].body
        if (
            len(queries) < wanted
            and usable(body)
            and len(prompter.text_ids([query.text], SHARED["query_tokens"] + 1)[0]) <= SHARED["query_tokens"]
        ):
            queries.append((query.text.strip(), doc_id))
            bodies[doc_id] = body
    for document in collection.documents:
        if len(bodies) < arguments.documents and usable(document.body):
            bodies.setdefault(document.doc_id, document.body)
    if len(queries) < wanted or len(bodies) < arguments.documents:
        raise SystemExit(
            f"{arguments.data}: {len(queries)} queries and {len(bodies)} documents are long enough; lower "
            "--document-tokens"
        )
    rows = {doc_id: row for row, doc_id in enumerate(bodies)}
    graph, state = nnx.split(model.decoder)
    vectors = Encoder(graph, prompter).encode(state, list(bodies.values()), max_tokens=arguments.index_tokens)
    np.save(temporary / "vectors.npy", vectors)
    work = (
        asdict(arguments)
        | SHARED
        | {"texts": [text for text, _ in queries], "positives": [rows[doc_id] for _, doc_id in queries]}
    )
    (temporary / "work.json").write_text(
        json.dumps(work | {"bodies": list(bodies.values()), "data": "", "out": ""})
    )
    export_model(model, temporary / "model")
    return temporary


def worker(side: str, folder: str) -> None:
    """One side, until it is dismissed."""
    from search_r3_jax.runtime_env import configure_libraries

    configure_libraries()
    given = json.loads((Path(folder) / "work.json").read_text())
    given |= {"model": str(Path(folder) / "model"), "vectors": np.load(Path(folder) / "vectors.npy")}
    if side == "trl":
        from grpo_of_trl import trl_steps

        trl_steps(given)
        return
    step = our_step(given)
    step(0)
    sides.serve(step)


def chosen(given: dict[str, Any], number: int) -> slice:
    return slice(number * given["queries"], (number + 1) * given["queries"])


def our_step(given: dict[str, Any]) -> Callable[[int], dict[str, Any]]:
    """The step as `train_rl` takes it, but for its logs and its checkpoints."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from search_r3_jax.config import LoraConfig, OptimizerConfig, RlConfig, SamplerConfig
    from search_r3_jax.hub.load_model import load_model, with_lora
    from search_r3_jax.models.lora import trainable_filter
    from search_r3_jax.objectives.policy_gradient import group_advantages
    from search_r3_jax.retrieval.environment.environment import Environment
    from search_r3_jax.retrieval.index.exact import ExactIndex
    from search_r3_jax.rollout.encoder import Encoder
    from search_r3_jax.rollout.sampler import Sampler, rollout_seeds
    from search_r3_jax.text.prompts import Prompter
    from search_r3_jax.training.optimizer import make_optimizer
    from search_r3_jax.training.rl_step import make_batch, make_scorer, make_update
    from search_r3_jax.training.state import init_state

    Q, G = given["queries"], given["group"]
    rl = RlConfig(
        global_queries=Q,
        group_size=G,
        beta=given["beta"],
        sampler=SamplerConfig(max_think_tokens=given["new_tokens"], temperature=given["temperature"]),
        optimizer=OptimizerConfig(learning_rate=given["learning_rate"], schedule="constant"),
    )
    base = load_model(given["model"], compute_dtype="float32", remat="dots")
    model = with_lora(base, LoraConfig(rank=given["lora_rank"], alpha=given["lora_alpha"]), seed=0)
    prompter = Prompter(model.tokenizer)
    graph, params, frozen = nnx.split(model.decoder, trainable_filter(model.decoder), ...)
    full_graph, _ = nnx.split(model.decoder)
    optimizer = make_optimizer(rl.optimizer, rl.steps)
    state = init_state(params, optimizer)
    encoder = Encoder(full_graph, prompter)
    sampling = SamplerConfig(max_think_tokens=given["new_tokens"], temperature=given["temperature"])
    sampler = Sampler(full_graph, prompter, sampling)
    score, update = make_scorer(graph, prompter, rl), make_update(graph, prompter, optimizer, rl)

    def encode_documents(rows: np.ndarray) -> np.ndarray:
        whole = nnx.merge_state(state.params, frozen)
        return encoder.encode(
            whole, [given["bodies"][row] for row in rows], max_tokens=given["document_tokens"]
        )

    vectors = given["vectors"]
    index = ExactIndex(vectors, [str(row) for row in range(len(vectors))], 0)
    environment = Environment(
        index, encode_documents, candidates=given["candidates"], refresh_budget=given["refresh"]
    )

    def step(number: int) -> dict[str, Any]:
        nonlocal state
        clock = Clock()
        positives = given["positives"][chosen(given, number)]
        seeds = rollout_seeds(0, number, range(Q), G)
        whole = nnx.merge_state(state.params, frozen)
        rollout = sampler.sample(
            whole, given["texts"][chosen(given, number)], seeds, max_tokens=given["query_tokens"]
        )
        clock.lap("rollout")
        result = environment.score(
            number,
            [{row: 1.0} for row in positives],
            rollout.vectors.reshape(Q, G, -1),
            np.ones((Q, G), bool),
        )
        clock.lap("reward")
        advantages, _ = group_advantages(
            jnp.asarray(result.rewards).reshape(-1), jnp.repeat(jnp.arange(Q), G), groups=Q, scale="group"
        )
        batch = make_batch(
            rollout, np.asarray(advantages), environment.vectors_of(np.array(positives)), np.eye(Q)
        )
        reference = score(params, frozen, batch.replies, adapters=False)
        state, scalars, _ = update(state, frozen, batch, None, reference)
        jax.block_until_ready((state, scalars))
        clock.lap("update")
        return clock.spent | {
            "reply_tokens": float(rollout.sampled.sum(axis=1).mean()),
            "mean_reward": float(result.rewards.mean()),
            "reencoded": result.stats["reencoded"],
        }

    return step


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(*sys.argv[2:4])
    else:
        main()
