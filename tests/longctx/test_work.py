"""The pairs that devices compute in each hop are those of the dense mask, by every strategy."""

import sys

import matplotlib
import numpy as np
import pytest

from longctx import masks
from longctx.context_parallel import Layout, Work, areas, balance_plot, work
from longctx.context_parallel.layout import permute
from pallas_kernels import Tokens
from pallas_kernels.testing import packed_tokens

LENGTH, DEGREE = 96, 4
PACKED = packed_tokens(((40, 1, 30, 20), (96,)), LENGTH)
MASKS = {
    "causal": masks.causal(),
    "documents": masks.causal() & masks.documents(),
    "window": masks.sliding_window(left=7, right=2) & masks.documents(),
    "strided": masks.causal() & masks.strided(3, block=8),
    "per_head": masks.per_head(masks.causal(), masks.sliding_window(left=9)),
}
LAYOUTS = {
    "contiguous": Layout(name="contiguous"),
    "zigzag": Layout(name="zigzag"),
    "striped_by_4": Layout(name="striped", stripe_size=4),
}


def from_device_to_device(mask, tokens, layout, *, q_len=LENGTH, kv_len=LENGTH, degree=DEGREE):
    """Pairs of the queries of each device with the keys of each, `[devices, devices]`, from the dense mask."""
    heads = np.asarray(mask.dense(tokens, q_len, kv_len, num_heads=mask.head_groups))
    dense = heads.astype(np.int64).sum(axis=(0, 1))
    dense = permute(permute(dense, layout.order(q_len, degree), axis=0), layout.order(kv_len, degree), axis=1)
    return dense.reshape(degree, q_len // degree, degree, kv_len // degree).sum(axis=(1, 3))


def by_hop(pairs):
    """The same, with the keys in the order in which a ring brings them."""
    size = len(pairs)
    return np.array([[pairs[device, (device - hop) % size] for hop in range(size)] for device in range(size)])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MASKS)
def test_areas_are_those_of_the_dense_mask(name, layout, monkeypatch):
    monkeypatch.setattr(areas, "_BLOCK", 10)  # several tiles a device, the last ragged
    monkeypatch.setattr(areas, "MAX_TILES_AT_ONCE", 300)  # and several groups of them
    mask, layout = MASKS[name], LAYOUTS[layout]
    pairs = from_device_to_device(mask, PACKED, layout)
    got = work(mask, PACKED, layout, "ring", degree=DEGREE)
    wanted = by_hop(pairs)
    if got.areas.shape[1] < DEGREE:
        wanted = wanted[:, wanted.any(axis=0)]  # hops that no window reaches are left out
    np.testing.assert_array_equal(got.areas, wanted)
    assert got.areas.sum() == pairs.sum()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strategies_share_the_same_pairs(layout):
    """Of usp a device has an I-th of those of its group, of ulysses a P-th of all, of all_gather its own at once."""
    layout, mask = LAYOUTS[layout], MASKS["documents"]
    pairs = from_device_to_device(mask, PACKED, layout)

    def areas(strategy, **options):
        return work(mask, PACKED, layout, strategy, degree=DEGREE, **options).areas

    np.testing.assert_array_equal(areas("all_gather"), pairs.sum(axis=1, keepdims=True))
    np.testing.assert_array_equal(areas("ulysses"), [[pairs.sum() // DEGREE]] * DEGREE)
    of_groups = pairs.reshape(2, 2, 2, 2).sum(axis=(1, 3))
    np.testing.assert_array_equal(areas("usp", inner_degree=2), by_hop(of_groups).repeat(2, axis=0) // 2)
    np.testing.assert_array_equal(areas("usp", inner_degree=4), areas("ulysses"))
    np.testing.assert_array_equal(areas("usp", inner_degree=1), areas("ring"))
    # Rounds of groups of two: own group, own and the other's place, then the same of the group before.
    place = [[0, 1, 2, 3], [1, 0, 3, 2], [2, 3, 0, 1], [3, 2, 1, 0]]
    np.testing.assert_array_equal(
        areas("double_ring", inner_degree=2), np.take_along_axis(pairs, np.array(place), axis=1)
    )
    np.testing.assert_array_equal(areas("double_ring", inner_degree=1), areas("ring"))
    np.testing.assert_array_equal(areas("double_ring", inner_degree=4), areas("ring"))


def test_queries_and_keys_of_other_lengths():
    layout, tokens = LAYOUTS["zigzag"], Tokens()
    pairs = from_device_to_device(masks.causal(offset=8), tokens, layout, q_len=32, degree=2)
    got = work(masks.causal(offset=8), tokens, layout, "ring", degree=2, q_len=32, kv_len=LENGTH)
    np.testing.assert_array_equal(got.areas, by_hop(pairs))


def test_what_is_uneven():
    even_in_sum = Work(areas=np.array([[4, 0], [0, 4]]))
    assert (even_in_sum.imbalance, even_in_sum.critical_path) == (1, 2)
    uneven = Work(areas=np.array([[1, 0], [1, 2]]))
    assert (uneven.imbalance, uneven.critical_path) == (1.5, 1.5)
    nothing = Work(areas=np.zeros((2, 2), int))
    assert (nothing.imbalance, nothing.critical_path) == (1, 1)


def test_zigzag_evens_out_a_causal_mask():
    of_layouts = {
        name: work(masks.causal(), Tokens(), layout, "ring", degree=8, q_len=4096) for name, layout in LAYOUTS.items()
    }
    assert of_layouts["contiguous"].imbalance > 1.8 and of_layouts["contiguous"].critical_path > 1.8
    assert of_layouts["zigzag"].imbalance < 1.001 and of_layouts["zigzag"].critical_path < 1.01


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(ValueError, match="work: got tokens without arrays and no q_len, wanted the length; pass q_len"):
        work(masks.causal(), Tokens(), Layout(), "ring", degree=2)
    with pytest.raises(NotImplementedError, match="work: usp needs two mesh axes"):
        work(masks.causal(), PACKED, Layout(), "usp", degree=2)


def test_a_picture(monkeypatch):
    matplotlib.use("Agg")
    axes = work(masks.causal(), PACKED, Layout(), "ring", degree=DEGREE).plot()
    assert axes.images[0].get_array().shape == (DEGREE, DEGREE)
    assert axes.get_title().startswith("busiest device 1.21 of the mean")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"Work.plot: matplotlib is not installed, wanted .* 'longctx-jax\[plot\]'"):
        balance_plot.plot(None, ax=None)
