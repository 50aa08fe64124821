"""The command that plans for a TPU without one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import tyro

from search_r3_jax.config import RunConfig


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a stage needs of a TPU slice, from its compiler, which runs without a TPU: memory, work,
    exchanges, the least time.

    Attributes:
        config: an experiment; the settings below show its values and change them.
        settings: the experiment's settings.
        stage: sft or rl: an update; decode: a rollout of rl.global_queries × rl.group_size replies; encode: a
            batch of the corpus.
        topology: a shape, such as v5p:2x2x2, or a slice's name, such as v5p-16.
        slices: so many of them, joined by the data-centre network; --mesh.slice says how they are used.
        auto: try the sensible meshes and print them all.
        largest: find the largest sft.encode_chunk, or rl.micro_queries, that fits.
        json: print the plan as JSON.
        out: also write it to this file.
        debug: show the traceback of an error.
    """

    config: str
    settings: Annotated[RunConfig, tyro.conf.arg(name="")]
    stage: Literal["sft", "rl", "decode", "encode"]
    topology: str
    slices: int = 1
    auto: bool = False
    largest: bool = False
    json: bool = False
    out: Path | None = None
    debug: bool = False

    def run(self) -> None:
        from search_r3_jax.planning.plan import make_plan, open_slice
        from search_r3_jax.planning.report import print_meshes, print_plan, write_plan
        from search_r3_jax.planning.search import largest_chunk, try_meshes

        chips = open_slice(self.topology, self.slices)
        if self.auto:
            print_meshes(try_meshes(self.settings, self.stage, chips, say=_say), as_json=self.json)
            return
        find = partial(largest_chunk, say=_say) if self.largest else make_plan
        plan = find(self.settings, self.stage, chips)
        print_plan(plan, as_json=self.json)
        if self.out is not None:
            write_plan(plan, self.out)


def _say(line: str) -> None:
    import sys

    print(line, file=sys.stderr, flush=True)
