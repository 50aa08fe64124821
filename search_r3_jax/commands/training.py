"""Commands that train."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from search_r3_jax.config import RunConfig
from search_r3_jax.distributed.spec import Cluster


@dataclass(frozen=True, kw_only=True)
class Quickstart:
    """The whole method, small, with nothing but installed packages.

    Attributes:
        out: folder for data, runs, the exported model and summary.json; a second call goes on from what is
            there.
        debug: show the traceback of an error.
    """

    out: Path = Path("runs/quickstart")
    debug: bool = False

    def run(self) -> None:
        from search_r3_jax.configs.quickstart import config
        from search_r3_jax.quickstart import Quickstart as Work

        Work(self.out, config).run()


@dataclass(frozen=True, kw_only=True)
class Sft:
    """Stage 1: contrastive fine-tuning. Calling it again with the same --run goes on from the last
    checkpoint.

    Attributes:
        config: an experiment; the settings below show its values and change them.
        run_folder: folder of the run; made where it is missing.
        allow_config_change: go on with a run whose config has changed in what it computes.
        debug: show the traceback of an error.
    """

    config: str
    run_folder: Annotated[Path, tyro.conf.arg(name="run")]
    settings: Annotated[RunConfig, tyro.conf.arg(name="")]
    cluster: Cluster = field(default_factory=Cluster)
    allow_config_change: bool = False
    debug: bool = False

    def run(self) -> None:
        from search_r3_jax.distributed.runtime import in_cluster

        with in_cluster(self.cluster):
            self._train()

    def _train(self) -> None:
        from search_r3_jax.console import Stages
        from search_r3_jax.data.development import load_training_sets
        from search_r3_jax.distributed.runtime import is_first
        from search_r3_jax.hub.checkpoint_reader import latest_checkpoint
        from search_r3_jax.hub.load_model import load_model, with_lora
        from search_r3_jax.mesh import mesh_from_config
        from search_r3_jax.training.sft import train_sft

        config, console = _absolute(self.settings), Stages(1, silent=not is_first())
        sets = load_training_sets(config.data)
        for each in sets:
            dev = (
                f"; {len(each.dev.queries)} of {each.dev.split} over {len(each.dev.documents)} to watch"
                if each.dev
                else ""
            )
            console.say(f"{each.train.name}: {len(each.train.queries)} queries of {each.train.split}{dev}")
        console.say(f"loading {config.model}")
        model = load_model(
            config.model,
            compute_dtype=config.compute_dtype,
            remat=config.remat,
            attention=config.attention,
            mesh=mesh_from_config(config.mesh),
        )
        with console.bar("steps", config.sft.steps) as bar:
            bar.resume_at(latest_checkpoint(self.run_folder) or 0)

            def on_step(done: int, total: int, values: dict[str, float]) -> None:
                rate = f"{values['tokens_per_second']:,.0f} tokens/s, MFU {values['mfu']:.0%}"
                bar.to(
                    done,
                    f"loss {values['loss']:.3f}, in-batch accuracy {values['in_batch_accuracy']:.0%}, {rate}",
                    total,
                )

            model = with_lora(model, config.lora, seed=config.seed)
            train_sft(
                config,
                self.run_folder,
                sets,
                model,
                on_step,
                say=console.say,
                allow_change=self.allow_config_change,
            )
        console.say(
            f"{self.run_folder}: done; search-r3 export --run {self.run_folder} --out FOLDER writes the model"
        )


@dataclass(frozen=True, kw_only=True)
class Rl:
    """Stage 2: reinforcement learning of reasoning and embedding. Calling it again with the same --run goes
    on from the last checkpoint.

    Attributes:
        config: an experiment; the settings below show its values and change them. --model is what it starts
            from: a run of stage 1.
        run_folder: folder of the run; made where it is missing.
        replay: a run whose record of index versions this run repeats: with the same settings, the same losses
            to the last bit.
        allow_config_change: go on with a run whose config has changed in what it computes, or whose index is
            gone.
        debug: show the traceback of an error.
    """

    config: str
    run_folder: Annotated[Path, tyro.conf.arg(name="run")]
    settings: Annotated[RunConfig, tyro.conf.arg(name="")]
    replay: Path | None = None
    allow_config_change: bool = False
    debug: bool = False

    def run(self) -> None:
        from search_r3_jax.console import Stages
        from search_r3_jax.data.development import for_stage_2, load_training_sets
        from search_r3_jax.errors import UserError
        from search_r3_jax.hub.checkpoint_reader import latest_checkpoint
        from search_r3_jax.hub.load_model import load_model, with_lora
        from search_r3_jax.mesh import mesh_from_config
        from search_r3_jax.training.rl import train_rl
        from search_r3_jax.training.run import start_record

        config, console = _absolute(self.settings), Stages(1)
        if len(config.data.sets) != 1:
            raise UserError(
                f"data.sets: {len(config.data.sets)} data sets: stage 2 searches one corpus; name one"
            )
        data = for_stage_2(load_training_sets(config.data, stored=True)[0], config.data)
        dev = (
            f"; {len(data.dev.queries)} of {data.dev.split} over {len(data.dev.documents)} to watch"
            if data.dev
            else ""
        )
        console.say(
            f"{data.train.name}: {len(data.train.queries)} queries over {len(data.train.documents)} "
            f"documents{dev}"
        )
        extra: dict[str, Any] = start_record(self.run_folder, config) | {
            "data": config.data.sets[0],
            "split": config.data.split,
        }
        console.say(
            f"loading {config.model}"
            + (f", step {extra['start_step']}" if extra["start_step"] is not None else "")
        )
        model = load_model(
            config.model,
            step=extra["start_step"],
            compute_dtype=config.compute_dtype,
            remat=config.remat,
            attention=config.attention,
            mesh=mesh_from_config(config.mesh),
        )
        with console.bar("steps", config.rl.steps) as bar:
            bar.resume_at(latest_checkpoint(self.run_folder) or 0)

            def on_step(done: int, total: int, values: dict[str, float]) -> None:
                told = (
                    f"reward {values['reward']:.3f}, valid {values['valid_rate']:.0%}, entropy "
                    f"{values['entropy']:.2f}"
                )
                bar.to(
                    done,
                    f"{told}, {values['rollout_tokens_per_second']:,.0f} tokens/s written",
                    max(done, total),
                )

            train_rl(
                config,
                self.run_folder,
                data,
                with_lora(model, config.lora, seed=config.seed),
                on_step,
                say=console.say,
                extra=extra,
                allow_change=self.allow_config_change,
                replay=None if self.replay is None else self.replay.resolve(),
            )
        console.say(
            f"{self.run_folder}: done; search-r3 export --run {self.run_folder} --out FOLDER writes the model"
        )


def _absolute(config: RunConfig) -> RunConfig:
    """The config with whole paths: a run is opened from anywhere, and remembers what it was made from."""
    sets = tuple(str(Path(folder).resolve()) for folder in config.data.sets)
    model = str(Path(config.model).resolve()) if Path(config.model).exists() else config.model
    return dataclasses.replace(config, model=model, data=dataclasses.replace(config.data, sets=sets))


@dataclass(frozen=True, kw_only=True)
class Indexer:
    """Follow a run of stage 2: encode its corpus with each new checkpoint and publish an index version.

    Attributes:
        run_folder: directory of the run.
        parent: process that started this one; the indexer ends with it.
        process: which of several processes that share the encoding this is; process 0 builds and publishes.
        processes: how many there are.
        debug: show the traceback of an error.
    """

    run_folder: Annotated[Path, tyro.conf.arg(name="run")]
    parent: int | None = None
    process: int = 0
    processes: int = 1
    debug: bool = False

    def run(self) -> None:
        from search_r3_jax.retrieval.indexer.worker import run_indexer

        run_indexer(self.run_folder, parent=self.parent, process=self.process, processes=self.processes)
