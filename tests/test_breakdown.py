"""A step's time, put down to its parts."""

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarks import breakdown


@pytest.mark.parametrize(
    "name, part",
    [
        ("jit(step)/while/body/jvp(Decoder)/while/body/closed_call/layers/attention/sqkrc,sukc->skrqu/dot_general", "queries"),
        ("jit(step)/while/body/jvp(Decoder)/while/body/closed_call/layers/self_attn/q_proj/dot_general", "with weights"),
        ("jit(step)/while/body/transpose(jvp(Decoder))/while/body/closed_call/layers/mlp/down_proj/dot_general", "with weights"),
        ("jit(step)/while/body/jvp(Decoder)/while/body/closed_call/layers/attention/jit(_where)/select_n", "softmax"),
        ("jit(step)/while/body/jvp(Decoder)/while/body/closed_call/layers/mlp/tanh", "activations"),
        ("jit(step)/while/body/jvp()/while/body/jit(log_softmax)/reduce_max", "cross-entropy"),
        ("", "optimizer"),
    ],
)
def test_part_of(name, part):
    assert part in breakdown.part_of(name)


def test_a_loop_has_none_of_the_time_of_its_body(tmp_path):
    """Own times of all operations add up to no more than the loop as a whole; the product in its body has most of it."""

    @jax.jit
    def repeated(x):
        return jax.lax.fori_loop(0, 20, lambda i, y: jnp.dot(y, x) * 1e-3, x)

    x = jnp.ones((300, 300))
    names = {
        found[1]: found[2]
        for found in map(breakdown.INSTRUCTION.match, repeated.lower(x).compile().as_text().splitlines())
        if found
    }
    repeated(x).block_until_ready()
    with jax.profiler.trace(str(tmp_path)):
        repeated(x).block_until_ready()
    seconds = breakdown.own_seconds(tmp_path)
    products = sum(value for name, value in seconds.items() if "dot_general" in names.get(name, ""))
    loops = sum(value for name, value in seconds.items() if name.startswith("while"))
    assert all(value > -1e-4 for value in seconds.values()) and any(name.startswith("while") for name in seconds)
    assert products > loops
