"""Norm, rotary positions and MLP against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx import RMSNorm, RotaryConfig, SwiGLU, apply_rotary
from longctx.rotary import rotary_angles


def test_rms_norm_follows_the_formula_with_statistics_in_float32():
    norm = RMSNorm(64, eps=1e-3)
    norm.scale[...] = jax.random.normal(jax.random.key(1), (64,))
    x = 100 * jax.random.normal(jax.random.key(0), (3, 5, 64), jnp.bfloat16)
    x64, scale64 = np.asarray(x, np.float64), np.asarray(norm.scale[...], np.float64)
    wanted = scale64 * x64 / np.sqrt(np.mean(x64**2, axis=-1, keepdims=True) + 1e-3)
    y = norm(x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float64), wanted, rtol=2**-8)


def test_rotary_turns_half_split_pairs():
    x = jax.random.normal(jax.random.key(0), (2, 3, 2, 8))
    positions = jnp.asarray([[0, 1, 7], [5, 3, 100]], jnp.int32)
    y = apply_rotary(x, positions, RotaryConfig(theta=100.0))
    angles = np.asarray(positions)[:, :, None, None] * 100.0 ** (-np.arange(4) / 4)
    turned = (np.asarray(x[..., :4]) + 1j * np.asarray(x[..., 4:])) * np.exp(1j * angles)
    np.testing.assert_allclose(y, np.concatenate([turned.real, turned.imag], axis=-1), atol=1e-5)


@pytest.mark.parametrize(("position", "tolerance"), [(4_000, 3e-4), (1_000_000, 3e-4), (10_000_000, 1e-3)])
def test_rotary_angles_stay_exact_at_long_range(position, tolerance):
    positions = position + np.arange(-5, 5)
    angles = np.asarray(rotary_angles(jnp.asarray(positions, jnp.int32), 128, RotaryConfig(theta=10_000.0)), np.float64)
    wanted = positions[:, None] * 10_000.0 ** (-np.arange(0, 128, 2) / 128)
    assert np.max(np.abs(np.exp(1j * angles) - np.exp(1j * wanted))) < tolerance


def test_rotary_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match=r"head_dim=7 is odd, wanted an even number of dims; pad the heads"):
        apply_rotary(jnp.ones((1, 2, 1, 7)), jnp.zeros((1, 2), jnp.int32), RotaryConfig())
    with pytest.raises(ValueError, match=r"theta: got 1.0, wanted a number > 1; 10000 is customary"):
        RotaryConfig(theta=1.0)


def test_swiglu_follows_the_formula():
    mlp = SwiGLU(8, 12, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 3, 8))
    gate, up, down = (np.asarray(p.kernel[...]) for p in (mlp.gate, mlp.up, mlp.down))
    g = np.asarray(x) @ gate
    np.testing.assert_allclose(mlp(x), (g / (1 + np.exp(-g)) * (np.asarray(x) @ up)) @ down, atol=1e-5)
