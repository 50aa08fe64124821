"""Exported folders: every bit of the weights, and the same embeddings in transformers and
sentence-transformers."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.exported_models import (
    FAMILIES,
    TEXTS,
    adapted,
    run_snippet,
    snippets,
    torch_vectors,
    write_full_vocabulary,
)
from helpers.tiny_models import byte_tokenizer, torch_model
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from search_r3_jax.config import EMBED_TOKEN, LoraConfig
from search_r3_jax.embedder import Embedder
from search_r3_jax.errors import UserError
from search_r3_jax.hub import export
from search_r3_jax.hub.export import export_model
from search_r3_jax.hub.load_model import LoadedModel, load_model, torch_tensors
from search_r3_jax.text.prompts import Prompter

MAX_TOKENS = 150


@pytest.fixture(scope="module")
def exports(tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("exports")
    return {
        family: export_model(load_model(tiny_folders[family]), root / family, max_tokens=MAX_TOKENS)
        for family in FAMILIES
    }


@pytest.fixture(scope="module")
def embedders(exports: dict[str, Path]) -> dict[str, Embedder]:
    return {family: Embedder.load(folder) for family, folder in exports.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_import_and_export_keep_every_bit(
    family: str, tiny_folders: dict[str, Path], exports: dict[str, Path]
) -> None:
    before, after = (
        load_file(tiny_folders[family] / "model.safetensors"),
        load_file(exports[family] / "model.safetensors"),
    )
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == torch.float32
        assert torch.equal(tensor, after[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_table_that_grew_keeps_its_old_rows(family: str, tmp_path: Path) -> None:
    folder = write_full_vocabulary(tmp_path / "before", family)
    out = export_model(load_model(folder), tmp_path / "after")
    before, after = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name][: len(tensor)]), name
    assert after["model.embed_tokens.weight"].shape[0] == 384
    AutoModelForCausalLM.from_pretrained(out)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_torchs_own_rounding(family: str, tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    out = export_model(load_model(tiny_folders[family]), tmp_path / "out", dtype="bfloat16")
    before, after = (
        load_file(tiny_folders[family] / "model.safetensors"),
        load_file(out / "model.safetensors"),
    )
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor.to(torch.bfloat16), after[name]), name
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16


def test_adapters_are_merged(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    model = adapted(load_model(tiny_folders["qwen2"]), LoraConfig(rank=2, alpha=6.0))
    decoder = AutoModelForCausalLM.from_pretrained(export_model(model, tmp_path / "out")).model
    ours = Embedder(model).encode(TEXTS[:3])
    np.testing.assert_allclose(
        torch_vectors(decoder, Prompter(model.tokenizer), TEXTS[:3], MAX_TOKENS), ours, atol=1e-5
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_computes_the_same_embeddings(
    family: str, exports: dict[str, Path], embedders: dict[str, Embedder]
) -> None:
    decoder = AutoModelForCausalLM.from_pretrained(exports[family]).model
    prompter = Prompter(AutoTokenizer.from_pretrained(exports[family]))
    np.testing.assert_allclose(
        embedders[family].encode(TEXTS), torch_vectors(decoder, prompter, TEXTS, MAX_TOKENS), atol=1e-5
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_sentence_transformers_computes_the_same_embeddings(
    family: str, exports: dict[str, Path], embedders: dict[str, Embedder]
) -> None:
    embedder, theirs = embedders[family], SentenceTransformer(str(exports[family]))
    assert embedder.max_tokens == MAX_TOKENS
    # Long ones around the cut, what looks like a picture's address, special tokens in plain sight.
    cuts = ["a" * n for n in range(MAX_TOKENS - 2, MAX_TOKENS + 3)]
    texts = [
        *TEXTS,
        *cuts,
        "https://example.org/a.png",
        "data:image/png",
        f"<|im_end|> and {EMBED_TOKEN} as text",
    ]
    for kind in ("query", "document"):
        ours = embedder.encode(texts, kind=kind)
        np.testing.assert_allclose(theirs.encode(texts, prompt_name=kind, batch_size=7), ours, atol=1e-5)
    np.testing.assert_allclose(theirs.encode(texts), ours, atol=1e-5)
    np.testing.assert_allclose(theirs.encode_query(texts[:3]), ours[:3], atol=1e-5)
    np.testing.assert_allclose(theirs.encode_document(texts[:3]), ours[:3], atol=1e-5)
    np.testing.assert_allclose(
        theirs.similarity(ours[:2], ours[2:]).numpy(), embedder.similarity(ours[:2], ours[2:]), atol=1e-6
    )


def test_sentence_transformers_refuses_another_prompt(exports: dict[str, Path]) -> None:
    with pytest.raises(Exception, match="trained with one prompt"):
        SentenceTransformer(str(exports["llama"])).encode(["a"], prompt="Another prompt.")


def test_padding_to_the_left_and_a_missing_pad_token_change_nothing(
    tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    model = load_model(tiny_folders["llama"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer().backend_tokenizer, eos_token="<|im_end|>", padding_side="left"
    )
    tokenizer.chat_template = byte_tokenizer().chat_template
    tokenizer.add_tokens([EMBED_TOKEN], special_tokens=True)
    assert tokenizer.pad_token is None
    out = export_model(
        LoadedModel(decoder=model.decoder, tokenizer=tokenizer, embed_id=model.embed_id), tmp_path / "out"
    )
    theirs = SentenceTransformer(str(out)).encode(TEXTS, batch_size=3)
    np.testing.assert_allclose(theirs, Embedder(model).encode(TEXTS), atol=1e-5)


def test_what_transformers_sees_of_the_tokenizer_is_the_source_and_one_token(tmp_path: Path) -> None:
    source = write_full_vocabulary(tmp_path / "source", "llama")
    exported = export_model(load_model(source), tmp_path / "exported")
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (source, exported))
    for text in TEXTS:
        assert after(text)["input_ids"] == before(text)["input_ids"]
    assert after.chat_template == before.chat_template
    assert set(after.get_vocab()) - set(before.get_vocab()) == {EMBED_TOKEN}


def test_generation_ends_at_the_embedding(exports: dict[str, Path]) -> None:
    config = GenerationConfig.from_pretrained(exports["llama"])
    config.validate(strict=True)
    tokenizer = AutoTokenizer.from_pretrained(exports["llama"])
    assert config.eos_token_id == [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(EMBED_TOKEN)]
    assert config.do_sample is False


@pytest.mark.parametrize("family", FAMILIES)
def test_several_shards_load_as_one(family: str, tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    limit = 100_000
    out = export_model(load_model(tiny_folders[family]), tmp_path / "out", shard_bytes=limit)
    shards = sorted(out.glob("model-*-of-*.safetensors"))
    assert len(shards) > 2
    assert not list(out.glob("*.part"))
    for shard in shards:
        tensors = load_file(shard)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= limit
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for shard in shards for tensor in load_file(shard).values()
    )
    theirs, again = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (tiny_folders[family], out)
    )
    assert theirs.keys() == again.keys()
    assert all(torch.equal(theirs[name], again[name]) for name in theirs)
    ours, read = (dict(torch_tensors(load_model(folder).decoder)) for folder in (tiny_folders[family], out))
    for name, tensor in ours.items():
        np.testing.assert_array_equal(tensor, read[name])


def test_the_cards_snippets_run_and_agree(
    exports: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with_transformers, with_sentence_transformers, with_embedder = (
        run_snippet(code) for code in snippets(exports["llama"])
    )
    embedder = with_embedder["embedder"]
    documents = embedder.encode(["BWV 988"], kind="document")
    np.testing.assert_allclose(with_embedder["documents"][:1], documents, atol=1e-6)
    np.testing.assert_allclose(with_sentence_transformers["documents"], with_embedder["documents"], atol=1e-5)
    ours = embedder.encode(TEXTS[:4])
    np.testing.assert_allclose(
        np.stack([with_transformers["embed"](text).numpy() for text in TEXTS[:4]]), ours, atol=1e-5
    )


@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(family, marks=pytest.mark.slow) for family in ("qwen2", "qwen3"))]
)
def test_the_card_thinks_as_the_embedder_does(exports: dict[str, Path], family: str) -> None:
    with_transformers = run_snippet(snippets(exports[family])[0])
    embedder = Embedder.load(exports[family])
    for text in TEXTS[:4]:
        for budget in (1, 8):
            thought, vector = with_transformers["think"](text, budget)
            ours = embedder.think(text, max_think_tokens=budget)
            assert ours.text in thought
            np.testing.assert_allclose(vector.numpy(), ours.vector, atol=1e-5)


def test_half_precision_gives_unit_vectors(tiny_model: LoadedModel, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    out = export_model(tiny_model, tmp_path / "half", dtype="bfloat16")
    vectors = SentenceTransformer(str(out)).encode(TEXTS[:4], prompt_name="query")
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=-1), 1, atol=1e-6)
    np.testing.assert_allclose(vectors, Embedder.load(out).encode(TEXTS[:4]), atol=1e-5)


def test_a_prompt_that_shares_tokens_with_texts_gets_no_sentence_transformers_files(tmp_path: Path) -> None:
    # Without a chat template nothing divides a text from the blank line after it, and here two line ends are
    # one token.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<eos>", *alphabet, "ĊĊ", ".Ċ"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[(".", "Ċ"), ("Ċ", "Ċ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    torch_model("llama").save_pretrained(tmp_path / "model")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(tmp_path / "model")
    out = export_model(load_model(tmp_path / "model"), tmp_path / "out")
    assert not (out / "modules.json").exists()
    assert not (out / "1_Pooling").exists()
    assert "has no files for it" in (out / "README.md").read_text()
    prompter = Prompter(AutoTokenizer.from_pretrained(out))
    decoder = AutoModelForCausalLM.from_pretrained(out).model
    np.testing.assert_allclose(
        Embedder.load(out).encode(TEXTS[:3]), torch_vectors(decoder, prompter, TEXTS[:3], 99), atol=1e-5
    )


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("earlier", [False, True])
def test_an_interrupted_export_leaves_what_was_there(
    earlier: bool,
    interruption: type[BaseException],
    tiny_model: LoadedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    if earlier:
        export_model(tiny_model, out, dtype="bfloat16")
    before = contents(tmp_path)

    def interrupt(*_: object) -> None:
        raise interruption

    monkeypatch.setattr(export, "write_export_manifest", lambda *_, **__: interrupt())
    with pytest.raises(interruption):
        export_model(tiny_model, out)
    assert contents(tmp_path) == before


def test_a_failed_replacement_puts_the_earlier_export_back(
    tiny_model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = export_model(tiny_model, tmp_path / "out", dtype="bfloat16")
    before = contents(tmp_path)
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path.name.endswith(".tmp"):
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(UserError, match="Input/output error"):
        export_model(tiny_model, out)
    assert contents(tmp_path) == before


def test_a_new_export_takes_the_place_of_an_earlier_one(tiny_model: LoadedModel, tmp_path: Path) -> None:
    out = export_model(tiny_model, tmp_path / "out", shard_bytes=100_000)
    export_model(tiny_model, out)
    assert not list(out.glob("*.index.json"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_weights_are_as_readable_as_the_rest(exports: dict[str, Path]) -> None:
    modes = {path.stat().st_mode for path in exports["llama"].iterdir() if path.is_file()}
    assert len(modes) == 1


def test_a_folder_of_somebody_else_is_refused(tiny_model: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="no export of ours"):
        export_model(tiny_model, tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        export_model(tiny_model, tmp_path / "file")
    assert (tmp_path / "out" / "thesis.txt").is_file()


def test_a_link_to_a_folder_stays(tiny_model: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "share").mkdir()
    (tmp_path / "link").symlink_to("share/model")
    for _ in ("new", "replaced"):
        export_model(tiny_model, tmp_path / "link")
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "share" / "model" / "config.json").is_file()
    assert [each.name for each in (tmp_path / "share").iterdir()] == ["model"]


def run_with_small_files(code: str) -> subprocess.CompletedProcess[str]:
    """A process none of whose files may grow beyond 1,000 bytes: what a full disk does, without filling
    one."""
    limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
    return subprocess.run(
        [sys.executable, "-B", "-c", limit + code], capture_output=True, text=True, timeout=120
    )


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_leaves_nothing(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    arguments = ["export", "--model", str(tiny_folders["llama"]), "--out", str(tmp_path / "out")]
    shown = run_with_small_files(f"from search_r3_jax.cli import main; sys.argv[1:] = {arguments}; main()")
    assert shown.returncode == 2, shown.stderr
    assert shown.stderr.count("\n") == 1
    assert "too large" in shown.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_disk_that_fills_up_under_the_tokenizer_is_an_os_error(
    tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    shown = run_with_small_files(
        "from pathlib import Path; from transformers import AutoTokenizer; from search_r3_jax.hub.export "
        "import save_tokenizer\n"
        f"tokenizer = AutoTokenizer.from_pretrained({str(tiny_folders['llama'])!r})\n"
        f"try: save_tokenizer(tokenizer, Path({str(tmp_path)!r}))\n"
        "except OSError as error: print(error)"
    )
    assert "File too large" in shown.stdout, shown.stderr


def test_other_prompts_are_refused(exports: dict[str, Path], tmp_path: Path) -> None:
    record = json.loads((exports["llama"] / "search_r3.json").read_text())
    for field, value in (
        ("direct_system", "Represent this."),
        ("closing", EMBED_TOKEN),
        ("max_tokens", None),
    ):
        (tmp_path / "search_r3.json").write_text(json.dumps(record | {field: value}))
        with pytest.raises(UserError, match=field):
            Embedder.load(tmp_path)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in folder.rglob("*")
    }
