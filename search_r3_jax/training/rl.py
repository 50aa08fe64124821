"""Stage 2: GRPO on retrieval success, against an index that is rebuilt while training goes on."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from flax import nnx

from search_r3_jax.compile_time import announce_compiling
from search_r3_jax.config import RunConfig, TrackerName, check_ranges
from search_r3_jax.data.development import TrainingSet
from search_r3_jax.distributed.lockstep import Team
from search_r3_jax.hub.load_model import LoadedModel
from search_r3_jax.hub.model_names import check_model_name
from search_r3_jax.profiling import TRAIN, part, step
from search_r3_jax.training.development import OnEvaluation
from search_r3_jax.training.led_index import LedIndex
from search_r3_jax.training.loading import check_sizes, load_rl_data, load_training_model, log_cut_texts
from search_r3_jax.training.monitor import require_learning
from search_r3_jax.training.rl_acts import sample, score, update
from search_r3_jax.training.rl_session import Listeners, OnStep, open_session
from search_r3_jax.training.rl_setup import check_settings, make_stage
from search_r3_jax.training.rolling_index import check_rolling
from search_r3_jax.training.run import (
    RlRecord,
    check_stage,
    data_version,
    led_record,
    prompt_record,
    recorded_prompts,
    require_same_settings,
    with_absolute_paths,
)
from search_r3_jax.training.trackers import check_trackers


@dataclass(frozen=True, kw_only=True)
class RlResult:
    """What stage 2 leaves.

    Attributes:
        params: the trained parameters.
        steps: steps taken.
        swaps: (step, index version) of every change of index.
        valid_rate: mean over the last quarter of the steps.
        reencoded_share: documents re-encoded a step, as a share of the corpus, on average.
        index_versions: every version used: step, recall@10 against exact search, seconds to encode and build.
    """

    params: nnx.State
    steps: int
    swaps: list[tuple[int, int]]
    valid_rate: float
    reencoded_share: float
    index_versions: list[dict[str, float]]


def train_rl(
    config: RunConfig,
    run_folder: Path | str,
    *,
    data: TrainingSet | None = None,
    model: LoadedModel | None = None,
    on_step: OnStep = lambda done, total, metrics: None,
    on_evaluation: OnEvaluation = lambda what, done, total: None,
    trackers: Sequence[TrackerName] = ("tensorboard",),
    record: RlRecord | None = None,
    replay: Path | None = None,
    allow_config_change: bool = False,
) -> RlResult:
    """Run stage 2 to its last step; a second call with the same folder resumes from the last checkpoint.

    Each process of a cluster calls it; process 0 owns the run folder and the index. `data`, `model` and
    `record` come from the config where they are not given; the model is also the reference of the KL.
    `on_step(steps done, steps in all, metrics)`; beside what is logged these have `seconds_each` and
    `seconds_left`. `on_evaluation(what, done, in all)`. `trackers` show the run beside its files. `replay` is
    a run whose schedule of index versions a new run repeats. `allow_config_change` resumes a run with other
    settings.

    Raises UserError for settings that cannot work, before the first step, when the replies collapse, and
    when too many updates in a row are not finite; StoppedError on a stop signal. The last checkpoint is kept.
    """
    # Act 1: what stage 2 is made of.
    team = Team()
    check_ranges(config, "rl")
    check_rolling(config, replay)
    check_trackers(trackers)
    check_stage(Path(run_folder), "rl", team)
    check_model_name(config.model)
    require_same_settings(team, config)
    config, run_folder, rl = with_absolute_paths(config), Path(run_folder), config.rl
    data = data or load_rl_data(config)
    check_settings(config, data.train)
    record = record or led_record(team, run_folder, config)
    model = model or load_training_model(config, step=record.start_step, revision=record.revision)
    model = recorded_prompts(model, run_folder, team)
    check_sizes(config, model, "rl")
    log_cut_texts(model.prompter(), config.text, data.train)
    stage, state = make_stage(config, data, model)
    described = record.to_json(data.train, replay) | prompt_record(stage.prompter)
    watched = None if data.dev is None else data_version(data.dev)
    team.require_same("data.sets, model", described | {"dev": watched})
    listeners = Listeners(on_step=on_step, on_evaluation=on_evaluation, trackers=trackers)
    with open_session(stage, team, run_folder, described, allow_config_change, listeners) as session:
        # Act 2: where to begin, and the index in use there.
        state, progress, start = session.begin(state, replay, allow_other_version=allow_config_change)
        stage.current = stage.merged(state.params)
        index = LedIndex.open(
            team, run_folder, stage.indexed_corpus(), start=start, on_wait=session.stop_waiting
        )
        with closing(index):
            # Act 3: the loop. The index changes between steps only.
            first = progress.step
            session.time_left.start()
            with stage.sampling_dropped():
                while not progress.finished(rl):
                    stalls = session.before_step(state, progress, index)
                    with step(TRAIN, progress.step):
                        with announce_compiling("the rollout", when=progress.step == first), part("rollout"):
                            sampled = sample(stage, progress.step)
                        with announce_compiling("the update", when=progress.step == first):
                            with part("rewards"):
                                scored = score(stage, state, sampled, index, progress.step)
                            with part("update"):
                                state, metrics = update(stage, state, sampled, scored, progress.step)
                    session.finish_step(state, progress, sampled, scored, metrics | stalls, index)
            # Act 4: the last checkpoint.
            session.save_last(state, progress, index)
    require_learning(progress.skipped, progress.step, "rl")
    return RlResult(
        params=state.params,
        steps=progress.step,
        swaps=list(progress.index.swaps),
        valid_rate=progress.recent_valid_rate(),
        reencoded_share=progress.reencoded / max(1, progress.step) / len(data.train.documents),
        index_versions=[dict(version) for version in progress.index.versions],
    )
