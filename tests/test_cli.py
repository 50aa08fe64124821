"""The command line: a user's mistake is one line and status 2; start-up is quiet."""

import subprocess
import sys
from pathlib import Path

import pytest


def search_r3(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "search_r3_jax", *arguments], capture_output=True, text=True, timeout=120)


def test_help_names_the_commands() -> None:
    shown = search_r3("--help")
    assert shown.returncode == 0
    for command in ("quickstart", "indexer", "export"):
        assert command in shown.stdout


@pytest.mark.parametrize("model", ["nowhere", "folder", "bad.gguf", "pickled"])
def test_a_model_that_cannot_be_read_is_one_line_and_status_2(tmp_path: Path, model: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "bad.gguf").write_bytes(b"not a model" * 100)
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text(
        '{"model_type": "llama", "vocab_size": 8, "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1,'
        ' "num_attention_heads": 1, "rms_norm_eps": 1e-5, "max_position_embeddings": 8}'
    )
    (tmp_path / "pickled" / "tokenizer_config.json").write_text("{}")
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"")
    shown = search_r3("export", "--model", str(tmp_path / model), "--out", str(tmp_path / "out"))
    assert shown.returncode == 2
    assert shown.stdout == ""
    assert shown.stderr.count("\n") == 1
    assert model in shown.stderr
    assert not (tmp_path / "out").exists()


def test_quickstart_refuses_a_folder_of_another_config(tmp_path: Path) -> None:
    (tmp_path / "quickstart.json").write_text("{}")
    shown = search_r3("quickstart", "--out", str(tmp_path))
    assert shown.returncode == 2
    assert "another config" in shown.stderr
