"""In which order the items of the Hopper backward kernel add into dq, so that the sum is the same each time.

Items (a block of keys each) add into the tiles of dq that they visit. A sum that must not depend on who comes first
needs an order, fixed beforehand, in which each tile is added to: the items' turns. Any order will do that never makes
items wait for each other in a circle, and good ones make them wait little:

- Items go out in one line (pallas_mosaic_gpu_queue.py), and turns go as they go out. Blocks of keys go from the first
  to the last, each visiting its blocks of queries from the last to the first: under a causal mask or a window an item
  then comes to a tile a step behind the one before it, if that began a step earlier, which takes several pairs side by
  side. Or both the other way round: then each begins with a tile of its own, whenever it does. But the longest items of
  a causal mask go out last, and items that are at work spread over all that a document has, which the second-level
  cache should hold. So the tokens say at run time which: where documents are long, the first.
- MoBA's lists tell beside each block after how many others an item comes to it; items go as in the first way.

Where rows visit several ranges of blocks, or lists of them, no order is good: dq is added up in fixed point there.

Reference: Qiang et al. 2026, DASH: Deterministic Attention Scheduling for High-throughput Reproducible LLM Training,
arXiv:2601.21824 (descending blocks of queries).
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from pallas_kernels.blockwise.pallas_mosaic_gpu_walk import row_of_batch
from pallas_kernels.mosaic_gpu import L2_BYTES, Deal
from pallas_kernels.schedule import BlockRanges

_ONE_BEHIND_THE_OTHER = 16
"""Items of a pair that are at work at a time where they come to a tile one after the other."""


class Table(NamedTuple):
    """Turns that are known at run time, and in which order items go out.

    Attributes:
      turn: int32 `[B or 1, lists, blocks of keys, blocks of queries]`.
      ascends: Whether an item visits its blocks of queries from the first to the last, int32 `[1]`; None for no item.
      section: As `Deal.section`, int32 `[1]`; None with `ascends`.
    """

    turn: Any
    ascends: Any = None
    section: Any = None


class Turns(NamedTuple):
    """After how many others an item adds into a tile of dq; one of three, the others None.

    Attributes:
      line: `(rank, gone)`, int32 `[B or 1, lists, blocks of keys]` and `[B or 1, lists, blocks of queries]`: how many
        items that visit anything come before an item, and how many of those have ended before a block. The turn is the
        difference, where items visit one range whose ends never fall.
      listed: `turn` of the schedule, which tells them itself.
      table: One of them all.
    """

    line: tuple[Any, Any] | None = None
    listed: Any = None
    table: Table | None = None

    def at(self, batch, which, row, block) -> ArrayLike:
        """The turn of the item of `row`, of the given list, in the tiles of a block of queries."""
        if self.table is not None:
            turn = self.table.turn
            return turn[row_of_batch(turn, batch), which, row, block]
        if self.listed is not None:
            return self.listed[row_of_batch(self.listed, batch), row, which, 0]
        rank, gone = self.line
        batch = row_of_batch(rank, batch)
        return rank[batch, which, row] - gone[batch, which, block]


class Plan(NamedTuple):
    """How the backward pass of a call goes.

    Attributes:
      deal: In which sections items go out, in one line, to whoever asks next; a pair is a batch row and a kv head. A
        table of turns has sections of its own.
      heads_together: Of how many heads of the group an item visits a block before it goes on to the next block.
      order: As `BlockRanges.order`: the rows of a pair as they go out.
      turns: None where dq is added up in no fixed order.
    """

    deal: Deal
    heads_together: int
    order: Any
    turns: Turns | None


def plan(
    ranges: BlockRanges,
    *,
    num_q_blocks: int,
    batch_size: int,
    num_heads: int,
    num_kv_heads: int,
    pair_bytes: int,
    num_cores: int,
    in_turns: bool,
    most_heads_together: int,
) -> Plan:
    """Plans the walk over a schedule's `q_blocks`.

    Args:
      ranges: NumPy arrays where the schedule is constant; for turns with one range a row.
      pair_bytes: What the items of a pair read over and over.
      in_turns: Whether each tile of dq is to be added to in a fixed order.
      most_heads_together: As `Plan.heads_together`, which is the greatest divisor of the group up to it.
    Memory: where turns are a table, one number for each block of keys and of queries, T S / 2^14 of them: 64 for each
      token at a million tokens.
    """
    num_pairs, num_rows = batch_size * num_kv_heads, ranges.num_rows
    group, is_constant = num_heads // num_kv_heads, isinstance(ranges.start, np.ndarray)
    # Heads that visit different blocks go one after the other.
    most_together = 1 if ranges.num_lists > num_kv_heads else most_heads_together
    together = max(n for n in range(1, most_together + 1) if group % n == 0)
    deal = Deal.of(num_pairs=num_pairs, num_ranks=num_rows, pair_bytes=pair_bytes, group=1, num_cores=num_cores)
    if not in_turns:
        # Sections of one size: the items of a smaller last one would not keep all blocks at work. Items that visit
        # scattered blocks find less of them in the cache beside another pair's.
        wanted = max(1 if ranges.first is not None else 2, deal.section)
        section = next(n for n in range(1, num_pairs + 1) if num_pairs % n == 0 and n >= min(num_pairs, wanted))
        deal = dataclasses.replace(deal, section=section)
        return Plan(deal=deal, heads_together=together, order=ranges.order, turns=None)
    # An item of several heads is longer, so the next begins later.
    side_by_side = max(deal.section, deal.num_blocks // (_ONE_BEHIND_THE_OTHER * min(group, 2)))
    descending = dataclasses.replace(deal, section=min(num_pairs, side_by_side))
    planned = Plan(
        deal=descending,
        heads_together=together,
        order=np.arange(num_rows, dtype=np.int32)[None, :, None],
        turns=Turns(line=_line(ranges, num_q_blocks) if is_constant else None, listed=ranges.turn),
    )
    if planned.turns.line is not None or planned.turns.listed is not None:
        return planned
    # A block of several heads takes long enough for turns to be passed on, and few rows have not far to.
    if group > 1 or num_rows <= _ONE_BEHIND_THE_OTHER:
        return planned._replace(turns=Turns(table=Table(turn=_turns(ranges, num_q_blocks, jnp.bool(False)))))
    ascends = _length_where_most_is_done(ranges) * (pair_bytes / num_q_blocks) < L2_BYTES
    table = Table(
        turn=_turns(ranges, num_q_blocks, ascends),
        ascends=ascends.astype(jnp.int32)[None],
        section=jnp.where(ascends, deal.section, descending.section).astype(jnp.int32)[None],
    )
    order = jnp.where(ascends, planned.order[:, ::-1], planned.order)
    return planned._replace(order=order, turns=Turns(table=table))


def _length_where_most_is_done(ranges: BlockRanges) -> jax.Array:
    """Of documents, in blocks, as if all had causal masks and were of the length in which a visit of a block falls on
    average: rows of a document of X blocks visit 2/3 X on average over the visits."""
    visited = (jnp.asarray(ranges.stop) - ranges.start).astype(jnp.float32)
    return 1.5 * jnp.sum(visited * visited) / jnp.maximum(jnp.sum(visited), 1.0)


def _line(ranges: BlockRanges, num_q_blocks: int) -> tuple[np.ndarray, np.ndarray] | None:
    """`Turns.line`, or None where rows are not what it takes."""
    start, stop = (x[..., 0].swapaxes(1, 2) for x in (ranges.start, ranges.stop))
    some = start < stop
    ends = (np.maximum.accumulate(np.where(some, x, 0), axis=2) for x in (start, stop))
    if not all(np.all((x == greatest) | ~some) for x, greatest in zip((start, stop), ends, strict=True)):
        return None
    rank = np.cumsum(some, axis=2) - some
    gone = np.sum((stop[..., None] <= np.arange(num_q_blocks)) & some[..., None], axis=2)
    return rank.astype(np.int32), gone.astype(np.int32)


def _turns(ranges: BlockRanges, num_q_blocks: int, from_last: jax.Array) -> jax.Array:
    """`Table.turn`: of the items that visit a block, from the first or from the last."""
    visited = jnp.asarray(_visited(ranges, num_q_blocks), jnp.int32)
    so_far = lax.cumsum(visited, axis=2)
    return jnp.where(from_last, so_far[:, :, -1:] - so_far, so_far - visited)


def _visited(ranges: BlockRanges, num_q_blocks: int):
    """Which blocks each row visits, `[B or 1, lists, rows, blocks]`."""
    blocks = np.arange(num_q_blocks)
    return ((ranges.start[..., None] <= blocks) & (blocks < ranges.stop[..., None])).any(axis=3).swapaxes(1, 2)
