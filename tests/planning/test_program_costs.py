"""Counted products, least times and collectives against numbers by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas

from bilevel_jax.planning import program_costs
from bilevel_jax.planning.program_costs import Collective, Cost

IN_LAYER = 'metadata={op_name="jit(f)/while/body/a/while/body/dot"}'
HLO = f"""
HloModule jit_step, is_scheduled=true
%fused (p: bf16[8,64]) -> bf16[16,64] {{
  %all-gather.2 = bf16[16,64]{{1,0:T(8,128)(2,1)}} all-gather(%p), channel_id=3, dimensions={{0}}, {IN_LAYER}
}}
%clone (p: bf16[8,64]) -> bf16[16,64] {{
  %all-gather.3 = bf16[16,64]{{1,0:T(8,128)(2,1)S(1)}} all-gather(%p), channel_id=3, dimensions={{0}}, {IN_LAYER}
}}
ENTRY %main {{
  %all-reduce.1 = (f32[4]{{0}}, f32[2,3]{{1,0}}) all-reduce(%x, %y), channel_id=1, to_apply=%add, metadata={{op_name="jit(f)/sum"}}
  %ag = (f32[8]{{0}}, f32[32]{{0}}) all-gather-start(%x), channel_id=2, metadata={{op_name="jit(f)/while/body/b"}}
  %ag.done = f32[32]{{0}} all-gather-done(%ag)
  %ar = f32[5]{{0}} all-reduce-start(%x), channel_id=4, to_apply=%add
  %permuted = pred[7]{{0}} collective-permute(%z), source_target_pairs={{{{0,1}}}}
  %unlike = f32[9]{{0}} fusion(%all-reduce.1), kind=kLoop, calls=%fused
}}
"""


def test_collectives():
    assert program_costs.parse_collectives(HLO) == [
        Collective("all-gather", 1, 1, 32 * 4),
        Collective("all-gather", 2, 1, 16 * 64 * 2),  # two pieces of one channel
        Collective("all-reduce", 0, 2, (4 + 6 + 5) * 4),
        Collective("collective-permute", 0, 1, 7),
    ]


def test_array_bytes():
    assert program_costs.array_bytes("(f32[2,3]{1,0}, bf16[], s8[5], pred[4], f8e4m3fn[3], c64[1], token[])") == [24, 2, 5, 4, 3, 8]


def counted(function, *arguments):
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    return program_costs.products(jaxpr), program_costs.products(jaxpr, unroll=False)


def test_products_of_a_scan():
    """Seven turns of [3, 4] x [4, 5]: 2·3·4·5 FLOPs and 12 + 20 + 15 numbers of 4 bytes each."""
    x, w = jnp.ones((3, 4)), jnp.ones((7, 4, 5))

    def turn(carry, w):
        return carry, jnp.tanh(x @ w)

    assert counted(lambda w: jax.lax.scan(turn, 0, w), w) == (Cost(7 * 120, 7 * 188), Cost(120, 188))


def test_products_of_loops_of_unknown_length_and_of_branches():
    """A `while` counts once, and of two branches the larger one."""
    x = jnp.ones((2, 4, 4), jnp.bfloat16)
    batched = jax.jit(lambda x: jnp.einsum("bij,bjk->bik", x, x))  # 2·2·4·4·4 FLOPs, three arrays of 64 bytes

    def looped(x, n):
        return jax.lax.fori_loop(0, n, lambda _, x: jax.lax.cond(n > 3, batched, lambda x: x, x), x)

    assert counted(looped, x, 5) == (Cost(256, 192), Cost(256, 192))


def test_cost_of_a_device():
    """XLA's counts, times what the loop adds; without XLA, the products shared by the devices."""
    jaxpr = jax.make_jaxpr(lambda w: jax.lax.scan(lambda c, w: (c, w @ w), 0, w))(jnp.ones((6, 2, 2))).jaxpr
    assert program_costs.of_device({"flops": 100.0, "bytes accessed": 10.0}, jaxpr, 4) == (Cost(600, 60), True)
    cost, is_counted = program_costs.of_device(None, jaxpr, 4)
    assert cost.flops == 6 * 16 / 4 and cost.bytes != cost.bytes and not is_counted


def test_products_agree_with_xla():
    """XLA's own count of a program of one product."""
    arguments = jnp.ones((64, 32)), jnp.ones((32, 16))
    xla = jax.jit(jnp.matmul).lower(*arguments).compile().cost_analysis()
    assert counted(jnp.matmul, *arguments)[0] == Cost(xla["flops"], xla["bytes accessed"])


def test_products_of_a_kernel():
    """Six blocks of [8, 16] x [16, 128], counted apart from the product outside, which XLA counts; twice in a scan of two."""
    grid = {
        "grid": (2, 3),
        "in_specs": [pallas.BlockSpec((8, 16), lambda i, j: (i, 0)), pallas.BlockSpec((16, 128), lambda i, j: (0, j))],
    }

    def kernel(x, w, out):
        out[...] = jnp.dot(x[...], w[...])

    def multiply(x, w):
        out = jax.ShapeDtypeStruct((16, 384), jnp.float32)
        return pallas.pallas_call(kernel, out, out_specs=pallas.BlockSpec((8, 128), lambda i, j: (i, j)), **grid)(x, w)

    def twice(x, w):
        return jax.lax.scan(lambda c, _: (c, multiply(x @ x.T @ x, w)), 0, None, length=2)

    jaxpr = jax.make_jaxpr(twice)(jnp.ones((16, 16)), jnp.ones((16, 384))).jaxpr
    assert program_costs.products(jaxpr).flops == 2 * 2 * (2 * 16**3)
    assert program_costs.kernel_flops(jaxpr) == 2 * (2 * 16 * 16 * 384)
    assert program_costs.of_device({"flops": 100.0, "bytes accessed": 10.0}, jaxpr, 4)[0].flops == 200 + 2 * 2 * 16 * 16 * 384 / 4


def test_least_time():
    """1.97e12 FLOP at 197e12 a second, and 8.19e9 bytes at 819e9."""
    assert program_costs.least_seconds(Cost(1.97e12, 8.19e9), 197e12, 819e9) == pytest.approx((0.01, 0.01))
