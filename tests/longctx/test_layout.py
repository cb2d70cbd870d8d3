"""Layouts: literal orders, the inverse, and what each evens out."""

import numpy as np
import pytest

from longctx.context_parallel import ContextParallelConfig
from longctx.context_parallel.layout import permute, unpermute


def order(layout, length, degree, **options):
    return ContextParallelConfig(layout=layout, **options).order(length, degree)


def test_orders():
    assert order("contiguous", 8, 2).tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert order("zigzag", 8, 2).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
    assert order("zigzag", 12, 3).tolist() == [0, 1, 10, 11, 2, 3, 8, 9, 4, 5, 6, 7]
    assert order("striped", 8, 2).tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert order("striped", 8, 2, stripe_size=2).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]


@pytest.mark.parametrize("layout", ["contiguous", "striped", "zigzag"])
@pytest.mark.parametrize("degree", [1, 2, 4, 8])
def test_unpermute_is_the_inverse(layout, degree):
    x = np.random.default_rng(0).normal(size=(2, 48, 3))
    places = order(layout, 48, degree)
    permuted = permute(x, places)
    np.testing.assert_array_equal(permuted, x[:, places])
    np.testing.assert_array_equal(unpermute(permuted, places), x)
    np.testing.assert_array_equal(permute(unpermute(x, places), places), x)
    assert (degree == 1 or layout == "contiguous") == np.array_equal(places, np.arange(48))


@pytest.mark.parametrize(
    ("layout", "least", "greatest"), [("contiguous", 6, 7), ("zigzag", 1, 1), ("striped", 1, 1.02)]
)
def test_causal_work_of_the_devices(layout, least, greatest):
    """Pairs that the busiest device's queries attend to, over those of the idlest."""
    pairs = (order(layout, 1024, 4) + 1).reshape(4, -1).sum(axis=1)
    assert least <= pairs.max() / pairs.min() <= greatest


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="zigzag over 4 devices splits .* a multiple of 8 tokens, got 20"):
        order("zigzag", 20, 4)
    with pytest.raises(ValueError, match="striped over 2 devices .* multiple of 8 tokens, got 20"):
        order("striped", 20, 2, stripe_size=4)
    with pytest.raises(ValueError, match="stripe_size: got 4 with layout=zigzag, which has no stripes"):
        ContextParallelConfig(layout="zigzag", stripe_size=4)
    with pytest.raises(ValueError, match="stripe_size: got 0"):
        ContextParallelConfig(layout="striped", stripe_size=0)
