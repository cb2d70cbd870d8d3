"""What a layer keeps by the names of its tensors: the same gradients, fewer bytes, and no attention run twice."""

import collections
import dataclasses
import functools
import itertools

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
    MobaConfig,
    ModelConfig,
    NsaConfig,
    ReglaConfig,
    RetentionConfig,
    TransformerLM,
    cross_entropy,
    make_mesh,
)
from longctx.remat import ATTENTION, BLOCK_NAMES, MIXER_OUTPUT, MLP_HIDDEN, NAMES, QKV, RESIDUAL

MIXERS = {
    "attention": AttentionConfig(num_heads=4, num_kv_heads=2, qk_norm=True),
    "moba": MobaConfig(num_heads=4, num_kv_heads=2, chunk_size=4, top_k=2),
    "nsa": NsaConfig(num_heads=4, num_kv_heads=2, compress_block=4, compress_stride=2, block_size=4, num_blocks=3, window=4),
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
    return jax.jit(jax.grad(loss_of))(build(config), TOKENS)


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        is_jaxpr = lambda x: isinstance(x, Jaxpr | ClosedJaxpr)  # noqa: E731
        for inner in filter(is_jaxpr, jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr)):
            yield from equations(inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner)


def gradient_equations(config):
    return list(equations(jax.make_jaxpr(jax.grad(loss_of))(build(config), TOKENS).jaxpr))


if __name__ == "__main__":
    for name, mixer in MIXERS.items():
        for remat in ("full", SAVED, {"attention": "save"}, OFFLOADED):
            eqs = gradient_equations(config_of(mixer, remat=remat))
            names = {e.params["name"] for e in eqs if e.primitive.name == "name"}
            out = []
            for e in eqs:
                if e.primitive.name in ("checkpoint", "remat2", "remat") and e.params["differentiated"]:
                    for i in equations(e.params["jaxpr"]):
                        s = str(i.source_info.name_stack)
                        import re
                        out += re.findall(r"\w+_(?:forward|states)\.\w+", s)
            print(name, remat if isinstance(remat, str) else len(remat), sorted(names), collections.Counter(out), collections.Counter(e.primitive.name for e in eqs)["dot_general"])
