"""Scaled rotary frequencies against what defines them, pair by pair."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx import (
    AttentionConfig,
    LinearRopeScaling,
    Llama3RopeScaling,
    RotaryConfig,
    YarnRopeScaling,
    apply_rotary,
)

THETA, HEAD_DIM = 500_000.0, 128
PLAIN = RotaryConfig(theta=THETA).frequencies(HEAD_DIM)
TURNS = 8192 * PLAIN / (2 * np.pi)


def frequencies(scaling):
    return RotaryConfig(theta=THETA, scaling=scaling).frequencies(HEAD_DIM)


def test_plain_and_linear():
    np.testing.assert_allclose(PLAIN, [THETA ** (-2 * pair / HEAD_DIM) for pair in range(64)], rtol=1e-12)
    np.testing.assert_array_equal(frequencies(LinearRopeScaling(factor=8.0)), PLAIN / 8)


def test_llama3_leaves_fast_pairs_and_divides_slow_ones():
    scaled = frequencies(Llama3RopeScaling(factor=8.0, original_length=8192))
    np.testing.assert_array_equal(scaled[TURNS >= 4], PLAIN[TURNS >= 4])
    np.testing.assert_array_equal(scaled[TURNS <= 1], PLAIN[TURNS <= 1] / 8)
    between = (TURNS > 1) & (TURNS < 4)
    assert between.sum() == 6
    share = (TURNS[between] - 1) / 3
    np.testing.assert_allclose(scaled[between], PLAIN[between] * (share + (1 - share) / 8), rtol=1e-12)


def test_yarn_leaves_fast_pairs_and_divides_slow_ones():
    scaling = YarnRopeScaling(factor=4.0, original_length=8192)
    scaled = frequencies(scaling)
    first, last = np.flatnonzero(TURNS >= 32).max(), np.flatnonzero(TURNS <= 1).min()
    np.testing.assert_array_equal(scaled[: first + 1], PLAIN[: first + 1])
    np.testing.assert_allclose(scaled[last:], PLAIN[last:] / 4, rtol=1e-12)
    share = (np.arange(first, last) - first) / (last - first)
    np.testing.assert_allclose(scaled[first:last], PLAIN[first:last] * (1 - share + share / 4), rtol=1e-12)
    assert scaling.amplitude == pytest.approx(0.1 * math.log(4) + 1)
    assert YarnRopeScaling(factor=4.0, original_length=8192, attention_factor=0.5).amplitude == 0.5


def test_rotated_heads_have_the_amplitude():
    x = jax.random.normal(jax.random.key(0), (1, 3, 2, 8))
    positions = jnp.asarray([[0, 5, 90]], jnp.int32)
    scaling = YarnRopeScaling(factor=4.0, original_length=16, attention_factor=1.5)
    lengths = [jnp.linalg.norm(y, axis=-1) for y in (x, apply_rotary(x, positions, RotaryConfig(scaling=scaling)))]
    np.testing.assert_allclose(lengths[1], 1.5 * lengths[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("scaling", "kwargs", "message"),
    [
        (LinearRopeScaling, dict(factor=0.5), r"factor: got 0.5, wanted a number >= 1, the new length"),
        (Llama3RopeScaling, dict(factor=2.0, original_length=0), r"original_length: got 0, wanted a number of tokens"),
        (
            Llama3RopeScaling,
            dict(factor=2.0, original_length=8, low_turns=4.0),
            r"low_turns: got 4.0 with high_turns=4.0, wanted 0 < low_turns < high_turns",
        ),
        (
            YarnRopeScaling,
            dict(factor=2.0, original_length=8, attention_factor=0.0),
            r"attention_factor: got 0.0, wanted null or a number > 0",
        ),
    ],
)
def test_refusals(scaling, kwargs, message):
    with pytest.raises(ValueError, match=message):
        scaling(**kwargs)


def test_a_mixer_without_rotary_positions_has_none_to_scale():
    with pytest.raises(ValueError, match=r"rope_scaling: got linear with rope_theta=null, .*; leave one of them out"):
        AttentionConfig(num_heads=2, rope_theta=None, rope_scaling=LinearRopeScaling(factor=2.0))
