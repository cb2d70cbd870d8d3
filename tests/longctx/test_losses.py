"""Cross-entropy sums."""

import jax
import jax.numpy as jnp
import numpy as np

from longctx import cross_entropy

LOGITS = 5 * jax.random.normal(jax.random.key(0), (2, 3, 7))
TARGETS = jnp.asarray([[0, 6, 3], [2, 2, 5]], jnp.int32)
WEIGHTS = jnp.asarray([[1.0, 0.0, 0.5], [2.0, 1.0, 0.0]])


def test_sums_follow_the_formula():
    sums = cross_entropy(LOGITS, TARGETS, WEIGHTS, z_loss=0.1)
    logits, weights = np.asarray(LOGITS, np.float64), np.asarray(WEIGHTS)
    log_normaliser = np.log(np.exp(logits).sum(-1))
    nll = log_normaliser - np.take_along_axis(logits, np.asarray(TARGETS)[..., None], -1)[..., 0]
    np.testing.assert_allclose(sums.nll_sum, (weights * nll).sum(), rtol=1e-5)
    np.testing.assert_allclose(sums.loss_sum, (weights * (nll + 0.1 * log_normaliser**2)).sum(), rtol=1e-5)
    assert sums.weight_sum == 4.5
    assert all(x.dtype == jnp.float32 for x in sums)


def test_gradient_is_softmax_minus_one_hot():
    gradient = jax.grad(lambda x: cross_entropy(x, TARGETS, WEIGHTS).loss_sum)(LOGITS)
    wanted = WEIGHTS[..., None] * (jax.nn.softmax(LOGITS) - jax.nn.one_hot(TARGETS, 7))
    np.testing.assert_allclose(gradient, wanted, atol=1e-5)


def test_a_zero_weight_hides_any_target():
    arbitrary = jnp.where(WEIGHTS == 0, jnp.asarray([[0, -7, 0], [0, 0, 10**6]], jnp.int32), TARGETS)
    both = jax.value_and_grad(lambda targets, x: cross_entropy(x, targets, WEIGHTS, z_loss=0.1).loss_sum, argnums=1)
    for wanted, got in zip(both(TARGETS, LOGITS), both(arbitrary, LOGITS), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_a_weighted_target_outside_the_vocabulary_is_nan():
    assert jnp.isnan(cross_entropy(LOGITS, TARGETS.at[0, 0].set(7), WEIGHTS).loss_sum)
    assert jnp.isnan(cross_entropy(LOGITS, TARGETS.at[0, 0].set(-1), WEIGHTS).loss_sum)


def test_huge_logits_stay_finite():
    value, gradient = jax.value_and_grad(lambda x: cross_entropy(x, TARGETS, WEIGHTS).loss_sum)(LOGITS * 1e4)
    assert jnp.isfinite(value) and jnp.all(jnp.isfinite(gradient))


def test_low_precision_logits_are_summed_in_float32():
    low = LOGITS.astype(jnp.bfloat16)
    np.testing.assert_array_equal(
        cross_entropy(low, TARGETS, WEIGHTS).nll_sum,
        cross_entropy(low.astype(jnp.float32), TARGETS, WEIGHTS).nll_sum,
    )
