"""Where the weights lie while replies are written."""

import dataclasses

import pytest
from jax.sharding import Mesh

from search_r3_jax.config import MeshConfig
from search_r3_jax.mesh import make_mesh
from search_r3_jax.planning.models import PUBLISHED
from search_r3_jax.planning.plan import open_slice
from search_r3_jax.rollout.sampler import writing_meshes

pytest.importorskip("libtpu", reason="the TPU compiler has no wheel for this system")

CONFIG = PUBLISHED["Qwen/Qwen2.5-7B-Instruct"]
GIB = 2.0**30


def sizes(mesh: Mesh | None) -> tuple[int, int, int]:
    assert mesh is not None
    return mesh.shape["data"], mesh.shape["fsdp"], mesh.shape["tensor"]


@pytest.mark.parametrize(
    ("gib", "on_the_way", "there"),
    [
        # Half of 15.75 GiB is enough for all of them, for one of two, for one of four.
        (5.0, (1, 16, 1), (16, 1, 1)),
        (14.2, (1, 8, 2), (8, 1, 2)),
        (30.0, (1, 4, 4), (4, 1, 4)),
    ],
)
def test_as_few_neighbours_share_the_weights_as_can_hold_them(
    gib: float, on_the_way: tuple[int, int, int], there: tuple[int, int, int]
) -> None:
    mesh = make_mesh(fsdp=16, devices=open_slice("v5e:4x4").devices)
    views = writing_meshes(mesh, CONFIG, gib * GIB)
    assert [sizes(view) for view in views] == [on_the_way, there]
    # Parts of a matrix that are next to each other stay so.
    assert all(view is not None and list(view.devices.flat) == list(mesh.devices.flat) for view in views)


def test_weights_that_no_group_can_hold_stay_where_they_are() -> None:
    mesh = make_mesh(**dataclasses.asdict(MeshConfig()), devices=open_slice("v5e:4x4").devices)
    # Of 4 key/value heads no more than 4 chips can have one each.
    assert writing_meshes(mesh, CONFIG, 40 * GIB) == [mesh]


def test_one_device_has_nothing_to_lay_out() -> None:
    assert writing_meshes(None, CONFIG, GIB) == [None]
