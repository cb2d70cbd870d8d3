"""Low-rank adapters: where they are, that they start as nothing, and what they add up to."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx import AttentionConfig, LoraConfig, ModelConfig, TransformerLM, make_mesh
from longctx.lora import ADAPTERS, is_adapter, merged
from longctx.sharding import MeshConfig, param_shardings
from train.state import frozen, together, trained

CONFIG = ModelConfig(
    vocab_size=29,
    dim=16,
    num_layers=2,
    mlp_dim=24,
    mixers={"softmax": AttentionConfig(num_heads=4, num_kv_heads=2)},
    pattern=("softmax",),
    dtype="float32",
)
LORA = LoraConfig(rank=3, alpha=6.0)
WITH = dataclasses.replace(CONFIG, lora=LORA)
TOKENS = jax.random.randint(jax.random.key(0), (2, 12), 0, 29)
call = jax.jit(TransformerLM.__call__)


def params_of(config, seed=0):
    model = jax.jit(lambda: TransformerLM(config, rngs=nnx.Rngs(seed)))()
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def logits(config, params):
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: TransformerLM(config, rngs=nnx.Rngs(0))))
    return call(nnx.merge(graphdef, params), TOKENS)


@pytest.fixture(scope="module")
def adapted():
    return params_of(WITH)


def test_starts_as_the_model_without(adapted):
    """The same values where that has parameters, drawn apart, and bit by bit the same logits."""
    plain = params_of(CONFIG)
    jax.tree.map(np.testing.assert_array_equal, frozen(adapted), plain)
    np.testing.assert_array_equal(logits(WITH, adapted), logits(CONFIG, plain))
    flat = {path: leaf for path, leaf in nnx.traversals.flatten_mapping(trained(adapted)).items()}
    assert {path[-1] for path in flat} == set(ADAPTERS) and all(map(is_adapter, flat))
    for path, leaf in flat.items():
        assert leaf.dtype == jnp.float32 and bool(jnp.any(leaf)) == (path[-1] == "lora_a")
    drawn = [np.ravel(leaf)[:3].tolist() for path, leaf in flat.items() if path[-1] == "lora_a"]
    assert len({tuple(values) for values in drawn}) == len(drawn)  # no two alike
    kernel = adapted["periods"][0]["mixer"]["q"]["lora_a"]
    np.testing.assert_allclose(np.std(kernel), 16**-0.5, rtol=0.3)
    assert jax.tree.structure(together(trained(adapted), frozen(adapted))) == jax.tree.structure(adapted)


def test_merged_weights_compute_the_same(adapted):
    rng = np.random.default_rng(0)
    learned = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype), trained(adapted))
    params = together(learned, frozen(adapted))
    want = logits(WITH, params)
    plain = merged(params, LORA)
    assert jax.tree.structure(plain) == jax.tree.structure(frozen(adapted))
    np.testing.assert_allclose(logits(CONFIG, plain), want, atol=2e-4)
    assert np.abs(want - logits(WITH, adapted)).max() > 0.01
    kernel, q = plain["periods"][0]["mixer"]["q"]["kernel"], params["periods"][0]["mixer"]["q"]
    by_hand = q["kernel"] + 2.0 * np.einsum("ldr,lrnh->ldnh", q["lora_a"], q["lora_b"])
    np.testing.assert_allclose(kernel, by_hand, atol=1e-5)


def test_only_the_targets_have_adapters():
    config = dataclasses.replace(WITH, lora=LoraConfig(rank=2, alpha=1.0, targets=("v", "down")))
    abstract = nnx.eval_shape(lambda: TransformerLM(config, rngs=nnx.Rngs(0)))
    paths = nnx.traversals.flatten_mapping(nnx.to_pure_dict(nnx.state(abstract, nnx.Param)))
    assert {path[-2] for path in paths if is_adapter(path)} == {"v", "down"}


def test_adapters_are_split_as_the_dims_of_their_matrices():
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    abstract = nnx.eval_shape(lambda: TransformerLM(dataclasses.replace(WITH, mixers=CONFIG.mixers), rngs=nnx.Rngs(0)))
    shardings = nnx.to_pure_dict(param_shardings(nnx.state(abstract, nnx.Param), mesh))
    q, down = shardings["periods"][0]["mixer"]["q"], shardings["periods"][0]["mlp"]["down"]
    q, down = ({name: tuple(sharding.spec) for name, sharding in of.items()} for of in (q, down))
    embed = ("fsdp", "context_outer", "context_inner")
    assert q["kernel"] == (None, embed, "tensor", None)
    assert (q["lora_a"], q["lora_b"]) == ((None, embed, None), (None, None, "tensor", None))
    assert (down["lora_a"], down["lora_b"]) == ((None, "tensor", None), (None, None, embed))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(rank=0, alpha=1.0), "rank: got 0, wanted a number >= 1"),
        (dict(rank=1, alpha=0.0), "alpha: got 0.0, wanted a number > 0"),
        (dict(rank=1, alpha=1.0, targets=()), "targets: got no names"),
        (dict(rank=1, alpha=1.0, targets="gate"), r"targets: got 'gate', wanted a list of names; write \[gate\]"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**options)


def test_a_target_that_is_no_projection_is_refused():
    config = dataclasses.replace(CONFIG, lora=LoraConfig(rank=1, alpha=1.0, targets=("q", "norm")))
    with pytest.raises(
        ValueError, match="lora.targets: got 'norm', wanted names of projections .*down, gate, k, out, q"
    ):
        nnx.eval_shape(lambda: TransformerLM(config, rngs=nnx.Rngs(0)))
