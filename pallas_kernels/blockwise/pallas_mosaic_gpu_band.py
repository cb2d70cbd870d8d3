"""The pair test of packed documents in the Hopper kernels, where their tokens stand in order: by two bounds a row.

The general test reads positions and segment ids of a tile's columns anew for every tile, 16 to 32 loads a thread. By
`Bands` a column is its own number. Whether they hold is known when the program runs: a kernel has both tests, and each
row of the batch takes the one that is right for it.
"""

import functools
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
from pallas_kernels.wgmma import ROWS


class Band(NamedTuple):
    """Of the tokens that are a kernel's rows, the ends of what they attend to or are attended to by.

    Attributes:
      first, last: int32 `[B or 1, length]`.
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


class BandTest(NamedTuple):
    """Of 64 rows: whether their batch row's tokens are in order, and allowed(the number of a tile's first column)."""

    in_order: Any
    allowed: Callable


def band_test(band: Band | None, *, batch, start, num_columns: int) -> BandTest | None:
    """That of the rows from `start` on; None without a band."""
    if band is None:
        return None
    shape = ROWS, num_columns
    at = row_of_batch(band.first, batch), pl.ds(start, ROWS)
    first, last = (rows(plgpu.load(x.at[at], layout=ROW, optimized=False), shape) for x in (band.first, band.last))

    def allowed(column) -> jax.Array:
        other = columns(indices(column, num_columns, COLUMN), shape)
        return (first <= other) & (other <= last)

    return BandTest(band.in_order[row_of_batch(band.in_order, batch)] != 0, allowed)


def keep_allowed(p, test: BandTest | None, column, general: Callable) -> jax.Array:
    """p of a tile, 0 where its pairs may not attend; `general()` says which may, whatever the order of tokens."""

    def by(bits_of: Callable) -> Callable:
        return lambda p: jnp.where(bits_of(), p, 0.0)

    if test is None:
        return by(general)(p)
    return lax.cond(test.in_order, by(functools.partial(test.allowed, column)), by(general), p)
