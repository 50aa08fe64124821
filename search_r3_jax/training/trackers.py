"""Trackers of a run beside its own files: TensorBoard and wandb, which show scalars and texts by group."""

from __future__ import annotations

import importlib
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tensorboardX import SummaryWriter

from search_r3_jax.console import printable
from search_r3_jax.distributed.runtime import is_first
from search_r3_jax.errors import UserError
from search_r3_jax.files import write_json
from search_r3_jax.training.development import Embeddings

PROJECT = "search_r3_jax"
# Keeps the id of the run at wandb, so that a restart goes on in it.
WANDB_FILE = "wandb.json"
PROJECTOR = (
    'embeddings {\n  tensor_name: "development queries and documents"\n  tensor_path: "tensors.tsv"\n'
    '  metadata_path: "metadata.tsv"\n}\n'
)

# The first group of which a name has one of the endings, or the beginnings.
_ENDINGS = (
    ("throughput", ("seconds", "per_second", "per_query", "tflops", "mfu", "padding_share")),
    ("index", ("index_stall_share",)),
)
_BEGINNINGS = (
    ("dev", ("dev_",)),
    ("reward", ("reward", "zero_group_share", "zero_advantage_share")),
    ("index", ("index_", "policy_step", "reencoded", "overlay_size", "candidate_", "drift_")),
    ("loss", ("loss", "policy", "infonce", "language", "kl", "triplet", "in_batch_accuracy")),
    (
        "update",
        ("learning_rate", "gradient_norm", "skipped", "ratio", "clipped_", "sampler_ratio", "importance"),
    ),
    (
        "rollout",
        ("rollout_", "valid_rate", "reply_tokens", "distinct_", "repetition", "entropy", "effective_rank"),
    ),
)


def tag_of(name: str) -> str:
    """GROUP/NAME of a scalar of `metrics.jsonl`, which itself keeps plain names.

    The groups are loss, reward, rollout, update, index, throughput, dev (the development queries) and other.
    """
    # What reasoning costs on the development queries stands beside what it gives.
    if not name.startswith("dev_"):
        for group, endings in _ENDINGS:
            if name.endswith(endings):
                return f"{group}/{name.removeprefix(f'{group}_')}"
    for group, beginnings in _BEGINNINGS:
        if name.startswith(beginnings):
            return f"{group}/{name.removeprefix(f'{group}_')}"
    return f"other/{name}"


class Tracker(Protocol):
    """Where the first process shows what it logs."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Show a step's scalars, named as in `metrics.jsonl`."""
        ...

    def text(self, step: int, tag: str, text: str) -> None:
        """Show a text in Markdown."""
        ...

    def embeddings(self, step: int, embeddings: Embeddings) -> None:
        """Show vectors, in place of those of the evaluation before."""
        ...

    def close(self) -> None:
        """Write what is in memory."""
        ...


class TensorBoard:
    """Event files in the folder `tensorboard` of a run."""

    def __init__(self, run: Path, first: int):
        """Steps from `first` on replace those of an interrupted call."""
        self._folder = run / "tensorboard"
        self._writer = SummaryWriter(str(self._folder), purge_step=first)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Show a step's scalars."""
        for name, value in values.items():
            self._writer.add_scalar(tag_of(name), value, step)

    def text(self, step: int, tag: str, text: str) -> None:
        """Show a text in Markdown."""
        self._writer.add_text(tag, text, step)

    def embeddings(self, step: int, embeddings: Embeddings) -> None:
        """Show vectors in the projector: those of the last evaluation only, because they are large."""
        rows = ("\t".join(f"{value:.5g}" for value in vector) for vector in embeddings.vectors.tolist())
        labels = (
            "\t".join((kind, " ".join(printable(text).split())[:200])) for kind, text in embeddings.labels
        )
        contents = {
            "tensors.tsv": "".join(f"{row}\n" for row in rows),
            "metadata.tsv": "".join(f"{label}\n" for label in ("kind\ttext", *labels)),
            "projector_config.pbtxt": PROJECTOR,
        }
        for name, content in contents.items():
            (self._folder / name).write_text(content, encoding="utf-8")

    def close(self) -> None:
        """Write what is in memory."""
        self._writer.close()


class Wandb:
    """A run at wandb, or in the folder `wandb` of a run with WANDB_MODE=offline."""

    def __init__(self, run: Path, config: Mapping[str, Any]):
        """Begin it, or go on in the one that the run folder names; raises UserError where wandb refuses."""
        self._wandb, file = _wandb(), run / WANDB_FILE
        known = (
            json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"id": uuid.uuid4().hex[:12]}
        )
        try:
            self._run = self._wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=run.resolve().name,
                id=known["id"],
                resume="allow",
                dir=str(run),
                config=dict(config),
            )
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"--tracker: wandb: does not begin ({reason}); run wandb login, or set WANDB_MODE=offline"
            ) from error
        if not file.is_file():
            write_json(file, known)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Show a step's scalars."""
        self._log(step, {tag_of(name): value for name, value in values.items()})

    def text(self, step: int, tag: str, text: str) -> None:
        """Show a text, as a table of one cell: wandb has no panel for Markdown that is logged."""
        self._log(step, {tag: self._wandb.Table(columns=["text"], data=[[text]])})

    def embeddings(self, step: int, embeddings: Embeddings) -> None:
        """Show nothing: the projector is TensorBoard's."""

    def close(self) -> None:
        """Finish the upload."""
        self._run.finish()

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        # wandb only goes forward. A resumed run repeats some steps, with the same values.
        if step >= int(getattr(self._run, "step", 0) or 0):
            self._run.log(dict(values), step=step)


def check_trackers(names: Sequence[str]) -> None:
    """Raise UserError for trackers that cannot be had, before any work."""
    if "none" in names and len(set(names)) > 1:
        raise UserError(f"--tracker: {' '.join(names)}: none stands alone; leave it out, or the others")
    if "wandb" in names and is_first():
        _wandb()


def open_trackers(names: Sequence[str], run: Path, config: Mapping[str, Any], first: int) -> list[Tracker]:
    """The trackers of a run that takes its steps from `first` on; for the first process only."""
    trackers: list[Tracker] = []
    if "tensorboard" in names:
        trackers.append(TensorBoard(run, first))
    if "wandb" in names:
        trackers.append(Wandb(run, config))
    return trackers


def sample_tag(record: Mapping[str, Any]) -> str:
    """The tag of a record of `samples.jsonl`: rollouts, or searches by set and mode."""
    return f"samples/{record['set']}/{record['mode']}" if "set" in record else "samples/rollouts"


def sample_text(record: Mapping[str, Any]) -> str:
    """A record of `samples.jsonl` in Markdown: what was asked, what was written, and what that found."""
    if "set" in record:
        written, outcome = record["reasoning"], f"nDCG@10 {record['ndcg@10']:.3f}"
    else:
        valid = "valid" if record["valid"] else "no embed token of its own"
        written = record["reply"]
        outcome = f"reward {record['reward']:.3f}, {record['tokens']} tokens, {valid}"
    top = [f"{each['document']}{' ✓' if each['relevant'] else ''}" for each in record["top"]]
    numbered = [f"{rank}. {document}" for rank, document in enumerate(top, start=1)]
    # Indented: what a model or a data set wrote is no Markdown.
    parts = [
        _literal(record["query"]),
        *([_literal(written)] if written else []),
        outcome,
        _literal(numbered),
    ]
    return printable("\n\n".join(parts))


def _literal(text: str | Sequence[str]) -> str:
    lines = text.splitlines() if isinstance(text, str) else text
    return "\n".join(f"    {line}" for line in lines)


def _wandb() -> Any:
    try:
        return importlib.import_module("wandb")
    except ImportError:
        raise UserError("--tracker: wandb: is not installed; run: pip install wandb") from None
