"""Sums, their norms and the gradients: by the kernels in JAX's interpreter, lowered for CUDA, and on a card."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch, rms_norm
from pallas_kernels.mosaic_gpu import interpreter
from pallas_kernels.testing import H100, tracing_for

EPS = 1e-3


def inputs(num_tokens, dim, dtype=jnp.bfloat16):
    """Tokens of very different sizes: x, delta, gain, cotangents of the norm and of the sum."""
    keys = jax.random.split(jax.random.key(0), 5)
    x, delta, dnormed, dtotal = (jax.random.normal(key, (num_tokens, dim), jnp.float32) for key in keys[:4])
    size = 10.0 ** jnp.linspace(-3, 2, num_tokens)[:, None]
    gain = 1 + 0.3 * jax.random.normal(keys[4], (dim,))
    return *(a.astype(dtype) for a in (x * size, delta * size)), gain, dnormed.astype(dtype), dtotal.astype(dtype)


def expected(x, delta, gain, dnormed, dtotal):
    """By the formula in float64, from the sum as it is rounded; each beside what its rounding is in proportion to."""
    total = x if delta is None else x + delta
    value, scale, cotangent = (np.asarray(a, np.float64) for a in (total, gain, dnormed))
    inverse = 1 / np.sqrt(np.mean(value**2, axis=1, keepdims=True) + EPS)
    unit, dunit = value * inverse, cotangent * scale
    dx = (dunit - unit * np.mean(dunit * unit, axis=1, keepdims=True)) * inverse
    normed, of_total = unit * scale, np.zeros_like(dx) if dtotal is None else np.asarray(dtotal, np.float64)
    return {
        "total": (value, np.abs(value)),
        "normed": (normed, np.abs(normed)),
        "dx": (dx + of_total, np.abs(dx) + np.abs(of_total)),
        "dgain": (np.sum(cotangent * unit, axis=0), np.sum(np.abs(cotangent * unit), axis=0)),
    }


def check(x, delta, gain, dnormed, dtotal, *, uses=1, **options):
    total, normed = rms_norm.add_and_normalise(x, delta, gain, eps=EPS, **options)
    parts = [dnormed * (i + 1) for i in range(uses)]
    dx, dgain = rms_norm.gradients(total, gain, parts, dtotal, eps=EPS, **options)
    dnormed = sum(part.astype(jnp.float32) for part in parts)
    assert (total.dtype, normed.dtype, dx.dtype, dgain.dtype) == (x.dtype, x.dtype, x.dtype, jnp.float32)
    got = {"total": total, "normed": normed, "dx": dx, "dgain": dgain}
    for name, (wanted, scale) in expected(x, delta, gain, dnormed, dtotal).items():
        tolerance = 1e-5 if name == "dgain" else float(jnp.finfo(x.dtype).eps)
        difference = np.abs(np.asarray(got[name], np.float64) - wanted) / np.maximum(scale, 1e-3)
        assert difference.max() <= tolerance, (name, difference.max())
    if delta is None:
        assert total is x


@pytest.mark.parametrize(
    ("num_tokens", "dim", "dtype"),
    [
        (24, 256, jnp.bfloat16),  # two channels a thread, in groups of eight tokens
        (12, 512, jnp.float16),
        (6, 1024, jnp.bfloat16),
        (3, 2048, jnp.bfloat16),
        (2, 5120, jnp.bfloat16),  # a token is more than a thread's share
    ],
)
def test_kernels(num_tokens, dim, dtype):
    x, delta, gain, dnormed, dtotal = inputs(num_tokens, dim, dtype)
    check(x, delta, gain, dnormed, dtotal, uses=2, interpret=interpreter())
    check(x, None, gain, dnormed, None, interpret=interpreter())


def test_the_formula_is_that_of_the_kernels():
    x, _, gain, dnormed, _ = inputs(6, 1024)
    normed, vjp = jax.vjp(functools.partial(rms_norm.normalised, eps=EPS), x, gain)
    _, by_kernel = rms_norm.add_and_normalise(x, None, gain, eps=EPS, interpret=interpreter())
    np.testing.assert_array_equal(normed, by_kernel)
    for of_formula, of_kernel in zip(
        vjp(dnormed), rms_norm.gradients(x, gain, [dnormed], None, eps=EPS, interpret=interpreter()), strict=True
    ):
        np.testing.assert_allclose(*(np.asarray(a, np.float32) for a in (of_formula, of_kernel)), rtol=1e-2, atol=1e-4)


def test_both_passes_are_lowered_for_hopper():
    x, gain = jax.ShapeDtypeStruct((4096, 2048), jnp.bfloat16), jax.ShapeDtypeStruct((2048,), jnp.float32)
    calls = {
        "rms_norm": (functools.partial(rms_norm.add_and_normalise, eps=EPS), (x, x, gain)),
        "rms_norm_gradients": (functools.partial(rms_norm.gradients, eps=EPS), (x, gain, [x, x], x)),
    }
    for name, (function, arguments) in calls.items():
        with tracing_for(H100), dispatch.record() as taken:
            text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
        assert taken == [(name, "mosaic_gpu")] and "mosaic_gpu_v2" in text


@pytest.mark.parametrize(
    ("num_tokens", "dim", "dtype", "refusal"),
    [
        (4096, 2048, jnp.float32, "x is float32, it takes bfloat16 and float16"),
        (4096, 1000, jnp.bfloat16, "x has 1000 channels, it takes multiples of 256 up to 8192"),
        (4096, 16384, jnp.bfloat16, "x has 16384 channels, it takes multiples of 256 up to 8192"),
        (4100, 256, jnp.bfloat16, "x has 4100 tokens, it takes multiples of 8, and 1024 or more"),
        (512, 2048, jnp.bfloat16, "x has 512 tokens, it takes multiples of 1, and 1024 or more"),
    ],
)
def test_refusals(num_tokens, dim, dtype, refusal):
    x, gain = jnp.zeros((num_tokens, dim), dtype), jnp.ones((dim,))
    with tracing_for(H100):
        assert not rms_norm.serves(num_tokens, dim, dtype) and rms_norm.serves(4096, 2048, jnp.bfloat16)
        with pytest.raises(NotImplementedError, match=re.escape(refusal)):
            rms_norm.add_and_normalise(x, None, gain, eps=EPS)
    assert not rms_norm.serves(4096, 2048, jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="it needs an NVIDIA Hopper GPU"):
        rms_norm.gradients(x, gain, [x], None, eps=EPS)


@pytest.mark.gpu
@pytest.mark.parametrize(("num_tokens", "dim"), [(4096, 2048), (1024, 8192), (2048, 4096), (1544, 256), (1100, 1536)])
def test_on_a_card(num_tokens, dim):
    x, delta, gain, dnormed, dtotal = inputs(num_tokens, dim)
    check(x, delta, gain, dnormed, dtotal, uses=2)
    check(x, None, gain, dnormed, None)
    same = functools.partial(rms_norm.gradients, x, gain, [dnormed], dtotal, eps=EPS)
    for first, second in zip(same(), same(), strict=True):
        np.testing.assert_array_equal(first, second)
