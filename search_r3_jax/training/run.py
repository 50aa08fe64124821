"""A run's directory: its config, its metrics, and its lock."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from transformers import PreTrainedTokenizerBase

from search_r3_jax.compile_cache import keep_programs_with_run
from search_r3_jax.config import RunConfig
from search_r3_jax.data.collection import Collection
from search_r3_jax.data.dataset import ordered_queries_hash
from search_r3_jax.distributed.lockstep import Message, Team
from search_r3_jax.errors import TransientError, UserError, not_written
from search_r3_jax.files import append_json_line, read_json_lines, write_json, write_json_lines
from search_r3_jax.hub.checkpoint_reader import latest_checkpoint, read_run
from search_r3_jax.hub.load_model import LoadedModel, pinned_step, with_recorded_prompts
from search_r3_jax.hub.model_names import hub_revision
from search_r3_jax.lease import Lease, LeaseHeldError, take_lease, this_machine
from search_r3_jax.text.prompts import Prompter
from search_r3_jax.training.config_changes import change_table, changes_of, describe_changes, longer_run
from search_r3_jax.training.development import Embeddings
from search_r3_jax.training.trackers import Tracker, open_trackers, sample_tag, sample_text

_STAGES = {"sft": "stage 1", "rl": "stage 2"}
LOCK, HISTORY = "trainer.lock", "changes"
# What runs of older versions did not record.
RECORDED_SINCE = ("prompts", "end_ids", "data_sizes", "start_step")
logger = logging.getLogger(__name__)


class Run:
    """An open run directory, locked against other trainers; the same config resumes it.

    Of several processes only process 0 writes. Raises UserError for a bucket, when another trainer has the
    directory open, or when it holds a run whose config differs in more than harmless fields. With
    `allow_config_change` such differences are accepted, after a call of `on_change`. `trackers` are the names
    of what shows the run beside its files.
    """

    def __init__(
        self,
        path: Path,
        config: RunConfig,
        *,
        stage: str,
        record: dict[str, Any] | None = None,
        allow_config_change: bool = False,
        on_change: Callable[[], object] = lambda: None,
        trackers: Sequence[str] = ("tensorboard",),
    ):
        if path.parts and path.parts[0].endswith(":"):
            # Path turns gs://BUCKET/… into gs:/BUCKET/…, a local folder.
            raise UserError(
                f"--run: {path}: a run lies in a folder that all its processes see, not in a bucket; its "
                "index may (index.folder)"
            )
        self.path = path
        self._first = jax.process_index() == 0
        self._metrics, self._samples = path / "metrics.jsonl", path / "samples.jsonl"
        self._tracker_names, self._trackers = trackers, list[Tracker]()
        self._config = dataclasses.asdict(config)
        self._lease: Lease | None = None
        if self._first:
            path.mkdir(parents=True, exist_ok=True)
            try:
                self._lease = take_lease(path / LOCK)
            except LeaseHeldError as error:
                message = (
                    f"{path}: another trainer has this run open; stop it first, or give another --run (it is "
                    f"{error.holder})"
                )
                # One elsewhere may be on its way out.
                if error.holder.machine != this_machine():
                    raise TransientError(message) from error
                raise UserError(message) from error
            try:
                self._claim(
                    {"stage": stage, "config": dataclasses.asdict(config), **(record or {})},
                    allow_config_change,
                    on_change,
                )
            except BaseException:
                self.close()
                raise
        # A machine that takes over from a preempted one finds them here. A CPU's run on that kind of CPU
        # only.
        if jax.default_backend() != "cpu":
            keep_programs_with_run(path / "compiled")

    def _claim(
        self, record: dict[str, Any], allow_config_change: bool, on_change: Callable[[], object]
    ) -> None:
        """Write `config.json` of a new run; for an existing one compare it, and log the changes.

        Raises UserError for a change that is not allowed.
        """
        file, record = self.path / "config.json", json.loads(json.dumps(record))
        if not file.is_file():
            write_json(file, record)
            return
        before = _with_all_settings(self.path)
        history = before.pop(HISTORY, [])
        # From now on they do.
        added = {key: record[key] for key in RECORDED_SINCE if key in record and key not in before}
        changes = changes_of(before | added, record)
        for change in changes:
            if change.field == "config.index.source" and "rolling" in (change.before, change.now):
                raise UserError(
                    f"{file}: index.source: was {change.before}, is {change.now}: a run keeps its kind of "
                    "index; give another --run"
                )
        done = latest_checkpoint(self.path) or 0
        longer = longer_run(changes, record, done)
        harmful = [change for change in changes if not change.harmless and change not in longer.harmless]
        if harmful and not allow_config_change:
            raise UserError(
                f"{file}: this run was made with other values; give another --run, or --allow-config-change "
                "to go on with these",
                table=[*change_table(harmful), *longer.explained],
            )
        harmless = [change for change in changes if change not in harmful]
        if harmless:
            logger.info(f"changed since this run was started, harmless: {describe_changes(harmless)}")
        if harmful:
            logger.info(f"changed since this run was started, as allowed: {describe_changes(harmful)}")
            # Before the change is written: a run interrupted here compares again.
            on_change()
        history += [{"step": done, **dataclasses.asdict(change)} for change in changes]
        if changes or added:
            write_json(file, record | ({HISTORY: history} if history else {}))

    def start_at(self, step: int) -> None:
        """Delete metrics and samples from `step` on.

        They will be computed again, and each step must be written once.
        """
        if not self._first:
            return
        for file in (self._metrics, self._samples):
            if file.is_file():
                write_json_lines(file, [each for each in read_json_lines(file) if each["step"] < step])
        self._trackers = open_trackers(self._tracker_names, self.path, self._config, max(step, 0))

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """Append one step's scalars to `metrics.jsonl`, and show them."""
        if not self._first:
            return
        self._append(self._metrics, {"step": step, **scalars})
        for tracker in self._trackers:
            tracker.scalars(step, scalars)

    def sample(self, records: Sequence[dict[str, Any]]) -> None:
        """Append searches, each with its `step`, to `samples.jsonl`, and show those of a step together."""
        if not self._first:
            return
        texts: dict[tuple[int, str], list[str]] = {}
        for record in records:
            self._append(self._samples, record)
            if self._trackers:
                texts.setdefault((max(record["step"], 0), sample_tag(record)), []).append(sample_text(record))
        for (step, tag), of_tag in texts.items():
            for tracker in self._trackers:
                tracker.text(step, tag, "\n\n---\n\n".join(of_tag))

    def show_embeddings(self, step: int, embeddings: Embeddings) -> None:
        """Show vectors of an evaluation where the trackers can."""
        for tracker in self._trackers:
            tracker.embeddings(step, embeddings)

    def last(self, name: str) -> float | None:
        """The last value of a scalar in `metrics.jsonl`, if any."""
        lines = read_json_lines(self._metrics) if self._metrics.is_file() else []
        return next((line[name] for line in reversed(lines) if name in line), None)

    def save_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Save the tokenizer beside the checkpoints, with `<|embed_token|>` in it."""
        folder = self.path / "tokenizer"
        if self._first and not folder.is_dir():
            # Written aside and renamed: an existing folder is always complete.
            aside = folder.with_name(f".tokenizer.{os.getpid()}.tmp")
            tokenizer.save_pretrained(str(aside))
            aside.rename(folder)

    def make_durable(self) -> None:
        """Flush metrics and samples to the disk; call before a checkpoint of their steps is saved."""
        if self._first:
            for file in (self._metrics, self._samples):
                if file.is_file():
                    with file.open("a") as opened:
                        os.fsync(opened.fileno())

    def close(self) -> None:
        """Flush the buffers, and release the lock."""
        try:
            for tracker in self._trackers:
                tracker.close()
        finally:
            if self._lease is not None:
                self._lease.release()

    def _append(self, file: Path, record: dict[str, Any]) -> None:
        if self._lease is not None:
            self._lease.check()
        try:
            append_json_line(file, record)
        except OSError as error:
            raise not_written(file, error, "make room, then the same command goes on") from error


@dataclass(frozen=True, kw_only=True)
class RlRecord:
    """The fields of `config.json` of a run of stage 2 beside its config.

    Paths may be relative to the run.

    Attributes:
        data: folder of the data set, for the indexer.
        split: its split.
        start: the run that this one starts from; None where it starts from no run.
        start_step: the checkpoint of that run.
        revision: the commit of a model of the hub.
    """

    data: str
    split: str
    start: str | None = None
    start_step: int | None = None
    revision: str | None = None

    def to_json(self, collection: Collection, replay: Path | None) -> dict[str, Any]:
        """The record's fields, what the collection contains, and the run that is replayed."""
        record: dict[str, Any] = {"data": self.data, "split": self.split, "start_step": self.start_step}
        if self.start is not None:
            record["start"] = self.start
        if self.revision is not None:
            record["revision"] = self.revision
        if replay is not None:
            record["replay"] = str(Path(replay).resolve())
        return record | {"data_version": data_version(collection), "data_sizes": data_sizes(collection)}


def rl_record(run: Path, config: RunConfig) -> RlRecord:
    """The record of a run of stage 2 on the config's first data set, starting from the config's model."""
    point = starting_point(run, config)
    step = point.get("start_step")
    return RlRecord(
        data=config.data.sets[0],
        split=config.data.split,
        start=None if step is None else os.path.relpath(config.model, run.resolve()),
        start_step=step,
        revision=point.get("revision"),
    )


def starting_point(run: Path, config: RunConfig, *, choose: bool = True) -> dict[str, Any]:
    """Which checkpoint of the run, or which commit of the hub's model, a run starts from; {} for files.

    It is chosen once: a resumed run keeps it, whatever has been saved or uploaded since, but where
    `start_step` names another. Without `choose`, for a model that is loaded already, only what is recorded.
    Raises UserError for a step of what is no run.
    """
    file = run / "config.json"
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    same_model = bool(before) and before["config"]["model"] == config.model
    if same_model and config.start_step is None:
        recorded = {name: before.get(name) for name in ("revision", "start_step")}
        known = {name: value for name, value in recorded.items() if value is not None}
        if known:
            return known
    if not choose:
        return {}
    step = pinned_step(config.model, config.start_step, flag="--start-step")
    if step is not None:
        return {"start_step": step}
    # A run of an older version recorded none, and may have had another.
    revision = None if same_model else hub_revision(config.model)
    return {} if revision is None else {"revision": revision}


def led_starting_point(team: Team, run: Path, config: RunConfig, *, choose: bool) -> dict[str, Any]:
    """`starting_point` as process 0 finds it."""
    return dict(team.lead(lambda: starting_point(run, config, choose=choose)))


def led_record(team: Team, run: Path, config: RunConfig) -> RlRecord:
    """`rl_record` as process 0 finds it."""
    return RlRecord(**team.lead(lambda: dataclasses.asdict(rl_record(run, config))))


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The config with absolute paths, so that a run can be opened from any directory."""
    sets = tuple(str(Path(folder).resolve()) for folder in config.data.sets)
    model = str(Path(config.model).resolve()) if Path(config.model).exists() else config.model
    return dataclasses.replace(config, model=model, data=dataclasses.replace(config.data, sets=sets))


def require_same_settings(team: Team, config: RunConfig) -> None:
    """Raise UserError in all processes where the settings of one differ; each may have files of its own.

    A process that evaluates or saves at other steps would wait for the others for ever.
    """
    settings = {
        f"{section}.{name}" if isinstance(values, dict) else section: value
        for section, values in dataclasses.asdict(config).items()
        for name, value in (values if isinstance(values, dict) else {"": values}).items()
    }
    del settings["model"], settings["data.sets"]
    team.require_same_settings(settings)


def prompt_record(prompter: Prompter) -> dict[str, Any]:
    """The fields of `config.json` that fix the rendered prompts and the tokens that end a turn."""
    return {"prompts": prompter.prompts.to_json(), "end_ids": list(prompter.end_ids)}


def recorded_prompts(model: LoadedModel, run: Path, team: Team) -> LoadedModel:
    """The model with the prompts that a run recorded when it was started; unchanged for a new run."""

    def read() -> Message:
        record = read_run(run)[1] if (run / "config.json").is_file() else {}
        return {key: record[key] for key in ("prompts", "end_ids") if key in record}

    return with_recorded_prompts(model, run, team.lead(read))


def check_stage(run: Path, stage: str, team: Team) -> None:
    """Raise UserError, before any long work, where a run folder holds a run of the other stage."""

    def read() -> Message:
        return {"there": read_run(run)[1].get("stage", stage) if (run / "config.json").is_file() else stage}

    # Of process 0 alone: another may see what it has written a moment ago, in part.
    there = team.lead(read)["there"]
    if there != stage:
        remedy = (
            f"give another --run, and --model {run} to start from it"
            if stage == "rl"
            else "give another --run; `search-r3 rl` goes on with this one"
        )
        raise UserError(f"--run: {run}: holds a run of {_STAGES.get(there, there)}; {remedy}")


def data_version(collection: Collection) -> dict[str, str]:
    """Identify a collection by its content: texts in their order, queries and judgements."""
    hashes = {
        "corpus_hash": collection.corpus_hash(),
        "queries_hash": ordered_queries_hash(collection.queries),
    }
    return {"name": collection.name, "split": collection.split, **hashes}


def data_sizes(collection: Collection) -> dict[str, int]:
    """How much of a collection is trained on."""
    return {"queries": len(collection.queries), "documents": len(collection.documents)}


def _with_all_settings(run: Path) -> dict[str, Any]:
    """Read the record of a run, with defaults for settings that are newer than it.

    Raises UserError where it cannot be read.
    """
    config, record = read_run(run)
    return record | {"config": json.loads(json.dumps(dataclasses.asdict(config)))}
