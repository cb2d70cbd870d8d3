"""How the warpgroups of a Hopper kernel walk their work in step: items one by one, and the blocks that each visits.

Producer and consumers each walk on their own, and so must walk alike: the barriers between them count on it.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from pallas_kernels.mosaic_gpu import Deal
from pallas_kernels.schedule import BlockRanges


class Range(NamedTuple):
    """A range of blocks, and the run of full ones in it."""

    start: ArrayLike
    stop: ArrayLike
    full_start: ArrayLike
    full_stop: ArrayLike


class Item(NamedTuple):
    """A tile of queries of a head; `exists` is false in rounds that have none for this block."""

    exists: ArrayLike
    batch: ArrayLike
    head: ArrayLike
    row: ArrayLike
    first_range: Range

    @property
    def visits_any(self) -> ArrayLike:
        return self.first_range.start < self.first_range.stop


@dataclasses.dataclass(frozen=True, kw_only=True)
class Walk:
    """The walk of one block of threads.

    Attributes:
      deal: Which items are its own; a pair is a batch row and a head.
      ranges: The blocks that each row of tiles visits: references in device memory.
      num_heads: Heads of a batch row.
      tests_blocks: Whether any block may need the pair test.
    """

    deal: Deal
    ranges: BlockRanges
    num_heads: int
    tests_blocks: bool

    def for_each_item(self, body: Callable, state):
        """state = body(number, item, state) for the items of this block; the next one is looked up ahead of time."""
        block = lax.axis_index("block")

        def look_up(turn) -> Item:
            return self.item_of(*self.deal.item(block, jnp.minimum(turn, self.deal.num_rounds - 1)))

        def one_round(turn, loop):
            number, item, state = loop
            ahead = look_up(turn + 1)
            state = lax.cond(item.exists, lambda state: body(number, item, state), lambda state: state, state)
            return number + item.exists.astype(jnp.int32), ahead, state

        first = jnp.int32(0), look_up(jnp.int32(0)), state
        return lax.fori_loop(0, self.deal.num_rounds, one_round, first)[2]

    def item_of(self, exists, pair, rank) -> Item:
        batch, head = lax.div(pair, self.num_heads), lax.rem(pair, self.num_heads)
        order = self.ranges.order
        row = order[row_of_batch(order, batch), rank]
        return Item(exists, batch, head, row, self.range_of(batch, row, 0))

    def range_of(self, batch, row, number) -> Range:
        at = row_of_batch(self.ranges.start, batch), row, number
        return Range(*(getattr(self.ranges, name)[at] for name in Range._fields))

    def first_block(self, item: Item) -> ArrayLike:
        """The block that `visit` starts with."""
        start, stop, full_start, full_stop = item.first_range
        if not self.tests_blocks:
            return start
        return jnp.where(full_start > start, start, jnp.where(stop > full_stop, full_stop, start))

    def visit(self, item: Item, tested: Callable, full: Callable, state, *, skip: int):
        """state = tested(j, state) or full(j, state) for each block j that the item visits, after the first `skip`.

        Range by range; in each, first the blocks that need the pair test, then those that do not.
        """
        num_ranges = self.ranges.start.shape[2]

        def one_range(loop):
            number, (start, stop, full_start, full_stop), skip, state = loop
            ahead = self.range_of(item.batch, item.row, jnp.minimum(number + 1, num_ranges - 1))
            if not self.tests_blocks:
                return number + 1, ahead, jnp.int32(0), lax.fori_loop(start + skip, stop, full, state)
            num_before = full_start - start
            num_tested = num_before + stop - full_stop

            def one_tested(i, state):
                return tested(jnp.where(i < num_before, start + i, full_stop + i - num_before), state)

            state = lax.fori_loop(skip, num_tested, one_tested, state)
            state = lax.fori_loop(full_start + jnp.maximum(skip - num_tested, 0), full_stop, full, state)
            return number + 1, ahead, jnp.int32(0), state

        loop = jnp.int32(0), item.first_range, jnp.int32(skip), state
        if num_ranges == 1:
            return one_range(loop)[3]

        def visits_any(loop):
            number, (start, stop, *_), _, _ = loop
            return (number < num_ranges) & (start < stop)

        return lax.while_loop(visits_any, one_range, loop)[3]

    def visit_in_order(self, item: Item, body: Callable, state, *, ascending: bool):
        """state = body(j, whether j needs no pair test, state) for each block j that the item visits."""
        num_ranges = self.ranges.start.shape[2]

        def one_range(current: Range, state):
            start, stop, full_start, full_stop = current

            def one_block(i, state):
                j = i if ascending else start + stop - 1 - i
                return body(j, (full_start <= j) & (j < full_stop), state)

            return lax.fori_loop(start, stop, one_block, state)

        if num_ranges == 1:
            return one_range(item.first_range, state)

        def number(i):
            i = jnp.minimum(i, num_ranges - 1)
            return i if ascending else num_ranges - 1 - i

        def one_more(i, loop):
            current, state = loop
            ahead = self.range_of(item.batch, item.row, number(i + 1))
            return ahead, one_range(current, state)

        first = item.first_range if ascending else self.range_of(item.batch, item.row, number(0))
        return lax.fori_loop(0, num_ranges, one_more, (first, state))[1]


def row_of_batch(ref, batch) -> ArrayLike:
    """Where a batch row is in an array of `[B or 1, ...]`."""
    return batch if ref.shape[0] > 1 else 0
