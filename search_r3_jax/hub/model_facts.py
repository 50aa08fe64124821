"""What a model card says of a model: its base and licence, its training data, and its scores."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from huggingface_hub import EvalResult, ModelCardData

from search_r3_jax.hub.base_model import BaseModel, License

LEVEL = 0.95
_ANY_BASE = "that of the base model"
# As identifiers on the hub are.
_DATA_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[\w.-]+)?")


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """One data set of one stage; an older run did not record its numbers of queries and documents."""

    stage: str
    name: str
    split: str
    queries: int | None = None
    documents: int | None = None


@dataclass(frozen=True, kw_only=True)
class Score:
    """nDCG@10 of the model on a data set, with the ends of its 95 % bootstrap interval over queries.

    Attributes:
        development: these queries were watched in training, and may have chosen the checkpoint.
    """

    data: str
    split: str
    mode: str
    queries: int
    ndcg_at_10: float
    low: float
    high: float
    documents: int | None = None
    development: bool = False


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """All that is known of a model; what is unknown is empty."""

    base: BaseModel | None = None
    data: Sequence[TrainingData] = ()
    scores: Sequence[Score] = ()


def card_metadata(
    facts: ModelFacts, *, name: str, library: Literal["sentence-transformers", "transformers", "peft"]
) -> str:
    """The YAML of a card, as the Hugging Face hub reads it; `name` is that of the model in its results."""
    base = facts.base
    license_ = _license(base)
    data = dict.fromkeys(each.name for each in facts.data if _DATA_ID.fullmatch(each.name))
    return ModelCardData(
        license=license_.identifier,
        license_name=license_.name,
        license_link=license_.link,
        base_model=base.hub_id if base is not None else None,
        datasets=list(data) or None,
        library_name=library,
        pipeline_tag="sentence-similarity",
        model_name=name if facts.scores else None,
        eval_results=[_result(score) for score in facts.scores] or None,
    ).to_yaml()


def facts_section(facts: ModelFacts) -> str:
    """The same in words and tables, as sections of the card."""
    lines = ["", "## What it was made of", ""]
    if facts.base is not None:
        lines += [f"- base model: {_linked(facts.base)}"]
    lines += [f"- licence: {_license_text(facts.base)}"]
    if facts.data:
        lines += ["- trained on:", ""]
        rows = ((d.stage, d.name, d.split, _count(d.queries), _count(d.documents)) for d in facts.data)
        lines += _table(("stage", "data set", "split", "queries", "documents"), rows)
    if facts.scores:
        lines += ["", "## Scores", ""]
        lines += ["nDCG@10 of cosine search, with its 95 % bootstrap interval over the queries.", ""]
        head = ("data set", "split", "queries", "documents", "embedded", "nDCG@10", "95 % interval")
        lines += _table(head, (_score_row(score) for score in facts.scores))
        if any(score.development for score in facts.scores):
            lines += ["", "Development queries were watched in training and may have chosen the checkpoint."]
    return "\n".join([*lines, ""])


def _license(base: BaseModel | None) -> License:
    if base is None or base.license is None:
        return License(identifier="other", name="license-of-the-base-model")
    found = base.license
    if found.identifier == "other" and found.name is None:
        return License(identifier="other", name="license-of-the-base-model", link=found.link)
    return found


def _license_text(base: BaseModel | None) -> str:
    found = None if base is None else base.license
    if found is None:
        return _ANY_BASE
    name = found.name or (None if found.identifier == "other" else found.identifier)
    text = _ANY_BASE if name is None else f"{_cell(name)}, {_ANY_BASE}"
    return f"{text} ([text]({found.link}))" if found.link else text


def _linked(base: BaseModel) -> str:
    return f"[{base.hub_id}](https://huggingface.co/{base.hub_id})" if base.hub_id else _cell(base.name)


def _result(score: Score) -> EvalResult:
    return EvalResult(
        task_type="information-retrieval",
        task_name="Information Retrieval",
        dataset_type=score.data,
        dataset_name=score.data,
        dataset_split=score.split,
        metric_type="cosine_ndcg@10",
        metric_name=f"nDCG@10, {_how(score)}",
        metric_value=round(score.ndcg_at_10, 6),
        metric_args={
            **{"level": LEVEL, "low": round(score.low, 6), "high": round(score.high, 6)},
            **{"queries": score.queries, "documents": score.documents},
        },
    )


def _score_row(score: Score) -> tuple[str, ...]:
    split = f"{score.split} (development)" if score.development else score.split
    interval = f"{score.low:.3f} … {score.high:.3f}"
    counts = str(score.queries), _count(score.documents)
    return score.data, split, *counts, _how(score), f"{score.ndcg_at_10:.4f}", interval


def _how(score: Score) -> str:
    return {"reason": "reasoned"}.get(score.mode, score.mode)


def _count(number: int | None) -> str:
    return "" if number is None else str(number)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [_row(head), _row(["---"] * len(head)), *(_row([_cell(value) for value in row]) for row in rows)]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(text: str) -> str:
    """A foreign name as plain text in one line of a Markdown table."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", " ".join(text.split()))
