"""What a card tells of base, licence, data and scores, as the hub's own library reads it."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard, ModelCardData

from search_r3_jax.hub.base_model import BaseModel, License
from search_r3_jax.hub.export import export_model
from search_r3_jax.hub.load_model import LoadedModel
from search_r3_jax.hub.model_facts import ModelFacts, Score, TrainingData, card_metadata, facts_section

SCORES = (
    Score(data="words", split="test", mode="direct", queries=12, ndcg_at_10=0.51234567, low=0.4, high=0.6),
    Score(
        data="words",
        split="test",
        mode="reason",
        queries=12,
        ndcg_at_10=0.5,
        low=0.39,
        high=0.61,
        documents=130,
        development=True,
    ),
)
FACTS = ModelFacts(
    base=BaseModel(name="some/Base", hub_id="some/Base", license=License(identifier="apache-2.0")),
    data=(
        TrainingData(stage="1, contrastive", name="words", split="train", queries=36, documents=40),
        TrainingData(stage="2, reinforcement", name="a | b", split="train"),
    ),
    scores=SCORES,
)


def read(facts: ModelFacts) -> ModelCardData:
    # Any card of a hub: its library reads the YAML.
    text = card_metadata(facts, name="export", library="transformers")
    data = ModelCard(f"---\n{text}\n---\n").data
    assert isinstance(data, ModelCardData)
    return data


def test_the_hubs_library_reads_all_of_it() -> None:
    data = read(FACTS)
    assert (data.license, data.base_model, data.datasets) == ("apache-2.0", "some/Base", ["words"])
    assert (data.library_name, data.pipeline_tag) == ("transformers", "sentence-similarity")
    assert data.model_name == "export"
    assert data.eval_results is not None
    direct, reasoned = data.eval_results
    assert (direct.dataset_name, direct.dataset_split) == ("words", "test")
    assert (direct.metric_type, direct.metric_value) == ("cosine_ndcg@10", 0.512346)
    assert direct.metric_args == {"level": 0.95, "low": 0.4, "high": 0.6, "queries": 12}
    assert (direct.metric_name, reasoned.metric_name) == ("nDCG@10, direct", "nDCG@10, reasoned")
    assert reasoned.metric_args is not None
    assert reasoned.metric_args["documents"] == 130


def test_the_text_tells_the_same() -> None:
    text = facts_section(FACTS)
    assert "- base model: [some/Base](https://huggingface.co/some/Base)\n" in text
    assert "- licence: apache-2.0, that of the base model\n" in text
    assert "| 1, contrastive | words | train | 36 | 40 |\n" in text
    assert "| 2, reinforcement | a \\| b | train |  |  |\n" in text
    assert "| words | test | 12 |  | direct | 0.5123 | 0.400 … 0.600 |\n" in text
    assert "| words | test (development) | 12 | 130 | reasoned | 0.5000 | 0.390 … 0.610 |\n" in text
    assert "may have chosen the checkpoint" in text
    assert "may have chosen" not in facts_section(ModelFacts(scores=SCORES[:1]))


@pytest.mark.parametrize(
    ("license_", "fields", "told"),
    [
        (None, ("other", "license-of-the-base-model", None), "- licence: that of the base model\n"),
        (
            License(identifier="other", link="LICENSE"),
            ("other", "license-of-the-base-model", "LICENSE"),
            "- licence: that of the base model ([text](LICENSE))\n",
        ),
        (
            License(identifier="other", name="qwen", link="https://l"),
            ("other", "qwen", "https://l"),
            "- licence: qwen, that of the base model ([text](https://l))\n",
        ),
    ],
)
def test_a_licence_that_is_not_known_is_the_base_models(
    license_: License | None, fields: tuple[str | None, ...], told: str
) -> None:
    facts = ModelFacts(base=BaseModel(name="a folder", license=license_))
    data = read(facts)
    assert (data.license, data.license_name, data.license_link) == fields
    assert (data.base_model, data.datasets, data.eval_results) == (None, None, None)
    assert told in facts_section(facts)
    assert "- base model: a folder\n" in facts_section(facts)


def test_an_export_without_facts_is_under_the_licence_of_its_base(
    tiny_model: LoadedModel, tmp_path: Path
) -> None:
    card = ModelCard.load(export_model(tiny_model, tmp_path / "plain") / "README.md")
    assert card.data.to_dict() == {
        **{"license": "other", "license_name": "license-of-the-base-model"},
        **{"library_name": "sentence-transformers", "pipeline_tag": "sentence-similarity"},
    }
    assert "- licence: that of the base model\n" in card.text


def test_the_licence_goes_with_the_model(tiny_model: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "LICENSE").write_text("terms")
    base = BaseModel(name="b", license=License(identifier="other"), license_file=tmp_path / "LICENSE")
    out = export_model(tiny_model, tmp_path / "out", facts=ModelFacts(base=base))
    assert (out / "LICENSE").read_text() == "terms"
