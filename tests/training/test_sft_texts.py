"""Texts of stage 1: the prompts that a run was started with, and the model's own reasoning."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import pytest
from helpers.clock import set_day
from helpers.sft_runs import config_of, train, watched
from helpers.tiny_models import CHAT_TEMPLATE, plain_hidden, word_collection, write_tiny_checkpoint

from search_r3_jax.hub.load_model import load_model
from search_r3_jax.text.prompts import Prompter
from search_r3_jax.training.sft import make_pipeline


@pytest.mark.slow
def test_a_run_keeps_the_prompts_that_it_was_started_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, run = write_tiny_checkpoint(tmp_path / "model", "llama"), tmp_path / "run"
    collection = word_collection(documents=8, queries=8)
    template = folder / "chat_template.jinja"
    template.write_text("{{ strftime_now('%d') }}" + CHAT_TEMPLATE)
    set_day(monkeypatch, 1)
    train(config_of(folder, 1), run, collection)
    started = load_model(folder).prompter()
    set_day(monkeypatch, 2)
    template.write_text("{{ 'other' }}" + CHAT_TEMPLATE)
    assert load_model(folder).prompter().prompts != started.prompts
    assert load_model(run).prompter().prompts == started.prompts
    record = json.loads((run / "config.json").read_text())
    assert record["prompts"]["direct"]["before"].startswith("26<|im_start|>")
    assert record["end_ids"] == list(started.end_ids)
    # A second call does not find a change; a run of an older version gets its record.
    train(config_of(folder, 1), run, collection)
    assert json.loads((run / "config.json").read_text()) == record
    older = {key: value for key, value in record.items() if key not in ("prompts", "end_ids")}
    (run / "config.json").write_text(json.dumps(older))
    train(config_of(folder, 1), run, collection)
    again = json.loads((run / "config.json").read_text())
    assert again == older | {
        "prompts": load_model(folder).prompter().prompts.to_json(),
        "end_ids": list(started.end_ids),
    }


@pytest.mark.slow
def test_the_models_own_reasoning_is_what_it_writes(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    folder, run = tiny_folders["llama"], tmp_path / "run"
    collection = word_collection(documents=24, queries=24)
    config = watched(folder, 3)
    text = dataclasses.replace(config.text, max_thought_tokens=6)
    config = dataclasses.replace(
        config, text=text, sft=dataclasses.replace(config.sft, reasoning="self", eval_every=0)
    )
    train(config, run, collection)
    written = {
        line["query_id"]: line["reasoning"]
        for line in map(json.loads, (run / "own_reasoning.jsonl").read_text().splitlines())
    }
    base = load_model(folder)
    prompter = Prompter(base.tokenizer)
    pipeline = make_pipeline(
        dataclasses.replace(config, sft=dataclasses.replace(config.sft, reasoning="off")),
        [collection],
        prompter,
    )
    pipeline = dataclasses.replace(pipeline, reasoned=2)
    rows = {pair.query for step in range(3) for pair in pipeline.pairs(step)[6:]}
    asked = [collection.queries[row] for row in sorted(rows)]
    assert written.keys() == {query.query_id for query in asked}
    for query in asked:
        row = [*prompter.reason.prefix, *prompter.reason_rows([query.text], 16)[0]]
        chosen: list[int] = []
        # Greedy, a whole forward pass a token.
        while len(chosen) < 6 and prompter.end_ids[0] not in chosen:
            hidden = plain_hidden(base.decoder, [row + chosen])[0, len(row) + len(chosen) - 1]
            chosen.append(int(jnp.argmax(base.decoder.logits(hidden))))
        ended = prompter.end_ids[0] in chosen
        words = str(
            base.tokenizer.decode([token for token in chosen if token != prompter.end_ids[0]])
        ).split()
        assert written[query.query_id] == " ".join(words if ended or len(words) < 2 else words[:-1])
