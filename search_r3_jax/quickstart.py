"""The whole method on a small scale: data, both stages with a live index, evaluation, export."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from flax import nnx
from rich.box import SIMPLE_HEAD
from rich.table import Table

from search_r3_jax.compile_time import compile_seconds
from search_r3_jax.config import RunConfig, check_ranges, config_from_dict
from search_r3_jax.console import Bar, Stages
from search_r3_jax.data.collection import Collection
from search_r3_jax.data.dataset import build_dataset, load_collection
from search_r3_jax.data.development import TrainingSet
from search_r3_jax.data.python_functions import python_functions
from search_r3_jax.errors import UserError
from search_r3_jax.evaluation.bm25 import bm25_run
from search_r3_jax.evaluation.card_facts import card_facts
from search_r3_jax.evaluation.evaluate import Evaluator, ModeResult
from search_r3_jax.evaluation.metrics import evaluate_run
from search_r3_jax.evaluation.report import ndcg_interval
from search_r3_jax.files import write_json
from search_r3_jax.hub.checkpoint_reader import resolve_step
from search_r3_jax.hub.export import export_model
from search_r3_jax.hub.load_model import LoadedModel, load_model, with_lora
from search_r3_jax.hub.model_facts import Score
from search_r3_jax.models.lora import merge_lora
from search_r3_jax.training.rl import train_rl
from search_r3_jax.training.run import RlRecord
from search_r3_jax.training.sft import train_sft

STAGES = 7
SHOWN = 3


class Quickstart:
    """One output folder; stages with a recorded result are not repeated."""

    def __init__(self, out: Path, config: RunConfig):
        self._out, self._config = out, config
        self._stages = Stages(STAGES)
        self._data = out / "data"

    def run(self) -> dict[str, Any]:
        """Run all stages in order; returns the summary, which is also written to `summary.json`.

        Raises UserError for a folder of another config, and for settings out of range.
        """
        for stage in ("sft", "rl"):
            check_ranges(self._config, stage)
        self._out.mkdir(parents=True, exist_ok=True)
        self._claim()
        with self._stages.log():
            return self._run()

    def _run(self) -> dict[str, Any]:
        data = self._step("data", "data: functions of the installed Python packages", self._build_data)
        before = self._step("before", "evaluate before training", lambda: self._evaluate(self._base))
        self._step("sft", f"stage 1: contrastive fine-tuning, {self._config.sft.steps} steps", self._stage_1)
        after_sft = self._step("after_sft", "evaluate after stage 1", lambda: self._evaluate(self._tuned))
        rl = self._step("rl", "stage 2: reinforcement learning against a moving index", self._stage_2)
        after_rl = self._step("after_rl", "evaluate after stage 2", lambda: self._evaluate(self._final))
        self._step("export", "export to a Hugging Face folder", lambda: self._export(after_rl))
        summary = self._summary(data, before, after_sft, rl, after_rl)
        write_json(self._out / "summary.json", summary)
        self._show(summary, before, after_rl)
        return summary

    def _claim(self) -> None:
        """Record the config of this folder, so that results of two configs never mix."""
        file = self._out / "quickstart.json"
        if not file.is_file():
            write_json(file, dataclasses.asdict(self._config))
        elif config_from_dict(RunConfig, json.loads(file.read_text(encoding="utf-8"))) != self._config:
            raise UserError(f"{file}: made with another config; give another --out or remove {self._out}")

    def _step(self, key: str, title: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        file = self._out / "stages" / f"{key}.json"
        if file.is_file():
            saved = json.loads(file.read_text(encoding="utf-8"))
            self._stages.reused(key, title, saved["seconds"])
            return saved["result"]
        with self._stages.stage(key, title):
            result = work()
        file.parent.mkdir(exist_ok=True)
        write_json(file, {"seconds": self._stages.seconds[key], "result": result})
        return result

    # Inputs of the stages, loaded when first needed, so that a second call does not wait for them.

    @functools.cached_property
    def _test(self) -> Collection:
        whole = load_collection(self._data, "test")
        return dataclasses.replace(whole, queries=whole.queries[: self._config.data.functions.test_queries])

    @functools.cached_property
    def _train(self) -> Collection:
        return load_collection(self._data, "train")

    @functools.cached_property
    def _base(self) -> LoadedModel:
        self._stages.say(f"loading {self._config.model}")
        return self._load(self._config.model)

    @functools.cached_property
    def _evaluator(self) -> Evaluator:
        # Merged models have the structure of the base, so all three evaluations share the compiled programs.
        graph = nnx.split(self._base.decoder)[0]
        return Evaluator(graph, self._base.prompter(), self._config.text, self._config.rl.sampler)

    @functools.cached_property
    def _tuned(self) -> LoadedModel:
        return self._load(self._out / "sft")

    @functools.cached_property
    def _final(self) -> LoadedModel:
        return self._load(self._out / "rl")

    def _load(self, name: str | Path) -> LoadedModel:
        config = self._config
        return load_model(
            name, compute_dtype=config.compute_dtype, remat=config.remat, attention=config.attention
        )

    def _bar(self, what: str, total: int) -> AbstractContextManager[Bar]:
        return self._stages.bar(what, total, aside=compile_seconds)

    # The stages.

    def _build_data(self) -> dict[str, Any]:
        data = self._config.data
        source = {
            "kind": "python-functions",
            "seed": self._config.seed,
            "train_functions": data.functions.train,
            "dev_functions": data.functions.dev,
            "test_functions": data.functions.test,
        }
        if not self._data.is_dir():
            collections = python_functions(
                seed=self._config.seed,
                train_functions=data.functions.train,
                dev_functions=data.functions.dev,
                test_functions=data.functions.test,
            )
            build_dataset(collections, self._data, name="python_functions", source=source)
        bm25, _ = evaluate_run(self._test.qrels(), bm25_run(self._test, identifiers=True))
        documents, queries = len(self._test.documents), len(self._test.queries)
        self._stages.say(
            f"{len(self._train.documents)} functions to train on; {queries} queries over {documents} of "
            "other packages"
        )
        self._stages.say(f"BM25 with identifiers split: nDCG@10 {bm25.ndcg_at_10:.3f}")
        return {"documents": documents, "queries": queries, "bm25": bm25.as_dict()}

    def _evaluate(self, model: LoadedModel) -> dict[str, Any]:
        state = nnx.state(model.decoder)
        with self._bar("documents", len(self._test.documents)) as bar:
            vectors = self._evaluator.documents(state, self._test, bar.advance)
        direct = self._evaluator.direct(state, self._test, vectors)
        with self._bar("queries", len(self._test.queries)) as bar:
            reason = self._evaluator.reason(state, self._test, vectors, bar.advance)
        self._stages.say(
            f"nDCG@10 direct {direct.metrics.ndcg_at_10:.3f}, reasoned {reason.metrics.ndcg_at_10:.3f}"
        )
        self._stages.say(f"wrote the embed token by itself: {reason.valid_rate:.0%} of the queries")
        numbers = {
            mode: result.as_dict() | {"ndcg@10_interval": ndcg_interval(self._test, result, seed=0)}
            for mode, result in (("direct", direct), ("reason", reason))
        }
        return {**numbers, "example": self._example(reason)}

    def _example(self, result: ModeResult) -> dict[str, Any]:
        """The first test query, whatever its result, because choosing one would bias the picture."""
        query = self._test.queries[0]
        ranked = sorted(result.run[query.query_id].items(), key=lambda pair: -pair[1])[:SHOWN]
        top = [
            {"document": doc_id, "score": score, "relevant": doc_id in query.positives}
            for doc_id, score in ranked
        ]
        return {"query": query.text, "thought": result.thoughts[0], "top": top}

    def _stage_1(self) -> dict[str, Any]:
        config = self._config
        with self._bar("steps", config.sft.steps) as bar:

            def on_step(step: int, total: int, metrics: dict[str, float]) -> None:
                accuracy = f"in-batch accuracy {metrics['in_batch_accuracy']:.0%}"
                note = f"loss {metrics['loss']:.2f}, {accuracy}"
                bar.to(step, note, total, each=metrics["seconds_each"], left=metrics["seconds_left"])

            model = with_lora(self._base, config.lora, seed=config.seed)
            sets = [TrainingSet(train=self._train, dev=None)]
            params = train_sft(config, self._out / "sft", sets=sets, model=model, on_step=on_step)
        self._tuned = _merged(model, params)
        return {"steps": config.sft.steps}

    def _stage_2(self) -> dict[str, Any]:
        config = self._config
        with self._bar("steps", config.rl.steps) as bar:

            def on_step(step: int, total: int, metrics: dict[str, float]) -> None:
                reward = f"reward {metrics['reward']:.3f}, valid {metrics['valid_rate']:.0%}"
                bar.to(
                    step,
                    reward,
                    max(step, total),
                    each=metrics["seconds_each"],
                    left=metrics["seconds_left"],
                )

            model = with_lora(self._tuned, config.lora, seed=config.seed)
            result = train_rl(
                config,
                self._out / "rl",
                data=TrainingSet(train=self._train, dev=None),
                model=model,
                # Relative paths, so that the folder can be moved.
                record=RlRecord(start="../sft", data="../data", split="train"),
                on_step=on_step,
            )
        self._final = _merged(model, result.params)
        self._stages.say(f"valid rate {result.valid_rate:.0%}; {len(result.swaps)} index swap(s)")
        return {
            "steps": result.steps,
            "valid_rate": result.valid_rate,
            "swaps": result.swaps,
            "reencoded_share": result.reencoded_share,
            "index_versions": result.index_versions,
        }

    def _export(self, result: dict[str, Any]) -> dict[str, Any]:
        run = self._out / "rl"
        facts = card_facts(str(run), resolve_step(run, None), self._final)
        facts = dataclasses.replace(facts, scores=[*scores_of(self._test, result), *facts.scores])
        return {"folder": str(export_model(self._final, self._out / "export", facts=facts))}

    # The summary and the example.

    def _summary(
        self,
        data: dict[str, Any],
        before: dict[str, Any],
        after_sft: dict[str, Any],
        rl: dict[str, Any],
        after_rl: dict[str, Any],
    ) -> dict[str, Any]:
        def modes(result: dict[str, Any]) -> dict[str, Any]:
            return {mode: result[mode] for mode in ("direct", "reason")}

        return {
            "model": self._config.model,
            "documents": data["documents"],
            "queries": data["queries"],
            "bm25": data["bm25"],
            "before": modes(before),
            "after_sft": modes(after_sft),
            "after_rl": modes(after_rl),
            "rl_steps": rl["steps"],
            "valid_rate": rl["valid_rate"],
            "index_versions": rl["index_versions"],
            "swaps": len(rl["swaps"]),
            "reencoded_share": rl["reencoded_share"],
            "export": str(self._out / "export"),
            "seconds": {key: round(seconds, 1) for key, seconds in self._stages.seconds.items()},
        }

    def _show(self, summary: dict[str, Any], before: dict[str, Any], after: dict[str, Any]) -> None:
        say = self._stages.console.print
        for title, result in (("before training", before), ("after training", after)):
            example = result["example"]
            say(f"\nA search {title}: {example['query']}", markup=False, style="bold")
            say(f"  thought: {example['thought'].strip()}", markup=False)
            for rank, document in enumerate(example["top"], start=1):
                mark = "  ← the right one" if document["relevant"] else ""
                say(f"  {rank}. {document['score']:.3f}  {document['document']}{mark}", markup=False)

        table = Table(
            title=f"\n{summary['queries']} queries over {summary['documents']} functions of packages never "
            "trained on",
            box=SIMPLE_HEAD,
        )
        for name in ("", "nDCG@10", "recall@10", "MRR", "valid", "tokens"):
            table.add_column(name, justify="left" if not name else "right", no_wrap=True)
        table.add_row("BM25, identifiers split", *_numbers(summary["bm25"]), "", "")
        rows = (("before training", "before"), ("after stage 1", "after_sft"), ("after stage 2", "after_rl"))
        for title, key in rows:
            for mode, label in (("direct", "direct"), ("reason", "reasoned")):
                values = summary[key][mode]
                table.add_row(
                    f"{title}, {label}",
                    *_numbers(values),
                    f"{values['valid_rate']:.0%}",
                    f"{values['reply_tokens']:.0f}",
                )
        self._stages.console.print(table)
        say(
            "valid: the model wrote the embed token by itself; elsewhere it was forced when the budget ran "
            "out."
        )
        say(
            f"stage 2: {summary['rl_steps']} steps, valid rate {summary['valid_rate']:.0%}, "
            f"{len(summary['index_versions'])} index"
            f" versions, {summary['swaps']} swap(s), {summary['reencoded_share']:.0%} of the corpus "
            "re-encoded a step"
        )
        say(
            f"\nmodel    {summary['export']}\nsummary  {self._out / 'summary.json'}\nruns     "
            f"{self._out / 'sft'}, {self._out / 'rl'}"
        )


def scores_of(test: Collection, result: dict[str, Any]) -> list[Score]:
    """The scores of an evaluation on `test`, for the card; none where an older version kept no interval."""
    return [
        Score(
            data=test.name,
            split=test.split,
            mode=mode,
            queries=len(test.queries),
            documents=len(test.documents),
            ndcg_at_10=result[mode]["ndcg@10"],
            low=result[mode]["ndcg@10_interval"]["low"],
            high=result[mode]["ndcg@10_interval"]["high"],
        )
        for mode in ("direct", "reason")
        if "ndcg@10_interval" in result[mode]
    ]


def _merged(model: LoadedModel, params: nnx.State) -> LoadedModel:
    nnx.update(model.decoder, params)
    return dataclasses.replace(model, decoder=merge_lora(model.decoder))


def _numbers(values: dict[str, float]) -> list[str]:
    return [f"{values[name]:.3f}" for name in ("ndcg@10", "recall@10", "mrr")]
