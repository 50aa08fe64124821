"""Seconds of compiling are counted once, and told to who waits for them."""

import jax
import jax.numpy as jnp

from search_r3_jax.compile_time import _Compiling, announce_compiling, compile_seconds


def test_what_is_traced_within_another_is_counted_once() -> None:
    compiling = _Compiling()
    for start, seconds in ((0.0, 1.0), (3.0, 1.0), (4.5, 0.5), (2.0, 4.0), (7.0, 2.0)):
        compiling.add(start, seconds)
    # 0 to 1, 2 to 6 with two others in it, 7 to 9.
    assert compiling.seconds == 7.0


def test_a_program_takes_time_when_it_is_new(log_lines: list[str]) -> None:
    compile_seconds()
    double = jax.jit(lambda x: jnp.sin(x) * 2)
    with announce_compiling("the step"):
        double(jnp.ones(3)).block_until_ready()
    after = compile_seconds()
    with announce_compiling("the step", when=False):
        double(jnp.ones(3)).block_until_ready()
    assert after > 0
    assert compile_seconds() == after
    first, second = log_lines
    assert first == "compiling the step …"
    assert second.startswith("compiled the step in ")
    assert second.endswith(" s")
