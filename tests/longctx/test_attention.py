"""The attention layer against the textbook formula, its cache, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx import Attention, BiasConfig, RotaryConfig, YarnRopeScaling, apply_rotary, masks
from pallas_kernels import BlockSizes, Tokens, make_schedule

DIM, LENGTH = 16, 11
WINDOW = masks.sliding_window(3) & masks.documents()
VARIANTS = {
    "plain": dict(num_heads=4),
    "grouped": dict(num_heads=4, num_kv_heads=2, head_dim=6),
    "one kv head, no rotary": dict(num_heads=4, num_kv_heads=1, rotary=None),
    "qk-norm, soft cap, window": dict(num_heads=2, qk_norm=True, logits_soft_cap=2.0, mask=WINDOW),
    "sinks": dict(num_heads=4, num_kv_heads=2, sinks=True, mask=WINDOW),
    "alibi": dict(num_heads=4, num_kv_heads=2, bias=BiasConfig(kind="alibi"), rotary=None, mask=WINDOW),
    "t5": dict(num_heads=2, bias=BiasConfig(kind="t5", buckets=8, max_distance=6), rotary=None),
    "kerple, learned": dict(num_heads=2, bias=BiasConfig(kind="kerple_log"), rotary=None),
    "biases, scaled rotary": dict(
        num_heads=4,
        num_kv_heads=2,
        qkv_bias=True,
        rotary=RotaryConfig(theta=50.0, scaling=YarnRopeScaling(factor=4.0, original_length=64)),
    ),
    "theta": dict(num_heads=2, rotary=RotaryConfig(theta=50.0), block_sizes=BlockSizes(block_q=4, block_kv=4)),
}


call = jax.jit(Attention.__call__)
decode = jax.jit(Attention.decode)


@functools.partial(jax.jit, static_argnames=("kwargs",))
def _build(kwargs):
    layer = Attention(DIM, **dict(kwargs), rngs=nnx.Rngs(0))
    for norm in (layer.q_norm, layer.k_norm):
        if norm is not None:
            norm.scale[...] = 1 + jax.random.normal(jax.random.key(9), norm.scale.shape, norm.scale.dtype)
    for number, project in enumerate((layer.q, layer.k, layer.v)):
        if project.bias is not None:
            project.bias[...] = jax.random.normal(jax.random.key(number), project.bias.shape, project.bias.dtype)
    if layer.sinks is not None:
        layer.sinks[...] = jax.random.normal(jax.random.key(8), layer.sinks.shape, layer.sinks.dtype)
    return layer


def build(**kwargs):
    return _build(tuple(kwargs.items()))


def inputs(batch_size=2):
    return jax.random.normal(jax.random.key(1), (batch_size, LENGTH, DIM))


def textbook(layer, x, positions, segment_ids, *, num_heads, **_):
    """Plain attention in jnp: expanded heads, one [T, T] softmax."""
    q, k, v = (jnp.einsum("btd,dnh->btnh", x, p.kernel[...]) for p in (layer.q, layer.k, layer.v))
    if layer.q.bias is not None:
        q, k, v = (y + p.bias[...] for y, p in zip((q, k, v), (layer.q, layer.k, layer.v), strict=True))
    if layer.q_norm is not None:
        q, k = layer.q_norm(q), layer.k_norm(k)
    if layer.rotary is not None:
        q, k = (apply_rotary(y, positions, layer.rotary) for y in (q, k))
    k, v = (jnp.repeat(y, num_heads // y.shape[2], axis=2) for y in (k, v))
    logits = jnp.einsum("btnh,bsnh->bnts", q, k) / jnp.sqrt(q.shape[-1])
    if layer.logits_soft_cap is not None:
        logits = layer.logits_soft_cap * jnp.tanh(logits / layer.logits_soft_cap)
    tokens = Tokens.self_attention(positions, segment_ids)
    allowed = layer.mask.dense(tokens, LENGTH, LENGTH)
    if layer.bias is not None:
        logits += layer.bias().dense(tokens, LENGTH, LENGTH)
    logits = jnp.where(allowed[:, None], logits, -1e30)
    if layer.sinks is not None:
        column = jnp.broadcast_to(layer.sinks[...][:, None, None], (*logits.shape[:3], 1))
        logits = jnp.concatenate([logits, column], axis=-1)
    weights = jax.nn.softmax(logits, axis=-1)[..., :LENGTH]
    return jnp.einsum("bnts,bsnh,nhd->btd", weights, v, layer.out.kernel[...])


QUICK = ("grouped", "qk-norm, soft cap, window", "t5")
variants = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in VARIANTS]
)


@variants
def test_layer_and_its_gradient_follow_the_formula(name):
    layer, x = build(**VARIANTS[name]), inputs()
    positions = jnp.asarray([[*range(7), *range(4)], range(3, 3 + LENGTH)], jnp.int32)
    segment_ids = jnp.asarray([[0] * 7 + [1] * 4, [0] * LENGTH], jnp.int32) if layer.mask.uses_segments else None
    cotangent = jax.random.normal(jax.random.key(2), x.shape)

    def run(function):
        y, vjp = jax.vjp(function, layer, x)
        return y, vjp(cotangent)

    got = jax.jit(lambda: run(lambda layer, x: layer(x, positions=positions, segment_ids=segment_ids)))()
    wanted = jax.jit(lambda: run(lambda layer, x: textbook(layer, x, positions, segment_ids, **VARIANTS[name])))()
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=2e-5, rtol=2e-5), got, wanted)


@variants
def test_decoding_step_by_step_equals_one_call(name):
    layer, x = build(**VARIANTS[name]), inputs()
    wanted, cache, pieces = call(layer, x), layer.init_cache(2, LENGTH + 3), []
    for start, stop in [(0, 8), (8, 9), (9, 10), (10, 11)]:
        y, cache = decode(layer, x[:, start:stop], cache)
        pieces.append(y)
    assert cache.length == LENGTH
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), wanted, atol=1e-5)


def test_a_full_cache_is_loud():
    layer, x = build(num_heads=2), inputs()
    y, cache = decode(layer, x[:, :3], layer.init_cache(2, 5))
    assert jnp.all(jnp.isfinite(y))
    y, _ = decode(layer, x[:, 3:6], cache)
    assert jnp.all(jnp.isnan(y))
    with pytest.raises(ValueError, match=r"decode: T=6 tokens do not fit a cache of 5; raise max_length in init_cache"):
        layer.decode(x[:, :6], layer.init_cache(2, 5))


def test_a_shared_schedule_changes_nothing():
    layer, x = build(num_heads=2, mask=WINDOW), inputs()
    segment_ids = jnp.asarray([[0] * 5 + [1] * 4 + [-1] * 2] * 2, jnp.int32)
    tokens = Tokens.self_attention(segment_ids=segment_ids)
    schedule = make_schedule(WINDOW, tokens, q_len=LENGTH, kv_len=LENGTH)
    got = call(layer, x, segment_ids=segment_ids, schedule=schedule)
    np.testing.assert_array_equal(got, call(layer, x, segment_ids=segment_ids))
    np.testing.assert_array_equal(got[:, 9:], 0)


def test_compute_and_parameter_dtypes_are_explicit():
    layer = build(num_heads=2, dtype=jnp.bfloat16, param_dtype=jnp.float16, qk_norm=True)
    assert {param.dtype for param in jax.tree.leaves(nnx.state(layer))} == {jnp.dtype("float16")}
    assert jax.eval_shape(layer, inputs()).dtype == jnp.bfloat16
    assert layer.init_cache(1, 4).k.dtype == jnp.bfloat16


def test_sinks_start_at_zero_and_are_one_for_each_query_head():
    layer = Attention(DIM, num_heads=4, num_kv_heads=2, sinks=True, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert layer.sinks.dtype == jnp.bfloat16 and layer.sinks.get_metadata("logical_axes") == ("heads",)
    np.testing.assert_array_equal(layer.sinks[...], np.zeros(4))
    assert Attention(DIM, num_heads=4, rngs=nnx.Rngs(0)).sinks is None


def dropping(**kwargs):
    return build(num_heads=2, dropout_rate=0.5, **kwargs)


def test_dropout_in_training_and_none_in_evaluation_and_decoding():
    layer, plain, x = dropping(), build(num_heads=2), inputs()
    wanted = call(plain, x)
    dropped = call(layer, x, rngs=jax.random.key(0))
    assert not np.allclose(dropped, wanted, atol=0.05)
    np.testing.assert_array_equal(call(layer, x, rngs=jax.random.key(0)), dropped)
    assert not np.allclose(call(layer, x, rngs=jax.random.key(1)), dropped, atol=0.05)
    np.testing.assert_allclose(decode(layer, x, layer.init_cache(2, LENGTH))[0], wanted, atol=1e-5)
    layer.eval()
    np.testing.assert_array_equal(call(layer, x), wanted)
    layer.train()
    np.testing.assert_array_equal(call(layer, x, rngs=jax.random.key(0)), dropped)


@pytest.mark.slow
def test_dropout_takes_streams_a_key_and_keys_for_rows():
    layer, x = dropping(), inputs()
    rngs = nnx.Rngs(dropout=3)
    key = nnx.Rngs(dropout=3).dropout()
    first = layer(x, rngs=rngs)
    np.testing.assert_array_equal(first, layer(x, rngs=key))
    np.testing.assert_array_equal(first, layer(x, rngs=nnx.Rngs(dropout=3).dropout))
    assert not np.allclose(first, layer(x, rngs=rngs), atol=0.05), "the stream goes on"
    keys = jax.random.split(key, 2)
    both = layer(x, rngs=keys)
    np.testing.assert_allclose(layer(x[1:], rngs=keys[1:]), both[1:], atol=1e-6)


def test_train_and_eval_leave_the_order_of_gradients_alone():
    """Flax sets an attribute `deterministic` on every module that has one; here that word means something else."""
    for deterministic in (True, False):
        layer = dropping(deterministic=deterministic)
        for switch in (layer.train, layer.eval):
            switch()
            assert layer.deterministic_gradients == deterministic


def test_dropout_without_a_random_source_is_refused():
    with pytest.raises(
        ValueError, match=r"rngs: got None in training, wanted a random source for dropout_rate=0.5; .*"
    ):
        dropping()(inputs())
    with pytest.raises(ValueError, match=r"rngs: got uint32\[2\], wanted a typed key; make it with jax.random.key"):
        dropping()(inputs(), rngs=jax.random.PRNGKey(0))
    with pytest.raises(ValueError, match=r"dropout_rate=1.0, wanted 0 <= rate < 1; 0 drops nothing"):
        Attention(DIM, num_heads=2, dropout_rate=1.0, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(num_heads=3), r"head_dim: dim=16 is not a multiple of num_heads=3; set head_dim"),
        (
            dict(num_heads=4, num_kv_heads=3),
            r"num_kv_heads: got 3, wanted a divisor of num_heads=4; each kv head",
        ),
        (dict(num_heads=4, head_dim=5), r"head_dim: got 5, wanted an even number for rotary positions; use 6"),
        (dict(num_heads=4, num_kv_heads=0), r"num_kv_heads: got 0, wanted a number >= 1"),
        (dict(num_heads=0), r"num_heads: got 0, wanted a number >= 1"),
        (dict(num_heads=4, logits_soft_cap=0.0), r"logits_soft_cap: got 0.0, wanted null or a finite number > 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Attention(DIM, **kwargs, rngs=nnx.Rngs(0))


def test_segment_ids_that_the_mask_would_ignore_are_refused():
    with pytest.raises(ValueError, match=r"segment_ids: passed to an Attention whose mask .* build it with mask & doc"):
        build(num_heads=2)(inputs(), segment_ids=jnp.zeros((2, LENGTH), jnp.int32))


def test_an_input_of_another_dim_is_refused():
    with pytest.raises(ValueError, match=r"x: got 8 dims in shape \(2, 11, 8\), wanted the layer's dim=16"):
        build(num_heads=2)(inputs()[..., :8])
