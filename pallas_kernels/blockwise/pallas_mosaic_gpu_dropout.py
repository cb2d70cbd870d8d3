"""Dropout in the Hopper kernels: which pairs of a tile are kept, from words of their tokens (../dropout.py)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import ArrayLike

from pallas_kernels.blockwise.pallas_mosaic_gpu_tiles import COLUMN, ROW, columns, rows
from pallas_kernels.blockwise.pallas_mosaic_gpu_walk import row_of_batch
from pallas_kernels.dropout import is_kept
from pallas_kernels.wgmma import ROWS


class Words(NamedTuple):
    """Dropout's words of tokens, uint32, in whole blocks of the schedule.

    Attributes:
      queries: Of each query and head, `[B or 1, N, T]`.
      keys: `[B or 1, S]`.
    """

    queries: Any
    keys: Any


class KeptPairs:
    """Which pairs of 64 rows, a warpgroup's, and of a tile's columns are kept, in a backward kernel."""

    def __init__(
        self,
        words: Words,
        rate: float,
        *,
        batch: ArrayLike,
        head: ArrayLike,
        start: ArrayLike,
        num_columns: int,
        rows_are_queries: bool,
    ):
        """Reads what is of the rows.

        Args:
          head: The query head of the rows, if they are queries.
          start: The first of the rows.
        """
        self.words, self.rate, self.batch = words, rate, batch
        self.shape, self.rows_are_queries = (ROWS, num_columns), rows_are_queries
        self.own = rows(self._read(head, start, of_rows=True), self.shape)

    def of_tile(self, head: ArrayLike, column: ArrayLike) -> jax.Array:
        """Of the tile whose first column has this number, with queries of this head; bool `[64, columns]`."""
        return self.of_columns(self._read(head, column, of_rows=False))

    def of_columns(self, words: jax.Array) -> jax.Array:
        """Of a tile of columns that have these words; bool `[64, columns]`."""
        pair = self.own, columns(words, self.shape)
        return is_kept(self.rate, *(pair if self.rows_are_queries else reversed(pair)))

    def _read(self, head, start, *, of_rows: bool) -> jax.Array:
        length, layout = (self.shape[0], ROW) if of_rows else (self.shape[1], COLUMN)
        of_queries = of_rows == self.rows_are_queries
        array = self.words.queries if of_queries else self.words.keys
        at = (head, pl.ds(start, length)) if of_queries else (pl.ds(start, length),)
        return plgpu.load(array.at[row_of_batch(array, self.batch), *at], layout=layout, optimized=False)


def kept_pairs(words: Words | None, rate: float, **of_rows) -> KeptPairs | None:
    """None where nothing is dropped."""
    return None if words is None else KeptPairs(words, rate, **of_rows)


def dropped(p: jax.Array, dp: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Probabilities, of which those that dropout drops came with a minus, and the gradients of what is left of them."""
    return jnp.abs(p), jnp.where(p > 0, dp, 0.0)
