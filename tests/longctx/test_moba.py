"""The MoBA layer and its mixer: the op between projections, decoding, its costs, and what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx import (
    Attention,
    AttentionSharding,
    MeshConfig,
    MobaAttention,
    MobaConfig,
    ModelConfig,
    TransformerLM,
    make_mesh,
    masks,
)
from longctx.context_parallel import Layout
from longctx.context_parallel.layout import permute, unpermute
from longctx.context_parallel.strategy import ShardedSchedule
from longctx.rotary import RotaryConfig
from pallas_kernels.sparse.moba_reference import chosen_pairs

DIM, LENGTH = 16, 24
CONFIG = MobaConfig(num_heads=4, num_kv_heads=2, chunk_size=4, top_k=3, implementation="reference")


def build(config=CONFIG, **kwargs):
    """A layer of random parameters; compiling the initialisers takes seconds."""
    rng = np.random.default_rng(1)
    layer = nnx.eval_shape(lambda: config.build(DIM, rngs=nnx.Rngs(0), **kwargs))
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape) / 2, x.dtype), layer)


def tokens(batch_size=2):
    return jax.random.normal(jax.random.key(0), (batch_size, LENGTH, DIM))


def documents():
    segments = np.zeros((2, LENGTH), np.int32)
    segments[0] = np.repeat([0, 1, -1], [13, 10, 1])
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (2, 1))
    positions[0] = [*range(13), *range(10), 0]
    return {"positions": jnp.asarray(positions), "segment_ids": jnp.asarray(segments)}


def test_every_option_reaches_the_layer():
    config = dataclasses.replace(CONFIG, head_dim=6, rope_theta=77.0, qk_norm=True, deterministic=False)
    layer = nnx.eval_shape(
        lambda: config.build(DIM, dtype=jnp.bfloat16, param_dtype=jnp.float16, norm_eps=0.1, rngs=nnx.Rngs(0))
    )
    assert layer.q.kernel.shape == (DIM, 4, 6) and layer.k.kernel.shape == (DIM, 2, 6)
    assert (layer.chunk_size, layer.top_k, layer.implementation) == (4, 3, "reference")
    assert layer.rotary == RotaryConfig(theta=77.0) and layer.q_norm.eps == 0.1 and not layer.deterministic_gradients
    assert layer.dtype == jnp.bfloat16 and layer.q.kernel.dtype == jnp.float16
    assert config.mask is None and (MobaConfig(num_heads=1).chunk_size, MobaConfig(num_heads=1).top_k) == (512, 4)


@pytest.mark.slow
def test_all_chunks_are_causal_attention():
    """With the parameters of Attention, by path."""
    layer = build(dataclasses.replace(CONFIG, top_k=9))
    graph, _ = nnx.split(
        nnx.eval_shape(
            lambda: Attention(
                DIM, num_heads=4, num_kv_heads=2, mask=masks.causal() & masks.documents(), rngs=nnx.Rngs(0)
            )
        )
    )
    attention = nnx.merge(graph, nnx.state(layer))
    x, where = tokens(), documents()
    got, want = (jax.jit(lambda x, f=f: f(x, **where))(x) for f in (layer, attention))
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_decoding_equals_a_call():
    """A piece that ends in the middle of a chunk, single tokens, and a piece over several chunks."""
    layer, x = build(), tokens()
    want, cache, pieces = jax.jit(layer.__call__)(x), layer.init_cache(2, LENGTH - 1), []
    assert cache.k.shape == (2, LENGTH, 2, 4) and cache.sums.shape == (2, LENGTH // 4, 2, 4)
    decode = jax.jit(lambda x, cache: layer.decode(x, cache))
    for start, stop in [(0, 7), *((i, i + 1) for i in range(7, 14)), (14, LENGTH)]:
        y, cache = decode(x[:, start:stop], cache)
        pieces.append(y)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), want, atol=2e-5)
    assert np.isnan(decode(x[:, :1], cache)[0]).all()
    with pytest.raises(ValueError, match=r"got 25 tokens for a cache with room for 24; make it with a larger max_len"):
        layer.decode(jnp.zeros((2, 25, DIM)), cache)


@pytest.mark.slow
def test_a_model_decodes_in_half_precision():
    config = ModelConfig(vocab_size=13, dim=DIM, num_layers=2, mlp_dim=8, mixers={"moba": CONFIG}, pattern=("moba",))
    model = jax.jit(lambda: TransformerLM(config, rngs=nnx.Rngs(0)))()
    ids = jax.random.randint(jax.random.key(0), (2, 10), 0, 13)
    logits, cache = jax.jit(TransformerLM.decode)(model, ids, model.init_cache(2, 12))
    np.testing.assert_allclose(logits, jax.jit(TransformerLM.__call__)(model, ids), atol=0.1)
    with pytest.raises(NotImplementedError, match=r"prefill: mixer 'moba' of kind 'moba' has none"):
        model.prefill(ids, 12)


@pytest.mark.slow
def test_over_a_mesh():
    """A call and its gradient over a ring and two heads a device, and decoding with the cache whole on both."""
    x, where, layer = tokens(), documents(), build()
    layout = Layout(name="zigzag")
    order = layout.order(LENGTH, 2)
    split = build(sharding=AttentionSharding(layout=layout))

    def loss(layer, x, where):
        return jnp.sum(jnp.sin(layer(x, **where)) * jnp.arange(DIM, dtype=jnp.float32))

    step = jax.jit(lambda layer, x, where: (layer(x, **where), jax.grad(loss)(layer, x, where)))
    want, gradients = step(layer, x, where)
    decode = jax.jit(lambda layer, x, cache: layer.decode(x, cache)[0])
    decoded = decode(layer, x, layer.init_cache(2, LENGTH))
    with jax.set_mesh(make_mesh(MeshConfig(data=2, context_inner=2, tensor=2))):
        got, split_gradients = step(split, permute(x, order), {k: permute(v, order) for k, v in where.items()})
        cache = split.init_cache(2, LENGTH)
        assert {shard.data.shape for shard in cache.k.addressable_shards} == {(1, LENGTH, 1, 4)}
        split_decoded = decode(split, x, cache)
    np.testing.assert_allclose(unpermute(np.asarray(got), order), want, atol=2e-5)
    np.testing.assert_allclose(split_decoded, decoded, atol=2e-5)
    for (path, a), b in zip(jax.tree.leaves_with_path(split_gradients), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max(), err_msg=jax.tree_util.keystr(path))


def test_flops_count_the_pairs_and_scores():
    config = dataclasses.replace(CONFIG, head_dim=6)
    lengths = np.array([5, 1, 18, 4])
    pairs = scores = 0
    for length in lengths:
        q = k = jax.random.normal(jax.random.key(0), (1, length, 1, 6))
        pairs += int(chosen_pairs(q, k, chunk_size=4, top_k=3).sum())
        scores += sum(t // 4 for t in range(length))
    assert config.flops_by_part(DIM, lengths) == {
        "projections": 2 * 28 * DIM * 6 * (4 + 2 + 2 + 4),
        "scores": 2 * scores * 4 * 6,
        "attention": 4 * pairs * 4 * 6,
    }
    assert dataclasses.replace(config, top_k=1).flops_by_part(DIM, lengths)["scores"] == 0


def split(strategy="ring", **sizes):
    return dict(seq_len=64, ring_size=4, heads_split=1, sharding=AttentionSharding(strategy=strategy)) | sizes


def test_refuses_other_strategies_at_config_time():
    assert CONFIG.refusal(DIM, **split()) is None and CONFIG.refusal(DIM, **split("ulysses", ring_size=1)) is None
    assert "got strategy=halo; choose one of those" in CONFIG.refusal(DIM, **split("halo"))
    assert "2 kv heads over 4 devices, wanted a multiple of 4" in CONFIG.refusal(DIM, **split(heads_split=4))


def test_what_is_sent():
    """Sums of 16 chunks, 2 kv heads and 4 dims in float32; keys and values of 2 heads of 4 dims, twice."""
    transfers = CONFIG.transfers(DIM, rows=3, dtype="bfloat16", **split())
    sums = [x.num_bytes for x in transfers if x.kind == "all-reduce"]
    assert sums == [2 * 3 * (3 * 16 * 2 * 4 * 4) // 4]
    hops = [(x.count, x.num_bytes) for x in transfers if x.kind == "collective-permute" and x.phase == "forward"]
    assert hops == [(3, 3 * 16 * 2 * 8 * 2)] * 2  # without a layout every hop
    near = CONFIG.transfers(
        DIM, rows=3, dtype="bfloat16", **split(sharding=AttentionSharding(layout=Layout(name="contiguous")))
    )
    hops = [x.count for x in near if x.kind == "collective-permute" and x.phase == "forward"]
    assert hops == [1, 3]  # a chunk of 4 reaches into the device before alone
    assert CONFIG.transfers(DIM, rows=3, dtype="bfloat16", **split(ring_size=1)) == ()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(chunk_size=0), r"chunk_size: got 0, wanted a number of tokens >= 1"),
        (dict(top_k=0), r"top_k: got 0, wanted a number of chunks >= 1, a token's own among them"),
        (dict(num_kv_heads=3), r"num_kv_heads: got 3, wanted a divisor of num_heads=4"),
        (dict(rope_theta=0.5), r"rope_theta: got 0.5, wanted null or a number > 1"),
    ],
)
def test_config_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **kwargs)


@pytest.mark.parametrize("kwargs", [dict(chunk_size=0), dict(top_k=0)])
def test_a_layer_refuses_the_sizes_that_the_config_does(kwargs):
    with pytest.raises(ValueError, match=r": got 0, wanted a number of (tokens|chunks) >= 1"):
        MobaAttention(DIM, num_heads=4, rngs=nnx.Rngs(0), **kwargs)


def test_a_schedule_is_refused():
    with pytest.raises(ValueError, match=r"schedule: got one, wanted None; queries of MoBA choose their keys"):
        build()(tokens(), schedule=ShardedSchedule())
