"""Schedules of blocks that were chosen: a list for each block of queries and head, and the transpose, on the device.

The transpose is made by one sort of all pairs of blocks, a key of 32 bits each: no array of rows times columns, and
nothing that the host would have to wait for. It also tells after how many others a block of keys comes to a block of
queries, which a backward pass with a fixed order of sums asks for.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.bands import make_bands
from pallas_kernels.block_sizes import BlockSizes
from pallas_kernels.dispatch import search_method
from pallas_kernels.mask import Mask
from pallas_kernels.schedule import BlockRanges, Blocks, Schedule, judge, longest_first, sides_of
from pallas_kernels.tokens import Tokens

_NOTHING = jnp.iinfo(jnp.int32).max


def schedule_of_lists(
    lists: jax.Array,
    *,
    mask: Mask,
    tokens: Tokens | None,
    q_len: int,
    kv_len: int,
    list_sizes: BlockSizes,
    block_sizes: BlockSizes,
) -> Schedule:
    """The schedule that visits the blocks of lists and no others; traceable.

    Args:
      lists: Blocks of keys, ascending, then -1: int32 `[B, lists, blocks of queries, most]`.
      mask: Which pairs of them may attend.
      tokens: Positions and segment ids; None means arange and one document.
      q_len, kv_len: Number of queries T and of keys S.
      list_sizes: Tokens a block of the lists holds.
      block_sizes: Tokens a block of the schedule holds; divides list_sizes (`can_be_cut`).
    Raises: ValueError where it does not.
    Cost: a sort of B lists (T / list block_q) most (list block_kv / block_kv) pairs, each of which takes 36 bytes.
    """
    sizes = block_sizes.fit(q_len, kv_len)
    num_q_blocks, num_kv_blocks = -(-q_len // sizes.block_q), -(-kv_len // sizes.block_kv)
    if not can_be_cut(list_sizes, sizes, q_len, kv_len):
        raise ValueError(
            f"schedule_of_lists: block_sizes={sizes}, wanted ones that divide those of the lists, {list_sizes}"
        )
    parts_q, parts_kv = -(-list_sizes.block_q // sizes.block_q), -(-list_sizes.block_kv // sizes.block_kv)
    there = lists >= 0

    # Of each pair of blocks of the schedule whether the pair test can be left out:
    # [B, lists, blocks of queries, parts, most, parts of a block of keys].
    row = jnp.minimum(_parts(jnp.arange(lists.shape[2]), parts_q), num_q_blocks - 1)
    column = _parts(lists, parts_kv)
    q, kv = sides_of(mask, tokens or Tokens(), q_len, kv_len, sizes)
    q = Blocks(*jax.tree.map(lambda x: x[:, None, row, None, None], tuple(q)))
    kv = jax.tree.map(lambda x: _taken(x, jnp.clip(column, 0, num_kv_blocks - 1))[:, :, :, None], kv)
    column = column[:, :, :, None]
    every = judge(mask, q, kv).all & there[:, :, :, None, :, None] & (column < num_kv_blocks)

    start = jnp.where(there, lists * parts_kv, 0)
    stop = jnp.where(there, jnp.minimum(start + parts_kv, num_kv_blocks), 0)
    # Full blocks at the start of a chosen one.
    full = jnp.sum(jnp.cumprod(every.astype(jnp.int32), axis=-1), axis=-1)

    def of_rows(x):
        """`[B, lists, blocks of queries, parts or 1, most]` to `[B, rows, lists, most]`."""
        x = jnp.broadcast_to(x, (*x.shape[:3], parts_q, x.shape[4]))
        x = x.reshape(*x.shape[:2], -1, x.shape[4])[:, :, :num_q_blocks]
        return x.swapaxes(1, 2)

    start, stop, full = of_rows(start[:, :, :, None]), of_rows(stop[:, :, :, None]), of_rows(full)
    kv_blocks = BlockRanges(
        start=start,
        stop=stop,
        full_start=start,
        full_stop=start + full,
        order=longest_first(jnp.sum(stop - start, axis=-1)),
    )
    q_blocks = _transposed(
        column[:, :, :, 0],
        there[..., None] & (column[:, :, :, 0] < num_kv_blocks),
        every.all(axis=3),
        parts_q=parts_q,
        num_q_blocks=num_q_blocks,
        num_kv_blocks=num_kv_blocks,
    )
    return Schedule(
        kv_blocks=kv_blocks,
        q_blocks=q_blocks,
        mask=mask,
        q_len=q_len,
        kv_len=kv_len,
        block_sizes=sizes,
        bands=make_bands(mask, tokens or Tokens(), q_len=q_len, kv_len=kv_len),
        is_selection=True,
    )


def can_be_cut(list_sizes: BlockSizes, sizes: BlockSizes, q_len: int, kv_len: int) -> bool:
    """Whether blocks of lists are made of whole blocks of these sizes; one that holds the sequence always is."""

    def divides(block: int, part: int, length: int) -> bool:
        return block % part == 0 or block >= length

    return divides(list_sizes.block_q, sizes.block_q, q_len) and divides(list_sizes.block_kv, sizes.block_kv, kv_len)


def _transposed(column, there, full, *, parts_q: int, num_q_blocks: int, num_kv_blocks: int) -> BlockRanges:
    """Of pairs `[B, lists, blocks of queries, most, parts of a block of keys]`: the block of keys, whether there is
    such a pair, and whether it is full."""
    num_rows = column.shape[2]
    row = jnp.arange(num_rows)[:, None, None]
    key = jnp.where(there, column * num_rows + row, _NOTHING)
    full = jnp.broadcast_to(full, key.shape)
    key, full = (x.reshape(*x.shape[:2], -1) for x in (key, full))
    key, full = jax.lax.sort((key, full), num_keys=1, is_stable=False)
    bounds = jnp.arange(num_kv_blocks + 1, dtype=jnp.int32) * num_rows
    search = functools.partial(jnp.searchsorted, v=bounds, method=search_method())
    first = jax.vmap(jax.vmap(search))(key).astype(jnp.int32)
    start = jnp.where(key == _NOTHING, 0, key % num_rows) * parts_q
    stop = jnp.where(key == _NOTHING, 0, jnp.minimum(start + parts_q, num_q_blocks))
    num_visits = jnp.sum(jnp.diff(first, axis=-1), axis=1)[..., None]
    return BlockRanges(
        start=start,
        stop=stop,
        full_start=start,
        full_stop=jnp.where(full, stop, start),
        order=longest_first(num_visits),
        first=first,
    )


def _parts(blocks: jax.Array, num: int) -> jax.Array:
    """The blocks that large ones are made of, as a last dim; negative of those that are not there."""
    return blocks[..., None] * num + jnp.arange(num, dtype=blocks.dtype)


def _taken(x: jax.Array, at: jax.Array) -> jax.Array:
    """`x[b, at[b]]` of `[B or 1, length]`, for indices of `[B, ...]`."""
    if x.shape[0] == 1:
        return x[0][at]
    return jax.vmap(lambda x, at: x[at])(x, at)
