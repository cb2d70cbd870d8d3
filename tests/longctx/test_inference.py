"""Models over a split context: decoding and prefill equal the whole call, star attention its dense mask."""

import dataclasses
import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx import (
    Attention,
    AttentionConfig,
    LinearConfig,
    MeshConfig,
    MlaConfig,
    MobaConfig,
    ModelConfig,
    NsaConfig,
    TransformerLM,
    make_mesh,
)
from longctx.context_parallel import PrefillPlan, empty_cache, sharded_decode
from longctx.masks import causal
from longctx.rotary import RotaryConfig, apply_rotary

CONFIG = ModelConfig(
    vocab_size=29,
    dim=16,
    num_layers=3,
    mlp_dim=24,
    mixers={
        "local": AttentionConfig(num_heads=4, num_kv_heads=2, window=6, qk_norm=True, block_q=4, block_kv=4),
        "global": AttentionConfig(num_heads=2, logits_soft_cap=3.0, sinks=True, block_q=4, block_kv=4),
    },
    pattern=("local", "global"),
    dtype="float32",
)
LENGTH, CONTEXT_LEN, ROOM = 20, 15, 22
KINDS = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"


def mesh_of(**shape):
    return make_mesh(MeshConfig(**shape), jax.devices()[: int(np.prod(list(shape.values())))])


@functools.cache
def model_of(config=CONFIG):
    rng = np.random.default_rng(0)
    abstract = nnx.eval_shape(lambda: TransformerLM(config, rngs=nnx.Rngs(0)))
    return jax.tree.map(lambda leaf: jnp.asarray(0.4 * rng.standard_normal(leaf.shape), leaf.dtype), abstract)


TOKENS = jax.random.randint(jax.random.key(0), (2, LENGTH), 0, CONFIG.vocab_size)
call = jax.jit(TransformerLM.__call__)
decode = jax.jit(TransformerLM.decode)
prefill = jax.jit(TransformerLM.prefill, static_argnums=(2,), static_argnames=("star_block",))


def rest_after(cache, start=CONTEXT_LEN, chunk=5):
    """Scores after each token from `start` on, and the cache after them."""
    pieces = []
    for stop in range(start + chunk, LENGTH + 1, chunk):
        logits, cache = jax.block_until_ready(decode(model_of(), TOKENS[:, start:stop], cache))
        pieces.append(np.asarray(logits))
        start = stop
    return np.concatenate(pieces, axis=1), cache


@pytest.mark.parametrize(
    "mesh_shape",
    [
        {"context_outer": 2, "context_inner": 2, "tensor": 2},
        pytest.param({"context_inner": 8}, marks=pytest.mark.slow),
        pytest.param({"data": 2, "context_outer": 2, "tensor": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_decoding_step_by_step_equals_one_call(mesh_shape):
    """Of the first chunk, 16 tokens, every device has a part outside attention; of the others it has all."""
    want = call(model_of(), TOKENS)
    with jax.set_mesh(mesh_of(**mesh_shape)):
        logits, cache = jax.block_until_ready(decode(model_of(), TOKENS[:, :16], model_of().init_cache(2, ROOM)))
        rest, cache = rest_after(cache, 16, chunk=1)
    np.testing.assert_allclose(np.concatenate([logits, rest], axis=1), want, atol=3e-5)
    degree = mesh_shape.get("context_inner", 1) * mesh_shape.get("context_outer", 1)
    for layer in (*cache.periods, *cache.remainder):
        for x in (layer.k, layer.v):
            slots = x.shape[-3]
            assert slots == -(-ROOM // degree) * degree
            assert {shard.data.shape[-3] for shard in x.addressable_shards} == {slots // degree}


def test_prefill_over_devices_equals_one_call():
    """Runs are of 4 tokens in two pieces, the last ones short; tokens that follow even the devices out."""
    want = call(model_of(), TOKENS)
    with jax.set_mesh(mesh_of(context_inner=4)):
        rest, cache = rest_after(prefill(model_of(), TOKENS[:, :CONTEXT_LEN], ROOM))
    np.testing.assert_allclose(rest, want[:, CONTEXT_LEN:], atol=3e-5)
    positions = np.asarray(cache.remainder[0].positions)
    np.testing.assert_array_equal(np.sort(positions[positions >= 0]), np.arange(LENGTH))


def star_mask(length, context_len, block):
    """Star attention as one dense mask, written out: a token of the context sees its block and the first, a later one
    everything before it."""
    allowed = np.zeros((length, length), bool)
    for t in range(length):
        for s in range(t + 1):
            allowed[t, s] = t >= context_len or s // block == t // block or s < block
    return allowed


def dense_model(model, tokens, allowed):
    """The transformer in plain jnp with one [T, T] mask for all layers, and each layer's own window beside it."""
    config, length = model.config, tokens.shape[1]
    positions = jnp.arange(length, dtype=jnp.int32)[None]
    near = np.arange(length)[:, None] - np.arange(length)[None]

    def norm(x, scale):
        return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + config.norm_eps) * scale

    def attend(layer, mixer, x):
        q, k, v = (jnp.einsum("btd,dnh->btnh", x, layer[name]["kernel"]) for name in ("q", "k", "v"))
        if mixer.qk_norm:
            q, k = norm(q, layer["q_norm"]["scale"]), norm(k, layer["k_norm"]["scale"])
        q, k = (apply_rotary(y, positions, RotaryConfig(theta=mixer.rope_theta)) for y in (q, k))
        k, v = (jnp.repeat(y, mixer.num_heads // y.shape[2], axis=2) for y in (k, v))
        logits = jnp.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1]).astype(np.float32)
        if mixer.logits_soft_cap is not None:
            logits = mixer.logits_soft_cap * jnp.tanh(logits / mixer.logits_soft_cap)
        seen = allowed if mixer.window is None else allowed & (near < mixer.window)
        logits = jnp.where(seen, logits, -1e30)
        if mixer.sinks:
            sinks = jnp.broadcast_to(layer["sinks"][:, None, None], (*logits.shape[:-1], 1))
            logits = jnp.concatenate([logits, sinks], axis=-1)
        weights = jax.nn.softmax(logits, axis=-1)[..., :length]
        return jnp.einsum("bnts,bsnh,nhd->btd", weights, v, layer["out"]["kernel"])

    state = nnx.to_pure_dict(nnx.state(model))
    layers = [jax.tree.map(lambda x: x[0], state["periods"][i]) for i in (0, 1)] + [state["remainder"][0]]
    x = state["embedding"][tokens]
    for layer, name in zip(layers, ("local", "global", "local"), strict=True):
        x += attend(layer["mixer"], config.mixers[name], norm(x, layer["mixer_norm"]["scale"]))
        y, mlp = norm(x, layer["mlp_norm"]["scale"]), {n: layer["mlp"][n]["kernel"] for n in ("gate", "up", "down")}
        x += (jax.nn.silu(y @ mlp["gate"]) * (y @ mlp["up"])) @ mlp["down"]
    return norm(x, state["final_norm"]["scale"]) @ state["embedding"].T


@pytest.mark.parametrize("star_block", [4, *(pytest.param(b, marks=pytest.mark.slow) for b in (2, 3))])
def test_star_prefill_equals_its_dense_mask(star_block):
    """One block a device, the last one short; two a device; and as many as leave one device with a padded run."""
    want = jax.jit(dense_model)(model_of(), TOKENS, star_mask(LENGTH, CONTEXT_LEN, star_block))[:, CONTEXT_LEN:]
    exact = call(model_of(), TOKENS)[:, CONTEXT_LEN:]
    assert np.abs(want - exact).max() > 0.1, "the mask makes no difference here"
    with jax.set_mesh(mesh_of(context_inner=4)):
        rest, _ = rest_after(prefill(model_of(), TOKENS[:, :CONTEXT_LEN], ROOM, star_block=star_block))
    np.testing.assert_allclose(rest, want, atol=3e-5)


@pytest.mark.slow
@pytest.mark.slow
def test_star_prefill_on_one_device():
    want = jax.jit(dense_model)(model_of(), TOKENS, star_mask(LENGTH, CONTEXT_LEN, 4))[:, CONTEXT_LEN:]
    rest, _ = rest_after(prefill(model_of(), TOKENS[:, :CONTEXT_LEN], ROOM, star_block=4))
    np.testing.assert_allclose(rest, want, atol=3e-5)


@pytest.mark.slow
def test_star_prefill_of_one_block_is_exact():
    want = call(model_of(), TOKENS)[:, CONTEXT_LEN:]
    with jax.set_mesh(mesh_of(context_inner=2)):
        rest, _ = rest_after(prefill(model_of(), TOKENS[:, :CONTEXT_LEN], 30, star_block=CONTEXT_LEN))
    np.testing.assert_allclose(rest, want, atol=3e-5)


def collectives(program: str) -> list[tuple[str, str]]:
    """Kind and shape of every collective of a compiled program."""
    found = re.findall(rf"= (\w+\[[\d,]*\])[^ ]* ({KINDS})(?:-start)?\(", program)
    assert len(found) == len(re.findall(rf" (?:{KINDS})(?:-start)?\(", program)), "a collective of several arrays"
    return [(kind, shape) for shape, kind in found]


def compiled(function, *arguments):
    """The program for four devices that all hold the parameters."""
    graphdef, params = nnx.split(model_of())
    with jax.set_mesh(mesh := mesh_of(context_inner=4)):
        params = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
        step = jax.jit(lambda params, *arguments: function(nnx.merge(graphdef, params), *arguments))
        return step.lower(params, *arguments).compile().as_text()


@pytest.mark.slow
def test_star_prefill_sends_nothing():
    tokens = jnp.zeros((1, 1024), jnp.int32)
    program = compiled(lambda model, tokens: model.prefill(tokens, 1100, star_block=256), tokens)
    assert collectives(program) == []
    assert not re.search(r"f32\[[\d,]*\b1024\b", program), "a float array that holds the whole context"


@pytest.mark.parametrize("num_new", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_what_a_step_of_the_model_sends(num_new):
    """One all-gather of partial results a layer; where the new tokens are split outside attention, q, k and v too."""

    def step(model, tokens):
        return model.decode(tokens, model.init_cache(2, 4096))

    found = collectives(compiled(step, jnp.zeros((2, num_new), jnp.int32)))
    local = [("all-gather", f"f32[4,2,{num_new},4,6]")]
    everywhere = [("all-gather", f"f32[4,2,{num_new},2,10]")]
    if num_new == 4:
        local += [("all-gather", f"f32[2,{num_new},{heads},4]") for heads in (4, 2, 2)]
        everywhere += [("all-gather", f"f32[2,{num_new},2,8]")] * 3
    assert sorted(found) == sorted(local * 2 + everywhere)


def test_plans():
    star = PrefillPlan(length=10, degree=3, star_block=2)
    np.testing.assert_array_equal(
        star.places.reshape(3, -1), [[-1, -1, 0, 1, 2, 3], [0, 1, 4, 5, 6, 7], [0, 1, 8, 9, -1, -1]]
    )
    np.testing.assert_array_equal(star.num_filled, [4, 4, 2])
    assert star.num_slots(15) == 4 + 2
    exact = PrefillPlan(length=10, degree=3)
    np.testing.assert_array_equal(exact.places.reshape(3, -1), [[0, 1, -1, -1], [2, 3, 8, 9], [4, 5, 6, 7]])
    alone = PrefillPlan(length=5, degree=1, star_block=2)
    np.testing.assert_array_equal(alone.places, [0, 1, 2, 3, 4, -1])


@pytest.mark.slow
def test_the_anchors_positions_are_its_own():
    """The keys that a device keeps are those of its run, rotated by their places in the context."""
    layer = Attention(16, num_heads=2, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(3), (1, 10, 16))
    with jax.set_mesh(mesh_of(context_inner=2)):
        plan = PrefillPlan(length=10, degree=2, star_block=5)
        _, star = jax.jit(Attention.prefill, static_argnums=(2, 3))(layer, x[:, np.maximum(plan.places, 0)], plan, 10)
    _, want = jax.jit(Attention.decode)(layer, x, layer.init_cache(1, 10))
    np.testing.assert_allclose(star.k, want.k, atol=1e-6)
    np.testing.assert_array_equal(star.positions, want.positions)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 8, None), "prefill: got a context of 0 tokens, wanted at least 1; decode from an empty cache instead"),
        ((9, 8, None), "prefill: a context of 9 tokens does not fit max_length=8; raise max_length"),
        ((4, 8, 0), "prefill: star_block=0, wanted None or a number of tokens >= 1"),
    ],
)
def test_prefill_refuses(arguments, message):
    length, max_length, star_block = arguments
    with pytest.raises(ValueError, match=message):
        model_of().prefill(TOKENS[:, :length], max_length, star_block=star_block)


@pytest.mark.parametrize("tokens", [jnp.zeros((4,), jnp.int32), jnp.zeros((2, 4)), jnp.zeros((2, 4, 1), jnp.int32)])
def test_what_is_no_rows_of_ids_is_refused(tokens):
    model = model_of()
    prefill, decode = inspect.unwrap(TransformerLM.prefill), inspect.unwrap(TransformerLM.decode)
    message = re.escape(f"tokens: got {tokens.dtype}{list(tokens.shape)}, wanted integers [batch, length]")
    with pytest.raises(ValueError, match=message):
        prefill(model, tokens, 8)
    with pytest.raises(ValueError, match=message):
        decode(model, tokens, model.init_cache(2, 8))


@pytest.mark.parametrize(
    "config",
    [
        AttentionConfig(num_heads=2),
        MlaConfig(num_heads=2, kv_rank=8, head_dim=8, rope_dim=4, value_dim=8),
        MobaConfig(num_heads=2, chunk_size=4),
        NsaConfig(num_heads=2),
        LinearConfig(num_heads=2),
    ],
    ids=lambda config: config.kind,
)
def test_decoding_refuses_what_does_not_fit_the_cache(config):
    layer = nnx.eval_shape(lambda: config.build(16, rngs=nnx.Rngs(0)))
    cache, decode = layer.init_cache(2, 8), inspect.unwrap(type(layer).decode)
    with pytest.raises(ValueError, match=r"x: got 3 rows, the cache has 2; pass the tokens and the cache of the same"):
        layer.decode(jnp.ones((3, 1, 16)), cache)
    for shape in ((16,), (2, 16), (2, 0, 16)):
        with pytest.raises(ValueError, match=r"x: got shape .* wanted \[batch, length, 16\], no dimension 0"):
            decode(layer, jnp.ones(shape), cache)


def test_a_model_refuses_a_cache_of_other_rows():
    model = model_of()
    with pytest.raises(ValueError, match=r"x: got 1 rows, the cache has 2"):
        model.decode(TOKENS[:1], model.init_cache(2, TOKENS.shape[1]))


def test_a_mixer_without_prefill_is_named(monkeypatch):
    class Layer(nnx.Module):
        pass

    monkeypatch.setattr(AttentionConfig, "build", lambda self, dim, **_: Layer())
    mixers = {"global": CONFIG.mixers["global"]}
    model = nnx.eval_shape(
        lambda: TransformerLM(dataclasses.replace(CONFIG, mixers=mixers, pattern=("global",)), rngs=nnx.Rngs(0))
    )
    with pytest.raises(NotImplementedError, match="mixer 'global' of kind 'attention' has none; pass the context to"):
        model.prefill(TOKENS, 30)


@pytest.mark.parametrize("wrong", [{"value_dim": 2}, {"v": None}, {"value_dim": 2, "v": None}])
def test_values_and_value_dim_do_not_go_together(wrong):
    x = jnp.ones((1, 2, 1, 4))
    cache = empty_cache(
        batch_size=1, max_length=8, num_kv_heads=1, head_dim=4, values="v" not in wrong, dtype=x.dtype, mask=causal()
    )
    with pytest.raises(ValueError, match="decode: (got v|value_dim=2 with v)"):
        sharded_decode(x, x, wrong.get("v", x), cache, mask=causal(), value_dim=wrong.get("value_dim"))
