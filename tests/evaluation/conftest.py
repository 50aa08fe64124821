"""A data set that tests of evaluation share."""

import json
from pathlib import Path

import pytest
from helpers.tiny_models import word_collection


@pytest.fixture(scope="module")
def beir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BEIR folder of 130 documents and 12 queries, some with graded judgements."""
    folder = tmp_path_factory.mktemp("beir")
    made = word_collection(documents=130, queries=12, split="test")
    (folder / "qrels").mkdir()
    # Of many lengths, so that sorting by length changes the order.
    texts = {
        each.doc_id: " ".join([each.text, *["more"] * (row * 7 % 5)])
        for row, each in enumerate(made.documents)
    }
    lines = (json.dumps({"_id": doc_id, "title": "", "text": text}) for doc_id, text in texts.items())
    (folder / "corpus.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "queries.jsonl").write_text(
        "\n".join(json.dumps({"_id": each.query_id, "text": each.text}) for each in made.queries) + "\n"
    )
    rows = [
        f"q{i}\t{doc_id}\t{score}"
        for i in range(12)
        for doc_id, score in ((f"d{i}", 2), (f"d{i + 40}", 1), (f"d{i + 80}", 0))
    ]
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "\n".join(rows) + "\n")
    return folder
