"""A ring of Hopper GPUs, without any: every hop is a Hopper kernel, and the program lowers for CUDA."""

import jax
import jax.numpy as jnp
import pytest

from longctx import masks
from longctx.context_parallel.api import AttentionSharding, sharded_attention
from pallas_kernels import Tokens, dispatch
from pallas_kernels.testing import H100


@pytest.mark.parametrize("head_dim", [64, pytest.param(128, marks=pytest.mark.slow)])
def test_hops_of_a_ring_are_hopper_kernels(head_dim):
    mesh = jax.sharding.AbstractMesh((4,), ("context",), axis_types=(jax.sharding.AxisType.Auto,), abstract_device=H100)
    q, kv = (jax.ShapeDtypeStruct((1, 2048, n, head_dim), jnp.bfloat16) for n in (4, 2))
    ids = jax.ShapeDtypeStruct((1, 2048), jnp.int32)

    def run(q, k, v, positions, segment_ids):
        def attend(q, k, v):
            return sharded_attention(
                q,
                k,
                v,
                mask=masks.sliding_window(300) & masks.documents(),
                tokens=Tokens.self_attention(positions, segment_ids),
                sharding=AttentionSharding(sequence=("context",)),
            )

        out, vjp = jax.vjp(attend, q, k, v)
        return out, *vjp(out)

    with jax.sharding.use_abstract_mesh(mesh), dispatch.record() as taken:
        text = jax.jit(run).trace(q, kv, kv, ids, ids).lower(lowering_platforms=("cuda",)).as_text()
    assert set(taken) == {("blockwise_attention_forward", "mosaic_gpu"), ("blockwise_attention_backward", "mosaic_gpu")}
    assert "mosaic_gpu_v2" in text and "collective_permute" in text
