"""Schedules of lists: both sides visit the pairs of blocks that are chosen, and know which need no pair test."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import BlockSizes
from pallas_kernels.block_lists import schedule_of_lists
from pallas_kernels.mask import Causal
from pallas_kernels.sparse.choose import lists_of


def test_the_transpose_has_the_pairs_of_the_lists():
    """Blocks of 16 queries and 24 keys, cut into parts of 8; ragged at the end, some lists empty."""
    rng = np.random.default_rng(1)
    chosen = rng.random((2, 3, 10, 7)) < 0.3
    chosen[0, 1, 4] = False
    make = functools.partial(
        schedule_of_lists, mask=Causal(), tokens=None, q_len=156, kv_len=165,
        list_sizes=BlockSizes(block_q=16, block_kv=24), block_sizes=BlockSizes(block_q=8, block_kv=8),
    )  # fmt: skip
    schedule = jax.tree.map(np.asarray, jax.jit(make)(lists_of(jnp.asarray(chosen), 7)))
    num_q, num_kv = 20, 21
    want = np.repeat(np.repeat(chosen, 2, axis=2), 3, axis=3)[:, :, :num_q, :num_kv]
    full = want & (np.arange(num_q)[:, None] > np.arange(num_kv))  # of blocks of 8, causal
    # A ragged last block of keys has no pair behind the last query anyway.
    rows = schedule.q_blocks
    visits, tests_left_out = np.zeros(want.shape, int), np.zeros(want.shape, bool)
    for batch, which, column in np.ndindex(2, 3, num_kv):
        for i in range(*rows.first[batch, which, column : column + 2]):
            at = batch, which, i
            visits[batch, which, rows.start[at] : rows.stop[at], column] += 1
            tests_left_out[batch, which, rows.full_start[at] : rows.full_stop[at], column] = True
    np.testing.assert_array_equal(visits, want)
    # Both parts of a block of queries are full, or neither is said to be.
    both = np.repeat(full.reshape(2, 3, -1, 2, num_kv).all(axis=3), 2, axis=2)
    np.testing.assert_array_equal(tests_left_out, both)
    np.testing.assert_array_equal(np.asarray(schedule.visited()), want)
