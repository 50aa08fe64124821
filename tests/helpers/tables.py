"""A small table of questions and answers, and the data set that is built of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from search_r3_jax.data.build import BuiltTable, TableOptions, build_table

QA = ("query=question", "positive=answer")
ROWS = [
    {"question": " what purrs ", "answer": 'A cat;\n\npurrs, it "does".', "bad": "Dogs bark.", "score": 2},
    {"question": "what barks", "answer": "Dogs bark.", "bad": None, "score": 1},
    {"question": "what purrs", "answer": "Ein Löwe schnurrt nicht. \t", "bad": "", "score": 1},
]


def build(source: Path, out: Path, *fields: str, skip_bad: bool = False, **options: Any) -> BuiltTable:
    table = TableOptions(fields=fields, **options)
    return build_table(source, out, options=table, skip_bad=skip_bad)


def save_datasets(folder: Path) -> None:
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(folder)
