"""`embed` and `export` on the command line: what they write, and mistakes before the work."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.command_line import search_r3_process
from safetensors.numpy import load_file, save_file

from search_r3_jax.commands.models import Embed, Export
from search_r3_jax.embedder import Embedder
from search_r3_jax.errors import UserError


def test_embed_writes_an_array_and_one_line(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    texts = ["first line", "", "dritte Zeile: Öl"]
    (tmp_path / "texts.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    model = str(tiny_folders["llama"])
    out = tmp_path / "vectors.npy"
    shown = search_r3_process(
        "embed",
        "--model",
        model,
        "--input",
        str(tmp_path / "texts.txt"),
        "--out",
        str(out),
        "--kind",
        "document",
    )
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.startswith(f"{out}: 3 document vectors of 64 dimensions, direct, in ")
    assert shown.stdout.count("\n") == 1
    expected = Embedder.load(model).encode(texts)
    np.testing.assert_array_equal(np.load(out), expected)

    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    Embed(model=model, input=tmp_path / "texts.jsonl", out=out, truncate_dim=8).run()
    cut = expected[:, :8]
    np.testing.assert_allclose(np.load(out), cut / np.linalg.norm(cut, axis=-1, keepdims=True), atol=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["texts.jsonl", "texts.txt", "vectors.npy"]


def test_kept_vectors_go_on_where_they_were_interrupted(
    tiny_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"text {number} of some" for number in range(20)]
    (tmp_path / "texts.txt").write_text("\n".join(texts) + "\n")
    model, folder = str(tiny_folders["llama"]), tmp_path / "kept"
    asked: dict[str, Any] = {"model": model, "input": tmp_path / "texts.txt", "vectors": folder}
    expected, encoded = Embedder.load(model).encode(texts), list[int]()
    encode = Embedder.encode
    monkeypatch.setattr("search_r3_jax.retrieval.store.corpus_vectors.SHARD_DOCUMENTS", 8)

    def interrupted(embedder: Embedder, texts: list[str], **named: Any) -> np.ndarray:
        encoded.append(len(texts))
        if len(encoded) == 2:
            raise KeyboardInterrupt
        return encode(embedder, texts, **named)

    monkeypatch.setattr(Embedder, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Embed(**asked, out=tmp_path / "a.npy").run()
    assert not (tmp_path / "a.npy").exists()
    Embed(**asked, out=tmp_path / "a.npy").run()
    # The first shard was kept.
    assert encoded == [8, 8, 8, 4]
    np.testing.assert_allclose(np.load(tmp_path / "a.npy"), expected, atol=1e-6)
    Embed(**asked, out=tmp_path / "b.npy", truncate_dim=8, precision="binary").run()
    assert encoded == [8, 8, 8, 4]
    np.testing.assert_array_equal(
        np.load(tmp_path / "b.npy"), np.packbits(expected[:, :8] > 0, axis=-1).view(np.int8) ^ np.int8(-128)
    )
    (tmp_path / "texts.txt").write_text("\n".join(reversed(texts)) + "\n")
    with pytest.raises(UserError, match=r"holds other vectors \(differs in corpus_hash\)"):
        Embed(**asked, out=tmp_path / "a.npy").run()
    with pytest.raises(UserError, match="--vectors: keeps vectors of mode direct only"):
        Embed(**asked, out=tmp_path / "a.npy", mode="reason").run()


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("a.jsonl", b'{"text": "fine"}\n{"txt": "x"}\n', "a.jsonl, line 2: field 'text' is missing"),
        ("a.jsonl", b'{"text": "fine"}\n["x"]\n', "a.jsonl, line 2: expected a JSON object"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": ', "a.jsonl, line 2: not valid JSON"),
        ("a.txt", b"fine\nfine\n\xff\n", "a.txt, line 3: not UTF-8"),
        ("a.txt", None, "a.txt: cannot be read"),
        ("a.jsonl", b'{"text": "a \\ud83d b"}\n', "line 1: field 'text' holds an unpaired surrogate"),
        ("a.jsonl", b'{"text": "a", "x": ' + b"[" * 10**5 + b"]" * 10**5 + b"}\n", "line 1: not valid JSON"),
        ("a.txt", b"fine\na\0b\n", "a.txt, line 2: holds a NUL byte"),
        ("A.TXT.GZ", b"no gzip", "A.TXT.GZ, after line 0: damaged gzip file"),
    ],
)
def test_bad_texts_name_file_and_line_before_any_model_is_loaded(
    tmp_path: Path, name: str, content: bytes | None, named: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        Embed(model="nowhere", input=tmp_path / name, out=tmp_path / "out.npy").run()
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.npy").exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_tokens": 0}, "--max-tokens: 0: give 1 or more"),
        ({"truncate_dim": -1}, "--truncate-dim: -1: give 1 or more"),
        ({"mode": "reason", "kind": "document"}, "--mode: reason: documents are embedded directly"),
    ],
)
def test_limits_are_checked_before_any_model_is_loaded(
    tmp_path: Path, options: dict[str, Any], named: str
) -> None:
    (tmp_path / "texts.txt").write_text("a text\n")
    with pytest.raises(UserError, match=named):
        Embed(model="nowhere", input=tmp_path / "texts.txt", out=tmp_path / "out.npy", **options).run()


def test_an_array_that_cannot_be_written_leaves_the_one_before(
    tiny_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "texts.txt").write_text("a text\n")
    out = tmp_path / "out.npy"
    out.write_bytes(b"before")

    def refuse(file: object, array: np.ndarray, allow_pickle: bool) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", refuse)
    with pytest.raises(UserError, match="No space left"):
        Embed(model=str(tiny_folders["llama"]), input=tmp_path / "texts.txt", out=out).run()
    assert out.read_bytes() == b"before"
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(UserError, match="no such folder"):
        Embed(model="nowhere", input=tmp_path / "texts.txt", out=tmp_path / "missing" / "out.npy").run()


def test_export_asks_for_one_source(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give one of them"):
        Export(out=tmp_path / "out").run()
    with pytest.raises(UserError, match="give one of them"):
        Export(out=tmp_path / "out", model="smollm2", run_folder=tmp_path).run()
    with pytest.raises(UserError, match="has no checkpoints"):
        Export(out=tmp_path / "out", run_folder=tmp_path).run()
    with pytest.raises(UserError, match="give --peft"):
        Export(out=tmp_path / "out", model="smollm2", base="x").run()


@pytest.mark.parametrize("factor", [1e30, 0.0])
def test_a_model_that_makes_no_embeddings_is_not_exported(
    tiny_folders: dict[str, Path], tmp_path: Path, factor: float
) -> None:
    """Its weights are finite, so nothing else would say so."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folders["llama"], folder)
    weights = load_file(folder / "model.safetensors")
    changed = ("mlp.up_proj", "mlp.down_proj") if factor else ("model.norm",)
    for name in weights:
        if any(part in name for part in changed):
            weights[name] = (weights[name] * factor).astype(np.float32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="makes no embeddings"):
        Export(model=str(folder), out=tmp_path / "out").run()
    assert not (tmp_path / "out").exists()
