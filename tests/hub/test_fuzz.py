"""Damaged weights either load or end in one `UserError`: no other exception, no hang, no memory beyond the
file's own size."""

import json
import resource
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.tiny_gguf import write_gguf
from helpers.tiny_models import torch_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from search_r3_jax.errors import UserError
from search_r3_jax.hub.gguf import GgufFile
from search_r3_jax.hub.load_model import load_model
from search_r3_jax.hub.safetensors_folder import SafetensorsFolder
from search_r3_jax.text.tokenizer import tokenizer_from_gguf

fuzz = settings(
    deadline=2000,
    max_examples=300,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
few = settings(fuzz, deadline=20_000, max_examples=60)


@pytest.fixture(autouse=True)
def memory_limit(request: pytest.FixtureRequest) -> Any:
    """Of address space, a little more than is in use: an absurd allocation fails the test at once."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    # XLA's compiler reserves address space for its threads.
    limit = (16 << 30) if "whole_import" in request.node.name else (1 << 30)
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + limit, before[1]))
    with warnings.catch_warnings():
        # Random bits are often not a number.
        warnings.simplefilter("ignore", RuntimeWarning)
        yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def loads(read: Callable[[Path], Any], path: Path) -> bool:
    """Whether a path can be read; any other exception than a `UserError` of one line that names the path
    escapes."""
    problem = None
    try:
        read(path)
    except UserError as error:
        problem = str(error)
    assert problem is None or ("\n" not in problem and str(path) in problem)
    return problem is None


def all_safetensors(folder: Path) -> None:
    source = SafetensorsFolder(folder)
    for name, shape in source.shapes.items():
        if shape and all(shape):
            source.read(name, tuple(slice(0, size) for size in shape))


def all_gguf(file: Path) -> None:
    source = GgufFile(file)
    for name, shape in source.shapes.items():
        source.read(name, tuple(slice(0, size) for size in shape))
    tokenizer_from_gguf(source.tokenizer_fields(), str(file))


def damaged(data: bytes, cut: int, flips: list[tuple[int, int]], header: int) -> bytes:
    """`data` without its last `cut` bytes and with some bits changed, mostly among the first `header`
    bytes."""
    changed = bytearray(data[: len(data) - cut])
    for place, bit in flips:
        if changed:
            changed[place % min(header, len(changed))] ^= 1 << bit
    return bytes(changed)


flips = st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 7)), max_size=4)
cuts = st.one_of(st.just(0), st.integers(0, 4000))
VALID = save(
    {
        "a": np.arange(12, dtype=np.float32).reshape(3, 4),
        "b": np.ones(5, np.float16),
        "c": np.zeros((2, 0), np.float32),
    }
)


@fuzz
@given(st.binary(max_size=300))
def test_random_bytes_as_safetensors(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(data)
    loads(all_safetensors, tmp_path)


@fuzz
@given(st.integers(0, len(VALID)), flips)
def test_damaged_safetensors(tmp_path: Path, cut: int, flips: list[tuple[int, int]]) -> None:
    (tmp_path / "model.safetensors").write_bytes(damaged(VALID, cut, flips, len(VALID)))
    assert not (loads(all_safetensors, tmp_path) and cut)


entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "I32", "F8_E4M3", "BOOL", "F64", "nonsense", 3]),
        "shape": st.lists(st.sampled_from([0, 1, 2, 4, 1 << 31, 1 << 62, -1]), max_size=4),
        "data_offsets": st.lists(
            st.sampled_from([-8, 0, 4, 8, 16, 64, 1 << 40, (1 << 64) - 1]), min_size=1, max_size=3
        ),
    }
)


@fuzz
@given(
    st.dictionaries(st.sampled_from("abc"), entries, max_size=3),
    st.sampled_from([None, 0, 7, 1 << 32, (1 << 64) - 1]),
)
def test_absurd_safetensors_headers(tmp_path: Path, header: dict[str, Any], length: int | None) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(
        struct.pack("<Q", len(text) if length is None else length) + text + bytes(64)
    )
    loads(all_safetensors, tmp_path)


@pytest.mark.parametrize("nesting", ["[", '{"a":'])
def test_deep_json_is_refused(tmp_path: Path, nesting: str) -> None:
    deep = nesting.encode() * 100_000
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(deep)) + deep)
    assert not loads(all_safetensors, tmp_path)
    (tmp_path / "model.safetensors.index.json").write_bytes(deep)
    assert not loads(all_safetensors, tmp_path)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=20)
    | st.sampled_from(["model.safetensors", "../model.safetensors", "/", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@fuzz
@given(st.one_of(json_values, st.fixed_dictionaries({"weight_map": json_values})))
def test_absurd_indexes(tmp_path: Path, index: Any) -> None:
    (tmp_path / "model.safetensors").write_bytes(VALID)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    loads(all_safetensors, tmp_path)


@pytest.fixture(scope="module")
def valid_gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = write_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf", torch_model("qwen2"), kind="Q8_0")
    assert loads(all_gguf, file)
    return file.read_bytes()


@fuzz
@given(st.binary(max_size=300), st.booleans())
def test_random_bytes_as_gguf(tmp_path: Path, data: bytes, magic: bool) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes((b"GGUF\x03\0\0\0" if magic else b"") + data)
    assert not loads(all_gguf, file)


@fuzz
@given(cuts, flips, st.sampled_from([24, 700, 12_000, 1 << 20]))
def test_damaged_gguf(
    tmp_path: Path, valid_gguf: bytes, cut: int, flips: list[tuple[int, int]], header: int
) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(damaged(valid_gguf, cut, flips, header))
    loads(all_gguf, file)


@fuzz
@given(
    st.sampled_from([0, 1, 1 << 20, 1 << 63, (1 << 64) - 1]),
    st.sampled_from([0, 1, 1 << 20, 1 << 63, (1 << 64) - 1]),
    st.lists(st.tuples(st.sampled_from([0, 3, 1 << 20, (1 << 64) - 1]), st.integers(0, 14)), max_size=4),
    st.sampled_from([0, 4, 1 << 30, (1 << 64) - 1]),
)
def test_absurd_gguf_counts(
    tmp_path: Path, tensors: int, fields: int, entries: list[tuple[int, int]], count: int
) -> None:
    """Counts, lengths and list sizes far beyond the file, lists within lists among them."""
    data = b"GGUF" + struct.pack("<IQQ", 3, tensors, fields)
    for length, kind in entries:
        data += struct.pack("<Q", length) + b"key" + struct.pack("<IIQ", kind, kind, count) + bytes(8)
    file = tmp_path / "model.gguf"
    file.write_bytes(data)
    assert not loads(all_gguf, file)


@few
@given(cuts, flips)
def test_damaged_gguf_through_the_whole_import(
    tmp_path: Path, valid_gguf: bytes, cut: int, flips: list[tuple[int, int]]
) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(damaged(valid_gguf, cut, flips, 12_000))
    loads(load_model, file)


@few
@given(
    st.integers(0, 500),
    flips,
    st.sampled_from(["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"]),
)
def test_damaged_folder_through_the_whole_import(
    tmp_path: Path, tiny_folders: dict[str, Path], cut: int, flips: list[tuple[int, int]], which: str
) -> None:
    for file in tiny_folders["llama"].iterdir():
        data = file.read_bytes()
        (tmp_path / file.name).write_bytes(damaged(data, cut, flips, 3000) if file.name == which else data)
    loads(load_model, tmp_path)


FIELDS = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
]
FIELDS += [
    "rms_norm_eps",
    "max_position_embeddings",
    "tie_word_embeddings",
    "model_type",
    "rope_parameters",
    "quantization_config",
]
junk = st.sampled_from(
    [None, "64", "", -1, 0, 3, 1.5, float("inf"), float("nan"), 10**30, [], [1], {}, {"a": 1}, True]
)


@few
@given(st.dictionaries(st.sampled_from(FIELDS), junk, min_size=1, max_size=3))
def test_absurd_configs_through_the_whole_import(
    tmp_path: Path, tiny_folders: dict[str, Path], fields: dict[str, Any]
) -> None:
    for file in tiny_folders["llama"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | fields))
    loads(load_model, tmp_path)
