"""Learned sinks beside their numbers, which the conformance suite compares: what they start, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    SoftmaxCarry,
    blockwise_attention,
    blockwise_attention_forward,
    dispatch,
    sinks_gradient,
)
from pallas_kernels.mask import Causal
from pallas_kernels.testing import tracing_for

A100 = jax.sharding.AbstractDevice(device_kind="NVIDIA A100-SXM4-80GB", num_cores=108, platform="cuda")


def inputs(dtype="float32", head_dim=8):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((2, 16, 4, head_dim), (2, 16, 2, head_dim), (2, 16, 2, head_dim), (2, 16, 4, head_dim))
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def test_a_carry_of_sinks_alone_merges_as_one_with_zeros_for_values():
    q, k, v, _ = inputs()
    keys = blockwise_attention_forward(q, k, v, mask=Causal(offset=-4), return_carry=True)
    bare = SoftmaxCarry.of_sinks(jnp.array([1.0, 0.0, -2.0, -jnp.inf]), batch_size=2, q_len=16)
    whole = bare.whole(v.shape[3])
    for merged, want in ((bare.merge(keys), whole.merge(keys)), (keys.merge(bare), keys.merge(whole))):
        jax.tree.map(np.testing.assert_array_equal, merged, want)
    assert bare.merge(bare).acc is None


@pytest.mark.parametrize("offset", [0, -4], ids=["causal", "empty_rows"])
def test_sinks_of_minus_infinity_are_none(offset):
    q, k, v, dout = inputs()

    def results(sinks):
        def attend(*operands):
            return blockwise_attention(*operands[:3], mask=Causal(offset), sinks=(*operands, None)[3], return_lse=True)

        operands = (q, k, v) if sinks is None else (q, k, v, sinks)
        results, vjp = jax.vjp(attend, *operands)
        return *results, *vjp((dout, jnp.ones_like(results[1])))

    *got, dsinks = jax.jit(results)(jnp.full(4, -jnp.inf))
    for x, y in zip(got, jax.jit(results)(None), strict=True):
        np.testing.assert_array_equal(x, y)
    np.testing.assert_array_equal(dsinks, 0)


def test_a_large_sink_takes_everything():
    q, k, v, _ = inputs()
    attend = jax.jit(functools.partial(blockwise_attention_forward, mask=Causal()))
    out, lse = attend(q, k, v, sinks=jnp.full(4, 1e4))
    np.testing.assert_array_equal(out, 0)
    np.testing.assert_array_equal(lse, 1e4)


def test_dsinks_have_the_dtype_of_the_sinks_and_are_computed_in_float32():
    q, k, v, dout = inputs("bfloat16")
    sinks = jnp.linspace(-1, 1, 4).astype(jnp.bfloat16)

    @jax.jit
    def both(sinks):
        out, vjp = jax.vjp(lambda sinks: blockwise_attention(q, k, v, mask=Causal(), sinks=sinks), sinks)
        _, lse = blockwise_attention_forward(q, k, v, mask=Causal(), sinks=sinks)
        return *vjp(dout), sinks_gradient(sinks, out, lse, dout, None)

    dsinks, want = both(sinks)
    assert dsinks.dtype == jnp.bfloat16 and want.dtype == jnp.float32
    np.testing.assert_array_equal(dsinks, want.astype(jnp.bfloat16))


def test_sinks_and_a_carry_are_refused():
    q, k, v, _ = inputs()
    carry = SoftmaxCarry.empty(batch_size=2, q_len=16, num_heads=4, value_dim=8)
    with pytest.raises(ValueError, match="got both sinks and carry, wanted at most one: .* with the first keys only"):
        blockwise_attention_forward(q, k, v, mask=Causal(), sinks=jnp.zeros(4), carry=carry)


@pytest.mark.parametrize("op", [blockwise_attention, blockwise_attention_forward])
@pytest.mark.parametrize("sinks", [jnp.zeros(2), jnp.zeros((4, 1)), jnp.zeros(4, jnp.int32)], ids=str)
def test_sinks_of_another_form_are_refused(op, sinks):
    q, k, v, _ = inputs()
    with pytest.raises(ValueError, match=r"sinks is .*, wanted floats of shape \[4\], one for each query head"):
        getattr(op, "__wrapped__", op)(q, k, v, mask=Causal(), sinks=sinks)


def test_where_cudnn_refuses_a_carry_another_takes_the_sinks():
    q = jax.ShapeDtypeStruct((2, 128, 4, 64), jnp.bfloat16)

    def attend(q, sinks=None):
        return blockwise_attention(q, q, q, mask=Causal(), sinks=sinks)

    with tracing_for(A100), dispatch.record() as taken:
        jax.eval_shape(attend, q)
        jax.eval_shape(attend, q, jax.ShapeDtypeStruct((4,), jnp.float32))
    assert [name for _, name in taken] == ["cudnn", "xla"]
