"""A program for tests: a version in parts, searched by all processes; prints JSON.

Arguments: a folder that holds the version, its parts, process index, number of processes, port of the
coordinator.
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from helpers.index_versions import unit
from helpers.jax_processes import joined

from search_r3_jax.distributed.lockstep import Message, Team
from search_r3_jax.errors import UserError
from search_r3_jax.retrieval.index.exact import ExactIndex
from search_r3_jax.retrieval.store.versions import open_version
from search_r3_jax.training.team_index import IndexShare


def main(folder: str) -> None:
    team = Team()
    parts = IndexShare(team, [epath.Path(folder) / "replayed", epath.Path(folder) / "index"])
    whole = open_version(epath.Path(folder) / "index", 5, place=False)
    if whole.kind == "device":
        whole = ExactIndex(whole.vectors, whole.ids, 5)
    share = (jax.process_index(), jax.process_count())
    report: dict[str, Any] = {"equal": []}

    def search() -> Message:
        own = open_version(epath.Path(folder) / "index", 5, share=share, place=share == (0, 1))
        index = parts.shared(own)
        report["kinds"] = [type(index).__name__, index.kind, index.version, list(index.shape)]
        for queries, k in [(1, 5), (7, 20), (3, 150), (2, 220), (0, 3)]:
            asked = unit(queries, seed=queries)
            for mine, expected in zip(index.search(asked, k), whole.search(asked, k), strict=True):
                report["equal"].append(bool(np.allclose(mine, expected, rtol=0, atol=1e-6)))
        rows = np.array([199, 0, 57])
        report["equal"].append(bool(np.array_equal(index.take(rows), whole.take(rows))))
        return {"done": True}

    report["done"] = team.lead(search)["done"]

    def open_damaged() -> Message:
        # Process 0 has its share open; the manifest that the others read is of other files.
        index = open_version(epath.Path(folder) / "index", 6, share=share, place=share == (0, 1))
        manifest = Path(folder) / "index" / "v6" / "MANIFEST.json"
        manifest.write_text(manifest.read_text().replace("float32", "float64"))
        parts.shared(index)
        return {}

    try:
        team.lead(open_damaged)
        report["damaged"] = ""
    except UserError as error:
        report["damaged"] = str(error)
    print(json.dumps(report))


if __name__ == "__main__":
    with joined(sys.argv[-3:]):
        main(sys.argv[1])
