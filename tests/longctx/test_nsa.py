"""The NSA layer and its mixer: the op between projections, compression, decoding, its costs, and what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx import AttentionSharding, MeshConfig, ModelConfig, NsaAttention, NsaConfig, TransformerLM, make_mesh
from longctx.context_parallel import Layout
from longctx.context_parallel.strategy import ShardedSchedule
from longctx.rotary import RotaryConfig, apply_rotary
from pallas_kernels.sparse import NsaSizes
from pallas_kernels.sparse.nsa_reference import nsa_reference

DIM, LENGTH = 16, 40
CONFIG = NsaConfig(
    num_heads=4, num_kv_heads=2, compress_block=4, compress_stride=2, compress_dim=6, block_size=8, num_blocks=4,
    window=6, implementation="reference",
)  # fmt: skip


def build(config=CONFIG, **kwargs):
    """A layer of random parameters; compiling the initialisers takes seconds."""
    rng = np.random.default_rng(1)
    layer = nnx.eval_shape(lambda: config.build(DIM, rngs=nnx.Rngs(0), **kwargs))
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape) / 3, x.dtype), layer)


def tokens(batch_size=2):
    return jax.random.normal(jax.random.key(0), (batch_size, LENGTH, DIM))


def test_every_option_reaches_the_layer():
    config = dataclasses.replace(CONFIG, head_dim=6, rope_theta=77.0, qk_norm=True, deterministic=False)
    layer = nnx.eval_shape(
        lambda: config.build(DIM, dtype=jnp.bfloat16, param_dtype=jnp.float16, norm_eps=0.1, rngs=nnx.Rngs(0))
    )
    assert layer.q.kernel.shape == (DIM, 4, 6) and layer.gates.kernel.shape == (DIM, 4, 3)
    for name in ("k", "v", "compressed_k", "compressed_v", "sliding_k", "sliding_v"):
        assert getattr(layer, name).kernel.shape == (DIM, 2, 6)
    for compress in (layer.compress_k, layer.compress_v):
        assert compress.places.shape == (4, 6) and compress.hidden.kernel.shape == (4, 6, 6)
    assert layer.sizes == NsaSizes(compress_block=4, compress_stride=2, block_size=8, num_blocks=4, window=6)
    assert layer.rotary == RotaryConfig(theta=77.0) and layer.implementation == "reference"
    assert not layer.deterministic_gradients
    assert [x.eps for x in (layer.q_norm, layer.k_norm, layer.compressed_k_norm, layer.sliding_k_norm)] == [0.1] * 4
    assert layer.dtype == jnp.bfloat16 and {x.dtype for x in jax.tree.leaves(layer)} == {jnp.dtype("float16")}
    assert config.mask is None and NsaConfig(num_heads=1).sizes == NsaSizes()


def test_a_layer_is_its_formula():
    """Blocks of one document, compressed before they are rotated, to the position of their last token."""
    layer, x = build(), tokens()
    blocks = np.arange(0, LENGTH - 3, 2)[:, None] + np.arange(4)
    last = jnp.asarray(blocks[None, :, -1], jnp.int32)
    places = jnp.arange(LENGTH, dtype=jnp.int32)[None]

    def compress(mlp, x):
        placed = x[:, blocks] + mlp.places[...][:, None]
        hidden = jnp.einsum("bmlkh,lhf->bmkf", placed, mlp.hidden.kernel[...])
        return jax.nn.gelu(hidden) @ mlp.out.kernel[...]

    @jax.jit
    def formula(layer, x):
        def rotated(x, positions=places):
            return apply_rotary(x, positions, layer.rotary)

        compressed = (
            rotated(compress(layer.compress_k, layer.compressed_k(x)), last),
            compress(layer.compress_v, layer.compressed_v(x)),
        )
        branches = [(rotated(k(x)), v(x)) for k, v in ((layer.k, layer.v), (layer.sliding_k, layer.sliding_v))]
        gates = jax.nn.sigmoid(layer.gates(x))
        return layer.out(nsa_reference(rotated(layer.q(x)), compressed, *branches, gates, sizes=layer.sizes))

    np.testing.assert_allclose(jax.jit(layer.__call__)(x), formula(layer, x), atol=2e-5)


def test_decoding_equals_a_call():
    """A piece that ends in the middle of a block, single tokens over several blocks, and pieces that go on."""
    layer, x = build(dataclasses.replace(CONFIG, qk_norm=True)), tokens()
    want, cache, pieces = jax.jit(layer.__call__)(x), layer.init_cache(2, LENGTH), []
    assert cache.selected.shape == (2, LENGTH, 2, 8) and cache.compressed.shape == (2, 19, 2, 8)
    assert cache.window.shape == (2, 5, 2, 8) and cache.uncompressed.shape == (2, 3, 2, 8)
    decode = jax.jit(lambda x, cache: layer.decode(x, cache))
    for start, stop in [(0, 7), *((i, i + 1) for i in range(7, 19)), *((i, i + 7) for i in range(19, LENGTH, 7))]:
        y, cache = decode(x[:, start:stop], cache)
        pieces.append(y)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), want, atol=2e-5)
    assert np.isnan(decode(x[:, :1], cache)[0]).all()
    with pytest.raises(ValueError, match=r"got 41 tokens for a cache with room for 40; make it with a larger max_len"):
        layer.decode(jnp.zeros((2, 41, DIM)), cache)


@pytest.mark.slow
@pytest.mark.parametrize("change", [dict(window=1), dict(compress_stride=4), dict(compress_block=8, num_blocks=3)])
def test_decoding_with_other_sizes(change):
    layer, x = build(dataclasses.replace(CONFIG, **change)), tokens()
    cache, pieces = layer.init_cache(2, LENGTH), []
    decode = jax.jit(lambda x, cache: layer.decode(x, cache))
    for start, stop in [(0, 1), (1, 2), (2, 21), *((i, i + 1) for i in range(21, LENGTH))]:
        y, cache = decode(x[:, start:stop], cache)
        pieces.append(y)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), jax.jit(layer.__call__)(x), atol=2e-5)


@pytest.mark.slow
def test_a_model_decodes_in_half_precision():
    config = ModelConfig(vocab_size=13, dim=DIM, num_layers=2, mlp_dim=8, mixers={"nsa": CONFIG}, pattern=("nsa",))
    model = jax.jit(lambda: TransformerLM(config, rngs=nnx.Rngs(0)))()
    ids = jax.random.randint(jax.random.key(0), (2, 20), 0, 13)
    logits, cache = jax.jit(TransformerLM.decode)(model, ids, model.init_cache(2, 22))
    np.testing.assert_allclose(logits, jax.jit(TransformerLM.__call__)(model, ids), atol=0.1)
    with pytest.raises(NotImplementedError, match=r"prefill: mixer 'nsa' of kind 'nsa' has none"):
        model.prefill(ids, 12)


@pytest.mark.slow
def test_decoding_over_a_mesh():
    layer, x = build(), tokens()
    decode = jax.jit(lambda x, cache: layer.decode(x, cache)[0])
    want = decode(x, layer.init_cache(2, LENGTH))
    with jax.set_mesh(make_mesh(MeshConfig(data=2, context_inner=2, tensor=2))):
        cache = layer.init_cache(2, LENGTH)
        assert {shard.data.shape for shard in cache.selected.addressable_shards} == {(1, LENGTH, 1, 8)}
        np.testing.assert_allclose(decode(x, cache), want, atol=2e-5)


def test_flops_count_the_pairs():
    config = dataclasses.replace(CONFIG, head_dim=6)
    lengths = np.array([5, 1, 38, 4, 16])
    seen = pairs = blocks = 0
    for length in lengths:
        last = range(3, length, 2)  # of each compressed block
        blocks += len(last)
        for t in range(length):
            sees = sum(x <= t for x in last)
            selects = range(max(0, t // 8 - 3), t // 8 + 1)  # as many as of any others
            seen, pairs = seen + sees, pairs + sees + min(t + 1, 6)
            pairs += sum(min(8, t + 1 - 8 * block) for block in selects)
    assert config.flops_by_part(DIM, lengths) == {
        "projections": 2 * 64 * DIM * 6 * (4 + 6 * 2 + 4),
        "gates": 2 * 64 * DIM * 3 * 4,
        "compression": 2 * blocks * 2 * 2 * (4 * 6 * 6 + 6 * 6),
        "scores": 2 * seen * 4 * 6,
        "attention": 4 * pairs * 4 * 6,
    }


def split(strategy="all_gather", **sizes):
    return dict(seq_len=64, ring_size=4, heads_split=1, sharding=AttentionSharding(strategy=strategy)) | sizes


def test_refuses_at_config_time():
    assert CONFIG.refusal(DIM, **split()) is None and CONFIG.refusal(DIM, **split("ulysses", ring_size=1)) is None
    assert "halo must know which tokens a device holds" in CONFIG.refusal(DIM, **split("halo"))
    assert "2 kv heads over 4 devices, wanted a multiple of 4" in CONFIG.refusal(DIM, **split(heads_split=4))


def test_what_is_sent():
    """Of 2 kv heads, keys and values of 4 dims: of 64 tokens, and of 31 blocks, rounded up to 32."""
    halo = AttentionSharding(window_strategy="halo", layout=Layout(name="contiguous"))
    transfers = CONFIG.transfers(DIM, rows=3, dtype="bfloat16", **split(sharding=halo))
    of_token = 3 * 3 * 2 * 8
    gathers = [(x.count, x.num_bytes) for x in transfers if x.kind == "all-gather" and x.phase == "forward"]
    of_keys = [(1, 16 * of_token * 2)] * 2 + [(1, 8 * of_token * 2)]
    assert gathers == [(2, 3 * 3 * 16 * 4), (1, 3 * 3 * 16 * 4), *of_keys]
    scatters = [(x.count, x.num_bytes) for x in transfers if x.kind == "reduce-scatter"]
    assert scatters == [(2, 16 * of_token * 4), (1, 8 * of_token * 4)]
    assert [x.num_bytes for x in transfers if x.kind == "collective-permute"][0] == 3 * 5 * 2 * 8 * 2
    assert CONFIG.transfers(DIM, rows=3, dtype="bfloat16", **split(ring_size=1)) == ()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(compress_stride=3), r"compress_block: got 4, wanted a multiple of compress_stride=3"),
        (dict(num_blocks=2), r"num_blocks: got 2, wanted a number of blocks >= 3"),
        (dict(compress_dim=0), r"compress_dim: got 0, wanted null or a number >= 1"),
        (dict(num_kv_heads=3), r"num_kv_heads: got 3, wanted a divisor of num_heads=4"),
    ],
)
def test_config_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **kwargs)


def test_a_layer_refuses_the_sizes_that_the_config_does():
    with pytest.raises(ValueError, match=r"compress_dim: got 0, wanted a number >= 1"):
        NsaAttention(DIM, num_heads=4, compress_dim=0, rngs=nnx.Rngs(0))


def test_a_schedule_is_refused():
    with pytest.raises(ValueError, match=r"schedule: got one, wanted None; queries of NSA choose their keys"):
        build()(tokens(), schedule=ShardedSchedule())
