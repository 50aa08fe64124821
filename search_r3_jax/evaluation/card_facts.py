"""Collects what a model card says of a model: from its run folders, and from results of `eval` in them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from search_r3_jax.errors import UserError
from search_r3_jax.evaluation.report import SAMPLES
from search_r3_jax.evaluation.result_files import EvalResult, read_results
from search_r3_jax.evaluation.significance import bootstrap_interval
from search_r3_jax.hub.base_model import base_model
from search_r3_jax.hub.checkpoint_reader import read_run, starting_model, starting_step
from search_r3_jax.hub.load_model import LoadedModel
from search_r3_jax.hub.model_facts import ModelFacts, Score, TrainingData
from search_r3_jax.hub.model_names import resolve
from search_r3_jax.hub.weights import parameter_hash
from search_r3_jax.models.lora import merge_lora

STAGES = {"sft": "1, contrastive", "rl": "2, reinforcement"}
# Of the bootstrap: its intervals are the same whenever a model is exported.
SEED = 0


class _Trained(NamedTuple):
    """A run that a model went through, and the checkpoint that it left with."""

    run: Path
    record: dict[str, Any]
    step: int | None


def card_facts(source: str, step: int | None, model: LoadedModel) -> ModelFacts:
    """What is known of `model`, which is `source` at checkpoint `step` (None for a model that is no run).

    Scores are those of the run's development queries at that checkpoint, and those of files of `eval --out`
    in the folder, or in its `eval/`, that measured these parameters.
    """
    path = resolve(source)
    if not (path / "checkpoints").is_dir():
        scores = [] if path.is_file() else _measured(path, None, model)
        return ModelFacts(base=base_model(source), scores=scores)
    runs = list(_runs(path, step))
    return ModelFacts(
        base=base_model(starting_model(runs[0].run, runs[0].record)),
        data=[each for trained in runs for each in _training_data(trained)],
        scores=[*_measured(path, step, model), *_watched(path, step)],
    )


def score_of(values_q: np.ndarray, **described: Any) -> Score:
    """The score that values of nDCG@10 [Q] are, with its interval; `described` are its other fields."""
    interval = bootstrap_interval(values_q, samples=SAMPLES, seed=SEED)
    return Score(
        queries=len(values_q),
        ndcg_at_10=interval.mean,
        low=interval.low,
        high=interval.high,
        **described,
    )


def _runs(run: Path, step: int | None) -> Iterator[_Trained]:
    """The runs that a run builds on, and itself, oldest first."""
    record = read_run(run)[1]
    start = Path(starting_model(run, record))
    if (start / "checkpoints").is_dir():
        yield from _runs(start, starting_step(record))
    yield _Trained(run, record, step)


def _training_data(trained: _Trained) -> Iterator[TrainingData]:
    """The data sets of a run; none where the model left it before its first step."""
    if trained.step == 0:
        return
    record = trained.record
    versions, sizes = (_as_list(record.get(name)) for name in ("data_version", "data_sizes"))
    for at, version in enumerate(versions):
        size = sizes[at] if at < len(sizes) else {}
        yield TrainingData(
            stage=STAGES.get(str(record.get("stage")), ""),
            name=str(version.get("name")),
            split=str(version.get("split")),
            queries=size.get("queries"),
            documents=size.get("documents"),
        )


def _as_list(value: Any) -> list[Mapping[str, Any]]:
    """Stage 1 records a list of data sets, stage 2 one."""
    return [value] if isinstance(value, dict) else value if isinstance(value, list) else []


def _watched(run: Path, step: int | None) -> list[Score]:
    """Scores of the development queries at a checkpoint, where it was evaluated."""
    content = _json_of(run / "eval" / f"dev_{step or 0:06d}.json")
    scores = []
    for name, modes in content.get("results", {}).items():
        about = content.get("sets", {}).get(name, {})
        scores += [
            score_of(
                np.array(list(modes[mode]["per_query"].values())),
                data=name,
                split=about.get("split", "dev"),
                mode=mode,
                documents=about.get("documents"),
                development=True,
            )
            for mode in modes
        ]
    return scores


def _measured(folder: Path, step: int | None, model: LoadedModel) -> list[Score]:
    """Scores of the result files of `eval` in a folder that are of this model's parameters."""
    files = sorted([*folder.glob("*.json"), *folder.glob("eval/*.json")])
    results = [result for file in files for result in _results_in(file) if result.step == step]
    if not any(result.parameter_hash for result in results):
        return []
    measured = parameter_hash(nnx.state(merge_lora(model.decoder)))
    return [
        score_of(
            result.values("ndcg@10"),
            data=result.searched.name,
            split=result.searched.split,
            mode=result.mode,
            documents=result.searched.documents,
        )
        for result in results
        if result.parameter_hash == measured
    ]


def _results_in(file: Path) -> list[EvalResult]:
    """The results in a file of `eval`, one per mode; none in any other file."""
    try:
        return read_results([file])[0]
    except UserError:
        return []


def _json_of(file: Path) -> dict[str, Any]:
    """The object in a file; empty where there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
