"""Hopper GPUs that share a sequence, without any: what they run are Hopper kernels, and programs lower for CUDA."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from longctx import (
    AttentionConfig,
    GatedDeltaConfig,
    GlaConfig,
    LightningConfig,
    MlaConfig,
    MobaConfig,
    ModelConfig,
    NsaConfig,
    TransformerLM,
    cross_entropy,
    masks,
)
from longctx.context_parallel.api import AttentionSharding, sharded_attention
from longctx.sharding import MeshConfig
from pallas_kernels import Tokens, dispatch
from pallas_kernels.testing import H100

MIXERS = {
    "attention": AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=64),
    "mla": MlaConfig(num_heads=4, kv_rank=64, head_dim=128, rope_dim=64, value_dim=128),
    "moba": MobaConfig(num_heads=4, num_kv_heads=2, head_dim=64, chunk_size=256, top_k=2),
    "nsa": NsaConfig(num_heads=4, num_kv_heads=2, head_dim=64),
    "lightning": LightningConfig(num_heads=4, head_dim=64),
    "gla": GlaConfig(num_heads=4, head_dim=64),
    "gated_delta": GatedDeltaConfig(num_heads=4, head_dim=64),
}


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


@pytest.mark.parametrize(
    "kind", [pytest.param(x, marks=() if x in ("attention", "nsa") else pytest.mark.slow) for x in MIXERS]
)
def test_a_loop_over_layers_is_differentiated(kind):
    """Where each layer's attention is within shard_map, and the loop is split in what gradients need and what not."""
    config = ModelConfig(
        vocab_size=64, dim=256, mlp_dim=256, num_layers=4, mixers={"only": MIXERS[kind]}, pattern=("only",),
        dtype="bfloat16", remat="none",
    )  # fmt: skip
    sizes = MeshConfig(context_inner=4).sizes(4)
    kinds = (jax.sharding.AxisType.Auto,) * len(sizes)
    mesh = jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds, abstract_device=H100)

    def loss(model, tokens, segment_ids):
        return cross_entropy(model(tokens, segment_ids=segment_ids), tokens, jnp.ones(tokens.shape)).loss_sum

    with jax.sharding.use_abstract_mesh(mesh), dispatch.record() as taken:
        model = nnx.eval_shape(lambda: TransformerLM(config, sharding=AttentionSharding(), rngs=nnx.Rngs(0)))
        ids = jax.ShapeDtypeStruct((1, 2048), jnp.int32)
        jax.jit(jax.grad(loss)).trace(model, ids, ids).lower(lowering_platforms=("cuda",))
    assert {implementation for _, implementation in taken} == {"mosaic_gpu"}
    assert any("backward" in op for op, _ in taken)
