"""Feature maps of linear attention, the norms of its results and its refined gate, against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx.feature_maps import DPFP, LRPE, CosineReweighted, NormalizedExponential, Pointwise, Taylor2
from longctx.gla import log_refined_gate
from longctx.norms import GroupNorm, SimpleRMSNorm


def test_maps_give_the_weights_they_promise():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 6, 2, 5))
    positions = jnp.asarray([[0, 1, 5, 7, 8, 9]], jnp.int32)

    def weights(features):
        return jnp.einsum("btkh,bskh->btsk", features(q), features(k))

    product = jnp.einsum("btkh,bskh->btsk", q, k)
    apart = (positions[0][:, None] - positions[0][None, :]).astype(jnp.float32)[None, :, :, None]
    taylor = product / 5**0.5
    np.testing.assert_allclose(weights(lambda x: Taylor2()(x, positions)), 1 + taylor + taylor**2 / 2, rtol=1e-4)
    assert Taylor2().num_features(16) == 320 and Taylor2().num_features(5) == 64
    relu = jnp.einsum("btkh,bskh->btsk", jnp.maximum(q, 0), jnp.maximum(k, 0))
    cosine = weights(lambda x: CosineReweighted(12)(x, positions))
    np.testing.assert_allclose(cosine, relu * jnp.cos(np.pi / 24 * apart), atol=1e-5)
    assert jnp.all(jnp.isnan(CosineReweighted(9)(q, positions)[:, -1]))
    lrpe = LRPE(2, 5)
    lrpe.theta[...] = jnp.abs(jax.random.normal(jax.random.key(1), (2, 5)))
    turned = jnp.einsum("btkh,bskh,btskh->btsk", q, k, jnp.cos(apart[..., None] * lrpe.theta[...]))
    np.testing.assert_allclose(weights(lambda x: lrpe(x, positions)), turned, atol=1e-5)
    np.testing.assert_allclose(LRPE(2, 4).theta[...][1], 10_000.0 ** (-np.arange(4) / 4), rtol=1e-6)
    r = np.concatenate([np.maximum(q, 0), np.maximum(-q, 0)], axis=-1)
    wanted = np.concatenate([r * np.roll(r, 1, axis=-1), r * np.roll(r, 2, axis=-1)], axis=-1)
    np.testing.assert_allclose(DPFP(2)(q, positions), wanted, rtol=1e-6)
    assert DPFP(2).num_features(5) == wanted.shape[-1] and DPFP().is_positive and NormalizedExponential().is_positive
    bounded = NormalizedExponential()(100 * q, positions)
    np.testing.assert_allclose(bounded, np.exp(100 * (q - q.max(axis=-1, keepdims=True))), rtol=1e-4, atol=1e-30)
    for function, wanted in {"relu": np.maximum(q, 0), "identity": q, "swish": q / (1 + np.exp(-q))}.items():
        np.testing.assert_allclose(Pointwise(function)(q, positions), wanted, rtol=1e-5)
    assert [Pointwise(f).is_positive for f in ("identity", "elu1", "relu", "swish")] == [False, True, True, False]


def test_maps_compute_in_float32_and_keep_the_dtype():
    x = jnp.full((1, 2, 1, 4), -8.0, jnp.bfloat16)
    positions = jnp.arange(2, dtype=jnp.int32)[None]
    maps = Pointwise("elu1"), Pointwise("swish"), CosineReweighted(4), Taylor2(), DPFP(2), NormalizedExponential()
    for features in maps:
        assert features(x, positions).dtype == jnp.bfloat16
    assert float(Pointwise("elu1")(x, positions)[0, 0, 0, 0]) == pytest.approx(np.exp(-8), rel=0.01)


def test_norms_without_a_gain_follow_their_formulas():
    x = 3 + 100 * jax.random.normal(jax.random.key(0), (2, 3, 4, 8), jnp.bfloat16)
    x64 = np.asarray(x, np.float64)
    for norm, wanted in [
        (SimpleRMSNorm(eps=1e-3), x64 / np.sqrt(np.mean(x64**2, axis=-1, keepdims=True) + 1e-3)),
        (SimpleRMSNorm(num_dims=2), x64 / np.sqrt(np.mean(x64**2, axis=(-2, -1), keepdims=True) + 1e-6)),
        (GroupNorm(), (x64 - x64.mean(-1, keepdims=True)) / np.sqrt(x64.var(-1, keepdims=True) + 1e-6)),
    ]:
        y = norm(x)
        assert y.dtype == jnp.bfloat16 and not jax.tree.leaves(nnx.state(norm))
        np.testing.assert_allclose(np.asarray(y, np.float64), wanted, rtol=2**-7, atol=1e-2)


def test_the_refined_gate_is_exact_and_finite_where_gates_saturate():
    gate, refinement = jnp.asarray([-200.0, -3.0, 0.0, 3.0, 20.0, 200.0]), jnp.asarray([-200.0, -2.0, 0.0, 2.0, 200.0])
    log = log_refined_gate(gate[:, None], refinement[None])
    assert jnp.all(jnp.isfinite(log)) and jnp.all(log <= 0)
    g, r = (1 / (1 + np.exp(-np.asarray(x, np.float64))) for x in (gate[1:5, None], refinement[None, 1:]))
    np.testing.assert_allclose(jnp.exp(log[1:5, 1:]), (1 - r) * g**2 + r * (1 - (1 - g) ** 2), rtol=1e-5)
    # d f / d refinement = 2 g (1 - g) r (1 - r)
    slope = jax.grad(lambda r: jnp.exp(log_refined_gate(jnp.float32(0.0), r)))(jnp.float32(0.0))
    np.testing.assert_allclose(slope, 2 * 0.25 * 0.25, rtol=1e-5)
