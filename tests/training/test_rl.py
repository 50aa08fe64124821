"""Stage 2 from its first checkpoint to its last: the index really moves, what is logged is true."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx
from helpers.rl_runs import CONFIG, lines_of, run_it, start_of_run
from helpers.tiny_models import word_collection

from search_r3_jax.config import (
    CollapseConfig,
    InfoNceConfig,
    RewardConfig,
)
from search_r3_jax.errors import UserError
from search_r3_jax.hub.checkpoint_reader import best_checkpoint, latest_checkpoint
from search_r3_jax.hub.load_model import load_model
from search_r3_jax.retrieval.indexer.publishing import index_folder
from search_r3_jax.retrieval.store.versions import list_versions, open_version
from search_r3_jax.rollout.encoder import Encoder
from search_r3_jax.text.prompts import Prompter


@pytest.mark.slow
def test_a_run_swaps_to_an_index_built_meanwhile_and_resumes(
    tiny_folders: dict[str, Path], tmp_path: Path, log_lines: list[str]
) -> None:
    config, data, model = start_of_run(tmp_path, tiny_folders["llama"], min_swaps=1, max_extra_steps=400)
    run = tmp_path / "run"
    result = run_it(config, run, data, model, pause=0.1)
    assert result.swaps, (log_lines, (run / "indexer.log").read_text(), list_versions(index_folder(run)))
    assert result.swaps[0][1] > 0
    versions = list_versions(index_folder(run))
    assert result.swaps[-1][1] in versions

    # A version is what its checkpoint's parameters say of the corpus.
    step = versions[-1]
    index = open_version(index_folder(run), step, expect_corpus_hash=data.train.corpus_hash())
    checkpoint = load_model(run, step=step)
    graph, state = nnx.split(checkpoint.decoder)
    texts = [document.body for document in data.train.documents]
    np.testing.assert_allclose(
        index.vectors,
        Encoder(graph, Prompter(checkpoint.tokenizer)).encode(state, texts, max_tokens=32),
        atol=1e-5,
    )

    lines = lines_of(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(result.steps))
    assert all(0 <= line["reward"] <= 1 and line["index_age"] >= 0 for line in lines)
    assert result.valid_rate == pytest.approx(
        np.mean([line["valid_rate"] for line in lines[-max(1, len(lines) // 4) :]])
    )
    again = run_it(config, run, data, model)
    assert again.steps == result.steps
    assert again.swaps == result.swaps


@pytest.mark.slow
def test_the_indexer_ends_with_a_killed_trainer(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tiny_folders["llama"]
    start_of_run(tmp_path, folder)
    code = (
        "import sys, time; from pathlib import Path; from search_r3_jax.retrieval.indexer.follower import "
        "IndexFollower\n"
        "follower = IndexFollower(Path(sys.argv[1]), 'x', 0); follower.start()\n"
        "print(follower.indexer_pid, flush=True)\n"
        "time.sleep(60)"
    )
    run = tmp_path / "run"
    run.mkdir()
    record = {
        "stage": "rl",
        "config": dataclasses.asdict(dataclasses.replace(CONFIG, model=str(folder))),
        "data": "../data",
        "split": "train",
    }
    (run / "config.json").write_text(json.dumps(record))
    trainer = subprocess.Popen([sys.executable, "-c", code, str(run)], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    indexer = int(trainer.stdout.readline())
    time.sleep(8)
    os.kill(indexer, 0)
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline and Path(f"/proc/{indexer}").exists() and "Z" not in state_of(indexer):
        time.sleep(0.2)
    assert not Path(f"/proc/{indexer}").exists() or "Z" in state_of(indexer)


def state_of(process: int) -> str:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "Z"


@pytest.mark.slow
def test_everything_turned_on_and_what_is_logged_of_it(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    """Two passes over a rollout in micro-batches, importance weights, length, gain over direct; watched on
    development queries."""
    config, data, model = start_of_run(
        tmp_path,
        tiny_folders["qwen3"],
        steps=4,
        inner_epochs=2,
        micro_queries=1,
        importance_cap=2.0,
        infonce=InfoNceConfig(negatives=5, near_duplicate_cosine=0.9, train_documents=True),
        reward=RewardConfig(variant="gain_over_direct", length_weight=0.1, free_tokens=2),
        eval_every=2,
        sample_every=5,
        save_every=10,
    )
    dev = word_collection(documents=30, queries=6, seed=1, split="dev")
    run = tmp_path / "run"
    run_it(config, run, dataclasses.replace(data, dev=dev), model)
    lines = lines_of(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    for line in lines:
        assert line["reward"] == pytest.approx(
            line["reward_retrieval"] + line["reward_length"] + line["reward_format"], abs=1e-6
        )
        assert line["reward_format_variance"] >= 0
        assert 0 <= line["zero_group_share"] <= 1
        # What sampled the tokens and what trains on them compute the same; after a first pass the policy has
        # moved.
        assert 1 - 1e-5 <= line["sampler_ratio_min"] <= line["sampler_ratio_max"] <= 1 + 1e-5
        assert line["ratio_max"] - line["ratio_min"] > 1e-5
        assert line["importance_capped_share"] == 0
        assert (
            line["seconds"]
            == line["swap_seconds"]
            + line["index_wait_seconds"]
            + line["rollout_wait_seconds"]
            + line["environment_seconds"]
            + line["update_seconds"]
        )
        assert min(line["rollout_seconds"], line["environment_seconds"], line["update_seconds"]) > 0
        assert {
            "kl",
            "entropy",
            "distinct_2",
            "repetition",
            "rollout_tokens_per_second",
            "skipped",
        } <= line.keys()
    # Of the first of every 16 steps.
    assert ["effective_rank" in line for line in lines] == [True, False, False, False]
    assert 1 <= lines[0]["effective_rank"] <= 12
    watched = [line["step"] for line in lines if "dev_reason_ndcg@10" in line]
    assert watched == [1, 3]
    assert sorted(file.name for file in (run / "eval").iterdir()) == [
        "dev_000000.json",
        "dev_000002.json",
        "dev_000004.json",
    ]
    assert all(
        -1 <= lines[step]["dev_swap_gain"] <= 1 and 0 <= lines[step]["dev_swap_wins"] <= 1 for step in watched
    )
    scores = {
        0: json.loads((run / "eval" / "dev_000000.json").read_text())["results"]["words"]["reason"]["ndcg@10"]
    }
    record = json.loads((run / "config.json").read_text())
    assert record["data_sizes"] == {
        "queries": len(data.train.queries),
        "documents": len(data.train.documents),
    }
    scores |= {line["step"] + 1: line["dev_reason_ndcg@10"] for line in lines if "dev_reason_ndcg@10" in line}
    assert best_checkpoint(run) == max(scores, key=lambda step: (scores[step], step))

    # Every fifth of the 12 rollouts a step, counted through the run.
    rollouts = [sample for sample in lines_of(run / "samples.jsonl") if "reward" in sample]
    assert Counter(sample["step"] for sample in rollouts) == Counter(n // 12 for n in range(0, 48, 5))
    texts = {query.query_id: query.text for query in data.train.queries}
    for sample in rollouts:
        assert sample["query"] == texts[sample["query_id"]]
        assert sample["reward"] == pytest.approx(sum(sample["terms"].values()), abs=1e-6)
        assert len(sample["top"]) == (3 if sample["valid"] else 0)


@pytest.mark.slow
@pytest.mark.parametrize("scoring", ["stale", "consistent_stale"])
def test_rewards_by_the_index_alone_encode_nothing_anew(
    tiny_folders: dict[str, Path], tmp_path: Path, scoring: Any
) -> None:
    config, data, model = start_of_run(tmp_path, tiny_folders["llama"], steps=3)
    index = dataclasses.replace(
        config.index, scoring=scoring, drift_every=1, drift_documents=20, drift_cosine=1.0
    )
    run = tmp_path / "run"
    run_it(dataclasses.replace(config, index=index), run, data, model)
    lines = lines_of(run / "metrics.jsonl")
    assert [line["reencoded"] for line in lines] == [0, 0, 0]
    assert all(line["index_stall_share"] >= 0 and 0 < line["drift_cosine"] <= 1 + 1e-6 for line in lines)
    # Any change counts as drift by such a limit.
    assert latest_checkpoint(run) == 3
    assert [path.name for path in (run / "pins").glob("trainer")] == (
        ["trainer"] if scoring == "consistent_stale" else []
    )


@pytest.mark.slow
def test_a_collapse_stops_the_run_and_keeps_its_checkpoint(
    tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    config, data, model = start_of_run(
        tmp_path, tiny_folders["llama"], collapse=CollapseConfig(steps=2, valid_rate=0.9), save_every=50
    )
    run = tmp_path / "run"
    with pytest.raises(
        UserError,
        match=r"stage 2, step 1: valid_rate: below 0\.9 for 2 steps in a row .* \(checkpoints are in .*run\)",
    ):
        run_it(config, run, data, model)
    assert latest_checkpoint(run) == 2
    # The same command does not forget how low it had sunk.
    with pytest.raises(UserError, match=r"step 2: valid_rate: below 0\.9 for 3 steps in a row"):
        run_it(config, run, data, model)
    assert [line["step"] for line in lines_of(run / "metrics.jsonl")] == [0, 1, 2]
