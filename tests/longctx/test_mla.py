"""The MLA layer and its mixer: the paper's equations, decoding by latents, prefill, meshes, costs, what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx import AttentionSharding, MeshConfig, MlaConfig, ModelConfig, TransformerLM, make_mesh, masks
from longctx.context_parallel import Layout, PrefillPlan
from longctx.context_parallel.layout import permute, unpermute
from longctx.lora import LoraConfig, add_adapters
from longctx.rotary import RotaryConfig
from pallas_kernels import Tokens
from pallas_kernels.testing import assert_close

DIM, LENGTH = 16, 24
CONFIG = MlaConfig(num_heads=4, kv_rank=10, q_rank=12, head_dim=6, rope_dim=4, value_dim=8)
WITHOUT_Q_RANK = dataclasses.replace(CONFIG, q_rank=None, window=7)


def build(config=CONFIG, **kwargs):
    """A layer of random parameters; compiling the initialisers takes seconds."""
    rng = np.random.default_rng(1)
    layer = nnx.eval_shape(lambda: config.build(DIM, rngs=nnx.Rngs(0), **kwargs))
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape) / 2, x.dtype), layer)


def inputs(batch_size=2):
    return jax.random.normal(jax.random.key(0), (batch_size, LENGTH, DIM))


def documents():
    segments = np.zeros((2, LENGTH), np.int32)
    segments[0] = np.repeat([0, 1, -1], [13, 10, 1])
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (2, 1))
    positions[0] = [*range(13), *range(10), 0]
    return {"positions": jnp.asarray(positions), "segment_ids": jnp.asarray(segments)}


def formula(layer, x, positions=None, segment_ids=None):
    """Equations 37 to 47 of DeepSeek-V2, head by head, with the whole matrix of logits.

    Differentiable in the layer and x; the norms are those of section 2.1.2.
    """

    def norm(module, c):
        return module.scale[...] * c / jnp.sqrt(jnp.mean(c * c, axis=-1, keepdims=True) + 1e-6)

    places = jnp.arange(LENGTH)[None] if positions is None else positions
    half = layer.rope_dim // 2
    frequencies = layer.rotary.theta ** (-np.arange(half, dtype=np.float32) / np.float32(half))
    angles = places[..., None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)

    def rope(x):
        a, b = x[..., :half], x[..., half:]
        return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)

    c_q = x if layer.q_latent is None else norm(layer.q_norm, x @ layer.q_latent.kernel[...])
    c_kv = norm(layer.kv_norm, x @ layer.kv_latent.kernel[...])
    k_r = rope(x @ layer.k_rope.kernel[...])
    allowed = layer.mask.dense(Tokens.self_attention(positions, segment_ids), LENGTH, LENGTH)
    u = 0.0
    for head in range(CONFIG.num_heads):
        q = c_q @ layer.q.kernel[:, head]
        q_c, q_r = q[..., : layer.head_dim], rope(q[..., layer.head_dim :])
        k_c, v_c = c_kv @ layer.k.kernel[:, head], c_kv @ layer.v.kernel[:, head]
        logits = jnp.einsum("bth,bsh->bts", q_c, k_c) + jnp.einsum("bth,bsh->bts", q_r, k_r)
        logits = jnp.where(allowed, logits / np.sqrt(layer.head_dim + layer.rope_dim), -jnp.inf)
        sees_some = allowed.any(axis=-1, keepdims=True)
        p = jnp.where(sees_some, jax.nn.softmax(jnp.where(sees_some, logits, 0.0), axis=-1), 0.0)
        u = u + jnp.einsum("bts,bsv->btv", p, v_c) @ layer.out.kernel[head]
    return u


def test_every_option_reaches_the_layer():
    config = dataclasses.replace(CONFIG, rope_theta=77.0, window=3, implementation="reference", deterministic=False)
    layer = nnx.eval_shape(
        lambda: config.build(DIM, dtype=jnp.bfloat16, param_dtype=jnp.float16, norm_eps=0.1, rngs=nnx.Rngs(0))
    )
    shapes = {name: getattr(layer, name).kernel.shape for name in ("q_latent", "q", "kv_latent", "k_rope", "k", "v")}
    assert shapes == {
        "q_latent": (DIM, 12),
        "q": (12, 4, 10),
        "kv_latent": (DIM, 10),
        "k_rope": (DIM, 4),
        "k": (10, 4, 6),
        "v": (10, 4, 8),
    }
    assert layer.out.kernel.shape == (4, 8, DIM)
    assert layer.mask == config.mask == masks.sliding_window(2) & masks.documents()
    assert layer.rotary == RotaryConfig(theta=77.0) and layer.implementation == "reference"
    assert not layer.deterministic_gradients and layer.q_norm.eps == layer.kv_norm.eps == 0.1
    assert layer.dtype == jnp.bfloat16 and {x.dtype for x in jax.tree.leaves(layer)} == {jnp.dtype("float16")}
    default = MlaConfig(num_heads=1)
    assert default.mask == masks.causal() & masks.documents()
    assert (default.kv_rank, default.head_dim, default.rope_dim, default.value_dim) == (512, 128, 64, 128)
    assert nnx.eval_shape(lambda: default.build(DIM, rngs=nnx.Rngs(0))).q.kernel.shape == (DIM, 1, 192)


@pytest.mark.parametrize(
    "config", [CONFIG, pytest.param(WITHOUT_Q_RANK, marks=pytest.mark.slow)], ids=["q_rank", "window"]
)
def test_a_layer_is_the_papers_equations(config):
    """In packed documents too; every parameter's gradient, and that of x."""
    layer, x = build(config), inputs()
    dy = jax.random.normal(jax.random.key(1), x.shape)
    graph, state = nnx.split(layer)

    @jax.jit
    def results(state, x, dy):
        def both(f):
            y, vjp = jax.vjp(lambda state, x: f(nnx.merge(graph, state), x, **documents()), state, x)
            return y, *vjp(dy)

        return both(lambda layer, x, **tokens: layer(x, **tokens)), both(formula)

    got, want = results(state, x, dy)
    for name, a, b in zip(("y", "dx"), (got[0], got[2]), (want[0], want[2]), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, err_msg=name)
    for (path, a), b in zip(jax.tree.leaves_with_path(got[1]), jax.tree.leaves(want[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-5, rtol=1e-4, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    "config", [CONFIG, pytest.param(WITHOUT_Q_RANK, marks=pytest.mark.slow)], ids=["q_rank", "window"]
)
def test_decoding_by_latents_equals_a_call(config):
    layer, x = build(config), inputs()
    want, cache, pieces = jax.jit(layer.__call__)(x), layer.init_cache(2, LENGTH), []
    assert cache.k.shape == (2, LENGTH, 1, 14) and cache.v is None
    decode = jax.jit(lambda x, cache: layer.decode(x, cache))
    for start, stop in [(0, 7), *((i, i + 1) for i in range(7, 14)), (14, LENGTH)]:
        y, cache = decode(x[:, start:stop], cache)
        pieces.append(y)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), want, atol=2e-5)
    assert np.isnan(decode(x[:, :1], cache)[0]).all()
    with pytest.raises(ValueError, match=r"decode: T=25 tokens do not fit a cache of 24; raise max_length"):
        layer.decode(jnp.zeros((2, 25, DIM)), cache)


def test_decoding_by_latents_knows_of_adapters():
    layer = build()
    add_adapters(layer, LoraConfig(rank=2, alpha=3.0), nnx.Rngs(1))
    for path, param in nnx.iter_graph(layer):
        if path and path[-1] == "lora_b":
            param[...] = jax.random.normal(jax.random.key(len(path)), param.shape)
    x = inputs()
    want = jax.jit(layer.__call__)(x)
    y, _ = jax.jit(lambda x, cache: layer.decode(x, cache))(x, layer.init_cache(len(x), LENGTH))
    np.testing.assert_allclose(y, want, atol=1e-4 * float(jnp.abs(want).max()))


def mesh_of(**shape):
    return make_mesh(MeshConfig(**shape), jax.devices()[: int(np.prod(list(shape.values())))])


MESHES = [
    ("ring", "zigzag", {"context_inner": 2, "tensor": 2}),
    ("all_gather", "striped", {"data": 2, "context_inner": 4}),
    ("ulysses", "contiguous", {"context_inner": 4}),
    ("usp", "zigzag", {"context_outer": 2, "context_inner": 2, "tensor": 2}),
    ("double_ring", "contiguous", {"context_outer": 2, "context_inner": 2}),
    ("halo", "contiguous", {"context_inner": 2}),
]


@pytest.mark.parametrize(
    ("strategy", "layout", "mesh_shape"),
    [pytest.param(*case, marks=[pytest.mark.slow] * (i > 0)) for i, case in enumerate(MESHES)],
    ids=str,
)
def test_every_strategy_equals_one_device(strategy, layout, mesh_shape):
    """Its keys and values differ in their dims."""
    config = WITHOUT_Q_RANK if strategy == "halo" else CONFIG
    x, dy, tokens = inputs(), jax.random.normal(jax.random.key(1), (2, LENGTH, DIM)), documents()
    degree = mesh_shape.get("context_inner", 1) * mesh_shape.get("context_outer", 1)
    layout = Layout(name=layout)
    order = layout.order(LENGTH, degree)
    # A halo's documents must end: here they do.
    sharding = AttentionSharding(strategy=strategy, layout=layout)
    graph, state = nnx.split(build(config))
    spread, _ = nnx.split(build(config, sharding=sharding))

    def run(graph, x, dy, tokens):
        @jax.jit
        def results(state, x, dy):
            y, vjp = jax.vjp(lambda state, x: nnx.merge(graph, state)(x, **tokens), state, x)
            return y, *vjp(dy)

        return jax.block_until_ready(results(state, x, dy))

    want = run(graph, x, dy, tokens)
    with jax.set_mesh(mesh_of(**mesh_shape)):
        got = run(spread, *(permute(a, order) for a in (x, dy)), jax.tree.map(lambda a: permute(a, order), tokens))
    for name, i in (("y", 0), ("dx", 2)):
        assert_close(name, unpermute(np.asarray(got[i]), order), want[i], "float32")
    for (path, a), b in zip(jax.tree.leaves_with_path(got[1]), jax.tree.leaves(want[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5, rtol=1e-4, err_msg=jax.tree_util.keystr(path))


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh_shape",
    [
        {"context_inner": 4},
        pytest.param({"data": 2, "context_inner": 2, "tensor": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("star_block", [None, pytest.param(3, marks=pytest.mark.slow)])
def test_prefill_and_decoding_over_a_mesh(mesh_shape, star_block):
    """A prefilled cache goes on as one that was decoded; star attention's is that of its dense mask."""
    layer, x, length = build(), inputs(), 17
    degree = mesh_shape.get("context_inner", 1)
    plan = PrefillPlan(length=length, degree=degree, star_block=star_block)
    decode = jax.jit(lambda layer, x, cache: layer.decode(x, cache))
    masked = nnx.merge(*nnx.split(layer))
    masked.mask = plan.mask(layer.mask)
    want = np.asarray(jax.jit(lambda layer, x: layer(x))(masked, x[:, :length]))
    with jax.set_mesh(mesh_of(**mesh_shape)):
        y, cache = jax.jit(lambda layer, x: layer.prefill(x, plan, LENGTH))(layer, x[:, np.maximum(plan.places, 0)])
        assert cache.k.shape[2:] == (1, 14) and cache.v is None
        for place, token in enumerate(plan.places):
            if token >= 0 and place % (len(plan.places) // degree) >= plan.anchor_len:
                np.testing.assert_allclose(y[:, place], want[:, token], atol=2e-5)
        rest, cache = jax.block_until_ready(decode(layer, x[:, length:], cache))
    if star_block is None:
        all_of_it = np.asarray(jax.jit(lambda layer, x: layer(x))(layer, x))
        np.testing.assert_allclose(rest, all_of_it[:, length:], atol=2e-5)
    assert int(cache.length) == LENGTH and np.isfinite(rest).all()


@pytest.mark.slow
def test_a_model_decodes_in_half_precision():
    config = ModelConfig(vocab_size=13, dim=DIM, num_layers=2, mlp_dim=8, mixers={"mla": CONFIG}, pattern=("mla",))
    model = jax.jit(lambda: TransformerLM(config, rngs=nnx.Rngs(0)))()
    ids = jax.random.randint(jax.random.key(0), (2, 20), 0, 13)
    logits, cache = jax.jit(TransformerLM.decode)(model, ids, model.init_cache(2, 22))
    np.testing.assert_allclose(logits, jax.jit(TransformerLM.__call__)(model, ids), atol=0.1)


@pytest.mark.parametrize("config", [CONFIG, WITHOUT_Q_RANK], ids=["q_rank", "window"])
def test_flops_count_the_allowed_pairs(config):
    lengths = np.array([5, 1, 9, 4])
    segment_ids = jnp.asarray(np.repeat(np.arange(4), lengths), jnp.int32)[None]
    positions = jnp.asarray(np.concatenate([np.arange(length) for length in lengths]), jnp.int32)[None]
    pairs = int(config.mask.dense(Tokens.self_attention(positions, segment_ids), 19, 19).sum())
    layer = nnx.eval_shape(lambda: config.build(DIM, rngs=nnx.Rngs(0)))
    matrices = sum(x.size for x in jax.tree.leaves(layer) if x.ndim > 1)
    assert config.flops_by_part(DIM, lengths) == {
        "projections": 2 * 19 * matrices,
        "attention": 2 * pairs * 4 * (6 + 4 + 8),
    }


def test_transfers_are_of_keys_and_values_of_all_heads():
    sharding = AttentionSharding(strategy="all_gather", layout=Layout(name="zigzag"))
    split = dict(rows=2, seq_len=64, heads_split=2, sharding=sharding, dtype=jnp.bfloat16)
    gathered = [t for t in CONFIG.transfers(DIM, ring_size=4, **split) if t.kind == "all-gather"]
    assert {t.num_bytes for t in gathered} == {3 * 2 * 16 * 2 * (10 + 8) * 2}
    assert CONFIG.transfers(DIM, ring_size=1, **split) == ()
    refused = dict(seq_len=64, heads_split=1, ring_size=8, sharding=AttentionSharding(strategy="ulysses"))
    assert "8" in CONFIG.refusal(DIM, **refused) and CONFIG.refusal(DIM, **refused | {"ring_size": 4}) is None


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(num_heads=0), r"num_heads: got 0, wanted a number >= 1"),
        (dict(num_heads=4, kv_rank=0), r"kv_rank: got 0, wanted a number >= 1"),
        (dict(num_heads=4, q_rank=0), r"q_rank: got 0, wanted a number >= 1"),
        (dict(num_heads=4, rope_dim=5), r"rope_dim: got 5, wanted an even number for rotary positions; use 6"),
        (dict(num_heads=4, rope_theta=1.0), r"rope_theta: got 1.0, wanted a number > 1; 10000 is customary"),
        (dict(num_heads=4, window=0), r"window: got 0, wanted null or a number of tokens >= 1"),
    ],
)
def test_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MlaConfig(**kwargs)


def test_segment_ids_that_the_mask_would_ignore_are_refused():
    layer = build()
    layer.mask = masks.causal()
    with pytest.raises(ValueError, match=r"segment_ids: passed to an MlaAttention whose mask Causal.* does not read"):
        layer(inputs(), segment_ids=documents()["segment_ids"])
