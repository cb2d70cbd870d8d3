"""The language model: documents, decoding, periods, rematerialisation, initial values."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx import AttentionConfig, ModelConfig, TransformerLM, cross_entropy

CONFIG = ModelConfig(
    vocab_size=29,
    dim=16,
    num_layers=5,
    mlp_dim=24,
    mixers={
        "local": AttentionConfig(num_heads=4, num_kv_heads=2, window=3, qk_norm=True, block_q=4, block_kv=4),
        "global": AttentionConfig(num_heads=2, rope_theta=500.0, block_q=4, block_kv=4),
    },
    pattern=("local", "global"),
    dtype="float32",
)
call = jax.jit(TransformerLM.__call__)
decode = jax.jit(TransformerLM.decode)


@functools.cache
def build(config=CONFIG):
    return jax.jit(lambda: TransformerLM(config, rngs=nnx.Rngs(0)))()


def random_tokens(batch_size, length, seed=0):
    return jax.random.randint(jax.random.key(seed), (batch_size, length), 0, CONFIG.vocab_size)


def loss_of(model, tokens):
    return cross_entropy(model(tokens), tokens, jnp.ones(tokens.shape)).loss_sum


PACKED_LENGTHS = (6, 1, 5)
NUM_PADDING = 2


def packed():
    """One row: three documents, then padding."""
    segments = np.repeat([0, 1, 2, -1], [*PACKED_LENGTHS, NUM_PADDING])
    positions = np.concatenate([np.arange(length) for length in (*PACKED_LENGTHS, NUM_PADDING)])
    return (
        random_tokens(1, len(segments)),
        jnp.asarray(positions, jnp.int32)[None],
        jnp.asarray(segments, jnp.int32)[None],
    )


@pytest.mark.parametrize("with_positions", [True, False])
def test_packed_documents_equal_each_document_alone(with_positions):
    tokens, positions, segment_ids = packed()
    logits = call(build(), tokens, positions=positions if with_positions else None, segment_ids=segment_ids)
    start = 0
    for length in PACKED_LENGTHS:
        alone = call(build(), tokens[:, start : start + length])
        np.testing.assert_allclose(logits[:, start : start + length], alone, atol=2e-5)
        start += length


def test_padding_is_finite_and_changes_no_gradient():
    tokens, positions, segment_ids = packed()
    weights = (segment_ids >= 0).astype(jnp.float32)

    @jax.jit
    def gradient(model, tokens):
        def loss(model):
            logits = model(tokens, positions=positions, segment_ids=segment_ids)
            return cross_entropy(logits, jnp.roll(tokens, -1, axis=1), weights).loss_sum

        return jax.grad(loss)(model)

    first = gradient(build(), tokens)
    other = gradient(build(), jnp.where(segment_ids < 0, (tokens + 5) % CONFIG.vocab_size, tokens))
    # The last weighted target is the first padding token: give both runs the same.
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(first))
    assert jnp.all(jnp.isfinite(call(build(), tokens, segment_ids=jnp.full_like(segment_ids, -1))))
    unlike = [leaf for leaf in jax.tree.leaves(jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), first, other))]
    assert max(unlike) > 0


def test_the_future_is_not_seen():
    tokens = random_tokens(2, 12)
    changed = tokens.at[:, 7].add(1) % CONFIG.vocab_size
    before, after = call(build(), tokens), call(build(), changed)
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert jnp.all(jnp.any(before[:, 7:] != after[:, 7:], axis=-1))


def test_decoding_step_by_step_equals_one_call():
    tokens = random_tokens(2, 13)
    cache, pieces = build().init_cache(2, 16), []
    for start, stop in [(0, 10), (10, 11), (11, 12), (12, 13)]:
        logits, cache = decode(build(), tokens[:, start:stop], cache)
        pieces.append(logits)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), call(build(), tokens), atol=2e-5)


def test_scanned_layers_equal_the_layers_one_by_one():
    """The scan against a plain loop over the same parameters, values and gradients."""
    model, tokens = build(), random_tokens(2, 9)

    def unrolled(model, tokens):
        x = jnp.take(model.embedding[...], tokens, axis=0) * CONFIG.dim**0.5
        for period in range(2):
            for stacked in model.periods:
                x = jax.tree.map(lambda leaf: leaf[period], stacked)(x)  # noqa: B023
        (last,) = model.remainder
        return model.final_norm(last(x)) @ model.embedding[...].T

    cotangent = jax.random.normal(jax.random.key(3), (2, 9, CONFIG.vocab_size))

    @functools.partial(jax.jit, static_argnums=0)
    def run(function, model):
        logits, vjp = jax.vjp(lambda model: function(model, tokens), model)
        return logits, vjp(cotangent)

    got, wanted = run(TransformerLM.__call__, model), run(unrolled, model)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=1e-4, rtol=1e-4), got, wanted)


def count(jaxpr, counts=None):
    """How often each primitive occurs in a jaxpr, bodies of loops counted once."""
    counts = collections.Counter() if counts is None else counts
    for equation in jaxpr.eqns:
        counts[equation.primitive.name] += 1
        for inner in jax.core.jaxprs_in_params(equation.params):
            count(inner, counts)
    return counts


def gradient_primitives(**changes):
    config = dataclasses.replace(CONFIG, **changes)
    model = nnx.eval_shape(lambda: TransformerLM(config, rngs=nnx.Rngs(0)))
    return count(jax.make_jaxpr(jax.grad(loss_of))(model, random_tokens(1, 8)).jaxpr)


def test_the_program_does_not_grow_with_depth():
    shallow, deep = gradient_primitives(num_layers=4), gradient_primitives(num_layers=12)
    assert shallow == deep
    assert sum(gradient_primitives(num_layers=5).values()) > sum(deep.values())


def test_remat_recomputes_what_it_says():
    """Matmuls in the gradient of one layer, beside those of the logits (1 forward, 2 backward)."""
    one_layer = dict(num_layers=1, pattern=("global",), mixers={"global": CONFIG.mixers["global"]})
    dots = {remat: gradient_primitives(remat=remat, **one_layer)["dot_general"] for remat in ("none", "dots", "full")}
    projections, attention_forward, attention_backward = 7, 2, 5
    assert dots["none"] == 3 + 3 * projections + attention_forward + attention_backward
    assert dots["dots"] == dots["none"] + attention_forward
    # The down projection's output is not needed again.
    assert dots["full"] == dots["none"] + attention_forward + projections - 1


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_no_gradient(remat):
    tokens = random_tokens(1, 8)
    recomputing = nnx.merge(nnx.graphdef(build(dataclasses.replace(CONFIG, remat=remat))), nnx.state(build()))
    wanted, got = (nnx.state(jax.jit(jax.grad(loss_of))(model, tokens)) for model in (build(), recomputing))
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=1e-5, rtol=1e-5), got, wanted)


def test_initial_values_are_what_the_docstring_says():
    config = dataclasses.replace(CONFIG, dim=64, mlp_dim=96, num_layers=9, vocab_size=512, tie_embeddings=False)
    model = build(config)
    residual_scale = 1 / np.sqrt(2 * 9)
    block = model.periods[1]
    wanted = {
        "embedding": (model.embedding, 64**-0.5),
        "unembedding": (model.unembedding, 64**-0.5),
        "q": (block.mixer.q.kernel, 64**-0.5),
        "v": (block.mixer.v.kernel, 64**-0.5),
        "out": (block.mixer.out.kernel, 64**-0.5 * residual_scale),
        "gate": (block.mlp.gate.kernel, 64**-0.5),
        "down": (block.mlp.down.kernel, 96**-0.5 * residual_scale),
        "remainder down": (model.remainder[0].mlp.down.kernel, 96**-0.5 * residual_scale),
    }
    for name, (param, deviation) in wanted.items():
        assert np.std(param[...]) == pytest.approx(deviation, rel=0.05), name
        assert np.max(np.abs(param[...])) < 2.4 * deviation, f"{name} is not truncated"
    assert jnp.all(model.final_norm.scale[...] == 1)
    assert not jnp.any(block.mixer.q.kernel[0] == block.mixer.q.kernel[1]), "periods share initial values"
    loss = loss_of(model, random_tokens(2, 12)) / 24
    assert abs(loss - np.log(512)) < 1


def test_dtypes_are_what_the_config_says():
    config = dataclasses.replace(CONFIG, dtype="bfloat16", param_dtype="float16", tie_embeddings=False)
    model = build(config)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float16")}
    jaxpr = jax.make_jaxpr(jax.grad(lambda model: loss_of(model, random_tokens(1, 8))))(model)
    operands = {
        v.aval.dtype.name for e in equations(jaxpr.jaxpr) if e.primitive.name == "dot_general" for v in e.invars
    }
    assert operands == {"bfloat16"}
    assert jax.eval_shape(model, random_tokens(1, 8)).dtype == jnp.float32
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model.init_cache(1, 4))} == {"bfloat16", "int32"}


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.core.jaxprs_in_params(equation.params):
            yield from equations(inner)


def test_logits_projection_gradient_is_that_of_the_matmul():
    model, tokens = build(dataclasses.replace(CONFIG, num_layers=1, tie_embeddings=False)), random_tokens(2, 9)
    cotangent = jax.random.normal(jax.random.key(4), (2, 9, CONFIG.vocab_size))
    gradient = jax.jit(lambda model: jax.vjp(lambda m: m(tokens), model)[1](cotangent)[0])(model)
    hidden = jax.jit(lambda m: m.final_norm(m.remainder[0](m.embedding[...][tokens] * CONFIG.dim**0.5)))(model)
    np.testing.assert_allclose(
        gradient.unembedding[...], jnp.einsum("btv,btd->vd", cotangent, hidden), atol=1e-4, rtol=1e-4
    )


def test_soft_cap_bounds_the_logits():
    capped = build(dataclasses.replace(CONFIG, logits_soft_cap=0.5))
    tokens = random_tokens(1, 8)
    np.testing.assert_allclose(call(capped, tokens), 0.5 * jnp.tanh(call(build(), tokens) / 0.5), atol=1e-5)


def test_tied_and_untied_embeddings():
    assert build().unembedding is None
    untied = build(dataclasses.replace(CONFIG, tie_embeddings=False))
    tied_size, untied_size = (sum(leaf.size for leaf in jax.tree.leaves(model)) for model in (build(), untied))
    assert untied_size == tied_size + CONFIG.vocab_size * CONFIG.dim


def test_an_unknown_token_is_loud():
    assert jnp.all(jnp.isnan(call(build(), random_tokens(1, 8).at[0, 0].set(CONFIG.vocab_size))[0, 0]))


@pytest.mark.parametrize("num_layers", [1, 2])
def test_fewer_layers_than_two_periods(num_layers):
    model = build(dataclasses.replace(CONFIG, num_layers=num_layers))
    tokens = random_tokens(1, 6)
    cache = model.init_cache(1, 6)
    np.testing.assert_allclose(decode(model, tokens, cache)[0], call(model, tokens), atol=2e-5)


def test_schedules_are_shared_by_mask():
    """Two mixers of one mask take one schedule between them; another mask or other blocks take their own."""
    attention = AttentionConfig(num_heads=2, block_q=4, block_kv=4)
    mixers = {
        "a": attention,
        "b": dataclasses.replace(attention, rope_theta=50.0),
        "c": dataclasses.replace(attention, window=2),
        "d": dataclasses.replace(attention, block_kv=8),
    }
    config = dataclasses.replace(CONFIG, mixers=mixers, pattern=tuple(mixers), num_layers=4)
    model = nnx.eval_shape(lambda: TransformerLM(config, rngs=nnx.Rngs(0)))
    assert len(model._schedules(8, None, None)) == 3


def test_configs_compare_and_hash_by_value():
    same = dataclasses.replace(CONFIG, mixers=dict(reversed(CONFIG.mixers.items())), pattern=list(CONFIG.pattern))
    assert same == CONFIG and hash(same) == hash(CONFIG)
    other = dataclasses.replace(CONFIG, mixers={**CONFIG.mixers, "local": AttentionConfig(num_heads=4)})
    assert other != CONFIG and hash(other) != hash(CONFIG)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(dim=0), r"dim: got 0, wanted a number >= 1"),
        (dict(num_layers=0), r"num_layers: got 0, wanted a number >= 1"),
        (dict(mlp_dim=-1), r"mlp_dim: got -1, wanted a number >= 1"),
        (dict(vocab_size=0), r"vocab_size: got 0, wanted null or a number >= 1"),
        (dict(pattern=()), r"pattern: got no names, wanted at least one; name a mixer"),
        (dict(pattern=("locl",)), r"pattern: got 'locl', wanted names of mixers \(local, global\); define it under"),
        (
            dict(pattern=("local",)),
            r"mixers: 'global' is not in pattern \('local',\), so no layer would use it; remove",
        ),
        (dict(logits_soft_cap=-1.0), r"logits_soft_cap: got -1.0, wanted null or a number > 0"),
        (dict(norm_eps=0.0), r"norm_eps: got 0.0, wanted a number > 0; 1e-6 is customary"),
    ],
)
def test_config_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


def test_a_model_needs_its_vocabulary():
    with pytest.raises(
        ValueError, match=r"vocab_size: got None, wanted the number of token ids; set it with dataclass"
    ):
        TransformerLM(dataclasses.replace(CONFIG, vocab_size=None), rngs=nnx.Rngs(0))
