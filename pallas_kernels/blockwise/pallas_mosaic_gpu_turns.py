"""In which order the items of the Hopper backward kernel add into dq, so that the sum is the same each time.

Items (a block of keys each) add into the tiles of dq that they visit. A sum that must not depend on who comes first
needs an order, fixed beforehand, in which each tile is added to: the items' turns. Any order will do that never makes
items wait for each other in a circle, and good ones make them wait little:

- Items go out in one line (pallas_mosaic_gpu_queue.py), and turns go as they go out. Blocks of keys go from the first
  to the last, each visiting its blocks of queries from the last to the first: under a causal mask or a window an item
  then comes to a tile a step behind the one before it, if that began a step earlier, which takes several pairs side by
  side. Or both the other way round: then each begins with a tile of its own, whenever it does, but the longest items of
  a causal mask go out last.
- Lists of chosen blocks tell beside each block after how many others an item comes to it; items go as in the first way.
- Where rows visit scattered blocks and the schedule is constant, items are dealt out beforehand and the walk is
  rehearsed, every step taking the same time and nobody waiting for a turn, but only so many adding into a tile at a
  time; turns go as items came to it. That is free of circles, and of waiting too as far as steps do take the same time.
  Who waits for a turn counts on those before it being at work or done: blocks of threads take their items in the order
  of the plan, and one that has not begun yet, since another kernel has its multiprocessor, is waited for.

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
from pallas_kernels.mosaic_gpu import Deal
from pallas_kernels.schedule import BlockRanges

_ONE_BEHIND_THE_OTHER = 16
"""Items of a pair that are at work at a time where they come to a tile one after the other."""
_MOST_REHEARSED = 1 << 22
"""Turns that a program may hold as a constant: 16 heads of 64K tokens. It takes about a second to find them."""


class Turns(NamedTuple):
    """After how many others an item adds into a tile of dq; one of four, the others None.

    Attributes:
      rehearsed: int32 `[B N, blocks of keys, blocks of queries]`.
      line: `(rank, gone)`, int32 `[B or 1, lists, blocks of keys]` and `[B or 1, lists, blocks of queries]`: how many
        items that visit anything come before an item, and how many of those have ended before a block. The turn is the
        difference, where items visit one range whose ends never fall.
      listed: `(first, turn)` of the schedule, which tells them itself.
      table: int32 `[B or 1, lists, blocks of keys, blocks of queries]`.
    """

    rehearsed: Any = None
    line: tuple[Any, Any] | None = None
    listed: tuple[Any, Any] | None = None
    table: Any = None

    def at(self, batch, pair, which, row, number, block) -> ArrayLike:
        """The turn of the item of `row` in the tiles of a block of queries, which the given range of a list holds.

        Args:
          pair: The query head, counted over the whole batch.
        """
        if self.rehearsed is not None:
            return self.rehearsed[pair, row, block]
        if self.table is not None:
            return self.table[row_of_batch(self.table, batch), which, row, block]
        if self.listed is not None:
            first, turn = self.listed
            batch = row_of_batch(turn, batch)
            if first is None:
                return turn[batch, row, which, number]
            return turn[batch, which, first[batch, which, row] + number]
        rank, gone = self.line
        batch = row_of_batch(rank, batch)
        return rank[batch, which, row] - gone[batch, which, block]


class Plan(NamedTuple):
    """How the backward pass of a call goes.

    Attributes:
      deal: Who does which item, or in which sections they go out; a pair is a batch row and a kv head.
      in_line: Whether items go out in one line, to whoever asks next, and are not dealt beforehand.
      ascends: Whether an item visits its blocks of queries from the first to the last.
      heads_together: Of how many heads of the group an item visits a block before it goes on to the next block.
      order: As `BlockRanges.order`: the rows of a pair as they go out.
      turns: None where dq is added up in no fixed order.
    """

    deal: Deal
    in_line: bool
    ascends: bool
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
    deterministic: bool,
    most_heads_together: int,
) -> Plan:
    """Plans the walk over a schedule's `q_blocks`.

    Args:
      ranges: NumPy arrays where the schedule is constant.
      pair_bytes: What the items of a pair read over and over.
      deterministic: Whether each tile of dq is to be added to in a fixed order.
      most_heads_together: As `Plan.heads_together`, which is the greatest divisor of the group up to it.
    Memory: where turns are a table, one number for each block of keys and of queries, T S / 2^14 of them: 64 for each
      token at a million tokens.
    """
    num_pairs, num_rows, num_ranges = batch_size * num_kv_heads, ranges.num_rows, ranges.start.shape[-1]
    group, is_constant = num_heads // num_kv_heads, isinstance(ranges.start, np.ndarray)
    # Heads that visit different blocks go one after the other.
    most_together = 1 if ranges.num_lists > num_kv_heads else most_heads_together
    together = max(n for n in range(1, most_together + 1) if group % n == 0)
    deal = Deal.of(num_pairs=num_pairs, num_ranks=num_rows, pair_bytes=pair_bytes, group=1, num_cores=num_cores)
    if not deterministic:
        # Sections of one size: the items of a smaller last one would not keep all blocks at work. Items that visit
        # scattered blocks find less of them in the cache beside another pair's.
        wanted = max(1 if ranges.first is not None else 2, deal.section)
        section = next(n for n in range(1, num_pairs + 1) if num_pairs % n == 0 and n >= min(num_pairs, wanted))
        deal = dataclasses.replace(deal, section=section)
        return Plan(
            deal=deal, in_line=True, ascends=False, heads_together=together, order=ranges.order, turns=None
        )  # fmt: skip
    num_turns = batch_size * num_heads * num_rows * num_q_blocks
    if is_constant and ranges.num_lists == 1 and num_ranges > 1 and num_turns <= _MOST_REHEARSED:
        rehearsals = [(x, *_rehearse(x, ranges, num_q_blocks, group, together)) for x in _smaller(deal)]
        deal, _, turns = min(rehearsals, key=lambda rehearsal: rehearsal[1])
        return Plan(
            deal=deal, in_line=False, ascends=False, heads_together=together, order=ranges.order,
            turns=Turns(rehearsed=turns),
        )  # fmt: skip
    line = _line(ranges, num_q_blocks) if is_constant and num_ranges == 1 else None
    listed = None if ranges.turn is None else (ranges.first, ranges.turn)
    # A block of several heads takes long enough for turns to be passed on, and few rows have not far to; lists have
    # theirs in ascending order.
    ascends = line is None and listed is None and group == 1 and num_rows > _ONE_BEHIND_THE_OTHER
    if not ascends:
        # An item of several heads is longer, so the next begins later.
        side_by_side = max(deal.section, deal.num_blocks // (_ONE_BEHIND_THE_OTHER * min(group, 2)))
        deal = dataclasses.replace(deal, section=min(num_pairs, side_by_side))
    order = np.arange(num_rows, dtype=np.int32)[None, :: -1 if ascends else 1, None]
    if line or listed:
        turns = Turns(line=line, listed=listed)
    else:
        turns = Turns(table=_table(ranges, num_q_blocks, ascends))
    return Plan(
        deal=deal, in_line=True, ascends=ascends, heads_together=together, order=order, turns=turns
    )  # fmt: skip


def _smaller(deal: Deal) -> list[Deal]:
    """The deal, and such with sections of half the size or more: with fewer items at once, others are neighbours."""
    sections = [n for n in range(1, deal.section + 1) if deal.num_pairs % n == 0 or n == deal.section]
    return [dataclasses.replace(deal, section=n) for n in sections if deal.section <= 2 * n]


def _rehearse(
    deal: Deal, ranges: BlockRanges, num_q_blocks: int, group: int, heads_together: int
) -> tuple[int, np.ndarray]:
    """How many steps it takes, and `Turns.rehearsed`."""
    visited = _visited(ranges, num_q_blocks)[0, 0]
    num_rows = len(visited)
    blocks_of = [np.flatnonzero(row)[::-1] for row in visited]
    everyone = np.meshgrid(*(np.arange(n) for n in (deal.num_blocks, deal.num_rounds)), indexing="ij")
    steps = []  # of each block of threads: places in the result, tile by tile
    for items in np.stack(deal.item(*everyone), axis=-1):
        places = [np.empty(0, np.int64)]
        for _, pair, rank in items[items[:, 0] == 1]:
            row = ranges.order[0, rank, 0]
            heads = pair * group + np.arange(group).reshape(-1, 1, heads_together)
            places.append((((heads * num_rows) + row) * num_q_blocks + blocks_of[row][:, None]).ravel())
        steps.append(np.concatenate(places))
    lengths = np.array([len(x) for x in steps])
    table = np.zeros((len(steps), max(1, lengths.max())), np.int64)
    for places, row in zip(steps, table, strict=True):
        row[: len(places)] = places

    turns = np.zeros(deal.num_pairs * group * num_rows * num_q_blocks, np.int32)
    added = np.zeros(deal.num_pairs * group * num_q_blocks, np.int32)
    position, duration = np.zeros(len(steps), np.int64), 0
    while len(at_work := np.flatnonzero(position < lengths)):
        places = table[at_work, position[at_work]]
        tiles = places // (num_rows * num_q_blocks) * num_q_blocks + places % num_q_blocks
        # Of those that want to add into a tile, two do: it takes about half a step.
        sorting = np.argsort(tiles, kind="stable")
        _, first, group_of = np.unique(tiles[sorting], return_index=True, return_inverse=True)
        waiting = np.arange(len(tiles)) - first[group_of]
        now, ahead = sorting[waiting < 2], waiting[waiting < 2]
        turns[places[now]] = added[tiles[now]] + ahead
        np.add.at(added, tiles[now], 1)
        position[at_work[now]] += 1
        duration += 1
    return duration, turns.reshape(-1, num_rows, num_q_blocks)


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


def _table(ranges: BlockRanges, num_q_blocks: int, descending: bool) -> jax.Array:
    """`Turns.table`: of the items that visit a block, in ascending or descending order."""
    visited = jnp.asarray(_visited(ranges, num_q_blocks), jnp.int32)
    return lax.cumsum(visited, axis=2, reverse=descending) - visited


def _visited(ranges: BlockRanges, num_q_blocks: int):
    """Which blocks each row visits, `[B or 1, lists, rows, blocks]`."""
    blocks = np.arange(num_q_blocks)
    return ((ranges.start[..., None] <= blocks) & (blocks < ranges.stop[..., None])).any(axis=3).swapaxes(1, 2)
