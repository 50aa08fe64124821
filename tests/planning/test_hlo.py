"""What is read from programs that the TPU compiler made, against counts by hand."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from search_r3_jax.config import MeshConfig
from search_r3_jax.mesh import make_mesh
from search_r3_jax.models.layers import reduce_scatter_sum
from search_r3_jax.planning.hlo import LoopError, Program, read_program
from search_r3_jax.planning.plan import open_slice

pytest.importorskip("libtpu", reason="the TPU compiler has no wheel for this system")


def mesh_of(topology: str = "v5e:2x2", slices: int = 1, **sizes: int) -> Mesh:
    return make_mesh(**dataclasses.asdict(MeshConfig(**sizes)), devices=open_slice(topology, slices).devices)


def compiled(
    function: Callable[..., Any],
    mesh: Mesh,
    *arguments: tuple[tuple[int, ...], PartitionSpec],
    **settings: Any,
) -> Program:
    """What a function of bfloat16 arrays is made into."""
    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
        for shape, spec in arguments
    ]
    return read_program(jax.jit(function).lower(*shapes).compile(), dict(mesh.shape), **settings)


def test_products_in_loops_are_counted_as_often_as_they_run() -> None:
    mesh = mesh_of()
    everywhere = PartitionSpec()

    def function(x: jax.Array, ws: jax.Array) -> jax.Array:
        def body(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
            return jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ w), x), None

        return jax.lax.scan(body, x, ws)[0]

    found = compiled(function, mesh, ((256, 512), everywhere), ((7, 512, 512), everywhere))
    assert found.flops == 7 * 3 * 2 * 256 * 512 * 512
    assert found.product_bytes == 7 * 3 * 2 * (2 * 256 * 512 + 512 * 512)
    assert found.collectives == []


def test_products_of_batches_of_matrices_count_each_matrix() -> None:
    found = compiled(
        partial(jnp.einsum, "bij,bjk->bik"),
        mesh_of(),
        ((6, 256, 384), PartitionSpec()),
        ((6, 384, 128), PartitionSpec()),
    )
    assert found.flops == 6 * 2 * 256 * 384 * 128


def test_a_loop_without_a_constant_end_has_the_rounds_that_are_given() -> None:
    def function(x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda x: jnp.sum(x[0].astype(jnp.float32)) < 3, lambda x: x @ x, x)

    x = (256, 256), PartitionSpec()
    assert compiled(function, mesh_of(), x, open_rounds=5).flops == 5 * 2 * 256**3
    with pytest.raises(LoopError, match="rounds"):
        compiled(function, mesh_of(), x)


@pytest.mark.parametrize(
    ("kind", "bytes_of_one"),
    [
        ("all-gather", 3 / 4 * 2 * 1024 * 512),
        ("all-reduce", 2 * 3 / 4 * 2 * 1024 * 512),
        ("all-to-all", 3 / 4 * 2 * 1024 * 512 / 4),
    ],
)
def test_exchanges_are_counted_in_bytes_that_a_chip_sends(kind: str, bytes_of_one: float) -> None:
    mesh = mesh_of(fsdp=4)
    split = PartitionSpec("fsdp")

    def exchange(x: jax.Array) -> jax.Array:
        if kind == "all-gather":
            return jax.lax.all_gather(x, "fsdp", axis=0, tiled=True)
        if kind == "all-reduce":
            return jax.lax.psum(x, "fsdp")
        return jax.lax.all_to_all(x, "fsdp", split_axis=1, concat_axis=0, tiled=True)

    spec = PartitionSpec() if kind == "all-reduce" else split
    outputs = PartitionSpec() if kind != "all-to-all" else PartitionSpec(None, "fsdp")
    # Five different ones, a loop round each.
    mapped = jax.shard_map(exchange, mesh=mesh, in_specs=spec, out_specs=outputs, check_vma=False)

    def function(xs: jax.Array) -> jax.Array:
        return jax.lax.map(lambda x: mapped(jnp.tanh(x)), xs)

    found = compiled(function, mesh, ((5, 1024, 512), PartitionSpec(None, *spec)))
    assert {each.axes for each in found.collectives} == {("fsdp",)}
    assert {each.kind for each in found.collectives} == {kind}
    assert sum(each.bytes for each in found.collectives) == pytest.approx(5 * bytes_of_one, rel=1e-6)


@pytest.mark.parametrize(
    ("rows", "columns", "lies"), [(1536, 8960, ("fsdp", None)), (8960, 1536, (None, "fsdp"))]
)
def test_gradients_of_sharded_matrices_are_scattered_and_not_added_up_everywhere(
    rows: int, columns: int, lies: tuple[str | None, ...]
) -> None:
    mesh, batch = mesh_of("v5e:4x4"), PartitionSpec(("slice", "data", "fsdp"))

    def function(x: jax.Array, y: jax.Array) -> jax.Array:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return reduce_scatter_sum(
                lambda x, y: x.reshape(-1, x.shape[-1]).T @ y.reshape(-1, y.shape[-1]),
                [x, y],
                PartitionSpec(*lies),
            )

    found = compiled(function, mesh, ((32, 256, rows), batch), ((32, 256, columns), batch))
    assert {each.kind for each in found.collectives} == {"reduce-scatter"}
    assert sum(each.bytes for each in found.collectives) == pytest.approx(
        15 / 16 * 2 * rows * columns, rel=0.06
    )


def test_what_crosses_between_slices_is_told_apart() -> None:
    mesh = mesh_of(slices=2, slice=2)
    assert dict(mesh.shape) == {"slice": 2, "data": 1, "fsdp": 4, "tensor": 1, "sequence": 1}
    assert [{device.slice_index for device in row.flat} for row in mesh.devices] == [{0}, {1}]
    split = PartitionSpec(("slice", "fsdp"))
    total = jax.shard_map(
        partial(jax.lax.psum, axis_name="slice"), mesh=mesh, in_specs=split, out_specs=PartitionSpec("fsdp")
    )
    (found,) = compiled(total, mesh, ((4096, 512), split)).collectives
    assert found.axes == ("slice",)
    # Each chip has an eighth; of two slices each sends what it has once.
    assert found.bytes == 2 * 4096 * 512 / 8
