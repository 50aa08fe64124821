"""Made-up versions of an index for tests, and what they left in a folder or in the fake bucket."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from helpers.fake_bucket import FakeBucket

from search_r3_jax.retrieval.store.versions import PublishOptions, VersionInfo, publish_version

FIELDS = {
    "parameter_hash": "p",
    "corpus_hash": "c",
    "embed_token_id": 9,
    "pooling": "embed_token",
    "encode_seconds": 1.5,
}


def unit(rows: int, seed: int = 0, dim: int = 24) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(rows, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def publish(root: epath.PathLike, step: int = 5, **changes: Any) -> VersionInfo:
    """Publish a version of 200 vectors by exact search; `changes` are of the arguments or of the options."""
    arguments: dict[str, Any] = {
        "vectors": unit(200),
        "ids": [f"d{row}" for row in range(200)],
        "manifest_fields": FIELDS,
    }
    of_options = {field.name for field in dataclasses.fields(PublishOptions)}
    options: dict[str, Any] = {"kind": "exact"} | {
        name: value for name, value in changes.items() if name in of_options
    }
    arguments |= {name: value for name, value in changes.items() if name not in of_options}
    return publish_version(root, step=step, options=PublishOptions(**options), **arguments)


def stored_files(folder: epath.PathLike) -> dict[str, bytes]:
    """Contents of all files, by their names relative to the folder."""
    name = str(folder)
    if name.startswith("gs://"):
        prefix = f"{name.removeprefix('gs://')}/"
        return {
            path.removeprefix(prefix): content
            for path, content in FakeBucket.objects.items()
            if path.startswith(prefix)
        }
    return {
        str(path.relative_to(name)): path.read_bytes()
        for path in sorted(Path(name).rglob("*"))
        if path.is_file()
    }
