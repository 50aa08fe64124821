"""The command that plans a TPU run without a TPU."""

from __future__ import annotations

import dataclasses
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from search_r3_jax.commands.options import Common, CommonOptions
from search_r3_jax.config import RunConfig, check_ranges
from search_r3_jax.errors import UserError
from search_r3_jax.extras import require


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Estimate what a stage needs of a TPU slice: memory, FLOPs, communication and the least time.

    The numbers come from the TPU compiler, which runs without a TPU.

    Attributes:
        config: Name of an experiment: quickstart or smollm2 (SmolLM2-135M on two CPU cores), qwen25_1p5b (all
            parameters, v5e-16), qwen25_7b (all parameters, v5p-16), qwen25_7b_lora (adapters, v5e-16) or
            qwen3_8b (adapters, v5p-16). Put it before `--help` to see its values; the flags below change
            them.
        settings: The experiment's settings.
        stage: Program to plan. `sft`, `rl`: an update. `decode`: a rollout of rl.global_queries ×
            rl.group_size replies. `encode`: a batch of the corpus; with index.source trainer, beside all
            that the trainer holds. `search`: a search of a `device` index,
            1,024 queries at most.
        topology: TPU slice: a shape such as v5p:2x2x2, or a name such as v5p-16.
        slices: Slices joined by the data-centre network. `--mesh.slice` says how they are used.
        auto: Try the meshes that make sense and print them all.
        documents: Documents of an index on the chips (`index.kind device`), whose memory is counted too. With
            them `encode` is that of `index.source rolling`, beside the optimiser.
        largest: Find the largest `sft.encode_chunk` or `rl.micro_queries` that fits.
        json: Print the plan as JSON.
        out: Also write the plan, or those of all meshes, to this file as JSON. None: print only.
        common: Options of every command.
    """

    config: str
    settings: Annotated[RunConfig, tyro.conf.arg(name="")]
    stage: Literal["sft", "rl", "decode", "encode", "search"]
    topology: str
    slices: int = 1
    documents: int = 0
    auto: bool = False
    largest: bool = False
    json: bool = False
    out: Path | None = None
    common: Common = field(default_factory=CommonOptions)

    def run(self) -> None:
        """Run the subcommand."""
        from search_r3_jax.console import show_log
        from search_r3_jax.outputs import check_outputs, message_stream
        from search_r3_jax.planning.plan import make_plan, open_slice
        from search_r3_jax.planning.report import meshes_content, print_meshes, print_plan, write_plans
        from search_r3_jax.planning.search import largest_chunk, try_meshes

        check_ranges(self.settings, "sft" if self.stage == "sft" else "rl")
        if self.documents < 0 or (self.stage == "search" and not self.documents):
            raise UserError(f"--documents: {self.documents}: give the number of documents of the index")
        if self.documents and (self.auto or self.largest):
            raise UserError("--documents: not together with --auto or --largest; plan one mesh and one size")
        # The result goes to standard output; progress goes to standard error.
        show_log(sys.stderr)
        if "TPU_LIBRARY_PATH" not in os.environ:
            require("plan", "plan", "libtpu")
        check_outputs(("--out", self.out))
        chips = open_slice(self.topology, self.slices)
        stream = message_stream(self.out)
        if self.auto:
            tried = try_meshes(self.settings, self.stage, chips)
            try:
                write_plans(meshes_content(tried), self.out)
            finally:
                print_meshes(tried, as_json=self.json, stream=stream)
            return
        if self.largest:
            plan = largest_chunk(self.settings, self.stage, chips)
        else:
            plan = make_plan(self.settings, self.stage, chips, documents=self.documents)
        try:
            write_plans(dataclasses.asdict(plan), self.out)
        finally:
            print_plan(plan, as_json=self.json, stream=stream)
