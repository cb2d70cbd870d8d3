"""Schedule: which blocks of keys each block of queries visits, and the transpose, built on the device.

A schedule is built once a step per distinct mask and handed to every layer; over tokens in order it is known when the
program is traced, and can be a constant of it (`static_schedule`). Row by row it holds the ranges of blocks to
visit, and within each range those blocks whose pairs may all attend, where the pair test is skipped. A block outside
the ranges holds no pair that may attend; a block inside them may still turn out empty, which the pair test settles.

How many ranges a row has is static: as many as the mask says that it may need (`Mask.num_runs`), so one for causal,
window and document masks, two for sinks and a window. A row with more puts those left over, and what is between them,
into its last range. Where single blocks are scattered a range is one block, and the ranges are the list of blocks:
there is one form, and one walk over it. Where the mask differs between heads, each group of them has a list of its own.

Blocks may also be chosen, from the data (block_lists.py): then a schedule is part of what says which pairs may attend.
"""

import dataclasses
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pallas_kernels import block_sizes as block_sizes_lib
from pallas_kernels import dispatch
from pallas_kernels.arguments import check_kind
from pallas_kernels.bands import Bands, make_bands
from pallas_kernels.block_sizes import BlockSizes
from pallas_kernels.mask import Bounds, Mask, TileVerdict
from pallas_kernels.tokens import Leaf, TokenAxis, Tokens, validate_tokens

_MAX_RANGES_OF_ALL_ROWS = 1 << 21
"""Ranges of a side at most, at 16 bytes each: 256 a row at 1M tokens in blocks of 128."""

_MAX_TILES_AT_ONCE = 1 << 21
"""Tiles judged at a time. A tile costs about 20 bytes of temporaries, so this bounds the peak near 40 MB."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockRanges:
    """For each block of one side (a row), half-open ranges over the blocks of the other side.

    All arrays are int32, the ranges `[B or 1, rows, lists, ranges]`: where heads visit different blocks each has a list
    of its own, or each group of neighbouring heads, otherwise there is one. The ranges of a row are in order and do not
    overlap; the last ones may be empty, with start = stop.

    Attributes:
      start, stop: The blocks to visit.
      full_start, full_stop: The longest run of blocks, within each range, that need no pair test.
      order: The rows by how many blocks they visit, most first and ties in ascending order, `[B or 1, rows, lists or
        1]`: the order to deal them out in, so that the longest do not start last.
      first: None where all rows have the same number of ranges. Otherwise those of all rows lie one after the other,
        `[B or 1, lists, ranges]`, and this is where each row's begin, and where the last one's end,
        `[B or 1, lists, rows + 1]`.
      turn: None, or of the blocks of each row's one range how many rows visit them before this row, in ascending order;
        of the ranges' shape.
    """

    start: Leaf
    stop: Leaf
    full_start: Leaf
    full_stop: Leaf
    order: Leaf
    first: Leaf = None
    turn: Leaf = None

    @property
    def num_rows(self) -> int:
        return self.order.shape[1]

    @property
    def num_lists(self) -> int:
        return self.start.shape[2 if self.first is None else 1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """The blocks an attention op visits.

    Attributes:
      kv_blocks: For each block of queries, the blocks of keys: forward and dq.
      q_blocks: For each block of keys, the blocks of queries: dk and dv.
      mask: The mask it was built from.
      q_len, kv_len: Lengths of the sequences; the last block of a side may be ragged.
      block_sizes: Tokens a block holds.
      bands: What the mask allows each token, where that is a run of its neighbours; None where nobody knows.
      is_selection: Whether it says which pairs may attend, beside the mask: those of blocks that it leaves out may not.
        Otherwise all that it leaves out the mask does not allow, and it only says where to look.
    """

    kv_blocks: BlockRanges
    q_blocks: BlockRanges
    mask: Mask = dataclasses.field(metadata={"static": True})
    q_len: int = dataclasses.field(metadata={"static": True})
    kv_len: int = dataclasses.field(metadata={"static": True})
    block_sizes: BlockSizes = dataclasses.field(metadata={"static": True})
    bands: Bands | None = None
    is_selection: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def num_lists(self) -> int:
        """How many groups of neighbouring query heads have blocks of their own; 1 where all visit the same."""
        return self.kv_blocks.num_lists

    def visited(self) -> jax.Array:
        """Which blocks of keys each block of queries visits, bool `[B or 1, lists, rows, columns]`; for references."""
        columns = jnp.arange(-(-self.kv_len // self.block_sizes.block_kv))
        start, stop = (x[..., None] for x in (self.kv_blocks.start, self.kv_blocks.stop))
        return ((start <= columns) & (columns < stop)).any(axis=3).swapaxes(1, 2)


def make_schedule(
    mask: Mask,
    tokens: Tokens | None = None,
    *,
    q_len: int,
    kv_len: int,
    block_sizes: BlockSizes | None = None,
) -> Schedule:
    """Builds the schedule of `mask` over `tokens`; traceable, to be called once a step per distinct mask.

    Every tile is judged from the bounds of its blocks, a group of rows at a time, so no `[T, S]` array and no
    `[T / block_q, S / block_kv]` array is ever held.

    Args:
      mask: Which pairs may attend.
      tokens: Positions and segment ids; None means arange and one document.
      q_len: Number of queries T.
      kv_len: Number of keys S.
      block_sizes: Tokens a block; default by platform. Must be what the op is given.
    Returns: A Schedule whose arrays have the batch size of `tokens`, or 1, and a list for each group of heads between
      which the mask differs.
    Raises: ValueError where a length is not positive, or mask, tokens or block_sizes are not what is wanted.
    Cost: O(R T / block_q S / block_kv) elementwise with R ranges a row, peak memory about 40 MB, result
      O(R (T / block_q + S / block_kv)); that for each distinct mask of the heads.
    """
    for name, length in (("q_len", q_len), ("kv_len", kv_len)):
        if length < 1:
            raise ValueError(f"make_schedule: {name}={length}, wanted at least one token")
    check_kind("make_schedule", "mask", mask, Mask, optional=False)
    check_kind("make_schedule", "tokens", tokens, Tokens)
    check_kind("make_schedule", "block_sizes", block_sizes, BlockSizes)
    if tokens is not None:
        num_rows = max((x.shape[0] for x in jax.tree.leaves(tokens) if x.ndim), default=1)
        validate_tokens("make_schedule", tokens, num_rows, q_len, kv_len)
    sizes = block_sizes or block_sizes_lib.BLOCKWISE_ATTENTION[dispatch.current_platform()]
    sizes = sizes.fit(q_len, kv_len)
    tokens = tokens or Tokens()
    masks = mask.by_head(mask.head_groups)
    distinct = {one: _lists_of(one, tokens, q_len, kv_len, sizes) for one in dict.fromkeys(masks)}
    kv_blocks, q_blocks = (_side_by_side([distinct[one][side] for one in masks]) for side in range(2))
    return Schedule(
        kv_blocks=kv_blocks,
        q_blocks=q_blocks,
        mask=mask,
        q_len=q_len,
        kv_len=kv_len,
        block_sizes=sizes,
        bands=make_bands(mask, tokens, q_len=q_len, kv_len=kv_len),
    )


@functools.lru_cache(maxsize=16)
def static_schedule(mask: Mask, q_len: int, kv_len: int, block_sizes: BlockSizes) -> Schedule:
    """The schedule of `mask` over tokens in order, as constants: a program that uses it builds nothing when it runs.

    May be called while a program is being traced, for devices that are not there too, and from several threads.

    Args:
      mask: Which pairs may attend.
      q_len: Number of queries T.
      kv_len: Number of keys S.
      block_sizes: Tokens a block.
    Returns: What `make_schedule` returns with tokens=None, its arrays NumPy's, read-only and of batch size 1.
    Raises: as `make_schedule`.
    Cost: that of `make_schedule` and of compiling it, on the process's default device: on a CPU 0.3 s, at 1M tokens in
      blocks of 128 0.7 s; nothing when one of the last few, which are kept, is asked for again.
    """

    def build() -> Schedule:
        make = functools.partial(make_schedule, mask, q_len=q_len, kv_len=kv_len, block_sizes=block_sizes)
        return jax.device_get(jax.jit(make)())

    # What the caller traces and the mesh in its scope, whose devices may exist for the compiler only, are its thread's:
    # another thread has neither. `jax.ensure_compile_time_eval` leaves the trace, but neither the mesh nor a shard_map.
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(build).result()


def num_ranges(mask: Mask, q_len: int, kv_len: int, block_sizes: BlockSizes) -> tuple[int, int]:
    """How many ranges a row of `kv_blocks` and a row of `q_blocks` have."""
    # A gap in the keys of one query leaves a block out where it is as long as that. The queries of a block share a row,
    # and each next one may move the gap by one.
    gap = block_sizes.block_q + block_sizes.block_kv - 1
    num_q_blocks, num_kv_blocks = -(-q_len // block_sizes.block_q), -(-kv_len // block_sizes.block_kv)

    def of_side(num_rows: int, num_columns: int, length: int) -> int:
        # Between two ranges there is a block.
        most = min((num_columns + 1) // 2, max(1, _MAX_RANGES_OF_ALL_ROWS // num_rows))
        return min(mask.num_runs(length, gap), most)

    return of_side(num_q_blocks, num_kv_blocks, kv_len), of_side(num_kv_blocks, num_q_blocks, q_len)


class Walk(NamedTuple):
    """One walk for all rows and heads of a batch: the blocks of keys that each block of queries visits for any of them.

    Attributes:
      block_sizes: Tokens a block holds.
      start, stop: Half-open ranges of blocks, int32 `[blocks of queries, ranges]`; those of a row are in order and
        disjoint, and where start >= stop there is nothing to visit.
    """

    block_sizes: BlockSizes
    start: jax.Array
    stop: jax.Array


def merged_walk(schedule: Schedule, *, merge_q: int = 1, merge_kv: int = 1) -> Walk:
    """The walk over the forward direction of `schedule`, with as many of its blocks as asked made one.

    Range r covers range r of every row that it is made of, less what the ranges before it cover. So all that they visit
    is visited, nothing twice, and beside that what lies between their r-th ranges.

    Args:
      schedule: Of any batch size and number of lists; its rows of a batch, and its lists, become one too.
      merge_q, merge_kv: How many blocks of queries, and of keys, become one; the last may be made of fewer.
    Cost: O(B T / block_q R log R) with R ranges a row.
    """
    blocks = schedule.block_sizes
    tiles = BlockSizes(block_q=merge_q * blocks.block_q, block_kv=merge_kv * blocks.block_kv)

    def grouped(x):
        """`[B or 1, rows, ranges]` to `[merged rows, what each is made of, ranges]`; missing rows visit nothing."""
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % merge_q), (0, 0)))
        batch_size, num_rows, num_ranges = x.shape
        x = x.reshape(batch_size, num_rows // merge_q, merge_q, num_ranges).swapaxes(0, 1)
        return x.reshape(-1, batch_size * merge_q, num_ranges)

    start, stop = (grouped(x) for x in _of_all_lists(schedule.kv_blocks))
    none = jnp.iinfo(jnp.int32).max
    first = jnp.min(jnp.where(start < stop, start // merge_kv, none), axis=1)
    covered = jax.lax.cummax(jnp.max(jnp.where(start < stop, -(-stop // merge_kv), 0), axis=1), axis=1)
    first = first.at[:, 1:].max(covered[:, :-1])
    # Ranges of small blocks may be more than there are merged blocks. Those that came out empty go last.
    most = -(-schedule.kv_len // tiles.block_kv)
    start, stop = (jnp.sort(jnp.where(first < covered, x, none), axis=1)[:, :most] for x in (first, covered))
    return Walk(tiles.fit(schedule.q_len, schedule.kv_len), start, stop)


def _of_all_lists(ranges: BlockRanges) -> tuple[jax.Array, jax.Array]:
    """Start and stop, `[B or 1, rows, ranges]`, of ranges that have of each row what any of its lists has."""
    start, stop = ranges.start, ranges.stop
    if ranges.num_lists == 1:
        return start[:, :, 0], stop[:, :, 0]
    start, stop = (x.reshape(*x.shape[:2], -1) for x in (start, stop))
    start, stop = jax.lax.sort((start, stop), num_keys=1)
    # Less what those that begin earlier have already.
    reached = jax.lax.cummax(stop, axis=2)
    return start.at[:, :, 1:].max(reached[:, :, :-1]), stop


def _lists_of(
    mask: Mask, tokens: Tokens, q_len: int, kv_len: int, sizes: BlockSizes
) -> tuple[BlockRanges, BlockRanges]:
    """`kv_blocks` and `q_blocks` of a mask that all heads share."""
    q, kv = sides_of(mask, tokens, q_len, kv_len, sizes)
    num_q_blocks, num_kv_blocks = q.whole.shape[1], kv.whole.shape[1]

    def verdict_of_q_rows(q_rows: Blocks) -> TileVerdict:
        return judge(mask, _outer(q_rows, rows=True), _outer(kv, rows=False))

    def verdict_of_kv_rows(kv_rows: Blocks) -> TileVerdict:
        return judge(mask, _outer(q, rows=False), _outer(kv_rows, rows=True))

    kv_ranges, q_ranges = num_ranges(mask, q_len, kv_len, sizes)
    return (
        _ranges(verdict_of_q_rows, q, num_columns=num_kv_blocks, num_ranges=kv_ranges),
        _ranges(verdict_of_kv_rows, kv, num_columns=num_q_blocks, num_ranges=q_ranges),
    )


def _side_by_side(lists: list[BlockRanges]) -> BlockRanges:
    """One for all lists, filled up with empty ranges behind their last."""
    most = max(one.start.shape[3] for one in lists)

    def filled(one: BlockRanges) -> BlockRanges:
        def fill(x):
            return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, most - x.shape[3])))

        ranges = {name: fill(getattr(one, name)) for name in _Ranges._fields}
        return BlockRanges(**ranges, order=one.order)

    return jax.tree.map(lambda *x: jnp.concatenate(x, axis=2), *map(filled, lists)) if len(lists) > 1 else lists[0]


class Blocks(NamedTuple):
    """The blocks of one side, every array `[B or 1, blocks]`; under a mask within documents, of all but padding.

    Attributes:
      bounds: Bounds of each block.
      first_position: The least position among the tokens of the least segment.
      last_position: The greatest position among the tokens of the greatest segment.
      occupied: Whether the block has any token.
      whole: Whether nothing was left out of the block.
    """

    bounds: Bounds
    first_position: jax.Array
    last_position: jax.Array
    occupied: jax.Array
    whole: jax.Array


def sides_of(mask: Mask, tokens: Tokens, q_len: int, kv_len: int, sizes: BlockSizes) -> tuple[Blocks, Blocks]:
    """The blocks of queries, and those of keys."""
    q = _blocks(tokens.queries(q_len), sizes.block_q, mask)
    kv = _blocks(tokens.keys(kv_len), sizes.block_kv, mask)
    # The pair test is also what keeps a ragged last block's missing keys out, so that block is never full. Missing
    # queries need no such care: their rows are dropped, and their cotangents are zero.
    return q, kv._replace(whole=kv.whole & (jnp.arange(kv.whole.shape[1]) < kv_len // sizes.block_kv))


def _blocks(axis: TokenAxis, block: int, mask: Mask) -> Blocks:
    positions, segments = jnp.broadcast_arrays(*(_split(x, block) for x in axis))
    counts = segments >= 0 if mask.within_documents else jnp.ones_like(segments, bool)
    least, greatest = jnp.iinfo(jnp.int32).min, jnp.iinfo(jnp.int32).max

    def min_where(condition, x):
        return jnp.min(jnp.where(condition, x, greatest), axis=-1)

    def max_where(condition, x):
        return jnp.max(jnp.where(condition, x, least), axis=-1)

    bounds = Bounds(
        position_min=min_where(counts, positions),
        position_max=max_where(counts, positions),
        segment_min=min_where(counts, segments),
        segment_max=max_where(counts, segments),
    )
    return Blocks(
        bounds=bounds,
        first_position=min_where(counts & (segments == bounds.segment_min[..., None]), positions),
        last_position=max_where(counts & (segments == bounds.segment_max[..., None]), positions),
        occupied=counts.any(axis=-1),
        whole=counts.all(axis=-1),
    )


def _split(x: ArrayLike, block: int) -> jax.Array:
    """`[B or 1, length]` to `[B or 1, blocks, block]`; a ragged last block repeats its last token."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % block)), mode="edge")
    return x.reshape(x.shape[0], -1, block)


def _outer(blocks: Blocks, *, rows: bool) -> Blocks:
    return jax.tree.map(lambda x: x[:, :, None] if rows else x[:, None, :], blocks)


def judge(mask: Mask, q: Blocks, kv: Blocks) -> TileVerdict:
    """The verdict on each tile of `q` rows or columns against `kv` columns or rows."""
    q_bounds, kv_bounds = q.bounds, kv.bounds
    if mask.within_documents:
        # Positions restart in every document, so the bounds of a block that holds the end of one and the start of the
        # next are loose. Two blocks in order share at most one document, the last of one and the first of the other;
        # then only its positions count.
        shared = jnp.maximum(q_bounds.segment_min, kv_bounds.segment_min)
        single = shared == jnp.minimum(q_bounds.segment_max, kv_bounds.segment_max)
        q_bounds, kv_bounds = (_of_document(blocks, shared, single) for blocks in (q, kv))
    some, every = mask.tile(q_bounds, kv_bounds)
    return TileVerdict(some & q.occupied & kv.occupied, every & q.whole & kv.whole)


def _of_document(blocks: Blocks, document: jax.Array, single: jax.Array) -> Bounds:
    """The bounds, with the positions those of `document` where it is the `single` one that counts."""
    bounds = blocks.bounds
    first, last = (single & (document == x) for x in (bounds.segment_min, bounds.segment_max))
    return bounds._replace(
        position_min=jnp.where(first, blocks.first_position, bounds.position_min),
        position_max=jnp.where(last, blocks.last_position, bounds.position_max),
    )


def _ranges(verdict_of_rows: Callable, rows, *, num_columns: int, num_ranges: int) -> BlockRanges:
    """Ranges of every row; `rows` is a tree of `[B or 1, num_rows]`, judged in groups by `verdict_of_rows`."""
    batch_size = max(x.shape[0] for x in jax.tree.leaves(rows))
    num_rows = jax.tree.leaves(rows)[0].shape[1]
    group = max(1, min(num_rows, _MAX_TILES_AT_ONCE // (batch_size * num_columns)))
    num_groups = -(-num_rows // group)

    def grouped(x):
        x = jnp.pad(x, ((0, 0), (0, num_groups * group - num_rows)), mode="edge")
        return x.reshape(x.shape[0], num_groups, group).swapaxes(0, 1)

    def ranges_of_group(row_group) -> _Ranges:
        return _compress(verdict_of_rows(row_group), num_columns, num_ranges)

    ranges = jax.tree.map(
        lambda x: x.swapaxes(0, 1).reshape(x.shape[1], -1, x.shape[3])[:, :num_rows],
        jax.lax.map(ranges_of_group, jax.tree.map(grouped, rows)),
    )
    ranges = jax.tree.map(lambda x: x[:, :, None], ranges)
    return BlockRanges(**ranges._asdict(), order=longest_first(jnp.sum(ranges.stop - ranges.start, axis=-1)))


def longest_first(num_visits: jax.Array) -> jax.Array:
    """`BlockRanges.order`, of how many blocks each row visits, `[B or 1, rows, lists]`."""
    return jnp.argsort(-num_visits, axis=1, stable=True).astype(jnp.int32)


class _Ranges(NamedTuple):
    """The ranges of some rows, as in BlockRanges."""

    start: jax.Array
    stop: jax.Array
    full_start: jax.Array
    full_stop: jax.Array


def _compress(verdict: TileVerdict, num_columns: int, num_ranges: int) -> _Ranges:
    """The ranges of each row, from verdicts `[B or 1, rows, columns]`. A few passes over the tiles for each range."""
    some, every = jnp.broadcast_arrays(*verdict)
    column = jax.lax.broadcasted_iota(jnp.int32, some.shape, some.ndim - 1)
    # Full blocks in a row up to a column: as many as the distance to the last block that is not full.
    full_run = column - jax.lax.cummax(jnp.where(every, -1, column), axis=column.ndim - 1)
    stop_of_all = jnp.max(jnp.where(some, column + 1, 0), axis=-1)

    def first(condition):
        return jnp.min(jnp.where(condition, column, num_columns), axis=-1)

    def range_after(previous_stop, *, last: bool) -> _Ranges:
        inside = column >= previous_stop[..., None]
        start = first(some & inside)
        if last:
            stop = jnp.maximum(start, stop_of_all)
        else:
            stop = first(~some & (column >= start[..., None]))
            inside &= column < stop[..., None]
        run = jnp.where(inside, full_run, 0)
        length, end = jnp.max(run, axis=-1), jnp.argmax(run, axis=-1).astype(jnp.int32) + 1
        full_start = jnp.where(length > 0, end - length, start)
        return _Ranges(start=start, stop=stop, full_start=full_start, full_stop=full_start + length)

    def next_range(previous_stop, _):
        found = range_after(previous_stop, last=False)
        return found.stop, found

    stop, ranges = jax.lax.scan(next_range, jnp.zeros_like(stop_of_all), length=num_ranges - 1)
    last = range_after(stop, last=True)
    return jax.tree.map(lambda x, y: jnp.moveaxis(jnp.concatenate([x, y[None]]), 0, -1), ranges, last)
