"""What a layer keeps by the names of its tensors: the same gradients, fewer bytes, and no attention run twice."""

import collections
import copy
import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr

from longctx import (
    AttentionConfig,
    DeltaConfig,
    GatedDeltaConfig,
    GlaConfig,
    LightningConfig,
    LinearConfig,
    Mamba2Config,
    MeshConfig,
    MixerConfig,
    MlaConfig,
    MobaConfig,
    ModelConfig,
    NsaConfig,
    ReglaConfig,
    RetentionConfig,
    TransformerLM,
    cross_entropy,
    make_mesh,
)
from longctx.context_parallel import AttentionSharding
from longctx.remat import ATTENTION, BLOCK_NAMES, MIXER_OUTPUT, MLP_HIDDEN, NAMES, QKV, RESIDUAL
from longctx.sharding import batch_sharding

MIXERS = {
    "attention": AttentionConfig(num_heads=4, num_kv_heads=2, qk_norm=True),
    "mla": MlaConfig(num_heads=2, kv_rank=8, head_dim=8, rope_dim=4, value_dim=8),
    "moba": MobaConfig(num_heads=4, num_kv_heads=2, chunk_size=4, top_k=2),
    "nsa": NsaConfig(
        num_heads=4, num_kv_heads=2, compress_block=4, compress_stride=2, block_size=4, num_blocks=3, window=4
    ),
    "linear": LinearConfig(num_heads=2),
    "lightning": LightningConfig(num_heads=2),
    "retention": RetentionConfig(num_heads=2),
    "gla": GlaConfig(num_heads=2),
    "regla": ReglaConfig(num_heads=2),
    "mamba2": Mamba2Config(num_heads=2),
    "delta": DeltaConfig(num_heads=2),
    "gated_delta": GatedDeltaConfig(num_heads=2),
}
SAVED = dict.fromkeys((QKV, ATTENTION, MIXER_OUTPUT, MLP_HIDDEN), "save")
OFFLOADED = dict.fromkeys((RESIDUAL, QKV, ATTENTION, MIXER_OUTPUT, MLP_HIDDEN), "offload")
LENGTH = 16


def config_of(mixer: MixerConfig, **changes) -> ModelConfig:
    changes = dict(num_layers=2, dtype="float32") | changes
    return ModelConfig(vocab_size=29, dim=16, mlp_dim=24, mixers={"only": mixer}, pattern=("only",), **changes)


@functools.cache
def build(config):
    abstract = nnx.eval_shape(lambda: TransformerLM(config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(0.4 * rng.standard_normal(leaf.shape), leaf.dtype), abstract)


def loss_of(model, tokens):
    return cross_entropy(model(tokens), tokens, jnp.ones(tokens.shape)).loss_sum


TOKENS = jax.random.randint(jax.random.key(0), (2, LENGTH), 0, 29)


def gradient(config):
    return jax.tree.leaves(jax.jit(jax.grad(loss_of))(build(config), TOKENS))


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        is_jaxpr = lambda x: isinstance(x, Jaxpr | ClosedJaxpr)  # noqa: E731
        for inner in filter(is_jaxpr, jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr)):
            yield from equations(inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner)


def gradient_equations(config):
    return list(equations(jax.make_jaxpr(jax.grad(loss_of))(build(config), TOKENS).jaxpr))


def recomputed_attention(config):
    """Equations of an attention op's forward pass that the backward pass runs again."""
    backward = (e for e in gradient_equations(config) if e.params.get("differentiated"))
    return [
        equation
        for checkpoint in backward
        for equation in equations(checkpoint.params["jaxpr"])
        if re.search(r"_(forward|states)\.\w+", str(equation.source_info.name_stack))
    ]


def residual_bytes(config):
    """Bytes of what the forward pass leaves for the backward pass, by where they lie."""
    loss = functools.partial(loss_of, tokens=TOKENS)
    jaxpr = jax.make_jaxpr(lambda model: jax.vjp(loss, model)[1])(build(config))
    by_space = collections.Counter()
    for aval in jaxpr.out_avals:
        by_space[aval.memory_space.name.lower()] += aval.size * aval.dtype.itemsize
    return by_space


def test_every_mixer_is_here():
    assert MIXERS.keys() == MixerConfig.variants().keys() and all(kind == c.kind for kind, c in MIXERS.items())


def test_attention_that_is_kept_is_not_run_again():
    check_not_run_again("attention")


@pytest.mark.slow
@pytest.mark.parametrize("kind", MIXERS)
def test_attention_that_is_kept_is_not_run_again_by_any_mixer(kind):
    check_not_run_again(kind)


def check_not_run_again(kind):
    config = config_of(MIXERS[kind], num_layers=1)
    named = {e.params["name"] for e in gradient_equations(config) if e.primitive.name == "name"}
    assert named == MIXERS[kind].tensor_names
    assert recomputed_attention(dataclasses.replace(config, remat="full"))
    for keeping in ("save", "offload"):
        assert not recomputed_attention(dataclasses.replace(config, remat={ATTENTION: keeping}))


def test_matmuls_that_are_run_again():
    """Of a layer of softmax attention: those whose results are neither kept nor left unread."""

    def matmuls(remat):
        config = config_of(MIXERS["attention"], num_layers=1, remat=remat)
        return collections.Counter(e.primitive.name for e in gradient_equations(config))["dot_general"]

    none = matmuls("none")
    assert matmuls({ATTENTION: "save"}) == none + 6  # q, k, v, out, gate, up; down's result is not read again
    assert matmuls({ATTENTION: "save", QKV: "offload"}) == none + 3
    assert matmuls({ATTENTION: "save", QKV: "save", MLP_HIDDEN: "save"}) == none + 1
    assert matmuls(SAVED) == matmuls(OFFLOADED) == none
    assert matmuls(dict.fromkeys(SAVED, "recompute")) == matmuls({}) == matmuls("full")


def test_what_is_recomputed_is_held_apart_where_no_loop_does():
    """XLA would else find the recomputation's results in the forward pass, and keep those. A layer is held as a whole,
    its MLP's product in it: what is held twice is not fetched from the host ahead."""

    def held(*, remat, scan_layers):
        config = config_of(MIXERS["attention"], remat=remat, scan_layers=scan_layers)
        equations = [e for e in gradient_equations(config) if "prevent_cse" in e.params]
        is_product = [len(e.params["jaxpr"].eqns) < 30 for e in equations]
        assert any(is_product) and all(is_product) == (remat == "none")
        return {(product, e.params["prevent_cse"]) for product, e in zip(is_product, equations, strict=True)}

    assert held(remat="none", scan_layers=True) == {(True, False)}
    assert held(remat="none", scan_layers=False) == {(True, True)}
    assert held(remat="full", scan_layers=True) == {(True, False), (False, False)}
    assert held(remat="full", scan_layers=False) == {(True, False), (False, True)}


def test_bytes_that_are_kept():
    """A token and layer of the small model, float32: x 16, q 16, k 8, v 8, out 16 and lse 4, y 16, gate and up 24."""
    values = {RESIDUAL: 16, QKV: 32, ATTENTION: 20, MIXER_OUTPUT: 16, MLP_HIDDEN: 48}
    config = config_of(MIXERS["attention"])
    of_value = 4 * config.num_layers * TOKENS.size
    full = residual_bytes(dataclasses.replace(config, remat="full"))
    assert full.keys() == {"device"}
    sizes = {name: size * of_value for name, size in values.items()}
    saved = residual_bytes(dataclasses.replace(config, remat=SAVED))
    assert saved == {"device": full["device"] + sum(sizes[name] for name in SAVED)}
    one = residual_bytes(dataclasses.replace(config, remat={ATTENTION: "offload", QKV: "save"}))
    assert one == {"device": full["device"] + sizes[QKV], "host": sizes[ATTENTION]}
    everything = residual_bytes(dataclasses.replace(config, remat=OFFLOADED))
    # Of the inputs of layers the device then keeps nothing.
    assert everything == {"device": full["device"] - sizes[RESIDUAL], "host": sum(sizes.values())}


def test_gradients_are_those_without():
    config = config_of(MIXERS["attention"])
    got, want = gradient(dataclasses.replace(config, remat=OFFLOADED)), gradient(config)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=1e-4, rtol=1e-4), got, want)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MIXERS)
def test_gradients_are_those_without_for_every_choice(kind):
    config = config_of(MIXERS[kind])
    want = gradient(config)
    choices = [{name: keeping} for name, keeping in itertools.product(NAMES, ("save", "offload"))]
    for remat in ("dots", "full", SAVED, OFFLOADED, *choices):
        got = gradient(dataclasses.replace(config, remat=remat))
        jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=1e-3, rtol=1e-3), got, want)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ring", "all_gather", "ulysses"])
def test_over_devices(strategy):
    """Nothing of the attention's forward pass is run or sent again, and gradients are the same."""
    mesh = make_mesh(MeshConfig(data=2, context_inner=2, tensor=2))
    config = config_of(MIXERS["attention"])
    sharding = AttentionSharding(strategy=strategy)
    with jax.set_mesh(mesh):
        tokens = jax.device_put(TOKENS, batch_sharding(mesh))

        def compiled(remat):
            changed = dataclasses.replace(config, remat=remat)
            graphdef, _ = nnx.split(nnx.eval_shape(lambda: TransformerLM(changed, sharding=sharding, rngs=nnx.Rngs(0))))
            model = nnx.merge(graphdef, nnx.state(build(config)))
            program = jax.jit(jax.grad(loss_of)).lower(model, tokens).compile()
            again = re.findall(r"rematted_computation[^\"]*_forward\.", program.as_text())
            return jax.tree.leaves(program(model, tokens)), bool(again)

        want, _ = compiled("none")
        _, again = compiled("full")
        assert again
        got, again = compiled({RESIDUAL: "offload", ATTENTION: "offload"})
        assert not again
        jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=1e-4, rtol=1e-4), got, want)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unnamed(AttentionConfig):
    """A mixer that names nothing of its own."""

    @property
    def tensor_names(self):
        return BLOCK_NAMES


@pytest.mark.parametrize(
    ("mixer", "remat", "message"),
    [
        (
            MIXERS["attention"],
            {"q": "save"},
            r"remat: got the name 'q', wanted names of tensors \(residual, qkv, attention, mixer_output, mlp_hidden\)",
        ),
        (
            Unnamed(num_heads=4),
            {"qkv": "save"},
            "remat: got the name 'qkv', which no layer of the mixers only has, wanted one of residual, mixer_output, "
            "mlp_hidden; remove it",
        ),
        (MIXERS["attention"], {"residual": "recompute"}, "remat: got residual=recompute, wanted save or offload"),
    ],
)
def test_wrong_settings_are_refused(mixer, remat, message):
    with pytest.raises(ValueError, match=message):
        config_of(mixer, remat=remat)


@pytest.mark.parametrize(
    ("remat", "message"),
    [
        (
            "ful",
            "remat: got 'ful', wanted one of none, dots, full, or save, offload or recompute by the name of a tensor",
        ),
        (None, "remat: got None, wanted one of none, dots, full"),
        ({"qkv": "keep"}, "remat: got qkv='keep', wanted one of save, offload, recompute"),
    ],
)
def test_misspelt_settings_are_refused(remat, message):
    config = copy.copy(config_of(MIXERS["attention"]))
    object.__setattr__(config, "remat", remat)  # the constructor's types are checked in tests
    with pytest.raises(ValueError, match=message):
        config.__post_init__()
