"""What the compiler is told."""

import jax

from search_r3_jax.chips import CHIPS
from search_r3_jax.compiler import compiler_options
from search_r3_jax.mesh import make_mesh


def test_a_cpu_is_told_nothing() -> None:
    assert compiler_options(None) == compiler_options(make_mesh(devices=jax.devices()[:1])) == {}


def test_every_generation_has_its_options() -> None:
    from search_r3_jax.compiler import _OF_CHIP

    assert _OF_CHIP.keys() == CHIPS.keys()
