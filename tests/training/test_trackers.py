"""What shows a run beside its files: tags by group, TensorBoard read back, and a stand-in for wandb."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.command_line import search_r3_here
from helpers.fake_wandb import install_fake_wandb
from tensorboardX.proto import event_pb2

from search_r3_jax.config import RunConfig
from search_r3_jax.errors import UserError
from search_r3_jax.training.development import Embeddings
from search_r3_jax.training.run import Run
from search_r3_jax.training.trackers import check_trackers, sample_text, tag_of

ROLLOUT = {
    "step": 0,
    "query": "sort *a* list",
    "reply": "by key\n<b>sorted</b>",
    "valid": True,
    "tokens": 7,
    "reward": 0.5,
    "top": [{"document": "d1", "relevant": True}, {"document": "d2", "relevant": False}],
}
SEARCH = {
    "step": 0,
    "set": "words",
    "mode": "reason",
    "query": "q",
    "reasoning": "r",
    "ndcg@10": 0.25,
    "top": [{"document": "d1", "score": 0.1, "relevant": False}],
}

# Made by protobuf when it is imported, where no type checker sees it.
EVENT: Any = vars(event_pb2)["Event"]


def events(folder: Path) -> Iterator[Any]:
    """The events in TensorBoard's files: records of length, checksum, bytes and checksum."""
    for file in sorted(folder.glob("events.*")):
        content, at = file.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack("<Q", content[at : at + 8])
            yield EVENT.FromString(content[at + 12 : at + 12 + length])
            at += 12 + length + 4


def shown(folder: Path) -> tuple[dict[tuple[str, int], float], dict[tuple[str, int], str]]:
    """Scalars and texts of TensorBoard's files by tag and step."""
    scalars: dict[tuple[str, int], float] = {}
    texts: dict[tuple[str, int], str] = {}
    for event in events(folder):
        for value in event.summary.value:
            if value.HasField("tensor"):
                texts[value.tag.removesuffix("/text_summary"), event.step] = value.tensor.string_val[
                    0
                ].decode()
            else:
                scalars[value.tag, event.step] = value.simple_value
    return scalars, texts


def opened(path: Path, *trackers: str, first: int = 0) -> Run:
    run = Run(path, RunConfig(seed=3), stage="sft", trackers=trackers)
    run.start_at(first)
    return run


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("loss", "loss/loss"),
        ("infonce", "loss/infonce"),
        ("in_batch_accuracy_64", "loss/in_batch_accuracy_64"),
        ("policy", "loss/policy"),
        ("policy_step", "index/policy_step"),
        ("reward", "reward/reward"),
        ("reward_best", "reward/best"),
        ("reward_seconds", "throughput/reward_seconds"),
        ("rollout_tokens", "rollout/tokens"),
        ("rollout_tokens_per_second", "throughput/rollout_tokens_per_second"),
        ("index_age", "index/age"),
        ("index_stall_share", "index/stall_share"),
        ("index_wait_seconds", "throughput/index_wait_seconds"),
        ("drift_cosine", "index/drift_cosine"),
        ("learning_rate", "update/learning_rate"),
        ("dev_direct_ndcg@10", "dev/direct_ndcg@10"),
        ("dev_reason_milliseconds_per_query", "dev/reason_milliseconds_per_query"),
        ("something_new", "other/something_new"),
    ],
)
def test_tags_are_grouped(name: str, tag: str) -> None:
    assert tag_of(name) == tag


def test_tensorboard_shows_scalars_by_group_and_texts(tmp_path: Path) -> None:
    run = opened(tmp_path / "run", "tensorboard")
    run.sample([ROLLOUT, ROLLOUT | {"reply": "again"}, SEARCH, SEARCH | {"step": -1}])
    run.log(0, {"loss": 2.0, "learning_rate": 0.5})
    run.show_embeddings(0, Embeddings(labels=[("query", "a\tb")], vectors=np.ones((1, 3))))
    run.show_embeddings(4, Embeddings(labels=[("document", "c\nd")], vectors=np.array([[0.5, 0, 1]])))
    run.close()
    scalars, texts = shown(tmp_path / "run" / "tensorboard")
    assert scalars == {("loss/loss", 0): 2.0, ("update/learning_rate", 0): 0.5}
    assert texts.keys() == {("samples/rollouts", 0), ("samples/words/reason", 0)}
    assert "again" in texts["samples/rollouts", 0]
    # The files of the run keep their names: what reads older runs reads these.
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert json.loads(metrics) == {"step": 0, "loss": 2.0, "learning_rate": 0.5}
    board = tmp_path / "run" / "tensorboard"
    assert (board / "tensors.tsv").read_text() == "0.5\t0\t1\n"
    assert (board / "metadata.tsv").read_text() == "kind\ttext\ndocument\tc d\n"
    assert "tensors.tsv" in (board / "projector_config.pbtxt").read_text()


def test_what_was_written_is_shown_literally() -> None:
    text = sample_text(ROLLOUT)
    assert "    sort *a* list" in text
    assert "    by key\n    <b>sorted</b>" in text
    assert "reward 0.500, 7 tokens, valid" in text
    assert "    1. d1 ✓\n    2. d2" in text
    assert "nDCG@10 0.250" in sample_text(SEARCH)


def test_none_writes_nothing(tmp_path: Path) -> None:
    run = opened(tmp_path / "run", "none")
    run.log(0, {"loss": 2.0})
    run.close()
    assert not (tmp_path / "run" / "tensorboard").exists()
    assert (tmp_path / "run" / "metrics.jsonl").is_file()


def test_a_restart_goes_on_in_the_same_run_at_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    runs = install_fake_wandb(monkeypatch)
    run = opened(tmp_path / "mine", "tensorboard", "wandb")
    for step in range(4):
        run.sample([SEARCH | {"step": step}])
        run.log(step, {"loss": float(step)})
    run.close()
    # Step 2 is repeated, with the values that it had.
    run = opened(tmp_path / "mine", "wandb", first=2)
    for step in range(2, 6):
        run.log(step, {"loss": float(step)})
    run.close()
    first, second = runs
    assert first is second
    assert first.finished == 2
    assert {step: values["loss/loss"] for step, values in first.logged.items()} == {
        step: float(step) for step in range(6)
    }
    assert first.logged[1]["samples/words/reason"] == (("text",), [[sample_text(SEARCH | {"step": 1})]])
    settings: dict[str, Any] = first.settings
    assert settings["project"] == "search_r3_jax"
    assert settings["name"] == "mine"
    assert settings["dir"] == str(tmp_path / "mine")
    assert settings["config"]["seed"] == 3
    assert json.loads((tmp_path / "mine" / "wandb.json").read_text()) == {"id": settings["id"]}
    # It decides nothing: a run may be shown elsewhere than before.
    opened(tmp_path / "mine", "none").close()


def test_wandb_that_refuses_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_fake_wandb(monkeypatch, refuses="api_key not\nconfigured")
    with pytest.raises(UserError, match=r"^--tracker: wandb: does not begin \(api_key not configured\)"):
        opened(tmp_path / "run", "wandb")


def test_what_cannot_be_had_is_said_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="none stands alone"):
        check_trackers(["none", "tensorboard"])
    check_trackers(["tensorboard"])
    # As if it were not installed.
    monkeypatch.setitem(sys.modules, "wandb", None)
    for stage in ("sft", "rl"):
        # Neither data nor model is looked for.
        asked = ["--config", "smollm2", "--run", str(tmp_path / "run"), "--tracker", "tensorboard", "wandb"]
        found = search_r3_here(stage, *asked)
        assert found.returncode == 2
        assert found.stderr == "search-r3: --tracker: wandb: is not installed; run: pip install wandb\n"
    assert not (tmp_path / "run").exists()
