"""What is said of the data before a run trains on it."""

from helpers.tiny_models import byte_tokenizer, word_collection

from search_r3_jax.config import TextConfig
from search_r3_jax.text.prompts import Prompter
from search_r3_jax.training.loading import log_cut_texts


def test_texts_that_training_cuts_are_told(log_lines: list[str]) -> None:
    collection = word_collection(documents=20, queries=10)
    prompter = Prompter(byte_tokenizer(embed_token=True))
    lengths = [len(document.body.encode()) for document in collection.documents]
    most = max(lengths) - 1
    longer = sum(length > most for length in lengths)
    log_cut_texts(prompter, TextConfig(max_query_tokens=999, max_document_tokens=most), collection)
    assert log_lines == [
        f"{collection.name}: {longer / 20:.0%} of the documents are longer than text.max_document_tokens "
        f"{most}; the rest of each is not read"
    ]
    log_lines.clear()
    log_cut_texts(prompter, TextConfig(max_query_tokens=999, max_document_tokens=999), collection)
    assert log_lines == []
