"""The mixer registry, the attention mixer's config and its FLOPs."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx import (
    AttentionConfig,
    DeltaConfig,
    GatedDeltaConfig,
    GlaConfig,
    LightningConfig,
    LinearConfig,
    LinearRopeScaling,
    Mamba2Config,
    MixerConfig,
    MlaConfig,
    MobaConfig,
    ModelConfig,
    NsaConfig,
    ReglaConfig,
    RetentionConfig,
    RotaryConfig,
    TransformerLM,
    forward_flops,
    masks,
    register,
)
from longctx.mixers import registry
from longctx.model_flops import flops_by_part
from pallas_kernels import BlockSizes, Tokens

NEW_MECHANISM = '''
import dataclasses

import jax.numpy as jnp
from flax import nnx

from longctx.mixers.registry import MixerConfig, register


class RunningMean(nnx.Module):
    """Mean of the tokens so far, times a learned gain."""

    def __init__(self, dim, dtype, param_dtype):
        self.gain = nnx.Param(jnp.ones((dim,), param_dtype), logical_axes=("norm",))
        self.dim, self.dtype = dim, dtype

    def __call__(self, x_BTD, *, positions=None, segment_ids=None, schedule=None):
        return self.decode(x_BTD, self.init_cache(x_BTD.shape[0], x_BTD.shape[1]))[0]

    def init_cache(self, batch_size, max_length):
        return jnp.zeros((batch_size, 1, self.dim), self.dtype), jnp.zeros((), self.dtype)

    def decode(self, x_BTD, cache):
        total, count = cache
        totals = total + jnp.cumsum(x_BTD, axis=1)
        counts = count + jnp.arange(1, x_BTD.shape[1] + 1, dtype=self.dtype)
        y_BTD = totals / counts[None, :, None] * self.gain[...].astype(self.dtype)
        return y_BTD, (totals[:, -1:], counts[-1])


@register("running_mean")
@dataclasses.dataclass(frozen=True, kw_only=True)
class RunningMeanConfig(MixerConfig):
    def build(self, dim, *, dtype, param_dtype, norm_eps, out_init_scale, sharding, rngs):
        return RunningMean(dim, dtype, param_dtype)

    def flops_by_part(self, dim, document_lengths):
        return {"gain": 2.0 * dim * float(document_lengths.sum())}
'''


@pytest.fixture
def new_mechanism(tmp_path, monkeypatch):
    """A mixer whose one file is all there is of it."""
    (tmp_path / "running_mean_mixer.py").write_text(NEW_MECHANISM)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_VARIANTS", dict(registry._VARIANTS))
    import running_mean_mixer

    yield running_mean_mixer.RunningMeanConfig
    del sys.modules["running_mean_mixer"]


def test_a_new_mechanism_lands_in_one_file(new_mechanism):
    assert MixerConfig.variants()["running_mean"] is new_mechanism
    config = ModelConfig(
        vocab_size=13,
        dim=8,
        num_layers=3,
        mlp_dim=8,
        mixers={"mean": new_mechanism(), "attention": AttentionConfig(num_heads=2)},
        pattern=("mean", "attention"),
        dtype="float32",
    )
    model = jax.jit(lambda: TransformerLM(config, rngs=nnx.Rngs(0)))()
    tokens = jax.random.randint(jax.random.key(0), (2, 6), 0, 13)
    logits, cache, pieces = jax.jit(TransformerLM.__call__)(model, tokens), model.init_cache(2, 6), []
    for start, stop in [(0, 4), (4, 6)]:
        piece, cache = jax.jit(TransformerLM.decode)(model, tokens[:, start:stop], cache)
        pieces.append(piece)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), logits, atol=1e-5)
    assert flops_by_part(config, np.array([6]))["mean.gain"] == 2 * 2 * 8 * 6


def test_registered_kinds():
    assert MixerConfig.variants() == {
        "attention": AttentionConfig,
        "delta": DeltaConfig,
        "gated_delta": GatedDeltaConfig,
        "gla": GlaConfig,
        "lightning": LightningConfig,
        "linear": LinearConfig,
        "mamba2": Mamba2Config,
        "mla": MlaConfig,
        "moba": MobaConfig,
        "nsa": NsaConfig,
        "regla": ReglaConfig,
        "retention": RetentionConfig,
    }
    assert AttentionConfig.kind == "attention"
    with pytest.raises(ValueError, match=r"kind: got 'attention', which AttentionConfig has taken; choose another"):
        register("attention")(AttentionConfig)


def test_attention_mask_and_block_sizes():
    assert AttentionConfig(num_heads=2).mask == masks.causal() & masks.documents()
    assert AttentionConfig(num_heads=2, window=4).mask == masks.sliding_window(3) & masks.documents()
    assert AttentionConfig(num_heads=2, chunk=4).mask == masks.causal() & masks.chunked(4) & masks.documents()
    assert AttentionConfig(num_heads=2).block_sizes is None
    assert AttentionConfig(num_heads=2, block_q=8, block_kv=16).block_sizes == BlockSizes(block_q=8, block_kv=16)


def test_resolved():
    given = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=6)
    assert given.resolved(16) == given
    assert AttentionConfig(num_heads=4).resolved(16) == AttentionConfig(num_heads=4, num_kv_heads=4, head_dim=4)


def test_every_option_reaches_the_layer():
    config = AttentionConfig(
        num_heads=4,
        num_kv_heads=2,
        head_dim=6,
        window=3,
        rope_theta=77.0,
        rope_scaling=LinearRopeScaling(factor=2.0),
        qk_norm=True,
        qkv_bias=True,
        logits_soft_cap=5.0,
        sinks=True,
        dropout=0.25,
        implementation="reference",
        block_q=8,
        block_kv=16,
        deterministic=False,
    )
    layer = config.build(16, dtype=jnp.bfloat16, param_dtype=jnp.float16, norm_eps=0.1, rngs=nnx.Rngs(0))
    assert layer.q.kernel.shape == (16, 4, 6) and layer.k.kernel.shape == (16, 2, 6)
    assert layer.mask == config.mask and layer.block_sizes == config.block_sizes
    assert layer.rotary == RotaryConfig(theta=77.0, scaling=config.rope_scaling)
    assert (
        layer.q.bias.shape == (4, 6) and layer.k.bias.shape == layer.v.bias.shape == (2, 6) and layer.out.bias is None
    )
    assert layer.logits_soft_cap == 5.0 and layer.implementation == "reference"
    assert not layer.deterministic_gradients
    assert layer.sinks.shape == (4,) and layer.dropout.rate == 0.25 and config.is_stochastic
    assert layer.q_norm.eps == 0.1 and layer.k_norm.eps == 0.1
    assert layer.dtype == jnp.bfloat16 and layer.q.kernel.dtype == jnp.float16
    assert dataclasses.replace(config, rope_theta=None, rope_scaling=None).build(16, rngs=nnx.Rngs(0)).rotary is None


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(num_heads=4, num_kv_heads=3), r"num_kv_heads: got 3, wanted a divisor of num_heads=4"),
        (dict(num_heads=4, head_dim=3), r"head_dim: got 3, wanted an even number for rotary positions; use 4"),
        (dict(num_heads=4, window=0), r"window: got 0, wanted null or a number of tokens >= 1"),
        (dict(num_heads=4, chunk=0), r"chunk: got 0, wanted null or a number of tokens >= 1"),
        (dict(num_heads=4, chunk=4, window=2), r"chunk: got 4 with window=2, wanted one of them; leave one out"),
        (dict(num_heads=4, rope_theta=0.0), r"rope_theta: got 0.0, wanted null or a number > 1; 10000 is customary"),
        (dict(num_heads=4, logits_soft_cap=0.0), r"logits_soft_cap: got 0.0, wanted null or a finite number > 0"),
        (dict(num_heads=4, dropout=1.0), r"dropout: got 1.0, wanted 0 <= dropout < 1; 0 drops nothing"),
        (dict(num_heads=4, block_q=8), r"block_kv: got null although block_q is set, .* set block_kv"),
        (dict(num_heads=4, block_kv=8), r"block_q: got null although block_kv is set, .* set block_q"),
        (dict(num_heads=4, block_q=8, block_kv=0), r"block_kv: got 0, wanted null or a number of tokens >= 1"),
    ],
)
def test_attention_config_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        AttentionConfig(**kwargs)


@pytest.mark.slow
def test_chunked_attention_is_attention_to_each_block_by_itself():
    """The blocks of a document are counted from its start, in a row that two documents share."""
    layer = AttentionConfig(num_heads=2, chunk=4).build(8, rngs=nnx.Rngs(0))
    everywhere = jax.jit(AttentionConfig(num_heads=2).build(8, rngs=nnx.Rngs(0)).__call__)
    x = jax.random.normal(jax.random.key(0), (1, 16, 8))
    positions = jnp.asarray([[*range(6), *range(10)]], jnp.int32)
    segment_ids = jnp.asarray([[0] * 6 + [1] * 10], jnp.int32)
    y = layer(x, positions=positions, segment_ids=segment_ids)
    for start, stop in [(0, 4), (4, 6), (6, 10), (10, 14), (14, 16)]:
        block = slice(start, stop)
        np.testing.assert_allclose(y[:, block], everywhere(x[:, block], positions=positions[:, block]), atol=1e-5)


@pytest.mark.parametrize("limit", [{}, *({"window": w} for w in (1, 4, 100)), *({"chunk": c} for c in (1, 4, 100))])
def test_attention_flops_count_the_allowed_pairs(limit):
    config = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=6, **limit)
    lengths = np.array([5, 1, 9, 4])
    segment_ids = jnp.asarray(np.repeat(np.arange(4), lengths), jnp.int32)[None]
    positions = jnp.asarray(np.concatenate([np.arange(length) for length in lengths]), jnp.int32)[None]
    pairs = config.mask.dense(Tokens.self_attention(positions, segment_ids), 19, 19).sum()
    projections = 2 * 19 * 16 * 6 * (4 + 2 + 2 + 4)
    attention = 4 * int(pairs) * 4 * 6
    assert config.flops_by_part(16, lengths) == {"projections": projections, "attention": attention}
    assert config.forward_flops(16, lengths) == projections + attention


def test_model_flops_add_up_the_layers():
    local, everywhere = AttentionConfig(num_heads=2, window=3), AttentionConfig(num_heads=4)
    config = ModelConfig(
        vocab_size=50,
        dim=16,
        num_layers=5,
        mlp_dim=24,
        mixers={"local": local, "global": everywhere},
        pattern=("local", "local", "global"),
    )
    lengths = np.array([7, 12])
    mixers = 4 * local.forward_flops(16, lengths) + everywhere.forward_flops(16, lengths)
    mlp, logits = 5 * 19 * 2 * 3 * 16 * 24, 19 * 2 * 16 * 50
    assert forward_flops(config, lengths) == mixers + mlp + logits
    assert flops_by_part(config, lengths) == {
        "local.projections": 4 * local.flops_by_part(16, lengths)["projections"],
        "local.attention": 4 * local.flops_by_part(16, lengths)["attention"],
        "global.projections": everywhere.flops_by_part(16, lengths)["projections"],
        "global.attention": everywhere.flops_by_part(16, lengths)["attention"],
        "mlp": mlp,
        "logits": logits,
    }
    with pytest.raises(ValueError, match=r"vocab_size: got None, wanted the number of token ids; set it with"):
        forward_flops(dataclasses.replace(config, vocab_size=None), lengths)
