"""The mixers of a recurrent state against their formulas in quadratic form; documents, decoding, prefill, meshes."""

import copy
import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx import (
    AttentionConfig,
    BiasConfig,
    Block,
    DeltaConfig,
    DeltaNet,
    GatedDeltaConfig,
    GatedLinearAttention,
    GlaConfig,
    LightningConfig,
    LinearAttention,
    LinearConfig,
    Mamba2,
    Mamba2Config,
    MeshConfig,
    ModelConfig,
    ReglaConfig,
    RetentionConfig,
    TransformerLM,
    make_mesh,
)
from longctx.context_parallel import AttentionSharding, Layout, PrefillPlan, state_passing
from longctx.feature_maps import Pointwise
from longctx.linear_attention import StateShape
from longctx.mixers.recurrent import RecurrentConfig
from longctx.mixers.registry import MixerConfig
from longctx.norms import SimpleRMSNorm
from longctx.rotary import RotaryConfig, apply_rotary

DIM, LENGTH = 16, 70  # more than one chunk of 64
CONFIGS = {
    "linear": LinearConfig(num_heads=4, num_qk_heads=2, gate="sigmoid"),
    "identity": LinearConfig(num_heads=2, head_dim=6, value_dim=5, feature_map="identity"),
    "cosine": LinearConfig(num_heads=2, feature_map="cosine", horizon=80),
    "taylor2": LinearConfig(num_heads=2, head_dim=3, feature_map="taylor2"),
    "retention": RetentionConfig(num_heads=2, head_dim=6, value_dim=5),
    "lightning": LightningConfig(num_heads=4, num_qk_heads=2),
    "lrpe": LightningConfig(num_heads=2, slopes="linear", lrpe=True, gate="identity", head_dim=4),
    "mamba2": Mamba2Config(num_heads=4, num_groups=2, state_dim=6, head_dim=5),
    "mamba2_conv": Mamba2Config(num_heads=4, num_groups=2, state_dim=6, head_dim=5, conv_size=3),
    "gla": GlaConfig(num_heads=2, value_dim=6, gate_rank=3, gate_temperature=4.0),
    "gla_conv": GlaConfig(num_heads=2, head_dim=3, gate_rank=3, conv_size=2),
    "regla": ReglaConfig(num_heads=2, gate_rank=3),
    "delta": DeltaConfig(num_heads=4, num_qk_heads=2, head_dim=6, value_dim=5),
    "dpfp": DeltaConfig(num_heads=2, feature_map="dpfp", dpfp_order=2, feature_norm="sum", conv_size=None, gate=True),
    "gated_delta": GatedDeltaConfig(num_heads=4, num_qk_heads=2, head_dim=6, value_dim=5, conv_size=3),
}


def some_slow(*quick):
    """Every mixer, of which CI runs these."""
    params = [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in CONFIGS]
    return pytest.mark.parametrize("name", params)


DEPTH = 0.25


def depth_of(name):
    return {"depth": jnp.float32(DEPTH)} if CONFIGS[name].uses_depth else {}


def abstract(config, **kwargs):
    return nnx.eval_shape(lambda: config.build(DIM, rngs=nnx.Rngs(0), **kwargs))


def build(config):
    """A layer whose every parameter is random, so that gains and skips of 1 hide nothing."""
    return random_like(abstract(config), 0.3)


def random_like(abstract, deviation):
    """Values of numpy's: compiling the initialisers takes seconds."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(deviation * rng.standard_normal(x.shape), x.dtype), abstract)


def documents():
    """One row of three documents and padding, the other of one that fills it; positions restart."""
    segments = np.zeros((2, LENGTH), np.int32)
    segments[0] = np.repeat([0, 1, 2, -1], [30, 1, 35, 4])
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (2, 1))
    positions[0] = np.concatenate([np.arange(length) for length in (30, 1, 35, 4)])
    return jnp.asarray(positions), jnp.asarray(segments)


def tokens(seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((2, LENGTH, DIM)), jnp.float32)


def sum_over_past(q, k, v, log_decay, segment_ids, *, scale, normalize=False):
    """sum_s scale q[t]^T k[s] exp(sum of log decays in (s, t]) v[s] over the tokens s <= t of t's document."""
    group = v.shape[2] // q.shape[2]
    q, k = (jnp.repeat(x, group, axis=2) for x in (q, k))
    sums = jnp.cumsum(jnp.broadcast_to(log_decay, v.shape[:3]), axis=1)
    index = jnp.arange(v.shape[1])
    seen = (segment_ids[:, :, None] == segment_ids[:, None, :]) & (segment_ids >= 0)[:, :, None]
    seen = (seen & (index[:, None] >= index[None, :]))[..., None]
    apart = jnp.where(seen, sums[:, :, None] - sums[:, None, :], 0.0)
    weights = jnp.where(seen, scale * jnp.einsum("btnh,bsnh->btsn", q, k) * jnp.exp(apart), 0.0)
    out = jnp.einsum("btsn,bsnv->btnv", weights, v)
    total = weights.sum(axis=2)[..., None]
    return jnp.where(total == 0, 0.0, out / jnp.where(total == 0, 1.0, total)) if normalize else out


def token_by_token(q, k, v, log_decay, beta, segment_ids, *, scale):
    """The state of each document from its first token on; log_decay `[B, T, N, H]`, beta None to add."""
    q, k = (jnp.repeat(x, v.shape[2] // x.shape[2], axis=2) for x in (q, k))
    same = segment_ids[:, 1:] == segment_ids[:, :-1]
    begins = jnp.concatenate([jnp.ones_like(same[:, :1]), ~same], axis=1)

    def step(state, token):
        q, k, v, log_decay, beta, begins = token
        state = jnp.exp(log_decay)[..., None] * jnp.where(begins[:, None, None, None], 0.0, state)
        written = v if beta is None else beta[..., None] * (v - jnp.einsum("bnhv,bnh->bnv", state, k))
        state = state + jnp.einsum("bnh,bnv->bnhv", k, written)
        return state, scale * jnp.einsum("bnhv,bnh->bnv", state, q)

    log_decay = jnp.broadcast_to(log_decay, k.shape)
    along = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q, k, v, log_decay, beta, begins))
    first = jnp.zeros((q.shape[0], *k.shape[2:], v.shape[3]))
    return jnp.moveaxis(jax.lax.scan(step, first, along)[1], 0, 1)


def convolution(x, taps, segment_ids):
    """sum_s taps[W - 1 - (t - s)] x[s] over the last W tokens s <= t of t's document."""
    index, width = jnp.arange(x.shape[1]), len(taps)
    apart = index[:, None] - index[None, :]
    seen = (segment_ids[:, :, None] == segment_ids[:, None, :]) & (apart >= 0) & (apart < width)
    weights = jnp.where(seen[..., None, None], taps[jnp.clip(width - 1 - apart, 0, width - 1)], 0.0)
    return jnp.einsum("btsnh,bsnh->btnh", weights, x)


def step_decay(decay, x):
    dt = jnp.logaddexp(x @ decay.dt.kernel[...] + decay.dt_bias[...], 0.0)
    return dt, -jnp.exp(decay.a_log[...]) * dt


def gate(low_rank, x):
    logit = jnp.einsum("btr,rnh->btnh", x @ low_rank.down.kernel[...], low_rank.up.kernel[...])
    return 1 / (1 + jnp.exp(-logit - low_rank.bias[...]))


def rms(x, axes):
    return x / jnp.sqrt(jnp.mean(x**2, axis=axes, keepdims=True) + 1e-6)


def silu(x):
    return x / (1 + jnp.exp(-x))


def formula(name, layer, x, positions, segment_ids):
    """What the layer of that name is to compute, written out."""

    def project(linear):
        return jnp.einsum("btd,dnh->btnh", x, linear.kernel[...])

    def out(o, last=None):
        return jnp.einsum("btnv,nvd->btd", o, (last or layer.out).kernel[...])

    def attend(q, k, v, log_decay=0.0, **kwargs):
        return sum_over_past(q, k, v, log_decay, segment_ids, **kwargs)

    time = positions[:, :, None, None].astype(jnp.float32)
    if hasattr(layer, "qkv"):
        q, k, v = (project(linear) for linear in (layer.qkv.q, layer.qkv.k, layer.qkv.v))
        if layer.qkv.q_conv is not None:
            convs = layer.qkv.q_conv, layer.qkv.k_conv, layer.qkv.v_conv
            q, k, v = (silu(convolution(a, c.taps[...], segment_ids)) for a, c in zip((q, k, v), convs, strict=True))
    if name.startswith("mamba2"):
        c, b, u, z = q, k, v, project(layer.z)
        dt, decay = step_decay(layer.decay, x)
        o = attend(c, b, dt[..., None] * u, decay, scale=1.0)
        o = (o + layer.skip[...][:, None] * u) * silu(z)
        return out(rms(o, (-2, -1)) * layer.norm.scale[...].reshape(o.shape[2:]))
    if hasattr(layer, "qkv"):
        log_decay, beta, scale = jnp.zeros(()), None, 1.0
        if name.startswith("gla"):
            log_decay, scale = jnp.log(gate(layer.decay, x)) / {"gla": 4.0, "gla_conv": 16.0}[name], q.shape[3] ** -0.5
        elif name == "regla":
            q, k = (jnp.exp(a - a.max(axis=3, keepdims=True)) for a in (q, k))
            g, r = gate(layer.decay, x), gate(layer.refinement, x)
            log_decay, scale = jnp.log((1 - r) * g**2 + r * (1 - (1 - g) ** 2)), (4 * (np.e**4 - np.e**2)) ** -0.5
        else:
            beta = 1 / (1 + jnp.exp(-x @ layer.beta.kernel[...]))
            if name == "dpfp":

                def features(a):
                    r = jnp.maximum(jnp.concatenate([a, -a], axis=3), 0)
                    products = jnp.stack([r[..., j] * r[..., j - i] for i in (1, 2) for j in range(16)], axis=3)
                    return products / (products.sum(axis=3, keepdims=True) + 1e-6)

                q, k = features(q), features(k)
            else:
                q, k = (a / jnp.sqrt((a**2).sum(axis=3, keepdims=True) + 1e-6) for a in (q, k))
            if name == "gated_delta":
                log_decay = step_decay(layer.decay, x)[1][..., None]
        o = token_by_token(q, k, v, log_decay, beta, segment_ids, scale=scale)
        o = rms(o, (-1,)) * layer.output.norm.scale[...]
        return out(o if name == "delta" else o * silu(project(layer.output.gate)), layer.output.out)
    q, k, v = project(layer.q), project(layer.k), project(layer.v)
    if name == "linear":
        q, k = (jnp.where(a < 0, jnp.exp(jnp.minimum(a, 0.0)), a + 1) for a in (q, k))
        return out(attend(q, k, v, scale=1.0, normalize=True) / (1 + jnp.exp(-project(layer.gate))))
    if name == "identity":
        return out(rms(attend(q, k, v, scale=6**-0.5), (-2, -1)))
    if name == "cosine":
        q, k = jnp.maximum(q, 0), jnp.maximum(k, 0)
        angle = np.pi / 2 * time / 80
        q, k = (jnp.concatenate([a * jnp.cos(angle), a * jnp.sin(angle)], axis=3) for a in (q, k))
        return out(attend(q, k, v, scale=1.0, normalize=True))
    if name == "taylor2":

        def features(a):
            a = a / 3**0.25
            pairs = [a[..., i] * a[..., j] / 2**0.5 for i in range(3) for j in range(3)]
            return jnp.stack([jnp.ones_like(a[..., 0]), *(a[..., i] for i in range(3)), *pairs], axis=3)

        return out(attend(features(q), features(k), v, scale=1.0, normalize=True))
    if name == "retention":
        q, k = (apply_rotary(a, positions, RotaryConfig()) for a in (q, k))
        o = attend(q, k, v, jnp.log(1 - 2.0 ** (-5 - jnp.arange(2.0))), scale=6**-0.5)
        o = o - o.mean(axis=3, keepdims=True)
        return out(silu(project(layer.gate)) * rms(o, (-1,)))
    q, k = silu(q), silu(k)
    if name == "lrpe":
        angle = time * layer.lrpe.theta[...]
        q, k = (jnp.concatenate([a * jnp.cos(angle), a * jnp.sin(angle)], axis=3) for a in (q, k))
        o = attend(q, k, v, -8 * jnp.arange(2.0) / 2 * (1 - DEPTH), scale=4**-0.5)
        return out(project(layer.gate) * rms(o, (-2, -1)))
    o = attend(q, k, v, -(2.0 ** (-8 * jnp.arange(1.0, 5.0) / 4)) * (1 - DEPTH), scale=4**-0.5)
    return out(rms(o, (-2, -1)) / (1 + jnp.exp(-project(layer.gate))))


@some_slow("lightning", "mamba2", "gated_delta")
def test_each_mixer_and_its_gradients_are_those_of_the_quadratic_form(name):
    """In packed documents; then one document is changed, and the others must not notice."""
    layer, x, (positions, segment_ids) = build(CONFIGS[name]), tokens(), documents()
    real = (segment_ids >= 0)[..., None]
    dy = jnp.where(real, tokens(seed=2), 0.0)

    def with_gradients(function):
        @jax.jit
        def run(layer, x):
            y, vjp = jax.vjp(function, layer, x)
            return y, vjp(dy)

        return run

    run = with_gradients(lambda layer, x: layer(x, positions=positions, segment_ids=segment_ids, **depth_of(name)))
    wanted = with_gradients(lambda layer, x: formula(name, layer, x, positions, segment_ids))(layer, x)
    got = run(layer, x)
    np.testing.assert_allclose(jnp.where(real, got[0], 0), jnp.where(real, wanted[0], 0), atol=2e-5, rtol=2e-4)
    np.testing.assert_array_equal(jnp.where(real, 0, got[0]), 0)
    for (path, g), w in zip(jax.tree.leaves_with_path(got[1]), jax.tree.leaves(wanted[1]), strict=True):
        size = float(jnp.max(jnp.abs(w)))
        assert size > 0, path
        np.testing.assert_allclose(g, w, atol=3e-5 * max(size, 1.0), rtol=1e-3, err_msg=str(path))

    changed = jnp.where((segment_ids == 1)[..., None] | ~real, x + 3.0, x)
    other, _ = run(layer, changed)
    same = np.asarray((segment_ids != 1) & (segment_ids >= 0))
    # To rounding: log decays are summed along a chunk, over what documents it holds.
    np.testing.assert_allclose(other[same], got[0][same], atol=1e-5)
    assert not np.allclose(other[0, 30], got[0][0, 30])


@some_slow("mamba2", "gated_delta")
def test_decoding_equals_one_call(name):
    """By one piece longer than a chunk, by single steps and by a short piece."""
    layer, x, depth = build(CONFIGS[name]), tokens(), depth_of(name)
    whole = jax.jit(lambda layer, x: layer(x, **depth))(layer, x)
    decode = jax.jit(lambda layer, x, cache: layer.decode(x, cache, **depth))
    cache, pieces = layer.init_cache(2, LENGTH), []
    assert cache.state.dtype == jnp.float32 and int(cache.length) == 0
    for start, stop in [(0, 65), (65, 66), (66, 67), (67, LENGTH)]:
        piece, cache = decode(layer, x[:, start:stop], cache)
        pieces.append(piece)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), whole, atol=1e-5, rtol=1e-4)
    assert int(cache.length) == LENGTH


@pytest.mark.parametrize("name", list(CONFIGS))
def test_the_state_is_what_the_config_says_and_does_not_grow(name):
    layer, state = build(CONFIGS[name]), CONFIGS[name].state(DIM)
    shape = 3, state.num_heads, state.key_dim, state.value_dim + state.normalize
    for max_length in (1, 80):
        cache = jax.eval_shape(lambda n=max_length: layer.init_cache(3, n))
        assert cache.state.shape == shape and cache.state.dtype == jnp.float32
    assert layer.state == state


@pytest.mark.parametrize("name", ["linear", "lrpe", "mamba2"])
def test_dtypes_are_what_build_is_given(name):
    layer = abstract(CONFIGS[name], dtype=jnp.bfloat16, param_dtype=jnp.float16, norm_eps=0.1)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(layer)} == {"float16"}
    x = jnp.zeros((1, 4, DIM), jnp.bfloat16)
    y, cache = jax.eval_shape(lambda layer: layer.decode(x, layer.init_cache(1, 4), **depth_of(name)), layer)
    assert y.dtype == jnp.bfloat16 and cache.state.dtype == jnp.float32
    norm = layer.norm if name == "mamba2" else layer.output_norm
    assert norm is None or norm.eps == 0.1


@pytest.mark.parametrize("name", ["lightning", "mamba2"])
def test_out_init_scale_scales_the_way_back_alone(name):
    layer = jax.jit(lambda: CONFIGS[name].build(64, out_init_scale=0.01, rngs=nnx.Rngs(0)))()
    into = layer.qkv.v if name == "mamba2" else layer.v
    assert np.std(into.kernel[...]) == pytest.approx(64**-0.5, rel=0.1)
    assert np.std(layer.out.kernel[...]) == pytest.approx(0.01 * np.prod(into.kernel.shape[1:]) ** -0.5, rel=0.1)


def test_options_of_linear_reach_the_layer():
    config = LinearConfig(
        num_heads=4, num_qk_heads=2, head_dim=6, value_dim=5, feature_map="relu", normalize=False, gate="swish",
        implementation="reference",
    )  # fmt: skip
    layer = abstract(config)
    assert layer.q.kernel.shape == (DIM, 2, 6) and layer.v.kernel.shape == (DIM, 4, 5)
    assert layer.gate.kernel.shape == (DIM, 4, 5) and layer.gate_name == "swish"
    assert layer.feature_map == Pointwise("relu") and layer.implementation == "reference"
    assert isinstance(layer.output_norm, SimpleRMSNorm) and not layer.state.normalize and layer.scale == 6**-0.5
    assert abstract(dataclasses.replace(config, normalize=None)).output_norm is None
    assert abstract(dataclasses.replace(config, output_norm=False)).output_norm is None
    assert abstract(LinearConfig(num_heads=2)).gate is None
    assert abstract(RetentionConfig(num_heads=2, rope_theta=None)).rotary is None
    assert abstract(RetentionConfig(num_heads=2, rope_theta=50.0)).rotary == RotaryConfig(theta=50.0)
    constant = LightningConfig(num_heads=2, decay_by_depth=False)
    assert not constant.uses_depth and not abstract(constant).by_depth


def test_mamba2_starts_with_steps_and_rates_in_their_ranges():
    config = Mamba2Config(num_heads=64, state_dim=4, head_dim=2, dt_min=0.01, dt_max=0.02)
    layer = jax.jit(lambda: config.build(DIM, rngs=nnx.Rngs(0)))()
    steps, rates = jax.nn.softplus(layer.decay.dt_bias[...]), jnp.exp(layer.decay.a_log[...])
    assert jnp.all((steps > 0.0099) & (steps < 0.0201)) and jnp.std(steps) > 0.001
    assert jnp.all((rates > 0.99) & (rates < 16.1)) and jnp.std(rates) > 2
    assert jnp.all(layer.skip[...] == 1)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_flops_count_the_matrices_and_the_chunks(name):
    config, lengths = CONFIGS[name], np.array([130, 1, 64])
    layer = abstract(config)
    matrices = sum(
        leaf.size
        for path, leaf in jax.tree.leaves_with_path(layer)
        if leaf.ndim > 1 and "kernel" in jax.tree_util.keystr(path)
    )
    taps = sum(leaf.size for path, leaf in jax.tree.leaves_with_path(layer) if "taps" in jax.tree_util.keystr(path))
    state, index = config.state(DIM), np.arange(130)
    pairs = ((index[:, None] >= index) & (index[:, None] // 64 == index // 64)).sum() + 1 + 64 * 65 // 2
    columns = state.value_dim + state.normalize
    of_states, of_pairs = (6, 4) if state.delta_rule else (4, 2)
    attention = of_states * 195 * state.key_dim * columns + of_pairs * pairs * (state.key_dim + columns)
    wanted = {"projections": 2 * 195 * matrices, "attention": state.num_heads * attention}
    assert config.flops_by_part(DIM, lengths) == wanted | ({"convolutions": 2 * 195 * taps} if taps else {})
    assert config.mask is None


def test_what_is_split_over_devices_is_state_passings_to_say():
    config = CONFIGS["linear"]
    sharding = AttentionSharding(layout=Layout(name="zigzag"))
    split = dict(seq_len=64, heads_split=2, ring_size=4)
    assert config.refusal(DIM, **split, sharding=sharding) is None
    assert config.transfers(DIM, rows=3, **split, sharding=sharding, dtype="bfloat16") == state_passing.transfers(
        sharding, rows=3, num_heads=4, key_dim=4, value_dim=4, degree=4, heads_split=2, normalize=True, segment_ids=True
    )
    gla = CONFIGS["gla"].transfers(DIM, rows=3, **split, sharding=sharding, dtype="bfloat16")
    assert {transfer.num_bytes for transfer in gla} == {3 * 1 * (4 * 6 + 4) * 4, 3 * 4}
    # 2 of 4 heads of values, 1 of 2 of queries and keys: matrices of 6 x 6, and 2 tokens of 2 x 6 + 2 x 5 channels.
    delta = CONFIGS["gated_delta"].transfers(DIM, rows=3, **split, sharding=sharding, dtype="bfloat16")
    of_tokens = {3 * 2 * 22 * 2, 3 * 2 * 22 * 4, 3 * 2 * 4}
    assert {transfer.num_bytes for transfer in delta} == {3 * 2 * (6 * 5 + 6 * 6) * 4, 3 * 4} | of_tokens
    short = CONFIGS["gated_delta"].refusal(DIM, **(split | {"seq_len": 8}), sharding=sharding)
    assert short == (
        "a convolution of 3 tokens reads 2 before a device's own, got runs of 1 (8 tokens over 4 devices, "
        "layout=zigzag); make rows longer, or conv_size smaller"
    )
    # Tokens come into runs, if they are whole stripes of each device's part.
    in_stripes = [AttentionSharding(layout=Layout(name="striped", stripe_size=size)) for size in (4, 8)]
    assert config.refusal(DIM, **split, sharding=in_stripes[0]) is None
    assert "layout=striped" in config.refusal(DIM, **split, sharding=in_stripes[1])


HYBRID = ModelConfig(
    vocab_size=29,
    dim=DIM,
    num_layers=5,
    mlp_dim=24,
    mixers={
        "lightning": LightningConfig(num_heads=4, num_qk_heads=1, lrpe=True),
        "attention": AttentionConfig(num_heads=2, block_q=16, block_kv=16),
    },
    pattern=("lightning", "attention"),
    dtype="float32",
)


@functools.cache
def hybrid():
    """The model, tokens, and its logits for them."""
    model = random_like(nnx.eval_shape(lambda: TransformerLM(HYBRID, rngs=nnx.Rngs(0))), 0.4)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 29, (2, 13)), jnp.int32)
    return model, ids, jax.jit(TransformerLM.__call__)(model, ids)


def test_each_layer_of_a_model_gets_its_depth():
    """In the scan over periods and behind it: layers 0, 2 and 4 of 5 go by depth."""
    model, ids, logits = hybrid()
    layer, x = jax.jit(Block.__call__), jnp.take(model.embedding[...], ids, axis=0)
    lightning, attention = model.periods
    for period in range(2):
        first, second = (jax.tree.map(lambda x, i=period: x[i], block) for block in (lightning, attention))
        x = layer(second, layer(first, x, depth=jnp.float32(period / 2)))
    x = layer(model.remainder[0], x, depth=jnp.float32(1))
    np.testing.assert_allclose(logits, model.final_norm(x) @ model.embedding[...].T, atol=1e-4)


@pytest.mark.slow
def test_a_hybrid_model_decodes_as_it_computes():
    model, ids, logits = hybrid()
    cache, pieces, decode = model.init_cache(2, 16), [], jax.jit(TransformerLM.decode)
    for start, stop in [(0, 11), (11, 12), (12, 13)]:
        piece, cache = decode(model, ids[:, start:stop], cache)
        pieces.append(piece)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), logits, atol=1e-4)


@pytest.mark.slow
def test_a_hybrid_model_over_a_mesh_prefills_and_decodes_as_one_device_does():
    """A context that no number of devices divides, over tokens and heads; the states are whole on each device."""
    model, ids, wanted = hybrid()
    with jax.set_mesh(make_mesh(MeshConfig(context_inner=2, tensor=2), jax.devices()[:4])):
        cache = jax.jit(lambda model, ids: model.prefill(ids, 16))(model, ids[:, :11])
        state = jax.block_until_ready(cache.periods[0].state)
        assert state.shape == (2, 2, 4, 8, 4) and state.sharding.shard_shape(state.shape) == (2, 2, 2, 8, 4)
        decode = jax.jit(TransformerLM.decode)
        for start in (11, 12):
            logits, cache = jax.block_until_ready(decode(model, ids[:, start : start + 1], cache))
            np.testing.assert_allclose(logits, wanted[:, start : start + 1], atol=1e-4)
        empty = model.init_cache(2, 16).remainder[0].state
        assert empty.sharding.shard_shape(empty.shape) == (2, 2, 8, 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CONFIGS))
def test_a_layer_over_a_mesh_equals_one_device(name):
    """Tokens in zigzag order, heads and rows split; the output and every gradient."""
    layer, x, dy = build(CONFIGS[name]), tokens()[:, :64], tokens(seed=2)[:, :64]
    segment_ids = jnp.asarray(np.repeat([[0, 1], [0, 1]], [30, 34], axis=1), jnp.int32)
    positions = jnp.asarray(np.tile(np.concatenate([np.arange(30), np.arange(34)]), (2, 1)), jnp.int32)

    def run(layer, x, positions, segment_ids, dy, sharding):
        layer.sharding = sharding

        @jax.jit
        def with_gradients(layer, x):
            y, vjp = jax.vjp(
                lambda layer, x: layer(x, positions=positions, segment_ids=segment_ids, **depth_of(name)), layer, x
            )
            return y, vjp(dy)

        return jax.block_until_ready(with_gradients(layer, x))

    layout = Layout(name="zigzag")
    order = layout.order(64, 2)
    y, (dlayer, dx) = run(layer, x, positions, segment_ids, dy, None)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, context_inner=2, tensor=2))):
        arrays = (a[:, order] for a in (x, positions, segment_ids, dy))
        got_y, (got_dlayer, got_dx) = run(layer, *arrays, AttentionSharding(layout=layout))
    got, wanted = (got_y, got_dlayer, got_dx), (y[:, order], dlayer, dx[:, order])
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(g, w, atol=1e-5 * max(1.0, float(jnp.max(jnp.abs(w)))), rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("length", [3, 11])
def test_a_layer_with_convolutions_prefills_over_a_mesh_as_it_computes(length):
    """A context whose runs are one token, shorter than what a token reads, and a longer one; then one token more."""
    layer, x = build(CONFIGS["gated_delta"]), tokens()[:, : length + 1]
    whole = jax.jit(type(layer).__call__)(layer, x)
    plan = PrefillPlan(length=length, degree=2)
    with jax.set_mesh(make_mesh(MeshConfig(context_inner=2, tensor=2), jax.devices()[:4])):

        @jax.jit
        def run(layer, x):
            y, cache = layer.prefill(x[:, plan.places], plan, length + 1)
            return y, *layer.decode(x[:, length:], cache)

        y, last, cache = jax.block_until_ready(run(layer, x))
    np.testing.assert_allclose(y[:, plan.places >= 0], whole[:, plan.places[plan.places >= 0]], atol=1e-5, rtol=1e-4)
    np.testing.assert_allclose(last, whole[:, length:], atol=1e-5, rtol=1e-4)
    assert [recent.shape for recent in cache.recent] == [(2, 2, 2, 6), (2, 2, 2, 6), (2, 2, 4, 5)]


def test_star_prefill_is_refused_with_its_reason():
    layer = build(CONFIGS["linear"])
    plan = PrefillPlan(length=8, degree=1, star_block=4)
    with pytest.raises(NotImplementedError, match=r"star attention cuts a context into blocks of keys, and a state"):
        layer.prefill(tokens()[:, :8], plan, 8)
    with pytest.raises(ValueError, match=r"a context of 8 tokens does not fit max_length=7; raise max_length"):
        layer.prefill(tokens()[:, :8], PrefillPlan(length=8, degree=1), 7)


def test_every_mixer_of_a_state_is_tested_here():
    kinds = {kind for kind, config in MixerConfig.variants().items() if issubclass(config, RecurrentConfig)}
    assert kinds == {config.kind for config in CONFIGS.values()}


@pytest.mark.parametrize(
    "config", sorted({type(config) for config in CONFIGS.values()}, key=lambda c: c.kind), ids=lambda c: c.kind
)
def test_every_option_is_documented(config):
    text = "".join(inspect.getsource(base) for base in config.__mro__ if dataclasses.is_dataclass(base))
    for field in dataclasses.fields(config):
        assert f"    {field.name}: " in text
        assert text.split(f"    {field.name}: ", 1)[1].split("\n")[1].strip().startswith('"""'), field.name


def test_calls_are_refused_with_a_remedy():
    lightning, linear, cosine = (build(CONFIGS[name]) for name in ("lightning", "linear", "cosine"))
    x = tokens()
    with pytest.raises(ValueError, match=r"depth: got None, wanted 0.0 for the first layer .* decay_by_depth=False"):
        lightning(x)
    with pytest.raises(ValueError, match=r"depth: got 0.5 for a layer that does not go by it, wanted None; leave it"):
        linear(x, depth=0.5)
    with pytest.raises(ValueError, match=r"x: got 15 dims in shape \(2, 70, 15\), wanted the layer's dim=16"):
        linear(x[..., 1:])
    with pytest.raises(ValueError, match=r"horizon: got 80 with rows of 81 tokens, wanted at least as many, .* raise"):
        cosine.init_cache(1, 81)
    with pytest.raises(ValueError, match=r"horizon: got 80 with rows of 140 tokens"):
        cosine(jnp.concatenate([x, x], axis=1))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(rotary=RotaryConfig(), normalize=True), r"normalize: got True although weights may be negative"),
        (
            dict(rotary=RotaryConfig(), lrpe=True),
            r"lrpe: got True with rotary, wanted one encoding of positions; leave",
        ),
        (dict(log_decay=(0.5, 0.0)), r"log_decay: got \(0.5, 0.0\), wanted num_heads=2 numbers <= 0, or None"),
        (dict(log_decay=(-0.5,)), r"log_decay: got \(-0.5,\), wanted num_heads=2 numbers"),
        (dict(decay_by_depth=True), r"decay_by_depth: got True without log_decay, wanted one to scale; give log_decay"),
        (dict(rotary=RotaryConfig(), head_dim=3), r"head_dim: got 3, wanted an even number for rotary positions"),
    ],
)
def test_layer_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        LinearAttention(DIM, num_heads=2, rngs=nnx.Rngs(0), **kwargs)


@pytest.mark.parametrize(
    ("layer", "kwargs", "message"),
    [
        (GatedLinearAttention, dict(gate_temperature=0.0), r"gate_temperature: got 0.0, wanted a number > 0; 16 is"),
        (GatedLinearAttention, dict(gate_rank=0), r"gate_rank: got 0, wanted a number >= 1"),
        (GatedLinearAttention, dict(conv_size=0), r"conv_size: got 0, wanted a number >= 1"),
        (GatedLinearAttention, dict(head_dim=0), r"head_dim: got 0, wanted a number >= 1"),
        (DeltaNet, dict(value_dim=-1), r"value_dim: got -1, wanted a number >= 1"),
        (DeltaNet, dict(conv_size=-1), r"conv_size: got -1, wanted a number >= 1"),
        (DeltaNet, dict(decay=True, dt_range=(0.1, 1e-3)), r"dt_min: got 0.1 with dt_max=0.001, wanted 0 < dt_min"),
        (DeltaNet, dict(decay=True, dt_range=(0.0, 0.1)), r"dt_min: got 0.0 with dt_max=0.1, wanted 0 < dt_min"),
        (Mamba2, dict(state_dim=0), r"state_dim: got 0, wanted a number >= 1"),
        (Mamba2, dict(conv_size=0), r"conv_size: got 0, wanted a number >= 1"),
    ],
)
def test_layers_refuse_the_sizes_that_their_configs_do(layer, kwargs, message):
    with pytest.raises(ValueError, match=message):
        layer(DIM, num_heads=2, rngs=nnx.Rngs(0), **kwargs)


def test_a_layer_may_have_a_convolution_of_the_token_itself():
    layer = nnx.eval_shape(lambda: GatedLinearAttention(DIM, num_heads=2, conv_size=1, rngs=nnx.Rngs(0)))
    assert layer.convolution.width == 1


@pytest.mark.parametrize(
    ("config", "kwargs", "message"),
    [
        (LinearConfig, dict(num_heads=0), r"num_heads: got 0, wanted a number >= 1"),
        (LinearConfig, dict(num_heads=4, num_qk_heads=3), r"num_qk_heads: got 3, wanted a divisor of num_heads=4"),
        (LinearConfig, dict(num_heads=4, value_dim=0), r"value_dim: got 0, wanted null or a number of dims >= 1"),
        (LinearConfig, dict(num_heads=4, feature_map="cosine"), r"horizon: got null .* set it to data.seq_len"),
        (LinearConfig, dict(num_heads=4, horizon=8), r"horizon: got 8 with feature_map=elu1, which has none; leave it"),
        (
            LinearConfig,
            dict(num_heads=4, feature_map="cosine", horizon=0),
            r"horizon: got 0, wanted a number of tokens >= 1",
        ),
        (
            LinearConfig,
            dict(num_heads=4, feature_map="identity", normalize=True),
            r"normalize: got true with feature_map=identity, whose weights may be negative, .* or choose elu1",
        ),
        (RetentionConfig, dict(num_heads=4, head_dim=5), r"head_dim: got 5, wanted an even number for rotary"),
        (RetentionConfig, dict(num_heads=4, rope_theta=1.0), r"rope_theta: got 1.0, wanted null or a number > 1"),
        (LightningConfig, dict(num_heads=4, head_dim=0), r"head_dim: got 0, wanted null or a number of dims >= 1"),
        (LightningConfig, dict(num_heads=4, num_qk_heads=8), r"num_qk_heads: got 8, wanted a divisor of num_heads=4"),
        (Mamba2Config, dict(num_heads=4, num_groups=3), r"num_groups: got 3, wanted a divisor of num_heads=4"),
        (Mamba2Config, dict(num_heads=4, num_groups=0), r"num_groups: got 0, wanted a number >= 1"),
        (Mamba2Config, dict(num_heads=4, state_dim=0), r"state_dim: got 0, wanted null or a number of dims >= 1"),
        (Mamba2Config, dict(num_heads=4, dt_min=0.2), r"dt_min: got 0.2 with dt_max=0.1, wanted 0 < dt_min <= dt_max"),
        (GlaConfig, dict(num_heads=0), r"num_heads: got 0, wanted a number >= 1"),
        (GlaConfig, dict(num_heads=4, gate_rank=0), r"gate_rank: got 0, wanted null or a number of dims >= 1"),
        (GlaConfig, dict(num_heads=4, gate_temperature=0.0), r"gate_temperature: got 0.0, wanted a number > 0; 16 is"),
        (GlaConfig, dict(num_heads=4, conv_size=1), r"conv_size: got 1, wanted null or a number of tokens >= 2; 4 is"),
        (ReglaConfig, dict(num_heads=4, head_dim=0), r"head_dim: got 0, wanted null or a number of dims >= 1"),
        (DeltaConfig, dict(num_heads=4, num_qk_heads=3), r"num_qk_heads: got 3, wanted a divisor of num_heads=4"),
        (DeltaConfig, dict(num_heads=4, feature_map="dpfp"), r"dpfp_order: got None with feature_map=dpfp, wanted a"),
        (DeltaConfig, dict(num_heads=4, dpfp_order=1), r"dpfp_order: got 1 with feature_map=identity, which has none;"),
        (DeltaConfig, dict(num_heads=4, feature_norm="sum"), r"feature_norm: got sum with features .* map .dpfp"),
        (DeltaConfig, dict(num_heads=4, conv_size=0), r"conv_size: got 0, wanted null or a number of tokens >= 2"),
        (GatedDeltaConfig, dict(num_heads=4, value_dim=0), r"value_dim: got 0, wanted null or a number of dims >= 1"),
        (GatedDeltaConfig, dict(num_heads=4, dt_min=0.0), r"dt_min: got 0.0 with dt_max=0.1, wanted 0 < dt_min <="),
    ],
)  # fmt: skip
def test_config_refuses(config, kwargs, message):
    with pytest.raises(ValueError, match=message):
        config(**kwargs)


@pytest.mark.parametrize(
    ("made", "field", "value", "choices"),
    [
        (LinearConfig(num_heads=2), "feature_map", "gelu", "identity, elu1, relu, cosine, taylor2"),
        (LinearConfig(num_heads=2), "gate", "silu", "identity, sigmoid, swish"),
        (LightningConfig(num_heads=2), "slopes", "Linear", "geometric, linear"),
        (LightningConfig(num_heads=2), "gate", "silu", "identity, sigmoid, swish"),
        (DeltaConfig(num_heads=2), "feature_map", "gelu", "identity, elu1, relu, dpfp"),
        (DeltaConfig(num_heads=2), "feature_norm", "l1", "l2, sum"),
        (Pointwise("relu"), "function", "gelu", "identity, elu1, relu, swish"),
        (BiasConfig(kind="alibi"), "kind", "alibl", "alibi, alibi_learned, t5, kerple_log, kerple_power"),
    ],
)
def test_misspelt_choices_are_refused(made, field, value, choices):
    misspelt = copy.copy(made)
    object.__setattr__(misspelt, field, value)  # the types of constructors' arguments are checked in tests
    with pytest.raises(ValueError, match=f"^{field}: got '{value}', wanted one of {choices}; choose one of these"):
        misspelt.__post_init__()


@pytest.mark.parametrize(
    ("layer", "field", "value", "choices"),
    [
        (LinearAttention, "output_norm", "RMS", "rms, group"),
        (LinearAttention, "gate", "silu", "identity, sigmoid, swish"),
        (DeltaNet, "feature_norm", "l1", "l2, sum"),
    ],
)
def test_misspelt_choices_of_layers_are_refused(layer, field, value, choices):
    make = inspect.unwrap(layer.__init__)
    with pytest.raises(ValueError, match=f"{field}: got '{value}', wanted one of {choices}; choose one of these"):
        make(layer.__new__(layer), DIM, num_heads=2, rngs=nnx.Rngs(0), **{field: value})


def test_state_shape_columns():
    shape = StateShape(num_qk_heads=1, num_heads=2, key_dim=3, value_dim=4)
    assert (shape.columns, dataclasses.replace(shape, normalize=True).columns) == (4, 5)
