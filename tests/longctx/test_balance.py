"""The tiles of every hop equal those of the schedules that the ring builds, and what a layout evens out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx import MeshConfig, make_mesh, masks
from longctx.context_parallel import ContextParallelConfig, balance, sharded_schedule
from longctx.context_parallel.balance import hop_tiles, imbalance
from pallas_kernels import BlockSizes, Tokens, make_schedule

LENGTH = 480
SIZES = BlockSizes(block_q=8, block_kv=14)  # the last block of keys is ragged at every degree
MASKS = {
    "causal": masks.causal(),
    "window": masks.sliding_window(left=50),
    "documents": masks.causal() & masks.documents(),
    "documents_window": masks.sliding_window(left=7) & masks.documents(),
    "full": masks.full(),
    "nothing": masks.causal(offset=-LENGTH),
    "strided": masks.causal() & masks.strided(4, block=16),
    "two_ranges": masks.prefix(40) | (masks.causal() & masks.sliding_window(left=30)),
}
LAYOUTS = {
    "contiguous": ContextParallelConfig(layout="contiguous"),
    "zigzag": ContextParallelConfig(layout="zigzag"),
    "striped": ContextParallelConfig(layout="striped"),
    "striped_by_4": ContextParallelConfig(layout="striped", stripe_size=4),
}


@functools.cache
def schedules_of(degree: int):
    """The schedules of all masks, a function of the order; over a ring where there is one."""

    def build(mask, positions):
        tokens = Tokens.self_attention(positions)
        if degree == 1:
            schedule = make_schedule(mask, tokens, q_len=LENGTH, kv_len=LENGTH, block_sizes=SIZES)
            return jax.tree.map(lambda x: x[None], schedule.kv_blocks)
        lengths = dict(batch_size=1, q_len=LENGTH, kv_len=LENGTH)
        return sharded_schedule(mask, tokens, **lengths, block_sizes=SIZES).hops.kv_blocks

    return jax.jit(lambda positions: {name: build(mask, positions) for name, mask in MASKS.items()})


def visited(order, degree):
    """Tiles that the schedules of all masks visit, `[devices, hops]`."""
    mesh = make_mesh(MeshConfig(context_inner=degree), jax.devices()[:degree])
    with jax.set_mesh(mesh):
        ranges = jax.device_get(schedules_of(degree)(jnp.asarray(order, jnp.int32)[None]))
    return {name: (r.stop - r.start).reshape(degree, degree, -1).sum(axis=2).T for name, r in ranges.items()}


@pytest.mark.parametrize("degree", [4, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 8))])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tiles_are_those_of_the_schedules(layout, degree, monkeypatch):
    monkeypatch.setattr(balance, "MAX_TILES_AT_ONCE", 200)  # several groups of rows, the last smaller
    order = LAYOUTS[layout].order(LENGTH, degree)
    wanted = visited(order, degree)
    for name, mask in MASKS.items():
        np.testing.assert_array_equal(hop_tiles(mask, order, degree, SIZES), wanted[name], err_msg=name)


def test_imbalance():
    assert imbalance(np.array([[4, 4], [4, 4]])) == 1
    assert imbalance(np.array([[4, 0], [0, 4]])) == 2, "even in sum, but at each hop one waits for the other"
    assert imbalance(np.array([[1, 0], [1, 2]])) == 1.5
    assert imbalance(np.zeros((2, 2), int)) == 1


@pytest.mark.parametrize(
    ("layout", "least", "most"), [("contiguous", 1.8, 2), ("zigzag", 1, 1.01), ("striped", 1, 1.1)]
)
def test_layouts_even_out_a_causal_mask(layout, least, most):
    order = LAYOUTS[layout].order(1 << 14, 8)
    sizes = BlockSizes(block_q=64, block_kv=64)
    assert least <= imbalance(hop_tiles(MASKS["causal"], order, 8, sizes)) <= most


def test_tokens_must_split_over_the_devices():
    with pytest.raises(ValueError, match="order has 480 tokens, which do not split over degree=7 devices; pass"):
        hop_tiles(masks.causal(), np.arange(LENGTH), 7, SIZES)
