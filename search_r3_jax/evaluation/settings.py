"""Settings of the evaluation commands. Imports no jax."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from search_r3_jax.config import InferenceConfig, Step, TextConfig


@dataclass(frozen=True, kw_only=True)
class EvalSettings(InferenceConfig):
    """One system on one split of one collection.

    Attributes:
        model: Run folder, Hugging Face folder or id, GGUF file, or `smollm2` (SmolLM2-135M-Instruct, as
            installed); or a baseline: `bm25` (stemmed words), `bm25-split` (identifiers split, for code), or
            all-MiniLM-L6-v2 as `minilm`, any sentence-transformers model as `st:FOLDER`.
        data: Built data set or BEIR folder.
        split: Split whose queries are searched.
        mode: `direct`: no thinking. `reason`: the model thinks before it embeds a query. `both`: direct and
            reason. `all`: both, and `average`, the mean of a query's two vectors. Baselines have `direct`
            only.
        index: How to search.
        out: JSON file with all numbers and each query's results, for `compare` and `report`. None: print
            only.
        run_file: TREC run file to write; the judgements go beside it as .qrels. Several modes write a file
            each, with the mode added (.direct, .reason, .average). None: no file.
        max_queries: Random queries of the split to search, at most. None: all.
        max_documents: Documents to search: all that are judged, filled up with random others. None: the whole
            corpus.
        ignore_identical_ids: Leave a document out of the results of the query that has its id: MTEB does so
            on ArguAna, Quora and FiQA, where queries stand in the corpus.
        seed: Seed that draws queries and documents where there is a limit, and of the bootstrap.
        max_query_tokens: Longest query, in tokens (not for baselines). None: 64.
        max_document_tokens: Longest document, in tokens (not for baselines). None: 256.
        max_think_tokens: Longest reasoning, in tokens; then the embed token is forced. 0 forces it at once.
        vectors: Folder that keeps the vectors of the corpus: for one that memory cannot hold, and to go on
            after an interruption. Only the same model and documents may use it again. None: in memory.
        controls: Also search with another text in place of a query's own reasoning: another query's
            reasoning, none, the query repeated, random words. Needs a mode that reasons.
        step: Checkpoint of a run: a step or `best` (on its development queries). None: the newest.
        profile_steps: Passes to trace for xprof, as FIRST:END, counted from 0 over documents and queries; 3:6
            is 3, 4 and 5. A batch of queries that think is one. None: none.
        profile_folder: Folder that profile_steps writes to.
    """

    model: str
    data: Path
    split: str = "test"
    mode: Literal["direct", "reason", "both", "all"] = "direct"
    index: Literal["exact", "scann"] = "exact"
    out: Path | None = None
    run_file: Path | None = None
    max_queries: int | None = None
    max_documents: int | None = None
    ignore_identical_ids: bool = False
    seed: int = 0
    max_query_tokens: int | None = None
    max_document_tokens: int | None = None
    max_think_tokens: int = 32
    vectors: Path | None = None
    controls: bool = False
    step: Step = None
    profile_steps: str | None = None
    profile_folder: Path = Path("profile")

    def text(self) -> TextConfig:
        """Limits of texts for a model of ours."""
        usual = TextConfig()
        return TextConfig(
            max_query_tokens=self.max_query_tokens or usual.max_query_tokens,
            max_document_tokens=self.max_document_tokens or usual.max_document_tokens,
        )


@dataclass(frozen=True, kw_only=True)
class BudgetSettings(InferenceConfig):
    """One model on one split of one collection, at several budgets of thinking.

    Attributes:
        model: Run folder, Hugging Face folder or id, GGUF file, or `smollm2` (SmolLM2-135M-Instruct, as
            installed).
        data: Built data set or BEIR folder.
        out: JSON file with all numbers and each query's results.
        picture: PNG file to draw: nDCG@10 by the tokens written per query. None: no file.
        budgets: Thinking tokens before the embed token is forced. 0 forces it at once.
        split: Split whose queries are searched.
        index: How to search.
        max_queries: Random queries of the split to search, at most. None: all.
        max_documents: Documents to search: all that are judged, filled up with random others. None: the whole
            corpus.
        ignore_identical_ids: Leave a document out of the results of the query that has its id: MTEB does so
            on ArguAna, Quora and FiQA, where queries stand in the corpus.
        seed: Seed that draws queries and documents where there is a limit, and of the bootstrap.
        samples: Samples of the bootstrap.
        max_query_tokens: Longest query, in tokens. None: 64.
        max_document_tokens: Longest document, in tokens. None: 256.
        vectors: Folder that keeps the vectors of the corpus: for one that memory cannot hold, and to go on
            after an interruption. Only the same model and documents may use it again. None: in memory.
        step: Checkpoint of a run: a step or `best` (on its development queries). None: the newest.
    """

    model: str
    data: Path
    out: Path
    picture: Path | None = None
    budgets: tuple[int, ...] = (0, 8, 16, 32, 64)
    split: str = "test"
    index: Literal["exact", "scann"] = "exact"
    max_queries: int | None = None
    max_documents: int | None = None
    ignore_identical_ids: bool = False
    seed: int = 0
    samples: int = 10_000
    max_query_tokens: int | None = None
    max_document_tokens: int | None = None
    vectors: Path | None = None
    step: Step = None

    def evaluation(self) -> EvalSettings:
        """The settings of `eval` at the largest budget."""
        return EvalSettings(
            model=self.model,
            data=self.data,
            split=self.split,
            mode="both",
            index=self.index,
            max_queries=self.max_queries,
            max_documents=self.max_documents,
            ignore_identical_ids=self.ignore_identical_ids,
            seed=self.seed,
            max_query_tokens=self.max_query_tokens,
            max_document_tokens=self.max_document_tokens,
            max_think_tokens=max(self.budgets),
            vectors=self.vectors,
            step=self.step,
            param_dtype=self.param_dtype,
            compute_dtype=self.compute_dtype,
            mesh=self.mesh,
        )


@dataclass(frozen=True, kw_only=True)
class MtebSettings(InferenceConfig):
    """One model on tasks of MTEB, and on collections of this machine as tasks of it.

    Attributes:
        model: Exported folder, run folder, Hugging Face folder or id, GGUF file or `smollm2`
            (SmolLM2-135M-Instruct, as installed).
        out: Folder for MTEB's own files. Tasks whose results are there are not run again.
        tasks: Names of MTEB's tasks, such as SciFact. Their data comes from the hub.
        data: Built data sets or BEIR folders; each is a retrieval task.
        split: Split of these data sets whose queries are searched.
        mode: `reason`: the model thinks before it embeds a query. `direct`: it does not.
        instruction_template: Text before a task's queries, with the task's instruction filled in, such as
            'Instruct: {instruction}: '. None: no instruction.
        max_documents: Documents of these data sets to search: all that are judged, filled up with random
            others. None: all.
        ignore_identical_ids: Of these data sets: leave a document out of the results of the query that has
            its id, as MTEB's own ArguAna, Quora and FiQA do.
        seed: Seed that draws those documents.
        max_tokens: Longest text, in tokens. None: what an exported folder says, else 512.
        max_think_tokens: Longest reasoning, in tokens; then the embed token is forced. 0 forces it at once.
        step: Checkpoint of a run: a step or `best` (on its development queries). None: the newest.
    """

    model: str
    out: Path
    tasks: tuple[str, ...] = ()
    data: tuple[Path, ...] = ()
    split: str = "test"
    mode: Literal["direct", "reason"] = "direct"
    instruction_template: str | None = None
    max_documents: int | None = None
    ignore_identical_ids: bool = False
    seed: int = 0
    max_tokens: int | None = None
    max_think_tokens: int = 32
    step: Step = None

    def evaluation(self, folder: Path) -> EvalSettings:
        """The settings of `eval` on one of the data sets."""
        return EvalSettings(
            model=self.model,
            data=folder,
            split=self.split,
            mode=self.mode,
            max_documents=self.max_documents,
            ignore_identical_ids=self.ignore_identical_ids,
            seed=self.seed,
            max_think_tokens=self.max_think_tokens,
            step=self.step,
            param_dtype=self.param_dtype,
            compute_dtype=self.compute_dtype,
            mesh=self.mesh,
        )
