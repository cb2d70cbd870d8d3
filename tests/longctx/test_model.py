"""The language model: documents, decoding, periods, rematerialisation, initial values."""

import collections
import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr

from longctx import AttentionConfig, Block, ModelConfig, TransformerLM, cross_entropy
from longctx import attention as attention_module
from longctx.context_parallel import api
from longctx.unembedding import _project_float32
from pallas_kernels import make_schedule
from pallas_kernels.blockwise import xla

CONFIG = ModelConfig(
    vocab_size=29,
    dim=16,
    num_layers=4,
    mlp_dim=24,
    mixers={
        "local": AttentionConfig(num_heads=4, num_kv_heads=2, window=3, qk_norm=True, block_q=4, block_kv=4),
        "global": AttentionConfig(num_heads=2, rope_theta=500.0, block_q=4, block_kv=4),
    },
    pattern=("local", "global"),
    dtype="float32",
)
ONE_MIXER = dict(pattern=("global",), mixers={"global": CONFIG.mixers["global"]})
call = jax.jit(TransformerLM.__call__)
decode = jax.jit(TransformerLM.decode)


def abstract(config):
    return nnx.eval_shape(lambda: TransformerLM(config, rngs=nnx.Rngs(0)))


@functools.cache
def build(config=CONFIG):
    """A model with random values of numpy's: compiling the initialisers takes seconds, and gains must not all be 1."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(0.4 * rng.standard_normal(leaf.shape), leaf.dtype), abstract(config))


def random_tokens(batch_size, length, seed=0):
    return jax.random.randint(jax.random.key(seed), (batch_size, length), 0, CONFIG.vocab_size)


def loss_of(model, tokens):
    return cross_entropy(model(tokens), tokens, jnp.ones(tokens.shape)).loss_sum


PACKED_LENGTHS = (6, 1, 6)
NUM_PADDING = 2


def packed():
    """Two equal rows of three documents, then padding; positions restart in the first row and run on in the second."""
    segments = np.repeat([0, 1, 2, -1], [*PACKED_LENGTHS, NUM_PADDING])
    restarting = np.concatenate([np.arange(length) for length in (*PACKED_LENGTHS, NUM_PADDING)])
    positions = np.stack([restarting, np.arange(len(segments))])
    tokens = jnp.tile(random_tokens(1, len(segments)), (2, 1))
    return tokens, jnp.asarray(positions, jnp.int32), jnp.asarray(np.tile(segments, (2, 1)), jnp.int32)


def test_packed_documents_equal_each_document_alone():
    tokens, positions, segment_ids = packed()
    logits = call(build(), tokens, positions=positions, segment_ids=segment_ids)
    start = 0
    for length in PACKED_LENGTHS:
        document = slice(start, start + length)
        np.testing.assert_allclose(logits[:, document], call(build(), tokens[:, document]), atol=5e-5)
        start += length


def test_padding_is_finite_and_changes_no_gradient():
    tokens, positions, segment_ids = packed()
    has_target = (segment_ids[:, :-1] == segment_ids[:, 1:]) & (segment_ids[:, :-1] >= 0)

    @jax.jit
    def logits_and_gradient(model, tokens):
        def loss(model):
            logits = model(tokens, positions=positions, segment_ids=segment_ids)
            return cross_entropy(logits[:, :-1], tokens[:, 1:], has_target.astype(jnp.float32)).loss_sum, logits

        gradient, logits = jax.grad(loss, has_aux=True)(model)
        return logits, gradient

    model = build(dataclasses.replace(CONFIG, num_layers=2))
    first = logits_and_gradient(model, tokens)
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(first))
    for other in ((tokens + 5) % CONFIG.vocab_size, -1, CONFIG.vocab_size):
        other_padding = jnp.where(segment_ids < 0, other, tokens)
        gradient, gradient_of_other = first[1], logits_and_gradient(model, other_padding)[1]
        jax.tree.map(np.testing.assert_array_equal, gradient, gradient_of_other)


def test_gradients_of_the_embedding_are_those_of_the_rows_that_are_read():
    tokens, _, segment_ids = packed()
    model = build()

    def loss(x):
        return jnp.sum(jnp.where((segment_ids >= 0)[..., None], jnp.sin(x), 0.0))

    got = jax.grad(lambda model: loss(model._embed(tokens, segment_ids)))(model).embedding[...]
    wanted = jax.grad(lambda table: loss(jnp.take(table, tokens, axis=0)))(model.embedding[...])
    np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)


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
    model, tokens = build(dataclasses.replace(CONFIG, num_layers=5)), random_tokens(2, 9)
    layer = jax.jit(Block.__call__)
    x = jnp.take(model.embedding[...], tokens, axis=0)
    for period in range(2):
        for stacked in model.periods:
            x = layer(jax.tree.map(lambda leaf, period=period: leaf[period], stacked), x)
    (last,) = model.remainder
    wanted = model.final_norm(layer(last, x)) @ model.embedding[...].T
    np.testing.assert_allclose(call(model, tokens), wanted, atol=1e-4)


@pytest.mark.slow
def test_layers_without_a_loop_compute_the_same():
    model, tokens = build(), random_tokens(2, 9)
    wanted, config = call(model, tokens), model.config
    unrolled = nnx.clone(model)
    unrolled.config = dataclasses.replace(config, scan_layers=False)
    np.testing.assert_allclose(call(unrolled, tokens), wanted, atol=1e-5)
    for of_model, steps in ((model, 1), (unrolled, config.num_periods)):
        equations = jax.make_jaxpr(TransformerLM.__call__)(of_model, tokens).eqns
        assert [
            e.params["unroll"]
            for e in equations
            if e.primitive.name == "scan" and e.params["length"] == config.num_periods
        ] == [steps]


EDGES = dataclasses.replace(CONFIG, num_layers=3, pattern=("local",), edge_layers=1, edge_mixer="global")


@pytest.mark.slow
def test_layers_at_the_edges_equal_the_layers_one_by_one():
    """One before the pattern, and one behind it and what is left of it."""
    longer = dataclasses.replace(EDGES, num_layers=5, pattern=CONFIG.pattern)
    assert longer.layers == ("global", "local", "global", "local", "global")
    assert (longer.leading, longer.num_periods, longer.remainder) == (("global",), 1, ("local", "global"))
    assert EDGES.layers == ("global", "local", "global")
    model, tokens = build(EDGES), random_tokens(2, 9)
    layer = jax.jit(Block.__call__)
    x = jnp.take(model.embedding[...], tokens, axis=0)
    stacked = [jax.tree.map(lambda leaf: leaf[0], block) for block in model.periods]
    for block in (*model.leading, *stacked, *model.remainder):
        x = layer(block, x)
    logits = call(model, tokens)
    np.testing.assert_allclose(logits, model.final_norm(x) @ model.embedding[...].T, atol=1e-4)
    decoded, _ = decode(model, tokens, model.init_cache(2, 9))
    np.testing.assert_allclose(decoded, logits, atol=2e-5)


@pytest.mark.slow
def test_a_model_with_layers_at_the_edges_goes_on():
    """Behind what was decoded, and behind a prefill."""
    config = dataclasses.replace(EDGES, num_layers=5, pattern=CONFIG.pattern)
    model, tokens = build(config), random_tokens(2, 9)
    _, decoded = decode(model, tokens[:, :8], model.init_cache(2, 9))
    prefilled = jax.jit(TransformerLM.prefill, static_argnums=2)(model, tokens[:, :8], 9)
    want = call(model, tokens)[:, 8:]
    for cache in (decoded, prefilled):
        np.testing.assert_allclose(decode(model, tokens[:, 8:], cache)[0], want, atol=2e-5)


def equations(jaxpr):
    """Every equation of a jaxpr, bodies of loops once."""
    for equation in jaxpr.eqns:
        yield equation
        is_jaxpr = lambda x: isinstance(x, Jaxpr | ClosedJaxpr)  # noqa: E731
        for inner in filter(is_jaxpr, jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr)):
            yield from equations(inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner)


def gradient_equations(**changes):
    model = abstract(dataclasses.replace(CONFIG, **changes))
    return list(equations(jax.make_jaxpr(jax.grad(loss_of))(model, random_tokens(1, 8)).jaxpr))


def gradient_primitives(**changes):
    return collections.Counter(equation.primitive.name for equation in gradient_equations(**changes))


@pytest.mark.slow
def test_the_program_does_not_grow_with_depth():
    shallow, deep = gradient_primitives(num_layers=4), gradient_primitives(num_layers=12)
    assert shallow == deep
    assert sum(gradient_primitives(num_layers=5).values()) > sum(deep.values())


def test_remat_recomputes_what_it_says():
    """Matmuls in the gradient of one layer, beside those of the logits (1 forward, 2 backward)."""
    dots = {
        remat: gradient_primitives(remat=remat, num_layers=1, **ONE_MIXER)["dot_general"]
        for remat in ("none", "dots", "full")
    }
    projections, attention_forward, attention_backward = 7, 2, 5
    assert dots["none"] == 3 + 3 * projections + attention_forward + attention_backward
    assert dots["dots"] == dots["none"] + attention_forward
    # The down projection's output is not needed again.
    assert dots["full"] == dots["none"] + attention_forward + projections - 1


@pytest.mark.slow
def test_remat_changes_no_gradient():
    def gradient(remat):
        model = build(dataclasses.replace(CONFIG, num_layers=2, remat=remat, **ONE_MIXER))
        return nnx.state(jax.jit(jax.grad(loss_of))(model, random_tokens(1, 8)))

    wanted = gradient("none")
    for remat in ("dots", "full"):
        jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=1e-4, rtol=1e-4), gradient(remat), wanted)


def test_initial_values_are_what_the_docstring_says():
    changes = dict(dim=64, mlp_dim=96, num_layers=9, vocab_size=512, tie_embeddings=False, **ONE_MIXER)
    model = jax.jit(lambda: TransformerLM(dataclasses.replace(CONFIG, **changes), rngs=nnx.Rngs(0)))()
    residual_scale = 1 / np.sqrt(2 * 9)
    (block,) = model.periods
    wanted = {
        "embedding": (model.embedding, 0.64 * 64**-0.5),
        "unembedding": (model.unembedding, 0.64 * 64**-0.5),
        "q": (block.mixer.q.kernel, 64**-0.5),
        "v": (block.mixer.v.kernel, 64**-0.5),
        "out": (block.mixer.out.kernel, 64**-0.5 * residual_scale),
        "gate": (block.mlp.gate.kernel, 64**-0.5),
        "down": (block.mlp.down.kernel, 96**-0.5 * residual_scale),
    }
    for name, (param, deviation) in wanted.items():
        assert np.std(param[...]) == pytest.approx(deviation, rel=0.05), name
        assert np.max(np.abs(param[...])) < 2.4 * deviation, f"{name} is not truncated"
    assert jnp.all(model.final_norm.scale[...] == 1)
    assert not jnp.any(block.mixer.q.kernel[0] == block.mixer.q.kernel[1]), "periods share initial values"
    loss = jax.jit(loss_of)(model, random_tokens(2, 12)) / 24
    assert abs(loss - np.log(512)) < 1


def test_dtypes_are_what_the_config_says():
    changes = dict(dtype="bfloat16", param_dtype="float16", tie_embeddings=False)
    model = abstract(dataclasses.replace(CONFIG, **changes))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model)} == {"float16"}
    matmuls = [equation for equation in gradient_equations(**changes) if equation.primitive.name == "dot_general"]
    assert {operand.aval.dtype.name for matmul in matmuls for operand in matmul.invars} == {"bfloat16"}
    assert jax.eval_shape(TransformerLM.__call__, model, random_tokens(1, 8)).dtype == jnp.float32
    cache = jax.eval_shape(lambda: model.init_cache(1, 4))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(cache)} == {"bfloat16", "int32"}


def test_logits_projection_and_its_gradients_are_those_of_the_matmul():
    keys = jax.random.split(jax.random.key(4), 3)
    shapes = (2, 3, 8), (5, 8), (2, 3, 5)
    x, table, cotangent = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    logits, vjp = jax.vjp(_project_float32, x, table)
    wanted, wanted_vjp = jax.vjp(lambda x, table: x @ table.T, x, table)
    np.testing.assert_allclose(logits, wanted, rtol=1e-5)
    for gradient, wanted in zip(vjp(cotangent), wanted_vjp(cotangent), strict=True):
        np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_soft_cap_bounds_the_logits():
    capped = build(dataclasses.replace(CONFIG, logits_soft_cap=0.5))
    tokens = random_tokens(1, 8)
    np.testing.assert_allclose(call(capped, tokens), 0.5 * jnp.tanh(call(build(), tokens) / 0.5), atol=1e-5)


def test_tied_and_untied_embeddings():
    tied, untied = abstract(CONFIG), abstract(dataclasses.replace(CONFIG, tie_embeddings=False))
    assert tied.unembedding is None
    tied_size, untied_size = (sum(leaf.size for leaf in jax.tree.leaves(model)) for model in (tied, untied))
    assert untied_size == tied_size + CONFIG.vocab_size * CONFIG.dim


@pytest.mark.parametrize("unknown", [CONFIG.vocab_size, -1])
def test_an_unknown_token_is_loud(unknown):
    tokens = random_tokens(1, 8).at[0, 0].set(unknown)
    assert jnp.all(jnp.isnan(call(build(), tokens)[0, 0]))
    assert jnp.all(jnp.isnan(decode(build(), tokens, build().init_cache(1, 8))[0][0, 0]))


def test_fewer_layers_than_a_period():
    model = build(dataclasses.replace(CONFIG, num_layers=1))
    tokens = random_tokens(1, 6)
    cache = model.init_cache(1, 6)
    np.testing.assert_allclose(decode(model, tokens, cache)[0], call(model, tokens), atol=2e-5)


def test_one_schedule_is_built_for_each_distinct_mask(monkeypatch):
    """Two mixers of one mask take one schedule between them; another mask or other blocks take their own."""
    attention = AttentionConfig(num_heads=2, block_q=4, block_kv=4)
    mixers = {
        "a": attention,
        "b": dataclasses.replace(attention, rope_theta=50.0),
        "c": dataclasses.replace(attention, window=2),
        "d": dataclasses.replace(attention, block_kv=8),
    }
    built = []

    def build(mask, *args, block_sizes, **kwargs):
        built.append((mask, block_sizes))
        return make_schedule(mask, *args, block_sizes=block_sizes, **kwargs)

    # Where the model builds schedules, and where the op would build what it is not given.
    monkeypatch.setattr(api, "make_schedule", build)
    monkeypatch.setattr(xla, "make_schedule", build)
    model = abstract(dataclasses.replace(CONFIG, mixers=mixers, pattern=tuple(mixers), num_layers=9))
    jax.make_jaxpr(TransformerLM.__call__)(model, random_tokens(1, 8))
    assert len(built) == len(set(built)) == 3
    assert set(built) == {(mixers[name].mask, mixers[name].block_sizes) for name in "acd"}


def test_configs_compare_and_hash_by_value():
    same = dataclasses.replace(CONFIG, mixers=dict(reversed(CONFIG.mixers.items())), pattern=("local", "global"))
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
        (dict(edge_layers=-1, edge_mixer="local"), r"edge_layers: got -1, wanted a number of layers >= 0"),
        (dict(edge_layers=1), r"edge_mixer: got None with edge_layers=1, wanted a mixer and layers for it, or neither"),
        (dict(edge_mixer="local"), r"edge_mixer: got 'local' with edge_layers=0, wanted a mixer and layers for it"),
        (dict(edge_layers=1, edge_mixer="locl"), r"edge_mixer: got 'locl', wanted a name of a mixer \(local, global\)"),
        (
            dict(edge_layers=2, edge_mixer="local"),
            r"edge_layers: got 2 at either end of num_layers=4, which leaves none for the pattern; take fewer",
        ),
        (dict(logits_soft_cap=-1.0), r"logits_soft_cap: got -1.0, wanted null or a finite number > 0"),
        (dict(logits_soft_cap=float("inf")), r"logits_soft_cap: got inf, wanted null or a finite number > 0"),
        (dict(norm_eps=0.0), r"norm_eps: got 0.0, wanted a number > 0; 1e-6 is customary"),
    ],
)
def test_config_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


def test_a_pattern_that_is_a_string_is_refused():
    config = copy.copy(CONFIG)
    object.__setattr__(config, "pattern", "local")  # the constructor's types are checked in tests
    with pytest.raises(ValueError, match=r"pattern: got 'local', wanted a list of names; write \[local\]"):
        config.__post_init__()


def test_a_model_needs_its_vocabulary():
    with pytest.raises(
        ValueError, match=r"vocab_size: got None, wanted the number of token ids; set it with dataclass"
    ):
        TransformerLM(dataclasses.replace(CONFIG, vocab_size=None), rngs=nnx.Rngs(0))


DROPPING = dataclasses.replace(
    CONFIG,
    num_layers=5,
    mixers=CONFIG.mixers | {"global": dataclasses.replace(CONFIG.mixers["global"], dropout=0.5, sinks=True)},
)


@pytest.mark.slow
def test_dropout_of_each_layer_is_drawn_by_its_number(monkeypatch):
    """Of the layers that drop, in the scan and behind it, and of no other; from a key for each row."""
    seeds = []

    def record(*args, dropout, **kwargs):
        if dropout is not None:
            jax.debug.callback(lambda seeds_now: seeds.append(np.asarray(seeds_now)), dropout.seeds)
        return attention(*args, **kwargs)

    attention = attention_module.sharded_attention
    monkeypatch.setattr(attention_module, "sharded_attention", record)
    keys = jax.random.split(jax.random.key(7), 2)
    config = dataclasses.replace(DROPPING, pattern=("global", "local"))
    jax.block_until_ready(jax.jit(TransformerLM.__call__)(build(config), random_tokens(2, 6), rngs=keys))
    jax.effects_barrier()
    wanted = [
        np.stack([jax.random.bits(jax.random.fold_in(key, layer), (2,), jnp.uint32) for key in keys])
        for layer in (0, 2, 4)
    ]
    assert sorted(x.tolist() for x in seeds) == sorted(x.tolist() for x in wanted)


@pytest.mark.slow
def test_dropout_in_training_is_the_same_when_recomputed():
    tokens, key = random_tokens(2, 6), jax.random.key(0)
    config = dataclasses.replace(
        DROPPING, num_layers=2, pattern=("global",), mixers={"global": DROPPING.mixers["global"]}
    )

    def gradient(config):
        graphdef, state = nnx.split(build(config))

        def loss(state):
            logits = nnx.merge(graphdef, state)(tokens, rngs=key)
            return cross_entropy(logits, tokens, jnp.ones(tokens.shape)).loss_sum

        return jax.jit(jax.grad(loss))(state)

    got, want = gradient(dataclasses.replace(config, remat="full")), gradient(config)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4), got, want)


@pytest.mark.slow
def test_dropout_is_off_after_eval_and_asks_for_a_source_before():
    model, tokens = build(DROPPING), random_tokens(2, 6)
    with pytest.raises(ValueError, match="rngs: got None in training, wanted a random source for dropout_rate=0.5"):
        model(tokens)
    without = dataclasses.replace(DROPPING.mixers["global"], dropout=0.0)
    plain = dataclasses.replace(DROPPING, mixers=DROPPING.mixers | {"global": without})
    graphdef, state = nnx.split(model)
    evaluated = nnx.merge(graphdef, state)
    evaluated.eval()
    np.testing.assert_array_equal(call(evaluated, tokens), call(build(plain), tokens))
