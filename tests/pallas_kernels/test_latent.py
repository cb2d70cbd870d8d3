"""Attention to latents: what it equals, by every implementation, and what each refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    Tokens,
    blockwise_attention,
    dispatch,
    latent_attention,
    latent_attention_forward,
)
from pallas_kernels.blockwise import latent
from pallas_kernels.blockwise.options import Options
from pallas_kernels.mask import Causal, Full, PerHead, SameDocument
from pallas_kernels.mosaic_gpu import interpreter
from pallas_kernels.testing import H100, assert_close, tracing_for

MASK = Causal() & SameDocument()


def cached(lengths, q_len: int, kv_len: int) -> Tokens:
    last = jnp.asarray(lengths, jnp.int32)[:, None]
    slots = jnp.arange(kv_len, dtype=jnp.int32)[None]
    q_positions = last - q_len + jnp.arange(q_len, dtype=jnp.int32)
    return Tokens(
        q_positions=q_positions,
        q_segment_ids=jnp.zeros_like(q_positions),
        kv_positions=slots,
        kv_segment_ids=jnp.where(slots < last, 0, -1),
    )


def inputs(batch_size, q_len, kv_len, num_heads, dims=(576, 512), dtype="bfloat16"):
    normal = np.random.default_rng(0).standard_normal
    q = jnp.asarray(normal((batch_size, q_len, num_heads, dims[0]), np.float32), dtype)
    return q, jnp.asarray(normal((batch_size, kv_len, dims[0]), np.float32), dtype)


def options(mask=MASK) -> Options:
    return Options(mask=mask, scale=192**-0.5, logits_soft_cap=None, block_sizes=None, deterministic=True)


def by_reference(q, latents, tokens):
    call = {"tokens": tokens, "return_carry": False, "options": options(), "value_dim": 512}
    return latent.FORWARD["reference"](q.astype(jnp.float32), latents.astype(jnp.float32), **call)


@pytest.mark.parametrize("implementation", ["reference", pytest.param("xla", marks=pytest.mark.slow)])
def test_equals_blockwise_attention(implementation):
    """Forward and both gradients, of keys and of values that are part of them."""
    q, latents = inputs(2, 3, 70, 4, (12, 8), "float32")
    call = {"mask": MASK, "tokens": cached([70, 20], 3, 70), "scale": 0.3, "implementation": implementation}

    def plain(q, latents):
        return blockwise_attention(q, latents[:, :, None], latents[:, :, None, :8], **call)

    out, vjp = jax.vjp(functools.partial(latent_attention, value_dim=8, **call), q, latents)
    want, plain_vjp = jax.vjp(plain, q, latents)
    dout = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
    for name, got, wanted in zip(("out", "dq", "dlatent"), (out, *vjp(dout)), (want, *plain_vjp(dout)), strict=True):
        assert_close(name, got, wanted, "float32")


@pytest.mark.parametrize(
    ("lengths", "q_len", "num_heads"),
    [([150, 0], 1, 4), pytest.param([150, 3], 2, 40, marks=pytest.mark.slow)],
    ids=["ragged", "two_tiles"],
)
def test_the_kernels_for_hopper_in_the_interpreter(lengths, q_len, num_heads):
    q, latents = inputs(len(lengths), q_len, 150, num_heads)
    tokens = cached(lengths, q_len, 150)
    call = {"tokens": tokens, "return_carry": False, "options": options(), "value_dim": 512}
    out, lse = jax.jit(functools.partial(latent._mosaic_gpu, interpret=interpreter(), **call))(q, latents)
    want, want_lse = by_reference(q, latents, tokens)
    assert_close("out", out, want, "bfloat16")
    assert_close("lse", lse, want_lse, "float16")


@pytest.mark.slow
def test_no_race_between_copies_and_matmuls(capfd):
    q, latents = inputs(1, 1, 300, 4)
    call = {"tokens": cached([300], 1, 300), "return_carry": False, "options": options(), "value_dim": 512}
    run = functools.partial(latent._mosaic_gpu, interpret=interpreter(detect_races=True), **call)
    jax.block_until_ready(jax.jit(run)(q, latents))
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


def test_a_hopper_takes_its_kernels_first_and_differentiates_by_others():
    q, latents = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((2, 1, 16, 576), (2, 1000, 576)))

    def differentiate(q, latents):
        out, vjp = jax.vjp(functools.partial(latent_attention, value_dim=512, mask=Causal(), scale=0.1), q, latents)
        return vjp(out)

    with tracing_for(H100), dispatch.record() as taken:
        text = jax.jit(differentiate).trace(q, latents).lower(lowering_platforms=("cuda",)).as_text()
    assert taken == [("latent_attention_forward", "mosaic_gpu"), ("blockwise_attention_backward", "xla")]
    assert text.count("mosaic_gpu_v2") == 2


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("q is float32, it takes bfloat16 and float16", dict(dtype="float32")),
        ("latents of 320 dims with 256 of values, it takes 576 with 512", dict(dims=(320, 256))),
        ("T=17 under mask Causal", dict(q_len=17)),
        ("T=1 under mask PerHead", dict(mask=PerHead((Causal(), Full())))),
        ("scale=-1.0, it takes positive ones", dict(scale=-1.0)),
    ],
)
def test_the_kernels_refuse(message, change):
    options = {"mask": Causal(), "scale": 0.1, "dims": (576, 512), "dtype": "bfloat16", "q_len": 1} | change
    dims, dtype, q_len = (options.pop(name) for name in ("dims", "dtype", "q_len"))
    q, latents = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((2, q_len, 16, dims[0]), (2, 1000, dims[0])))
    call = functools.partial(latent_attention_forward, value_dim=dims[1], implementation="mosaic_gpu", **options)
    with tracing_for(H100), pytest.raises(NotImplementedError, match=f"mosaic_gpu: {message}"):
        jax.eval_shape(call, q, latents)


def test_more_values_than_dims_are_refused():
    q, latents = inputs(1, 1, 8, 2, (12, 8))
    with pytest.raises(
        ValueError, match="latent_attention: value_dim=13, wanted 1 to 12, as many as latents have dims"
    ):
        latent_attention(q, latents, value_dim=13, mask=Causal(), scale=1.0)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("batch_size", "q_len", "kv_len", "num_heads"), [(1, 1, 40000, 16), (9, 2, 3000, 16), (2, 1, 5000, 128)], ids=str
)
def test_long_caches_on_a_gpu(batch_size, q_len, kv_len, num_heads):
    """Ragged lengths; the same bits each time."""
    q, latents = inputs(batch_size, q_len, kv_len, num_heads)
    lengths = np.random.default_rng(0).integers(q_len, kv_len, batch_size)
    lengths[0] = kv_len - 3
    tokens = cached(lengths, q_len, kv_len)
    run = jax.jit(
        functools.partial(
            latent_attention_forward, value_dim=512, mask=MASK, scale=192**-0.5, implementation="mosaic_gpu"
        )
    )
    out, lse = run(q, latents, tokens=tokens)
    want, want_lse = by_reference(q, latents, tokens)
    assert_close("out", out, want, "bfloat16")
    assert_close("lse", lse, want_lse, "float16")
    for again, first in zip(run(q, latents, tokens=tokens), (out, lse), strict=True):
        np.testing.assert_array_equal(again, first)
