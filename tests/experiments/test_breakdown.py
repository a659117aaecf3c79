"""The time of a step by part."""

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
        ("jit(step)/while/body/jvp()/while/body/reduce_max", "cross-entropy"),
        ("", "optimizer"),
    ],
)
def test_part_of(name, part):
    assert part in breakdown.part_of(name)


def test_a_product_without_a_name_belongs_to_attention():
    names = breakdown.names_of(
        """%fused_computation.1 (p.0: f32[3,4,5]) -> f32[3,4,4] {
  %p.0 = f32[3,4,5]{2,1,0} parameter(0)
  ROOT %dot.7 = f32[3,4,4]{2,1,0} dot(%p.0, %p.0), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}
}

%fused_computation.2 (p.1: f32[4,5]) -> f32[4,5] {
  ROOT %neg = f32[4,5]{1,0} negate(%p.1)
}

ENTRY %main.1 (a: f32[3,4,5], b: f32[4,5]) -> f32[3,4,4] {
  %fusion.5 = f32[3,4,4]{2,1,0} fusion(%a), kind=kCustom, calls=%fused_computation.1
  %fusion.6 = f32[4,5]{1,0} fusion(%b), kind=kLoop, calls=%fused_computation.2
  ROOT %exp.3 = f32[3,4,4]{2,1,0} exponential(%fusion.5), metadata={op_name="jit(step)/layers/self_attn/exp" stack_frame_id=3}
}
"""
    )
    parts = {name: breakdown.part_of(names[name]) for name in ("dot.7", "fusion.5", "fusion.6", "exp.3")}
    assert "queries" in parts["dot.7"] and "queries" in parts["fusion.5"]
    assert "optimizer" in parts["fusion.6"] and "softmax" in parts["exp.3"]


def test_threads_share_the_time_in_which_both_run():
    """A loop of 10 s on thread a. In it a from 1 to 5; on thread b, b from 3 to 9 with c inside it from 8 to 9."""
    spans = [("a", "while.1", 0, 10), ("a", "a", 1, 5), ("b", "b", 3, 9), ("b", "c", 8, 9), ("a", "last", 10, 12)]
    seconds = breakdown.exclusive_seconds([breakdown.Span(*span) for span in spans])
    assert seconds == {"while.1": 2, "a": 2 + 1, "b": 1 + 3, "c": 1, "last": 2}


def test_a_loop_gets_no_time_of_its_body(tmp_path):
    """The product in the body has most of the time."""

    @jax.jit
    def repeated(x):
        return jax.lax.fori_loop(0, 20, lambda i, y: jnp.dot(y, x) * 1e-3, x)

    x = jnp.ones((300, 300))
    names = breakdown.names_of(repeated.lower(x).compile().as_text())
    repeated(x).block_until_ready()
    with jax.profiler.trace(str(tmp_path)):
        repeated(x).block_until_ready()
    seconds = breakdown.exclusive_seconds(breakdown.spans_of(tmp_path))
    products = sum(value for name, value in seconds.items() if "dot_general" in names.get(name, ""))
    loops = sum(value for name, value in seconds.items() if name.startswith("while"))
    assert products > loops > 0
