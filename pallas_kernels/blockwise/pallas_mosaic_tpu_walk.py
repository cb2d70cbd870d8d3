"""How the TPU kernels of blockwise attention walk a schedule: its ranges as words, and copies one visit ahead.

A kernel's grid has one step for each row of the schedule; what the row visits it copies from HBM itself, by a loop of
as many iterations as there are blocks to visit. So a block that is not visited costs nothing, neither a copy nor a step
of the grid, whatever the mask, and the number of visits may depend on data.

While one block is computed the next is on its way, into the other of two buffers, and behind the last of a row the
first of the next row that visits any: rows wait for no copy but the first. What that takes is known beforehand and
stands in the words of a row.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.schedule import BlockRanges

_VISITS, _BEFORE, _NEXT_COLUMN, _NEXT_MEMBER, _RANGES = 0, 1, 2, 3, 4


def words_of(ranges: BlockRanges, *, num_heads: int, num_members: int) -> jax.Array:
    """What the kernels read of a schedule, in the order in which they go through it.

    Heads are taken in groups of `num_members`, and of each group row by row, and of each row member by member.

    Args:
      ranges: Of one side; all rows have the same number of ranges.
      num_heads: Query heads.
      num_members: Heads of a group; 1 where each goes its own way.
    Returns: int32 `[B or 1, groups or fewer, rows, members, 1, words]`; where several groups visit the same there is
      one for all. The words: how many blocks are visited; how many were before, in this group; the column of the
      next visit after this row's last, or -1, and its member; then starts, stops, full starts and full stops.
    """
    parts = jnp.stack([jnp.asarray(getattr(ranges, name)) for name in ("start", "stop", "full_start", "full_stop")])
    _, batch_size, num_rows, num_lists, num_ranges = parts.shape
    parts = jnp.moveaxis(parts, 3, 2)  # [4, b, lists, rows, ranges]
    if num_members == 1:
        parts = parts[:, :, :, :, None]
    elif num_lists == 1:
        parts = jnp.broadcast_to(parts[:, :, :, :, None], (*parts.shape[:4], num_members, num_ranges))
    else:
        parts = jnp.repeat(parts, num_heads // num_lists, axis=2)
        parts = parts.reshape(4, batch_size, num_heads // num_members, num_members, num_rows, num_ranges)
        parts = jnp.moveaxis(parts, 3, 4)
    groups = parts.shape[2]
    parts = parts.reshape(4, batch_size, groups, -1, num_ranges)
    visits = jnp.sum(parts[1] - parts[0], axis=-1)  # [b, groups, items]
    num_items = visits.shape[2]
    before = jnp.cumsum(visits, axis=2) - visits
    item = jnp.where(visits > 0, jnp.arange(num_items, dtype=jnp.int32), num_items)
    following = jax.lax.cummin(item[:, :, 1:], axis=2, reverse=True)
    following = jnp.pad(following, ((0, 0), (0, 0), (0, 1)), constant_values=num_items)
    first = jnp.pad(parts[0, ..., 0], ((0, 0), (0, 0), (0, 1)), constant_values=-1)
    next_column = jnp.take_along_axis(first, following, axis=2)
    next_member = following % num_members
    head = jnp.stack([visits, before, next_column, next_member], axis=-1)
    words = jnp.concatenate([head, *parts], axis=-1).astype(jnp.int32)
    return words.reshape(batch_size, groups, num_rows, num_members, 1, -1)


def walk(words, own, copies: Callable[..., Sequence], visit: Callable[..., None]) -> None:
    """Visits the blocks of a row, in order.

    Args:
      words: A row's, in SMEM: `[1, 1, 1, 1, 1, words]`.
      own: The member of the group of heads that this step is for.
      copies: Given the buffer (0 or 1), the member of the group and the column: the copies of that block, to be started
        and waited for.
      visit: Of the buffer, the column, and whether all pairs of the block may attend.
    """
    num_ranges = (words.shape[-1] - _RANGES) // 4

    def word(i):
        return words[0, 0, 0, 0, 0, i]

    def start(r):
        return word(_RANGES + r)

    num, before = word(_VISITS), word(_BEFORE)
    next_member, next_column = word(_NEXT_MEMBER), word(_NEXT_COLUMN)

    @pl.when((num > 0) & (before == 0))
    def _():
        for copy in copies(0, own, start(0)):
            copy.start()

    def step(i, state):
        r, at = state
        buffer = jax.lax.rem(before + i, 2)
        ends = at + 1 >= word(_RANGES + num_ranges + r)
        next_r = jnp.where(ends, jnp.minimum(r + 1, num_ranges - 1), r)
        following = jnp.where(ends, start(next_r), at + 1)
        is_last = i + 1 == num

        @pl.when(jnp.logical_not(is_last) | (next_column >= 0))
        def _():
            member = jnp.where(is_last, next_member, own)
            for copy in copies(1 - buffer, member, jnp.where(is_last, next_column, following)):
                copy.start()

        for copy in copies(buffer, own, at):
            copy.wait()
        is_full = (word(_RANGES + 2 * num_ranges + r) <= at) & (at < word(_RANGES + 3 * num_ranges + r))
        visit(buffer, at, is_full)
        return next_r, following

    jax.lax.fori_loop(0, num, step, (jnp.int32(0), start(0)))
