"""The sampler against teacher-forced forwards of the same decoder: one pass, same numbers."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.jax_processes import run_processes
from helpers.tiny_models import plain_hidden

from search_r3_jax.config import SamplerConfig
from search_r3_jax.errors import UserError
from search_r3_jax.hub.load_model import LoadedModel
from search_r3_jax.rollout import sampling_program
from search_r3_jax.rollout.encoder import Encoder
from search_r3_jax.rollout.sampler import Rollout, Sampler, rollout_seeds, rollout_throughput
from search_r3_jax.rollout.token_sampling import SampledToken, sample_token
from search_r3_jax.text.prompts import Prompter

TEXTS = ["a query", "another, much longer query about something", "x"]
G, BUDGET = 4, 9
COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture(scope="module")
def sampler_of(tiny_model: LoadedModel) -> Callable[..., Sampler]:
    """A sampler of the tiny model; the same settings give the same one, which is compiled once."""
    made: dict[str, Sampler] = {}

    def sampler_of(**settings: Any) -> Sampler:
        settings = {"max_think_tokens": BUDGET, "prefill_chunk": 0} | settings
        name = str(sorted(settings.items()))
        if name not in made:
            graph, prompter = nnx.split(tiny_model.decoder)[0], Prompter(tiny_model.tokenizer)
            made[name] = Sampler(graph, prompter, SamplerConfig(**settings))
        return made[name]

    return sampler_of


@pytest.fixture(scope="module")
def sampled(tiny_model: LoadedModel, sampler_of: Callable[..., Sampler]) -> Callable[..., Rollout]:
    """One rollout of `TEXTS`."""
    state = nnx.split(tiny_model.decoder)[1]

    def sampled(seed: int = 0, **settings: Any) -> Rollout:
        return sampler_of(**settings).sample(
            state, TEXTS, rollout_seeds(seed, 5, range(len(TEXTS)), G), max_tokens=64
        )

    return sampled


def whole_rows(model: LoadedModel, replies: list[list[int]], group: int = G) -> tuple[np.ndarray, list[int]]:
    """Hidden states of prefix, prompt and reply in plain forwards, and where each reply begins."""
    prompter = Prompter(model.tokenizer)
    prompts = [
        [*prompter.reason.prefix, *prompter.reason_rows([TEXTS[b // group]], 64)[0]]
        for b in range(len(replies))
    ]
    hidden = plain_hidden(
        model.decoder, [prompt + reply for prompt, reply in zip(prompts, replies, strict=True)]
    )
    return np.asarray(hidden), [len(prompt) for prompt in prompts]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.9},
        {"slots": 5, "prefill_chunk": 8},
        {"max_think_tokens": 0},
    ],
)
def test_embedding_and_log_probs_equal_a_teacher_forced_forward(
    tiny_model: LoadedModel, sampled: Callable[..., Rollout], settings: dict[str, Any]
) -> None:
    """Log-probabilities and entropies are of the whole vocabulary under the temperature, also where top-k and
    top-p left tokens out."""
    rollout, temperature = sampled(**settings), settings.get("temperature", 1.0)
    hidden, starts = whole_rows(tiny_model, rollout.replies())
    logits = np.asarray(tiny_model.decoder.logits(jnp.asarray(hidden))).astype(np.float64) / temperature
    top = logits.max(-1, keepdims=True)
    log_probs = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    entropies = -(np.exp(log_probs) * log_probs).sum(-1)
    for b, reply in enumerate(rollout.replies()):
        state = hidden[b, starts[b] + len(reply) - 1].astype(np.float64)
        np.testing.assert_allclose(rollout.vectors[b], state / np.linalg.norm(state), atol=1e-5)
        for t, token in enumerate(reply):
            if rollout.sampled[b, t]:
                np.testing.assert_allclose(
                    rollout.log_probs[b, t], log_probs[b, starts[b] + t - 1, token], atol=1e-5
                )
                np.testing.assert_allclose(
                    rollout.entropies[b, t], entropies[b, starts[b] + t - 1], atol=1e-5
                )
            else:
                assert rollout.log_probs[b, t] == rollout.entropies[b, t] == 0.0


def test_every_reply_ends_with_the_one_embed_token_and_forced_ones_are_not_valid(
    tiny_model: LoadedModel, sampled: Callable[..., Rollout]
) -> None:
    rollout = sampled()
    closing = list(Prompter(tiny_model.tokenizer).reason.closing)
    for b, reply in enumerate(rollout.replies()):
        assert reply.count(tiny_model.embed_id) == 1
        assert reply[-1] == tiny_model.embed_id
        own = int(rollout.sampled[b].sum())
        assert own <= BUDGET
        assert rollout.valid[b] == (own == len(reply))
        if not rollout.valid[b]:
            assert reply[own:] == closing


@pytest.mark.parametrize("slots", [0, 5])
def test_without_a_budget_the_closing_is_all_that_is_written(
    tiny_model: LoadedModel, sampled: Callable[..., Rollout], slots: int
) -> None:
    rollout = sampled(max_think_tokens=0, slots=slots)
    assert rollout.replies() == [list(Prompter(tiny_model.tokenizer).reason.closing)] * len(TEXTS) * G
    assert not rollout.valid.any()
    assert not rollout.sampled.any()


def test_same_seed_same_reply_other_seed_other_reply(sampled: Callable[..., Rollout]) -> None:
    first, again, other = sampled(), sampled(), sampled(seed=1)
    np.testing.assert_array_equal(first.ids, again.ids)
    assert (first.ids != other.ids).any()
    assert len({tuple(reply) for reply in first.replies()[:G]}) > 1


@pytest.mark.slow
def test_a_reply_does_not_depend_on_what_else_is_sampled(
    tiny_model: LoadedModel, sampler_of: Callable[..., Sampler]
) -> None:
    """Queries in another order or alone, their samples in another order or alone: the same tokens for the
    same seeds."""
    state, sampler = nnx.split(tiny_model.decoder)[1], sampler_of()
    queries = [7, 2, 30]
    seeds = rollout_seeds(0, 5, queries, G)
    whole = sampler.sample(state, TEXTS, seeds, max_tokens=64).ids.reshape(3, G, -1)

    order = [2, 0, 1]
    again = rollout_seeds(0, 5, [queries[i] for i in order], G)
    np.testing.assert_array_equal(again, seeds[order])
    permuted = sampler.sample(state, [TEXTS[i] for i in order], again, max_tokens=64).ids.reshape(3, G, -1)
    np.testing.assert_array_equal(permuted, whole[order])
    for i in (0, 2):
        alone = sampler.sample(state, [TEXTS[i]], seeds[i : i + 1], max_tokens=64)
        np.testing.assert_array_equal(alone.ids, whole[i])
    one = sampler.sample(state, TEXTS[1:2], seeds[1:2, 2:3], max_tokens=64)
    np.testing.assert_array_equal(one.ids[0], whole[1, 2])
    shuffled = sampler.sample(state, TEXTS, seeds[:, ::-1], max_tokens=64).ids.reshape(3, G, -1)
    np.testing.assert_array_equal(shuffled, whole[:, ::-1])


def test_slots_write_the_same_replies(sampled: Callable[..., Rollout]) -> None:
    whole, slotted = sampled(), sampled(slots=5, prefill_chunk=8)
    for name in ("ids", "lengths", "sampled", "valid"):
        np.testing.assert_array_equal(getattr(slotted, name), getattr(whole, name), err_msg=name)
    for name in ("log_probs", "entropies", "vectors"):
        np.testing.assert_allclose(getattr(slotted, name), getattr(whole, name), atol=1e-5, err_msg=name)


def test_seeds_are_of_the_query_and_the_sample() -> None:
    seeds = rollout_seeds(0, 5, [7, 2, 30], 8)
    np.testing.assert_array_equal(rollout_seeds(0, 5, [30], 4), seeds[2:, :4])
    others = [rollout_seeds(1, 5, [7], 8), rollout_seeds(0, 6, [7], 8), seeds[1:2], seeds[2:]]
    assert len({*seeds[0].tolist(), *(int(seed) for other in others for seed in other[0])}) == 8 * 5


def test_one_shape_is_compiled_whatever_the_length_of_the_queries(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced: list[int] = []

    def counted(*arguments: Any, **settings: Any) -> Any:
        traced.append(1)
        return prefix_block(*arguments, **settings)

    prefix_block = sampling_program.prefix_block
    monkeypatch.setattr(sampling_program, "prefix_block", counted)
    graph, state = nnx.split(tiny_model.decoder)
    sampler = Sampler(
        graph, Prompter(tiny_model.tokenizer), SamplerConfig(max_think_tokens=2, temperature=1.0)
    )
    for texts in (["a", "b"], ["a much longer query", "c"], ["x" * 90, "y"]):
        sampler.sample(state, texts, rollout_seeds(0, 0, range(2), 2), max_tokens=20)
    assert len(traced) == 1


@pytest.mark.slow
def test_what_was_compiled_ahead_is_what_runs(tiny_model: LoadedModel) -> None:
    compiled: list[str] = []

    def heard(event: str, duration_secs: float, **_: str | int) -> None:
        if event == COMPILED:
            compiled.append(event)

    graph, state = nnx.split(tiny_model.decoder)
    prompter = Prompter(tiny_model.tokenizer)
    sampler, encoder = (
        Sampler(graph, prompter, SamplerConfig(max_think_tokens=2, temperature=0.0)),
        Encoder(graph, prompter, pass_tokens=128),
    )
    sampler.compile(state, 3, 2, max_tokens=20)
    encoder.compile(state, TEXTS, max_tokens=20)
    jax.monitoring.register_event_duration_secs_listener(heard)
    try:
        sampler.sample(state, TEXTS, rollout_seeds(0, 0, range(3), 2), max_tokens=20)
        encoder.encode(state, TEXTS, max_tokens=20)
        assert not compiled
        # Other shapes are heard.
        sampler.sample(state, TEXTS[:1], rollout_seeds(0, 0, range(1), 2), max_tokens=20)
        encoder.encode(state, ["x"] * 9, max_tokens=20)
        assert len(compiled) == 2
    finally:
        jax.monitoring.unregister_event_duration_listener(heard)


@pytest.mark.parametrize(("slots", "steps"), [(0, 3), (4, 9)])
def test_the_loop_ends_with_the_longest_reply(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch, slots: int, steps: int
) -> None:
    """Each reply ends by itself at its third token, far within the budget: all at once that is 3 passes, 12
    rows in 4 slots take 9."""
    passes: list[int] = []

    def ending(logits: jax.Array, keys: jax.Array, step: jax.Array, **settings: Any) -> SampledToken:
        jax.debug.callback(lambda: passes.append(1))
        choice = sample_token(logits, keys, step, **settings)
        return choice._replace(token=jnp.where(step >= 2, tiny_model.embed_id, 5))

    monkeypatch.setattr(sampling_program, "sample_token", ending)
    graph, state = nnx.split(tiny_model.decoder)
    sampler = Sampler(
        graph,
        Prompter(tiny_model.tokenizer),
        SamplerConfig(max_think_tokens=400, temperature=1.0, slots=slots),
    )
    rollout = sampler.sample(state, TEXTS, rollout_seeds(0, 0, range(3), 4), max_tokens=16)
    jax.effects_barrier()
    assert rollout.valid.all()
    assert rollout.replies() == [[5, 5, tiny_model.embed_id]] * 12
    assert len(passes) == steps


def test_tokens_a_second(sampled: Callable[..., Rollout]) -> None:
    rollout = sampled()
    assert rollout.tokens == sum(map(len, rollout.replies()))
    assert rollout_throughput(rollout, 2.0) == {
        "rollout_tokens": rollout.tokens,
        "rollout_tokens_per_second": rollout.tokens / 2,
    }


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}, {"slots": -2}]
)
def test_settings_out_of_range_are_the_users_mistake(tiny_model: LoadedModel, wrong: dict[str, Any]) -> None:
    name = next(iter(wrong))
    graph, prompter = nnx.split(tiny_model.decoder)[0], Prompter(tiny_model.tokenizer)
    with pytest.raises(UserError, match=f"sampler.{name}: "):
        Sampler(graph, prompter, SamplerConfig(max_think_tokens=2, **wrong))


@pytest.mark.slow
def test_samples_follow_the_models_distribution(tiny_model: LoadedModel) -> None:
    """First tokens of many samples: chi-square-like distance to the probabilities of a plain forward."""
    graph, state = nnx.split(tiny_model.decoder)
    sampler = Sampler(
        graph, Prompter(tiny_model.tokenizer), SamplerConfig(max_think_tokens=1, temperature=1.0)
    )
    n = 4000
    rollout = sampler.sample(state, TEXTS[:1], rollout_seeds(3, 0, [0], n), max_tokens=64)
    hidden, starts = whole_rows(tiny_model, [[]])
    logits = np.asarray(tiny_model.decoder.logits(jnp.asarray(hidden[0, starts[0] - 1]))).astype(np.float64)
    expected = np.exp(logits - logits.max())
    expected /= expected.sum()
    counts = np.bincount(rollout.ids[:, 0], minlength=len(expected))
    big = expected * n >= 5
    statistic = ((counts[big] - expected[big] * n) ** 2 / (expected[big] * n)).sum()
    # Mean of chi-square is its degrees of freedom, its deviation the root of twice that.
    assert abs(statistic - big.sum()) < 5 * np.sqrt(2 * big.sum())


def test_the_encoder_equals_a_plain_forward_in_any_batch(tiny_model: LoadedModel) -> None:
    graph, state = nnx.split(tiny_model.decoder)
    prompter = Prompter(tiny_model.tokenizer)
    texts = [TEXTS[i % 3] * (1 + i % 5) for i in range(17)]
    vectors = Encoder(graph, prompter, pass_tokens=256).encode(state, texts, max_tokens=40)
    rows = [[*prompter.direct.prefix, *row] for row in prompter.direct_rows(texts, 40)]
    hidden = np.asarray(plain_hidden(tiny_model.decoder, rows)).astype(np.float64)
    last = np.stack([hidden[i, len(row) - 1] for i, row in enumerate(rows)])
    np.testing.assert_allclose(vectors, last / np.linalg.norm(last, axis=-1, keepdims=True), atol=1e-5)


def test_of_many_texts_two_pieces_are_held_as_tokens(tiny_model, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, state = nnx.split(tiny_model.decoder)
    prompter, pieces, finished = Prompter(tiny_model.tokenizer), list[int](), list[int]()
    encoder = Encoder(graph, prompter, pass_tokens=256)
    texts = [TEXTS[i % 3] * (1 + i % 5) for i in range(50)]
    whole = encoder.encode(state, texts, max_tokens=40)
    monkeypatch.setattr("search_r3_jax.rollout.encoder.TEXTS_AT_ONCE", 16)
    rows = Prompter.direct_rows

    def counted(prompter: Prompter, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
        # Of those before, all but the last are finished.
        assert sum(pieces) - sum(finished) <= 2 * 16
        pieces.append(len(texts))
        return rows(prompter, texts, max_tokens)

    monkeypatch.setattr(Prompter, "direct_rows", counted)
    vectors = encoder.encode(state, texts, max_tokens=40, on_progress=finished.append)
    np.testing.assert_allclose(vectors, whole, atol=1e-6)
    assert (pieces, sum(finished)) == ([16, 16, 16, 2], 50)
    broken = nnx.clone(tiny_model.decoder)
    token = prompter.tokenizer("~")["input_ids"][-1]
    broken.embedding.set_value(broken.embedding[...].at[token].set(np.nan))
    with pytest.raises(UserError, match=r"text 38 \('~'\)"):
        encoder.encode(nnx.state(broken), [*texts[:37], "~", *texts], max_tokens=40)


@pytest.mark.slow
def test_slots_on_meshes_write_what_one_device_writes(tiny_folders: dict[str, Path]) -> None:
    program = Path(__file__).parents[1] / "helpers" / "slots_on_mesh.py"
    (found,) = run_processes(program, [str(tiny_folders["llama"])], processes=1, devices=8, timeout=240)
    assert found == dict.fromkeys(["fsdp 8", "fsdp 5", "all 8", "all 5"], True)
