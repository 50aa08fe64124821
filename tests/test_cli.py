"""The command line: a user's mistake is one line and status 2; start-up is quiet."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.command_line import search_r3_here, search_r3_process
from helpers.tiny_models import word_collection

import search_r3_jax
from search_r3_jax import cli
from search_r3_jax.cli import parse
from search_r3_jax.commands.data import DataBuild
from search_r3_jax.commands.evaluation import Compare
from search_r3_jax.commands.options import CommonOptions
from search_r3_jax.commands.training import Indexer, Sft
from search_r3_jax.configs import config_names, load_config
from search_r3_jax.data.dataset import build_dataset
from search_r3_jax.errors import UserError
from search_r3_jax.retrieval.indexer import worker


def test_help_names_the_commands() -> None:
    shown = search_r3_process("--help")
    assert shown.returncode == 0
    for command in ("quickstart", "indexer", "export", "embed", "data", "sft", "eval", "budget"):
        assert command in shown.stdout


@pytest.mark.slow
def test_settings_of_a_stage_are_those_of_its_experiment_and_can_be_changed(
    tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    data = tmp_path / "data"
    collection = word_collection(documents=40, queries=40)
    build_dataset({"train": collection}, data, name="words", source={"kind": "words"})
    settings = [
        "--sft.steps",
        "2",
        "--sft.eval-every",
        "2",
        "--sft.global-batch",
        "8",
        "--text.max-thought-tokens=8",
    ]
    settings += [
        "--model",
        str(tiny_folders["llama"]),
        "--data.sets",
        str(data),
        "--rl.sampler.max-think-tokens",
        "4",
    ]
    shown = search_r3_process("sft", "--config", "smollm2", "--run", str(tmp_path / "run"), *settings)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "words: 36 queries of train; 4 of train, held out over 40 to watch" in shown.stdout
    assert "compiling the first evaluation …" in shown.stdout
    assert "compiled the step in" in shown.stdout
    assert "before training: nDCG@10" in shown.stdout
    assert "step 2: nDCG@10" in shown.stdout
    assert "ms a query)" in shown.stdout
    record = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert (record["sft"]["steps"], record["sft"]["global_batch"], record["text"]["max_thought_tokens"]) == (
        2,
        8,
        8,
    )
    # What was not changed is the experiment's.
    assert record["sft"]["optimizer"] == dataclasses.asdict(load_config("smollm2").sft.optimizer)
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [0, 1]
    # What reasoning costs stands beside what it gives.
    assert {"dev_reason_ndcg@10", "dev_reason_reply_tokens", "dev_reason_milliseconds_per_query"} <= metrics[
        1
    ].keys()
    assert metrics[1]["evaluation_seconds"] > 0
    for name in (
        "infonce",
        "triplet",
        "language",
        "kl",
        "tokens_per_second",
        "learning_rate",
        "padding_share",
        "skipped",
    ):
        assert name in metrics[0]
    again = search_r3_process(
        "sft",
        "--config=smollm2",
        "--run",
        str(tmp_path / "run"),
        *settings[:-2],
        "--rl.sampler.max-think-tokens",
        "5",
    )
    assert again.returncode == 2
    assert "rl.sampler.max_think_tokens  4         5" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "nope"], "--config: nope: no such experiment"),
        (["--config", "smollm2"], "data.sets: no data set"),
        (["--config", "smollm2", "--data.sets", "nowhere"], "nowhere"),
        (["--config", "smollm2", "--model", "nowhere"], "data.sets"),
        (["--config", "smollm2", "--data.weights", "1", "2", "--data.sets", "{data}"], "data.weights"),
        (["--config", "smollm2", "--sft.encode-chunk", "7", "--data.sets", "{data}"], "sft.encode_chunk"),
        (["--config", "smollm2", "--sft.global-batch", "4096", "--data.sets", "{data}"], "sft.global_batch"),
        (["--config", "smollm2", "--sft.reasoning", "column", "--data.sets", "{data}"], "sft.reasoning"),
    ],
)
def test_mistakes_before_training(
    tiny_folders: dict[str, Path], tmp_path: Path, arguments: list[str], message: str
) -> None:
    data = tmp_path / "data"
    build_dataset(
        {"train": word_collection(documents=40, queries=40)}, data, name="words", source={"kind": "words"}
    )
    given = [argument.replace("{data}", str(data)) for argument in arguments]
    if "--model" not in given:
        given += ["--model", str(tiny_folders["llama"])]
    shown = search_r3_here("sft", *given, "--run", str(tmp_path / "run"))
    assert (shown.returncode, shown.stderr.count("\n")) == (2, 1)
    assert message in shown.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("model", ["nowhere", "folder", "bad.gguf", "pickled"])
def test_a_model_that_cannot_be_read_is_one_line_and_status_2(tmp_path: Path, model: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "bad.gguf").write_bytes(b"not a model" * 100)
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text(
        '{"model_type": "llama", "vocab_size": 8, "hidden_size": 4, "intermediate_size": 4, '
        '"num_hidden_layers": 1,'
        ' "num_attention_heads": 1, "rms_norm_eps": 1e-5, "max_position_embeddings": 8}'
    )
    (tmp_path / "pickled" / "tokenizer_config.json").write_text("{}")
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"")
    shown = search_r3_here("export", "--model", str(tmp_path / model), "--out", str(tmp_path / "out"))
    assert shown.returncode == 2
    assert shown.stdout == ""
    assert shown.stderr.count("\n") == 1
    assert model in shown.stderr
    assert not (tmp_path / "out").exists()


def test_quickstart_refuses_a_folder_of_another_config(tmp_path: Path) -> None:
    (tmp_path / "quickstart.json").write_text("{}")
    shown = search_r3_here("quickstart", "--out", str(tmp_path))
    assert shown.returncode == 2
    assert "another config" in shown.stderr


def test_data_build_from_a_beir_folder_and_from_lines(tmp_path: Path) -> None:
    (tmp_path / "in" / "qrels").mkdir(parents=True)
    (tmp_path / "in" / "corpus.jsonl").write_text('{"_id": "d1", "text": "a"}\n{"_id": "d2", "text": ""}\n')
    (tmp_path / "in" / "queries.jsonl").write_text('{"_id": "q1", "text": "b"}\n')
    (tmp_path / "in" / "qrels" / "test.tsv").write_text("q1\td1\t1\n")
    (tmp_path / "pairs.jsonl").write_text('{"query": "q", "positive": ["a", "b"]}\n')
    command = [
        "data",
        "build",
        "--source",
        "beir",
        "--input",
        str(tmp_path / "in"),
        "--out",
        str(tmp_path / "set"),
    ]
    shown = search_r3_here(*command)
    error = (
        f"{tmp_path}/in/corpus.jsonl, line 2: fields 'title' and 'text' are both empty; fill one, remove "
        "the line or pass --skip-bad to data build\n"
    )
    assert (shown.returncode, shown.stdout, shown.stderr) == (2, "", f"search-r3: {error}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "pairs.jsonl"]
    with pytest.raises(UserError, match="both empty"):
        search_r3_here(*command, "--debug")
    shown = search_r3_here(*command, "--skip-bad", "--split", "test")
    assert (shown.returncode, shown.stdout) == (0, f"{tmp_path}/set: test: 1 queries over 1 documents\n")
    assert shown.stderr == f"skipped: {error}skipped 1 in all: empty text 1\n"

    out = tmp_path / "lines"
    shown = search_r3_here(
        "data", "build", "--source", "jsonl", "--input", str(tmp_path / "pairs.jsonl"), "--out", str(out)
    )
    assert (shown.returncode, shown.stdout, shown.stderr) == (
        0,
        f"{out}: train: 1 queries over 2 documents\n",
        "",
    )
    with pytest.raises(UserError, match="--input: missing; --source beir reads it"):
        DataBuild(source="beir", out=tmp_path / "other").run()


def test_the_version_is_the_packages() -> None:
    shown = search_r3_process("--version")
    assert (shown.returncode, shown.stdout, shown.stderr) == (
        0,
        f"search-r3 {search_r3_jax.__version__}\n",
        "",
    )


def test_subcommands_are_listed_in_order_of_use() -> None:
    shown = search_r3_here("--help").stdout
    order = ["quickstart", "data", "sft", "rl", "indexer", "eval", "compare", "budget", "perplexity", "mteb"]
    order += ["curves", "report", "export", "embed", "think", "plan"]
    assert f"{{{','.join(order)}}}" in shown


@pytest.mark.parametrize(
    ("stage", "shown", "hidden"),
    [
        (
            "sft",
            ["--sft.steps", "--rl.sampler.max-think-tokens", "--data.batches"],
            ["--rl.steps", "--rl.sampler.top-k", "--index.", "--data.rl-"],
        ),
        ("rl", ["--rl.steps", "--index.kind", "--data.rl-queries"], ["--sft.", "--data.batches"]),
    ],
)
def test_a_stage_shows_its_own_settings(stage: str, shown: list[str], hidden: list[str]) -> None:
    text = search_r3_here(stage, "--config", "smollm2", "--help").stdout
    assert all(flag in text for flag in shown)
    assert not any(flag in text for flag in hidden)
    # The names of all experiments stand in the help of --config.
    assert all(name in text for name in config_names())


def test_a_flag_of_an_older_version_is_taken_with_a_note(tmp_path: Path) -> None:
    shown = search_r3_here(
        "rl", "--config", "smollm2", "--run", str(tmp_path / "run"), "--rl.floor-gap", "0.2"
    )
    assert shown.stderr.splitlines()[0] == "search-r3: note: --rl.floor-gap is now --rl.reward.floor-gap"
    assert "data.sets" in shown.stderr


def test_a_command_takes_the_settings_that_its_help_hides() -> None:
    """One set of flags may serve both stages."""
    command = parse(
        ["sft", "--config", "smollm2", "--run", "run", "--rl.steps", "3", "--index.kind", "exact"]
    )
    assert (command.settings.rl.steps, command.settings.index.kind) == (3, "exact")


def test_an_indexer_that_its_trainer_ends_does_not_say_that_it_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    def exit_now(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(worker, "run_indexer", interrupt)
    monkeypatch.setattr(os, "_exit", exit_now)
    with pytest.raises(SystemExit) as ended:
        Indexer(run_folder=tmp_path, parent=1).run()
    assert ended.value.code == 0
    assert capsys.readouterr().out == "stopped by the trainer\n"
    with pytest.raises(KeyboardInterrupt):
        Indexer(run_folder=tmp_path).run()


EVAL = ["eval", "--model", "bm25", "--data", "a"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*EVAL, "--seed", "1", "--seed=2"], r"--seed: given twice \(1 and 2\); give it once"),
        ([*EVAL, "--max-queries", "1", "--max_queries", "2"], "--max-queries: given twice"),
        (
            ["mteb", "--model", "m", "--out", "o", "--data", "a", "--data", "b"],
            r"\(a and b\); .* all its values",
        ),
        (["data", "build", "--skip-bad", "--no-skip-bad"], r"\(--skip-bad and --no-skip-bad\)"),
        (["rl", "--index.local", "--index.no-local"], r"--index.local: given twice"),
        (
            ["rl", "--rl.floor-gap", "0.1", "--rl.reward.floor-gap", "0.2"],
            "--rl.reward.floor-gap: given twice",
        ),
    ],
)
def test_an_option_given_twice_is_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(arguments)


def test_an_option_may_say_the_same_again() -> None:
    """A script may add what its caller has given already."""
    command = parse([*EVAL, "--debug", "--data", "a", "--debug"])
    assert (command.data, command.common.debug) == (Path("a"), True)
    assert parse(["mteb", "--model", "m", "--out", "o", "--data", "a", "b"]).data == (Path("a"), Path("b"))


class Printing:
    """A command that prints."""

    common = CommonOptions()

    def run(self) -> None:
        print("a result")


@pytest.mark.parametrize("device", ["/dev/full", "pipe"])
def test_a_standard_output_that_takes_nothing_is_one_line(
    device: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "parse", lambda _: Printing())
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    if device == "pipe":
        reader, descriptor = os.pipe()
        os.close(reader)
    else:
        descriptor = os.open(device, os.O_WRONLY)
    with os.fdopen(descriptor, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with pytest.raises(SystemExit) as ended:
            cli.main()
    shown = capsys.readouterr().err
    if device == "pipe":
        # As of a program that a signal ends.
        assert (ended.value.code, shown) == (128 + signal.SIGPIPE, "")
    else:
        message = "search-r3: standard output: cannot be written (No space left on device); make room\n"
        assert (ended.value.code, shown) == (2, message)


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_help_into_a_pipe_that_nobody_reads_is_quiet(argument: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of `search-r3 --help | head -1`, whose reader may be gone before the first line."""
    reader, writer = os.pipe()
    os.close(reader)
    # What is printed waits in a buffer, as it does for users.
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    with os.fdopen(writer, "w") as stream:
        shown = subprocess.run(
            [sys.executable, "-m", "search_r3_jax", argument],
            stdout=stream,
            stderr=subprocess.PIPE,
            text=True,
            timeout=100,
        )
    assert (shown.returncode, shown.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_before_training_ends_with_130(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Training that has saved ends with 0: tests/training/test_stopping.py."""

    def be_interrupted(command: object) -> None:
        os.kill(os.getpid(), number)
        time.sleep(1)

    def exit_now(status: int) -> None:
        raise SystemExit(status)

    # Without a handler of the command's the signal would end the tests.
    before = {each: signal.signal(each, lambda *_: None) for each in (signal.SIGTERM, signal.SIGUSR1)}
    request.addfinalizer(lambda: [signal.signal(*each) for each in before.items()])
    monkeypatch.setattr(os, "_exit", exit_now)
    for kind, arguments, then in (
        (Sft, ["sft", "--config", "smollm2", "--run", "r"], "; the same command starts, or goes on"),
        (Compare, ["compare", "a", "b"], "\n"),
    ):
        monkeypatch.setattr(kind, "run", be_interrupted)
        shown = search_r3_here(*arguments)
        assert (shown.returncode, shown.stdout, shown.stderr.count("\n")) == (130, "", 1)
        assert shown.stderr.startswith(f"search-r3: interrupted{then}")


def test_a_message_is_one_line_that_cannot_steer_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["search-r3", "eval", "--model", "bm25", "--data", "a\x1b[2J\nb"])
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().err.startswith("search-r3: a\ufffd[2J b: expected a built data set")
