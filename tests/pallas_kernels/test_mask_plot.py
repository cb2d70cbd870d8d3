"""Pictures of masks: what is drawn, without a display, and what is said where nothing can be."""

import sys

import matplotlib
import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.colors import same_color

from pallas_kernels import BlockSizes, Tokens
from pallas_kernels.mask import Causal, PerHead, Prefix, Window
from pallas_kernels.mask_patterns import Strided
from pallas_kernels.testing import packed_tokens


@pytest.fixture(autouse=True)
def without_a_display():
    matplotlib.use("Agg")
    yield
    pyplot.close("all")


def blocks(ax, color: str) -> set[tuple[int, int]]:
    """The upper left corners of the blocks outlined in this color, as (query, key)."""
    return {(p.get_y(), p.get_x()) for p in ax.patches if same_color(p.get_edgecolor(), color)}


def test_a_mask_with_its_blocks():
    ax = Causal().plot(q_len=10, block_sizes=BlockSizes(block_q=4, block_kv=4))
    np.testing.assert_array_equal(ax.images[0].get_array(), np.tri(10))
    assert blocks(ax, "black") == {(0, 0), (4, 4), (8, 8)}
    assert blocks(ax, "tab:green") == {(4, 0), (8, 0), (8, 4)}
    assert blocks(ax, "tab:red") == set()
    assert [p.get_hatch() for p in ax.patches].count("//") == 3
    assert ax.get_title() == "6 of 9 blocks visited: 3 need no pair test (hatched), 0 hold no pair (red)"
    ax.figure.canvas.draw()


def test_blocks_that_hold_nothing_are_red():
    """Positions out of order: the bounds of a block tell little."""
    positions = np.array([[0, 4, 8, 12, 1, 5, 9, 13]], np.int32)
    mask = Window(left=0, right=0)
    ax = mask.plot(Tokens.self_attention(positions), block_sizes=BlockSizes(block_q=4, block_kv=4))
    assert blocks(ax, "tab:red") == {(0, 4), (4, 0)}


def test_rows_lengths_and_axes():
    _, ax = pyplot.subplots()
    tokens = packed_tokens(((6, 2), (8,)), 8)
    assert Causal().plot(tokens, row=1, ax=ax) is ax
    assert ax.images[0].get_array().sum() == 36
    assert Causal().plot().images[0].get_array().shape == (128, 128)
    assert Causal().plot(q_len=20, kv_len=30).images[0].get_array().shape == (20, 30)


def test_heads_that_differ_are_shaded():
    shares = (Causal() & PerHead((Prefix(9), Strided(2)))).plot(q_len=3).images[0].get_array()
    np.testing.assert_array_equal(shares, [[1, 0, 0], [0.5, 1, 0], [1, 0.5, 1]])


def test_what_cannot_be_drawn(monkeypatch):
    with pytest.raises(ValueError, match="Mask.plot: q_len=4096 and kv_len=4096, wanted at most 4194304 pairs; draw a"):
        Causal().plot(q_len=4096)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        ImportError, match=r"matplotlib is not installed, wanted for drawing; pip install 'longctx-jax\[pl"
    ):
        Causal().plot(q_len=4)
