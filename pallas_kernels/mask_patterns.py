"""Sparse patterns as masks: global tokens, strides, chunks, powers of two, block tables, your own rules.

All of them read positions, which restart in every document of a packed row, so each pattern starts afresh with the
document; add `& SameDocument()` to keep it there.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from pallas_kernels.mask import Bounds, Mask, Span, TileVerdict, gap_between_blocks


@dataclasses.dataclass(frozen=True)
class GlobalQueries(Mask):
    """Queries at positions < length may attend to any key; with Prefix(length), the global tokens of Longformer.

    Reference: Beltagy, Peters and Cohan, Longformer, arXiv:2004.05150, section 3.1; Zaheer et al., Big Bird,
    arXiv:2007.14062, section 2.
    """

    length: int

    def __post_init__(self):
        _check_at_least("GlobalQueries", 0, length=self.length)

    def allowed(self, q_positions, kv_positions, q_segment_ids, kv_segment_ids):
        return (q_positions < self.length) & _true_like(kv_positions)

    def tile(self, q, kv):
        keys = _true_like(kv.position_min)
        return TileVerdict(some=(q.position_min < self.length) & keys, all=(q.position_max < self.length) & keys)


@dataclasses.dataclass(frozen=True)
class Strided(Mask):
    """Positions in blocks of `block`: a query may attend to keys whose block is a multiple of `stride` blocks away.

    (t // block - s // block) % stride == 0. With block = 1 that is every stride-th token, before and after.

    Reference: Child et al., Generating Long Sequences with Sparse Transformers, arXiv:1904.10509, section 4.3.
    """

    stride: int
    block: int = 1

    def __post_init__(self):
        _check_at_least("Strided", 1, stride=self.stride, block=self.block)

    def num_runs(self, length, gap):
        return _periodic_runs(length, gap, period=self.stride * self.block, run=self.block)

    def allowed(self, q_positions, kv_positions, q_segment_ids, kv_segment_ids):
        return (q_positions // self.block - kv_positions // self.block) % self.stride == 0

    def tile(self, q, kv):
        least, greatest = _block_distances(q, kv, self.block)
        return TileVerdict(
            some=greatest // self.stride * self.stride >= least,
            all=(least % self.stride == 0) & ((least == greatest) | (self.stride == 1)),
        )


@dataclasses.dataclass(frozen=True)
class Summary(Mask):
    """Any query may attend to the keys at the last `num` positions of every `period`.

    s % period >= period - num: the columns of the fixed pattern of Sparse Transformers.

    Reference: Child et al., Generating Long Sequences with Sparse Transformers, arXiv:1904.10509, section 4.3.
    """

    period: int
    num: int = 1

    def __post_init__(self):
        _check_at_least("Summary", 1, period=self.period, num=self.num)
        if self.num > self.period:
            raise ValueError(f"Summary: num={self.num}, wanted at most period={self.period}")

    def num_runs(self, length, gap):
        return _periodic_runs(length, gap, period=self.period, run=self.num)

    def allowed(self, q_positions, kv_positions, q_segment_ids, kv_segment_ids):
        return (kv_positions % self.period >= self.period - self.num) & _true_like(q_positions)

    def tile(self, q, kv):
        return _periodic_keys(q, kv, period=self.period, num=self.num, first=self.period - self.num)


@dataclasses.dataclass(frozen=True)
class StridedKeys(Mask):
    """Positions in blocks of `block`: any query may attend to every stride-th block of keys, counted from `offset`.

    (s // block) % stride == offset. The columns do not move with the query, unlike those of Strided.

    Reference: Lin et al., S2-Attention, arXiv:2407.17678, where `offset` differs between heads.
    """

    stride: int
    block: int = 1
    offset: int = 0

    def __post_init__(self):
        _check_at_least("StridedKeys", 1, stride=self.stride, block=self.block)
        if not 0 <= self.offset < self.stride:
            raise ValueError(f"StridedKeys: offset={self.offset}, wanted a number >= 0 and < stride={self.stride}")

    def num_runs(self, length, gap):
        return _periodic_runs(length, gap, period=self.stride * self.block, run=self.block)

    def allowed(self, q_positions, kv_positions, q_segment_ids, kv_segment_ids):
        return (kv_positions // self.block % self.stride == self.offset) & _true_like(q_positions)

    def tile(self, q, kv):
        period = self.stride * self.block
        return _periodic_keys(q, kv, period=period, num=self.block, first=self.offset * self.block)


@dataclasses.dataclass(frozen=True)
class PowersOfTwo(Mask):
    """Positions in blocks of `block`: a query may attend to its own block and those 1, 2, 4, 8, ... blocks before it.

    Reference: Chen et al., PowerAttention, arXiv:2503.03588.
    """

    block: int = 1

    def __post_init__(self):
        _check_at_least("PowersOfTwo", 1, block=self.block)

    @property
    def span(self):
        return Span(None, self.block - 1)

    def num_runs(self, length, gap):
        runs, distance, apart = 1, 1, gap_between_blocks(gap, self.block)
        while 2 * distance * self.block < length:
            runs += (distance - 1) * self.block >= apart  # between this distance and the next
            distance *= 2
        return runs

    def allowed(self, q_positions, kv_positions, q_segment_ids, kv_segment_ids):
        distance = q_positions // self.block - kv_positions // self.block
        return (distance & (distance - 1)) == 0  # of 0 and of powers of two, and of no negative number

    def tile(self, q, kv):
        least, greatest = _block_distances(q, kv, self.block)
        power = jnp.maximum(greatest, 0)
        for shift in (1, 2, 4, 8, 16):
            power |= power >> shift
        power -= power >> 1  # the last power of two that is no greater, or 0
        return TileVerdict(
            some=(greatest >= 0) & (power >= least),
            # Neighbouring numbers that all are powers of two, or 0, are 0, 1 and 2, or one alone.
            all=(least >= 0) & ((greatest <= 2) | ((least == greatest) & (power == least))),
        )


@dataclasses.dataclass(frozen=True)
class BlockWindow(Mask):
    """Positions in blocks of `block`: a query may attend to whole blocks, from `left` before its own to `right` after.

    -right <= t // block - s // block <= left. If `block` is a multiple of the op's block sizes no pair needs testing.
    """

    left: int
    right: int = 0
    block: int = 1

    def __post_init__(self):
        _check_at_least("BlockWindow", 0, left=self.left, right=self.right)
        _check_at_least("BlockWindow", 1, block=self.block)

    @property
    def span(self):
        return Span((self.left + 1) * self.block - 1, (self.right + 1) * self.block - 1)

    def allowed(self, q_positions, kv_positions, q_segment_ids, kv_segment_ids):
        distance = q_positions // self.block - kv_positions // self.block
        return (distance >= -self.right) & (distance <= self.left)

    def tile(self, q, kv):
        least, greatest = _block_distances(q, kv, self.block)
        return TileVerdict(
            some=(greatest >= -self.right) & (least <= self.left),
            all=(least >= -self.right) & (greatest <= self.left),
        )


@dataclasses.dataclass(frozen=True)
class Chunked(Mask):
    """A query may attend to keys of its own chunk of `size` positions: block-diagonal, in squares of `size`."""

    size: int

    def __post_init__(self):
        _check_at_least("Chunked", 1, size=self.size)

    @property
    def span(self):
        return Span(self.size - 1, self.size - 1)

    def allowed(self, q_positions, kv_positions, q_segment_ids, kv_segment_ids):
        return q_positions // self.size == kv_positions // self.size

    def tile(self, q, kv):
        q_first, q_last = q.position_min // self.size, q.position_max // self.size
        kv_first, kv_last = kv.position_min // self.size, kv.position_max // self.size
        return TileVerdict(
            some=(q_first <= kv_last) & (kv_first <= q_last),
            all=(q_first == q_last) & (kv_first == kv_last) & (q_first == kv_first),
        )


@dataclasses.dataclass(frozen=True)
class Table(Mask):
    """A fixed pattern of blocks: a query at t may attend to a key at s where `blocks[t // block_q, s // block_kv]`.

    Positions beyond the table take part in no pair. The table is part of the program, as are its sums over rectangles,
    from which a verdict on a tile is exact: 5 bytes a block. Two tables are equal where their contents are.

    Attributes:
      blocks: Bool, `[rows, columns]`; copied.
      block_q, block_kv: Positions that a row and a column stand for.
    """

    blocks: np.ndarray = dataclasses.field(compare=False, repr=False)
    block_q: int = 1
    block_kv: int = 1
    shape: tuple[int, ...] = dataclasses.field(init=False)
    digest: str = dataclasses.field(init=False)

    def __post_init__(self):
        _check_at_least("Table", 1, block_q=self.block_q, block_kv=self.block_kv)
        if self.blocks.ndim != 2 or self.blocks.dtype != bool or not self.blocks.size:
            raise ValueError(
                f"Table: blocks is {self.blocks.dtype}{list(self.blocks.shape)}, wanted bool[rows, columns], none of "
                "them 0; compare with > 0 or the like"
            )
        blocks = self.blocks.copy()
        blocks.flags.writeable = False
        object.__setattr__(self, "blocks", blocks)
        object.__setattr__(self, "shape", blocks.shape)
        object.__setattr__(self, "digest", hashlib.sha256(np.packbits(blocks)).hexdigest())

    def num_runs(self, length, gap):
        return max(_most_runs(self.blocks), _most_runs(self.blocks.T))

    def allowed(self, q_positions, kv_positions, q_segment_ids, kv_segment_ids):
        row, column = q_positions // self.block_q, kv_positions // self.block_kv
        rows, columns = self.shape
        inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
        return inside & jnp.asarray(self.blocks)[jnp.clip(row, 0, rows - 1), jnp.clip(column, 0, columns - 1)]

    def tile(self, q, kv):
        row, row_end = q.position_min // self.block_q, q.position_max // self.block_q + 1
        column, column_end = kv.position_min // self.block_kv, kv.position_max // self.block_kv + 1
        num_allowed = self._sum_before(row_end, column_end) + self._sum_before(row, column)
        num_allowed -= self._sum_before(row, column_end) + self._sum_before(row_end, column)
        return TileVerdict(num_allowed > 0, num_allowed == (row_end - row) * (column_end - column))

    def _sum_before(self, row: ArrayLike, column: ArrayLike) -> jax.Array:
        """How many blocks are allowed in rows < row and columns < column."""
        rows, columns = self.shape
        return jnp.asarray(self._sums)[jnp.clip(row, 0, rows), jnp.clip(column, 0, columns)]

    @functools.cached_property
    def _sums(self) -> np.ndarray:
        sums = np.cumsum(np.cumsum(self.blocks, axis=0, dtype=np.int32), axis=1, dtype=np.int32)
        return np.pad(sums, ((1, 0), (1, 0)))


@dataclasses.dataclass(frozen=True)
class Predicate(Mask):
    """A rule of your own.

    It is compared by identity of its functions: define them once, at module level, or each call compiles anew.

    Attributes:
      pair: `pair(q_positions, kv_positions, q_segment_ids, kv_segment_ids)`, int32 arrays that broadcast; returns bool.
      tile_rule: `tile_rule(q, kv)` of two Bounds; returns (some, all) of the tile, as TileVerdict explains. None visits
        every block and tests every pair: right, and as slow as no mask.
      uses_segments: Whether `pair` reads the segment ids.
    """

    pair: Callable[[ArrayLike, ArrayLike, ArrayLike, ArrayLike], ArrayLike]
    tile_rule: Callable[[Bounds, Bounds], tuple[ArrayLike, ArrayLike]] | None = None
    uses_segments: bool = False

    def num_runs(self, length, gap):
        return 1 if self.tile_rule is None else 4  # which is anyone's guess

    def allowed(self, *pair):
        return self.pair(*pair)

    def tile(self, q, kv):
        if self.tile_rule is not None:
            return TileVerdict(*self.tile_rule(q, kv))
        unsure = _true_like(q.position_min) & _true_like(kv.position_min)
        return TileVerdict(some=unsure, all=~unsure)


def _periodic_runs(length: int, gap: int, *, period: int, run: int) -> int:
    return -(-length // period) if period - run >= gap_between_blocks(gap, math.gcd(period, run)) else 1


def _periodic_keys(q: Bounds, kv: Bounds, *, period: int, num: int, first: int) -> TileVerdict:
    """The verdict on a tile where any query may attend to the keys at `first` ... `first + num - 1` of every period."""
    queries = _true_like(q.position_min)
    since_start = (kv.position_min - first) % period  # of the run of such keys before or at the first key
    next_one = jnp.where(since_start < num, kv.position_min, kv.position_min - since_start + period)
    within_a_run = since_start + (kv.position_max - kv.position_min) < num
    return TileVerdict(
        some=(next_one <= kv.position_max) & queries,
        all=(within_a_run | (num == period)) & queries,
    )


def _block_distances(q: Bounds, kv: Bounds, block: int) -> tuple[ArrayLike, ArrayLike]:
    """The least and the greatest distance from a key to a query of the tile, in blocks."""
    return q.position_min // block - kv.position_max // block, q.position_max // block - kv.position_min // block


def _most_runs(blocks: np.ndarray) -> int:
    """The greatest number of runs of True in a row."""
    starts = blocks & ~np.pad(blocks, ((0, 0), (1, 0)))[:, :-1]
    return int(starts.sum(axis=1).max())


def _true_like(x: ArrayLike) -> jax.Array:
    return jnp.ones(jnp.shape(x), bool)


def _check_at_least(mask: str, least: int, **numbers: int) -> None:
    for name, value in numbers.items():
        if value < least:
            raise ValueError(f"{mask}: {name}={value}, wanted a number >= {least}")
