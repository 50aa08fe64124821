"""Commands that train."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from search_r3_jax.commands.options import Common, CommonOptions
from search_r3_jax.config import RunConfig, TrackerName
from search_r3_jax.distributed.spec import Cluster
from search_r3_jax.extras import require


@dataclass(frozen=True, kw_only=True)
class Quickstart:
    """Run the whole method on a small scale, with nothing but installed packages.

    Attributes:
        out: Output folder: data, runs, the exported model and `summary.json`. A second call resumes what is
            there.
        common: Options of every command.
    """

    out: Path = Path("runs/quickstart")
    common: Common = field(default_factory=CommonOptions)

    def run(self) -> None:
        """Run the subcommand."""
        require("quickstart", "quickstart", "gguf", "bm25s")
        from search_r3_jax.configs.quickstart import config
        from search_r3_jax.hub.model_names import resolve
        from search_r3_jax.quickstart import Quickstart as Work

        # Its weights are needed after the data set is built.
        resolve(config.model)
        Work(self.out, config).run()


@dataclass(frozen=True, kw_only=True)
class Sft:
    """Stage 1: contrastive fine-tuning. The same command resumes from the last checkpoint.

    The embed token, `<|embed_token|>`, ends what the model writes; its hidden state is the embedding.

    Attributes:
        config: Name of an experiment: quickstart or smollm2 (SmolLM2-135M on two CPU cores), qwen25_1p5b (all
            parameters, v5e-16), qwen25_7b (all parameters, v5p-16), qwen25_7b_lora (adapters, v5e-16) or
            qwen3_8b (adapters, v5p-16). Put it before `--help` to see its values; the flags below change
            them.
        run_folder: Run folder. Created where it does not exist.
        settings: The experiment's settings.
        cluster: Processes that train together.
        tracker: What shows the run beside its own files: tensorboard, wandb (pip install wandb;
            WANDB_MODE=offline uploads nothing), both, or none.
        allow_config_change: Resume a run although settings that decide what it computes have changed.
        profile_steps: Steps to trace for xprof, as FIRST:END, counted from 0; 3:6 is 3, 4 and 5. The trace
            is `profile/` in the run folder. The first step compiles. None: none.
        common: Options of every command.
    """

    config: str
    run_folder: Annotated[Path, tyro.conf.arg(name="run")]
    settings: Annotated[RunConfig, tyro.conf.arg(name="")]
    cluster: Cluster = field(default_factory=Cluster)
    tracker: tuple[TrackerName, ...] = ("tensorboard",)
    allow_config_change: bool = False
    profile_steps: str | None = None
    common: Common = field(default_factory=CommonOptions)

    def run(self) -> None:
        """Run the subcommand."""
        from search_r3_jax.distributed.runtime import join_cluster
        from search_r3_jax.profiling import parse_steps

        steps = parse_steps(self.profile_steps, total=self.settings.sft.steps, of="steps (sft.steps)")
        with join_cluster(self.cluster):
            self._train(steps)

    def _train(self, profiled: range | None) -> None:
        from search_r3_jax.compile_time import compile_seconds
        from search_r3_jax.console import Stages
        from search_r3_jax.distributed.runtime import is_first
        from search_r3_jax.profiling import trace_run
        from search_r3_jax.training.sft import train_sft

        console = Stages(1, silent=not is_first())
        with console.log(), console.bar("steps", self.settings.sft.steps, aside=compile_seconds) as bar:

            def on_step(done: int, total: int, metrics: dict[str, float]) -> None:
                rate = f"{metrics['tokens_per_second']:,.0f} tokens/s"
                if "mfu" in metrics:
                    rate += f", MFU {metrics['mfu']:.0%}"
                accuracy = f"in-batch accuracy {_in_batch_accuracy(metrics):.0%}"
                note = f"loss {metrics['loss']:.3f}, {accuracy}, {rate}"
                bar.to(done, note, total, each=metrics["seconds_each"], left=metrics["seconds_left"])

            with trace_run(profiled, self.run_folder):
                train_sft(
                    self.settings,
                    self.run_folder,
                    on_step=on_step,
                    on_evaluation=bar.part,
                    trackers=self.tracker,
                    allow_config_change=self.allow_config_change,
                )
        console.say(
            f"{self.run_folder}: done; search-r3 export --run {self.run_folder} --out FOLDER writes the model"
        )


def _in_batch_accuracy(metrics: dict[str, float]) -> float:
    """The accuracy of the full vectors; with `sft.matryoshka` each dimension has one, the full one last."""
    names = [name for name in metrics if name.startswith("in_batch_accuracy")]
    return metrics[
        max(names, key=lambda name: int(name.rpartition("_")[2] or 0) if name[-1].isdigit() else 0)
    ]


@dataclass(frozen=True, kw_only=True)
class Rl:
    """Stage 2: reinforcement learning of reasoning and embedding.

    The same command resumes from the last checkpoint. A reply is a thought and the embed token,
    `<|embed_token|>`, whose hidden state is the embedding; it is valid where the model writes that token
    within its budget.

    Attributes:
        config: Name of an experiment: quickstart or smollm2 (SmolLM2-135M on two CPU cores), qwen25_1p5b (all
            parameters, v5e-16), qwen25_7b (all parameters, v5p-16), qwen25_7b_lora (adapters, v5e-16) or
            qwen3_8b (adapters, v5p-16). Put it before `--help` to see its values; the flags below change
            them. `--model` names what to start from: a run of stage 1.
        run_folder: Run folder. Created where it does not exist.
        settings: The experiment's settings.
        cluster: Processes that train together.
        replay: Run whose schedule of index versions to repeat: with the same settings, the same losses to the
            last bit.
        tracker: What shows the run beside its own files: tensorboard, wandb (pip install wandb;
            WANDB_MODE=offline uploads nothing), both, or none.
        allow_config_change: Resume a run although settings that decide what it computes have changed, or its
            index is gone.
        profile_steps: Steps to trace for xprof, as FIRST:END, counted from 0; 3:6 is 3, 4 and 5. The trace
            is `profile/` in the run folder. The first step compiles. None: none.
        common: Options of every command.
    """

    config: str
    run_folder: Annotated[Path, tyro.conf.arg(name="run")]
    settings: Annotated[RunConfig, tyro.conf.arg(name="")]
    cluster: Cluster = field(default_factory=Cluster)
    replay: Path | None = None
    tracker: tuple[TrackerName, ...] = ("tensorboard",)
    allow_config_change: bool = False
    profile_steps: str | None = None
    common: Common = field(default_factory=CommonOptions)

    def run(self) -> None:
        """Run the subcommand."""
        from search_r3_jax.distributed.runtime import join_cluster
        from search_r3_jax.profiling import parse_steps

        steps = parse_steps(self.profile_steps, total=self.settings.rl.steps, of="steps (rl.steps)")
        with join_cluster(self.cluster):
            self._train(steps)

    def _train(self, profiled: range | None) -> None:
        from search_r3_jax.compile_time import compile_seconds
        from search_r3_jax.console import Stages
        from search_r3_jax.distributed.runtime import is_first
        from search_r3_jax.profiling import trace_run
        from search_r3_jax.training.rl import train_rl

        console = Stages(1, silent=not is_first())
        with console.log(), console.bar("steps", self.settings.rl.steps, aside=compile_seconds) as bar:

            def on_step(done: int, total: int, metrics: dict[str, float]) -> None:
                reward = f"reward {metrics['reward']:.3f}, valid {metrics['valid_rate']:.0%}"
                rate = f"{metrics['rollout_tokens_per_second']:,.0f} tokens/s written"
                note = f"{reward}, entropy {metrics['entropy']:.2f}, {rate}"
                bar.to(
                    done,
                    note,
                    max(done, total),
                    each=metrics["seconds_each"],
                    left=metrics["seconds_left"],
                )

            with trace_run(profiled, self.run_folder):
                train_rl(
                    self.settings,
                    self.run_folder,
                    on_step=on_step,
                    on_evaluation=bar.part,
                    trackers=self.tracker,
                    replay=self.replay,
                    allow_config_change=self.allow_config_change,
                )
        console.say(
            f"{self.run_folder}: done; search-r3 export --run {self.run_folder} --out FOLDER writes the model"
        )


@dataclass(frozen=True, kw_only=True)
class Indexer:
    """Build the index of a run of stage 2: encode its corpus with the newest checkpoint, publish, repeat.

    `rl` starts it unless given `--index.no-local`.

    Attributes:
        run_folder: Run folder of stage 2.
        parent: Process id of the trainer that started this indexer; it ends with that process. None: it runs
            until stopped.
        process: Index of this process, from 0, where several share the encoding. Process 0 builds and
            publishes.
        processes: Number of processes that share the encoding.
        common: Options of every command.
    """

    run_folder: Annotated[Path, tyro.conf.arg(name="run")]
    parent: int | None = None
    process: int = 0
    processes: int = 1
    common: Common = field(default_factory=CommonOptions)

    def run(self) -> None:
        """Run the subcommand."""
        from search_r3_jax.console import show_log
        from search_r3_jax.retrieval.indexer.worker import run_indexer

        # The trainer redirects standard output to the run's indexer.log.
        show_log(sys.stdout, timestamps=True)

        try:
            run_indexer(self.run_folder, parent=self.parent, process=self.process, processes=self.processes)
        except KeyboardInterrupt:
            if self.parent is None:
                raise
            # No interruption: a trainer that has finished ends its indexer with a signal.
            print("stopped by the trainer", flush=True)
            # Library threads may still run and would block a normal exit; all files are written.
            os._exit(0)
