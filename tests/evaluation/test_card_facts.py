"""What `export` finds for the cards of a run's model: its base, its data, and its scores with intervals."""

import json
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from helpers.exported_models import adapted, write_run
from helpers.report_inputs import eval_record, write_json
from helpers.tiny_models import word_collection
from huggingface_hub import ModelCard

from search_r3_jax.commands.models import Export
from search_r3_jax.config import LoraConfig, RunConfig
from search_r3_jax.evaluation.card_facts import card_facts
from search_r3_jax.evaluation.significance import bootstrap_interval
from search_r3_jax.hub.load_model import load_model
from search_r3_jax.hub.model_facts import TrainingData
from search_r3_jax.hub.weights import parameter_hash
from search_r3_jax.quickstart import scores_of

VALUES = {mode: np.random.default_rng(seed).random(30) for seed, mode in enumerate(("direct", "reason"))}
WATCHED = {"direct": [0.5, 0.25, 1.0], "reason": [0.0, 0.5, 0.5]}
WORDS = {"name": "words", "split": "train"}


@pytest.fixture(scope="module")
def run(tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of stage 2 on one of stage 1; in its folder an evaluation of its development queries, a result
    of `eval`, and results of another checkpoint, of other parameters and of BM25."""
    place = tmp_path_factory.mktemp("facts")
    lora = LoraConfig(rank=2)
    config = RunConfig(model=str(tiny_folders["llama"]), compute_dtype="float32", lora=lora)
    first = adapted(load_model(tiny_folders["llama"]), lora, seed=1)
    sizes = {"queries": 20, "documents": 30}
    write_run(
        place / "sft",
        config,
        first,
        {"data_version": [WORDS, {"name": "other set", "split": "train"}], "data_sizes": [sizes, sizes]},
    )
    start = load_model(place / "sft")
    record = {"stage": "rl", "start": "../sft", "start_step": 3, "data_version": WORDS}
    folder = write_run(place / "rl", config, adapted(start, lora, seed=2), record)
    (folder / "eval").mkdir()
    modes = {
        mode: {"per_query": {f"q{i}": value for i, value in enumerate(values)}}
        for mode, values in WATCHED.items()
    }
    sets = {"words": {"split": "dev", "documents": 24}}
    write_json(folder / "eval" / "dev_000003.json", {"step": 3, "sets": sets, "results": {"words": modes}})
    measured = parameter_hash(nnx.state(load_model(folder).decoder))
    write_json(folder / "test.json", eval_record(VALUES, model="runs/rl", step=3, parameter_hash=measured))
    for name, system in {
        "earlier": {"step": 2, "parameter_hash": measured},
        "others": {"step": 3, "parameter_hash": "0" * 64},
        "bm25": {"kind": "bm25"},
    }.items():
        write_json(folder / "eval" / f"{name}.json", eval_record(VALUES, model="m", **system))
    return folder


def test_a_run_tells_its_data_and_its_scores(run: Path, tiny_folders: dict[str, Path]) -> None:
    facts = card_facts(str(run), 3, load_model(run))
    assert facts.base is not None
    assert facts.base.name == tiny_folders["llama"].name
    # Stage 2 is a run of an older version, which recorded no sizes.
    assert facts.data == [
        TrainingData(stage="1, contrastive", name="words", split="train", queries=20, documents=30),
        TrainingData(stage="1, contrastive", name="other set", split="train", queries=20, documents=30),
        TrainingData(stage="2, reinforcement", name="words", split="train"),
    ]
    found = [(score.split, score.mode, score.documents, score.development) for score in facts.scores]
    assert found == [
        ("test", "direct", 500, False),
        ("test", "reason", 500, False),
        ("dev", "direct", 24, True),
        ("dev", "reason", 24, True),
    ]
    for score, values in zip(facts.scores, [*VALUES.values(), *WATCHED.values()], strict=True):
        interval = bootstrap_interval(np.array(values), samples=10_000, seed=0)
        assert (score.queries, score.ndcg_at_10) == (len(values), interval.mean)
        assert (score.low, score.high) == (interval.low, interval.high)


@pytest.mark.parametrize("peft", [False, True])
def test_both_cards_tell_what_is_known(run: Path, tmp_path: Path, peft: bool) -> None:
    Export(run_folder=run, out=tmp_path / "out", peft=peft).run()
    card = ModelCard.load(tmp_path / "out" / "README.md")
    told = card.data.to_dict()
    assert told["library_name"] == ("peft" if peft else "sentence-transformers")
    # A name with a space is no id of a data set on the hub.
    assert (told["license"], told["datasets"]) == ("other", ["words"])
    (index,) = told["model-index"]
    assert index["name"] == "out"
    assert [(each["dataset"]["split"], len(each["metrics"])) for each in index["results"]] == [
        ("test", 2),
        ("dev", 2),
    ]
    assert "| 1, contrastive | other set | train | 20 | 30 |\n" in card.text
    assert "| words | dev (development) | 3 | 24 | reasoned | 0.3333 |" in card.text


def test_a_checkpoint_before_the_first_step_was_not_trained_by_its_run(run: Path) -> None:
    facts = card_facts(str(run), 0, load_model(run))
    assert [each.stage for each in facts.data] == ["1, contrastive"] * 2
    assert facts.scores == []


def test_adapters_may_name_their_base(run: Path, tmp_path: Path) -> None:
    Export(run_folder=run, out=tmp_path / "out", peft=True, base="some/Base").run()
    told = ModelCard.load(tmp_path / "out" / "README.md").data.to_dict()
    assert told["base_model"] == "some/Base"
    record = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert record["base_model_name_or_path"] == "some/Base"


def test_the_quickstarts_card_has_its_last_evaluation() -> None:
    test = word_collection(documents=9, queries=4, split="test")
    older = {"ndcg@10": 0.5}
    measured = older | {"ndcg@10_interval": {"mean": 0.5, "low": 0.25, "high": 0.75}}
    (score,) = scores_of(test, {"direct": measured, "reason": older, "example": {}})
    assert vars(score) == {
        **{"data": "words", "split": "test", "mode": "direct", "queries": 4, "documents": 9},
        **{"ndcg_at_10": 0.5, "low": 0.25, "high": 0.75, "development": False},
    }


def test_files_that_are_no_results_are_passed_over(run: Path, tmp_path: Path) -> None:
    for name, text in (("a", "no JSON"), ("b", "[]"), ("c", '{"format_version": 1, "data": {}, "modes": 3}')):
        (tmp_path / f"{name}.json").write_text(text)
    (tmp_path / "config.json").write_bytes((run / "config.json").read_bytes())
    (tmp_path / "checkpoints").symlink_to(run / "checkpoints")
    (tmp_path.parent / "sft").unlink(missing_ok=True)
    (tmp_path.parent / "sft").symlink_to(run.parent / "sft")
    assert card_facts(str(tmp_path), 3, load_model(run)).scores == []
