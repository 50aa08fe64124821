"""The plans that are kept in launch/plans: none is missing, each keeps within what it may take, and the
compiler still says the same."""

import json
import math
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from search_r3_jax.chips import CHIPS
from search_r3_jax.configs import config_names
from search_r3_jax.planning.models import PUBLISHED
from search_r3_jax.planning.plan import slice_shape

LAUNCH = Path(__file__).parents[2] / "launch"
PLANS = {
    str(file.relative_to(LAUNCH / "plans").with_suffix("")): json.loads(file.read_text())
    for file in LAUNCH.glob("plans/**/*.json")
}
MODELS, SLICES = ("Qwen2.5-1.5B", "Qwen2.5-7B", "Qwen3-8B"), ("v5e-16", "v5p-16", "v6e-16")
STAGES = ("sft", "rl", "decode", "encode")
# The slice that each experiment is made for.
SLICE_OF = {
    "qwen25_1p5b": "v5e-16",
    "qwen25_7b": "v5p-16",
    "qwen25_7b_lora": "v5e-16",
    "qwen3_8b": "v5p-16",
    "smollm2": "v5e-1",
    "quickstart": "v5e-1",
}
# As their publishers count them.
PARAMETERS = {
    "smollm2": 134_515_008,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen3-8B": 8_190_735_360,
}
SIZES = PUBLISHED | {"smollm2": PUBLISHED["HuggingFaceTB/SmolLM2-135M-Instruct"]}
UPDATES = [name for name, plan in PLANS.items() if plan["stage"] in ("sft", "rl")]
ONE_PASS = [name for name in UPDATES if name.split("/")[0] in MODELS]
# An index on the chips: of so many documents.
DOCUMENTS = {"8.8M": 8_800_000, "100M": 100_000_000}
WITH_INDEX = [name for name in PLANS if name.startswith("device-index/")]


def test_every_stage_has_a_plan_and_so_has_every_experiment() -> None:
    named = {f"{model}/{slice_name}/{stage}" for model in MODELS for slice_name in SLICES for stage in STAGES}
    experiments = {f"experiments/{name}/{SLICE_OF[name]}" for name in config_names()}
    assert named | {f"{each}/{stage}" for each in experiments for stage in ("sft", "rl")} <= set(PLANS)


def test_every_plan_can_be_made_again_and_is_of_what_its_name_says() -> None:
    done = subprocess.run([LAUNCH / "plans.sh", "--dry-run"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    made = [shlex.split(line) for line in done.stdout.splitlines() if line.startswith("search-r3 plan")]
    assert {words[-1] for words in made} == {str(LAUNCH / "plans" / f"{name}.json") for name in PLANS}
    for name, plan in PLANS.items():
        slice_name, stage = name.split("/")[-2:]
        assert (plan["stage"], plan["topology"]) == (stage, slice_shape(slice_name)), name


@pytest.mark.parametrize("name", PLANS)
def test_what_is_planned_fits_with_room_to_spare(name: str) -> None:
    plan = PLANS[name]
    chip = CHIPS[plan["topology"].split(":")[0]]
    assert plan["fits"]
    assert plan["hbm_limit"] == chip.hbm
    assert sum(plan["hbm"].values()) <= 0.95 * chip.hbm
    assert plan["chips"] == math.prod(int(size) for size in plan["topology"].split(":")[1].split("x"))


@pytest.mark.parametrize("name", ONE_PASS)
def test_an_update_in_one_pass_sends_and_computes_little_more_than_it_must(name: str) -> None:
    plan = PLANS[name]
    if plan["settings"]["lora_rank"] == 0:
        # Gathered forward and backward, and once more the reference; gradients scattered; in bfloat16.
        passes = 4 if "reference" in plan["hbm"] else 3
        bound = 2 * passes * PARAMETERS[plan["model"]] * (plan["chips"] - 1) / plan["chips"]
        assert plan["fsdp_bound_bytes"] == pytest.approx(bound)
    assert sum(plan["collective_bytes"].values()) <= 1.1 * plan["fsdp_bound_bytes"]
    assert plan["executed_flops"] <= 1.35 * plan["model_flops"]
    assert plan["mfu_bound"] <= 1


@pytest.mark.parametrize("name", UPDATES)
def test_parameters_and_optimiser_take_what_a_count_by_hand_says(name: str) -> None:
    plan = PLANS[name]
    base = 4 * PARAMETERS[plan["model"]] / plan["chips"]
    if plan["settings"]["lora_rank"] == 0:
        by_hand = {"parameters": base, "optimizer": 2 * base} | (
            {"reference": base} if "reference" in plan["hbm"] else {}
        )
    else:
        # Adapters, their moments, and no copy of the base.
        by_hand = {"parameters": base + 4 * adapters_on_chip(plan), "optimizer": 8 * adapters_on_chip(plan)}
    for kind, size in by_hand.items():
        assert plan["hbm"][kind] == pytest.approx(size, rel=0.02), kind
    # The compiler's tiles are 128 wide; a decoder of 576 fills four and a half.
    padding = 0.02 if SIZES[plan["model"]].hidden_size % 128 == 0 else 0.03
    assert plan["arguments_bytes"] == pytest.approx(sum(by_hand.values()), rel=padding)


def adapters_on_chip(plan: dict[str, Any]) -> float:
    """Parameters of the adapters that a chip holds: D is shared out, other sides of their factors are not."""
    model, rank = SIZES[plan["model"]], plan["settings"]["lora_rank"]
    D, F, heads, kv_heads = (
        model.hidden_size,
        model.feed_forward,
        model.heads * model.head_dim,
        model.kv_heads * model.head_dim,
    )
    whole = (heads + 2 * kv_heads + 2 * F) + (heads + F)
    return model.layers * rank * (7 * D / plan["chips"] + whole) + 2 * D


def test_all_that_stage_2_does_is_planned_beside_an_index() -> None:
    places = {name.rpartition("/")[0] for name in WITH_INDEX}
    assert len(places) >= 3
    assert set(WITH_INDEX) == {
        f"{place}/{stage}" for place in places for stage in ("rl", "decode", "encode", "search")
    }


@pytest.mark.parametrize("name", WITH_INDEX)
def test_the_vectors_of_an_index_take_what_a_count_by_hand_says(name: str) -> None:
    plan = PLANS[name]
    documents = DOCUMENTS[name.split("/")[1].rpartition("-")[2]]
    dimension = SIZES[plan["model"]].hidden_size
    assert plan["settings"]["documents"] == documents
    # Padding: less than a chunk a chip.
    assert plan["hbm"]["index"] == pytest.approx(2 * documents * dimension / plan["chips"], rel=0.01)
    assert {"parameters", "optimizer"} <= plan["hbm"].keys()
    if plan["stage"] == "search":
        assert plan["tokens"] == 1024
        assert plan["model_flops"] == pytest.approx(2 * 1024 * documents * dimension / plan["chips"])
        assert 1 <= plan["recomputed"] <= 1.02


@pytest.mark.parametrize("name", PLANS)
def test_the_table_of_shardings_shares_out_every_matrix(name: str) -> None:
    plan = PLANS[name]
    table = plan["shardings"]
    model = SIZES[plan["model"]]
    assert table["layers.gate.kernel"] == {
        "shape": [model.layers, model.hidden_size, model.feed_forward],
        "over": [None, "fsdp", "tensor"],
    }
    assert {path for path, entry in table.items() if "fsdp" not in entry["over"]} == {
        path
        for path in table
        if path.endswith((".bias", ".scale", "_row")) or path in replicated_factors(table)
    }
    size = sum(
        4 * count(entry["shape"])
        for path, entry in table.items()
        if ".lora_" not in path and not path.endswith("_row")
    )
    assert size == 4 * PARAMETERS[plan["model"]]


def replicated_factors(table: dict[str, Any]) -> set[str]:
    """The sides of adapters that have no D."""
    return {
        path
        for path in table
        if path.endswith(".lora_b" if not path.startswith(("layers.o.", "layers.down.")) else ".lora_a")
    }


def count(shape: list[int]) -> int:
    product = 1
    for length in shape:
        product *= length
    return product


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "Qwen2.5-1.5B/v5e-16/encode",
        "Qwen2.5-1.5B/v5e-16/decode",
        "device-index/Qwen2.5-1.5B-8.8M/v5e-16/search",
    ],
)
def test_the_compiler_says_the_same_again(tmp_path: Path, name: str) -> None:
    pytest.importorskip("libtpu", reason="the TPU compiler has no wheel for this system")
    done = subprocess.run([LAUNCH / "plans.sh", "--out", tmp_path, name], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (made,) = tmp_path.rglob("*.json")
    assert made == tmp_path / f"{name}.json"
    assert_alike(json.loads(made.read_text()), PLANS[name])


# What a machine takes to compile is its own affair; the exchanges one by one are told in words that may
# change.
TOLD_APART = {"compile_seconds", "collectives"}


def assert_alike(found: Any, expected: Any, where: str = "plan") -> None:
    """Numbers within 2 %, everything else as it was."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for name in expected.keys() - TOLD_APART:
            assert_alike(found[name], expected[name], f"{where}.{name}")
    elif isinstance(expected, float):
        # A megabyte more or less of a chip's memory is none of anybody's business.
        assert found == pytest.approx(expected, rel=0.02, abs=2**20 if ".hbm" in where else 0), where
    else:
        assert found == expected, where
