"""Which pairs of a tile may attend, in the Hopper kernels: by the mask's pair test, or by the ends of runs.

The pair test reads positions and segment ids of a tile's columns anew for every tile, 16 to 32 loads a thread. Where
`Bands` hold a column is its own number. Whether they do is known when the program runs: a kernel for packed documents
has both tests, and each row of the batch takes the one that is right for it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.bands import Bands
from pallas_kernels.blockwise.pallas_mosaic_gpu_tiles import COLUMN, ROW, columns, indices, rows
from pallas_kernels.blockwise.pallas_mosaic_gpu_walk import row_of_batch
from pallas_kernels.mask import Span
from pallas_kernels.wgmma import ROWS


class PairTest(NamedTuple):
    """Whether pairs of a tile may attend.

    Attributes:
      allowed: Of a query head, and of positions and segment ids (q, kv, q, kv) as tiles; None for those not read.
      reads: The numbers of those that are. The compiler would search minutes for a layout of vectors nobody reads.
    """

    allowed: Callable[..., jax.Array]
    reads: frozenset[int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CallConfig:
    """What is static of a call, whichever of the kernels it is for.

    Attributes:
      scale: Multiplies q.k; positive.
      soft_cap: If given, logits become soft_cap tanh(logits / soft_cap) before the pair test.
      dropout_rate: The share of probabilities that is dropped; 0 where there are no words of tokens.
      block_kv: Tokens of a block of keys.
      kv_len: Number of keys, of which the last block may hold fewer than it has room for.
      pair_test: Of `[64, columns]` pairs of a tile; None where all may attend, of those that are visited.
      span: Bounds on the distance of pairs that may attend (`Mask.span`), where tokens are in order, and a tile can be
        outside them that is visited; else None.
      interpret: Whether to run on a CPU, in JAX's interpreter.
    """

    scale: float
    soft_cap: float | None
    dropout_rate: float
    block_kv: int = 128
    kv_len: int
    pair_test: PairTest | None
    span: Span | None = None
    interpret: Any = None

    @property
    def has_ragged_keys(self) -> bool:
        """Whether the last block of keys is not a whole one."""
        return self.kv_len % self.block_kv != 0

    @property
    def tests_blocks(self) -> bool:
        """Whether blocks may need the pair test, or to have keys left out."""
        return self.pair_test is not None or self.has_ragged_keys


class Band(NamedTuple):
    """Of the tokens that are a kernel's rows, the ends of what they attend to or are attended to by.

    Attributes:
      first, last: As in `Bands`, int32 `[B or 1, length]`.
      in_order: Whether they hold, 1 or 0, int32 `[B or 1]`.
    """

    first: Any
    last: Any
    in_order: Any


def band_of(bands: Bands | None, *, of_queries: bool, padding: int) -> Band | None:
    """Of queries or of keys, and `padding` more that nothing is allowed with."""
    if bands is None:
        return None
    ends = (bands.first_key, bands.last_key) if of_queries else (bands.first_query, bands.last_query)
    first, last = (
        jnp.pad(x, ((0, 0), (0, padding)), constant_values=fill) for x, fill in zip(ends, (1, 0), strict=True)
    )
    return Band(first, last, bands.in_order.astype(jnp.int32))


class Pairs:
    """Which pairs of 64 rows, a warpgroup's, and of a tile's columns may attend.

    Attributes:
      in_order: Whether `in_band` says so of the rows' batch row; None where there is no band.
    """

    def __init__(self, inputs, config: CallConfig, *, batch, start, num_columns: int, rows_are_queries: bool):
        """Reads what is of the rows.

        Args:
          inputs, config: The kernel's.
          start: The first of the rows.
        """
        self.inputs, self.batch, self.start = inputs, batch, start
        self.test, self.span, self.shape = config.pair_test, config.span, (ROWS, num_columns)
        self.rows_are_queries, self.num_keys = rows_are_queries, config.kv_len if config.has_ragged_keys else None
        if self.test is not None:
            self.own = self.vectors((start, ROWS, ROW), of_queries=rows_are_queries)
        self.in_order = None
        if (band := inputs.band) is not None:
            at = row_of_batch(band.first, batch), pl.ds(start, ROWS)
            self.first, self.last = (
                rows(plgpu.load(x.at[at], layout=ROW, optimized=False), self.shape) for x in (band.first, band.last)
            )
            self.in_order = band.in_order[row_of_batch(band.in_order, batch)] != 0

    def vectors(self, at, *, of_queries: bool) -> list:
        sides = {"q": at, "kv": None} if of_queries else {"q": None, "kv": at}
        return token_vectors(self.inputs, self.test, batch=self.batch, **sides)

    def allowed(self, head, column) -> jax.Array | None:
        """Of the tile whose first column has this number, whatever the order of tokens; None for all pairs."""
        bits = None
        if self.test is not None:
            others = self.vectors((column, self.shape[1], COLUMN), of_queries=not self.rows_are_queries)
            pair = (
                columns(y, self.shape) if x is None else rows(x, self.shape)
                for x, y in zip(self.own, others, strict=True)
            )
            bits = self.test.allowed(head, *pair)
        if self.num_keys is not None:
            if self.rows_are_queries:
                keys = columns(indices(column, self.shape[1], COLUMN), self.shape)
            else:
                keys = rows(indices(self.start, ROWS, ROW), self.shape)
            are_keys = keys < self.num_keys
            bits = are_keys if bits is None else bits & are_keys
        return bits

    def holds_none(self, column) -> jax.Array:
        """Whether no pair of the tile whose first column has this number may attend, by the mask's span."""
        own, others = ((x, x + length - 1) for x, length in zip((self.start, column), self.shape, strict=True))
        (first_q, last_q), (first_kv, last_kv) = (own, others) if self.rows_are_queries else (others, own)
        is_empty = jnp.bool(False)
        if self.span.right is not None:
            is_empty |= first_kv - last_q > self.span.right
        if self.span.left is not None:
            is_empty |= first_q - last_kv > self.span.left
        return is_empty

    def in_band(self, column) -> jax.Array:
        """Of the tile whose first column has this number."""
        other = columns(indices(column, self.shape[1], COLUMN), self.shape)
        return (self.first <= other) & (other <= self.last)

    def keep(self, p, head, column) -> jax.Array:
        """p of a tile, 0 where its pairs may not attend."""

        def general(p):
            return jnp.where(self.allowed(head, column), p, 0.0)

        if self.in_order is None:
            return general(p)
        return lax.cond(self.in_order, lambda p: jnp.where(self.in_band(column), p, 0.0), general, p)


def token_vectors(inputs, test: PairTest, *, batch, q: tuple | None, kv: tuple | None) -> list:
    """Positions and segment ids of some queries and keys (q, kv, q, kv), None for those that the test does not read.

    Args:
      inputs: Has the arrays, each `[B or 1, length]`, or None for those of tokens in order of one document.
      q, kv: Where the vector begins, its length and layout; None for none.
    """
    arrays = inputs.q_positions, inputs.kv_positions, inputs.q_segment_ids, inputs.kv_segment_ids

    def vector(i: int, ref, at):
        if at is None or i not in test.reads:
            return None
        start, length, layout = at
        if ref is None:
            return (indices if i < 2 else zeros)(start, length, layout)
        return plgpu.load(ref.at[row_of_batch(ref, batch), pl.ds(start, length)], layout=layout, optimized=False)

    return [vector(i, ref, at) for i, (ref, at) in enumerate(zip(arrays, (q, kv, q, kv), strict=True))]


def zeros(start, length: int, layout) -> jax.Array:
    del start
    return plgpu.layout_cast(jnp.zeros((length,), jnp.int32), layout)
