"""What the pages and the experiments tell a user to rent is enough: all programs of a command with an
experiment and a slice have kept plans, which leave 5 % of a chip's memory free."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from search_r3_jax.chips import CHIPS
from search_r3_jax.cli import parse
from search_r3_jax.config import RunConfig
from search_r3_jax.configs import config_names, load_config
from search_r3_jax.planning.plan import slice_shape, stage_settings
from search_r3_jax.planning.stages import Stage

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "launch/README.md", *sorted((ROOT / "search_r3_jax").rglob("README.md"))]
PLANS = [json.loads(file.read_text()) for file in (ROOT / "launch/plans").rglob("*.json")]
# The programs of each command on the trainer's chips: stage 2 samples, updates and encodes documents again.
PROGRAMS: dict[str, tuple[Stage, ...]] = {"sft": ("sft",), "rl": ("rl", "decode", "encode")}
# What a program does not depend on.
UNUSED = {"encode": {"lora_rank", "remat"}}
# The names of generations, as the launchers' tools have them.
GENERATIONS = {
    **{"v5litepod": "v5e", "v6e": "v6e", "v5p": "v5p", "v4": "v4"},
    **{
        "tpu-v5-lite-podslice": "v5e",
        "tpu-v6e-slice": "v6e",
        "tpu-v5p-slice": "v5p",
        "tpu-v4-podslice": "v4",
    },
}
HOST = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "v5p": "v5p:2x2x1", "v4": "v4:2x2x1"}


class Needed(NamedTuple):
    """A program that a page or an experiment leads to, on chips of a shape."""

    where: str
    config: RunConfig
    stage: Stage
    shape: str
    slices: int = 1
    documents: int = 0


def flag(words: list[str], name: str, default: str) -> str:
    """The value of a launcher's flag."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == name:
            return following
        if word.startswith(f"{name}="):
            return word.removeprefix(f"{name}=")
    return default


def settings_of(arguments: list[str]) -> RunConfig:
    """The settings of a command; a run that it starts from has the experiment's model."""
    command = parse(arguments)
    return dataclasses.replace(command.settings, model=load_config(command.config).model)


def trained(where: str, arguments: list[str], shape: str, slices: int) -> Iterator[Needed]:
    if arguments[:1] and arguments[0] in PROGRAMS and "--config" in arguments:
        for stage in PROGRAMS[arguments[0]]:
            yield Needed(where, settings_of(arguments), stage, shape, slices)


def needed_by(where: str, line: str) -> Iterator[Needed]:
    """The programs of one command line of a page."""
    words = shlex.split(line)
    if words[:2] == ["search-r3", "plan"]:
        command = parse(words[1:])
        yield Needed(
            where,
            command.settings,
            command.stage,
            slice_shape(command.topology),
            command.slices,
            command.documents,
        )
    if not words or "--" not in words:
        return
    at = words.index("--")
    flags, arguments = words[:at], words[at + 1 :]
    slices = int(flag(flags, "--slices", "1"))
    if words[0].endswith("launch/tpu_vm.sh"):
        generation, count = flag(flags, "--type", "v5litepod-16").split("-")
        yield from trained(where, arguments, slice_shape(f"{GENERATIONS[generation]}-{count}"), slices)
    if words[0].endswith("launch/gke/submit.sh"):
        generation = GENERATIONS[flag(flags, "--accelerator", "tpu-v5-lite-podslice")]
        topology = flag(flags, "--topology", "2x2x2" if generation in ("v5p", "v4") else "4x4")
        yield from trained(where, arguments, f"{generation}:{topology}", slices)
        if int(flag(flags, "--indexers", "0")):
            # Each host of the indexer's slices is a world of its own.
            indexer = (
                GENERATIONS[flag(flags, "--indexer-accelerator", "")]
                if "--indexer-accelerator" in flags
                else ""
            )
            yield Needed(where, settings_of(arguments), "encode", HOST[indexer or generation])


def commands_of(page: Path) -> Iterator[str]:
    for block in re.findall(
        r"^```bash\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    ):
        for line in re.sub(r"\\\n", " ", block).splitlines():
            yield re.split(r"\s#\s", line)[0].strip()


def needed_by_pages() -> Iterator[Needed]:
    for page in PAGES:
        for line in commands_of(page):
            yield from needed_by(f"{page.relative_to(ROOT)}: {line}", line)


def needed_by_experiments() -> Iterator[Needed]:
    """Both stages of each experiment on the slice that its file names. Where it names none it is made for a
    laptop: its updates, which take most, fit one chip."""
    for name in config_names():
        where, file = f"configs/{name}.py", ROOT / f"search_r3_jax/configs/{name}.py"
        named = re.search(r"for a (v\w+-\d+)", file.read_text(encoding="utf-8"))
        for stage in ("sft", "rl"):
            arguments = [stage, "--config", name, "--run", "r"]
            if named:
                yield from trained(where, arguments, slice_shape(named[1]), 1)
            else:
                yield Needed(where, settings_of(arguments), stage, slice_shape("v5e-1"))


def mesh_of(needed: Needed) -> dict[str, int]:
    """The sizes of the mesh that a run makes of its chips."""
    chips = needed.slices * math.prod(int(size) for size in needed.shape.split(":")[1].split("x"))
    mesh = needed.config.mesh
    sizes = {name: getattr(mesh, name) for name in ("slice", "data", "fsdp", "tensor", "sequence")}
    left = chips // math.prod(size for size in sizes.values() if size != -1)
    return {name: left if size == -1 else size for name, size in sizes.items()}


def plans_of(needed: Needed) -> list[dict[str, Any]]:
    """The kept plans of exactly this program."""
    unused = UNUSED.get(needed.stage, set())
    described = stage_settings(needed.config, needed.stage, documents=needed.documents)
    settings = json.loads(json.dumps(described))
    wanted = {name: value for name, value in settings.items() if name not in unused}
    return [
        plan
        for plan in PLANS
        if (plan["stage"], plan["model"]) == (needed.stage, needed.config.model)
        and (plan["topology"], plan["slices"]) == (needed.shape, needed.slices)
        and plan["mesh"] == mesh_of(needed)
        and {name: value for name, value in plan["settings"].items() if name not in unused} == wanted
    ]


NEEDED = [*needed_by_pages(), *needed_by_experiments()]


@pytest.mark.parametrize(
    "needed", NEEDED, ids=lambda needed: f"{needed.stage} {needed.shape} {needed.where[:60]}"
)
def test_what_is_recommended_fits_its_slice(needed: Needed) -> None:
    plans = plans_of(needed)
    assert plans, f"{needed.where}: launch/plans has no plan of {needed.stage} on {needed.shape}"
    for plan in plans:
        used, limit = sum(plan["hbm"].values()), CHIPS[needed.shape.split(":")[0]].hbm
        assert used <= 0.95 * limit, f"{needed.where}: {used / 2**30:.1f} of {limit / 2**30:.1f} GiB a chip"


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen2.5-7B-Instruct"])
def test_an_indexer_of_four_chips_holds_the_model(name: str) -> None:
    (plan,) = [
        plan
        for plan in PLANS
        if (plan["stage"], plan["model"], plan["topology"]) == ("encode", name, "v5e:2x2")
    ]
    assert sum(plan["hbm"].values()) <= 0.95 * CHIPS["v5e"].hbm
    # The parameters stay in float32, shared out.
    assert plan["mesh"]["fsdp"] == 4


def test_commands_with_a_slice_are_found() -> None:
    pages = list(needed_by_pages())
    assert {(each.stage, each.shape) for each in pages} >= {
        ("sft", "v5e:4x4"),
        ("rl", "v5e:2x4"),
        ("encode", "v5e:2x2"),
        ("sft", "v5p:2x2x2"),
    }
    assert {each.where for each in needed_by_experiments()} == {
        f"configs/{name}.py" for name in config_names()
    }
    line = "./launch/tpu_vm.sh up --type v5p-32 --slices 2 -- rl --config qwen3_8b --run r --mesh.slice 2"
    (update, *_) = needed_by("", line)
    assert (update.stage, update.shape, update.slices) == ("rl", "v5p:2x2x4", 2)
    assert mesh_of(update) == {"slice": 2, "data": 1, "fsdp": 16, "tensor": 1, "sequence": 1}
    # All queries at once is what did not fit.
    at_once = line.replace("--type v5p-32 --slices 2", "--type v5litepod-16").replace(
        "--mesh.slice 2", "--rl.micro-queries 0"
    )
    assert plans_of(next(needed_by("", at_once))) == []
