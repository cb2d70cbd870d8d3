"""How the warpgroups of a Hopper kernel walk their work in step: items one by one, and the blocks that each visits.

Producer and consumers each walk on their own, and so must walk alike: the barriers between them count on it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

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


class Visit(NamedTuple):
    """A block that an item visits.

    Attributes:
      index: Its number.
      is_full: Whether it needs no pair test.
      is_last: Whether no block comes after it.
    """

    index: ArrayLike
    is_full: ArrayLike
    is_last: ArrayLike


@dataclasses.dataclass(frozen=True, kw_only=True)
class Walk:
    """The walk of one block of threads.

    Attributes:
      deal: Which items are its own; a pair is a batch row and a head.
      section: Of items that go out in line, in place of the deal's: a reference to one number; or None.
      ranges: The blocks that each row of tiles visits: references in device memory.
      num_heads: Heads of a batch row; there are as many lists of ranges, or a divisor, or a multiple of them.
      tests_blocks: Whether any block may need the pair test.
    """

    deal: Deal
    section: Any = None
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

    def item_in_line(self, number) -> Item:
        """The item of a number in line."""
        deal = self.deal if self.section is None else dataclasses.replace(self.deal, section=self.section[0])
        return self.item_of(*deal.item_in_line(number))

    def item_of(self, exists, pair, rank) -> Item:
        batch, head = lax.div(pair, self.num_heads), lax.rem(pair, self.num_heads)
        order, which = self.ranges.order, self.list_of(head)
        row = order[row_of_batch(order, batch), rank, which if order.shape[2] > 1 else 0]
        return Item(exists, batch, head, row, self.range_of(batch, which, row, 0))

    def list_of(self, head) -> ArrayLike:
        """The list of a head; the first of them where it has several."""
        return 0 if self.ranges.num_lists == 1 else lax.div(head * self.ranges.num_lists, self.num_heads)

    def num_ranges(self, batch, which, row) -> ArrayLike:
        """Ranges of a row of a list, of which the last may be empty."""
        first = self.ranges.first
        if first is None:
            return self.ranges.start.shape[3]
        batch = row_of_batch(first, batch)
        return first[batch, which, row + 1] - first[batch, which, row]

    def range_of(self, batch, which, row, number) -> Range:
        """A range; of a row that has none in a list of ranges, any other."""
        start, first = self.ranges.start, self.ranges.first
        batch = row_of_batch(start, batch)
        if first is None:
            at = batch, row, which, number
        else:
            at = batch, which, jnp.clip(first[batch, which, row] + number, 0, start.shape[2] - 1)
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
        which = self.list_of(item.head)
        num_ranges = self.num_ranges(item.batch, which, item.row)

        def one_range(loop):
            number, (start, stop, full_start, full_stop), skip, state = loop
            ahead = self.range_of(item.batch, which, item.row, jnp.minimum(number + 1, num_ranges - 1))
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

    def visit_in_order(self, item: Item, which, body: Callable, state, *, ascending: ArrayLike):
        """state = body(a Visit, state) for each block of a list's row.

        Args:
          which: One of the lists of the item's head.
          ascending: May be traced where rows have one range.
        """
        num_ranges = self.num_ranges(item.batch, which, item.row)

        def one_range(current: Range, is_last, state):
            start, stop, full_start, full_stop = current

            def one_block(i, state):
                j = either_way(ascending, i, start + stop - 1 - i)
                is_full = (full_start <= j) & (j < full_stop)
                return body(Visit(j, is_full, is_last & (i == stop - 1)), state)

            return lax.fori_loop(start, stop, one_block, state)

        def number(i):
            i = jnp.minimum(i, num_ranges - 1)
            return i if ascending else num_ranges - 1 - i

        has_one = self.ranges.first is None and num_ranges == 1
        if (has_one or ascending) and self.ranges.num_lists <= self.num_heads:
            first = item.first_range
        else:
            first = self.range_of(item.batch, which, item.row, jnp.int32(0) if has_one else number(0))
        if has_one:
            return one_range(first, True, state)

        def goes_on(i, current: Range):
            # Behind the last of ascending ranges may be empty ones.
            return (i < num_ranges) & (current.start < current.stop) if ascending else i < num_ranges

        def one_more(loop):
            i, current, state = loop
            ahead = self.range_of(item.batch, which, item.row, number(i + 1))
            is_last = jnp.logical_not(goes_on(i + 1, ahead))
            return i + 1, ahead, one_range(current, is_last, state)

        return lax.while_loop(lambda loop: goes_on(*loop[:2]), one_more, (jnp.int32(0), first, state))[2]


def either_way(condition: ArrayLike, x: ArrayLike, y: ArrayLike) -> ArrayLike:
    """x if the condition holds, which may be traced, else y."""
    if isinstance(condition, bool):
        return x if condition else y
    return jnp.where(condition, x, y)


def row_of_batch(ref, batch) -> ArrayLike:
    """Where a batch row is in an array of `[B or 1, ...]`."""
    return batch if ref.shape[0] > 1 else 0
