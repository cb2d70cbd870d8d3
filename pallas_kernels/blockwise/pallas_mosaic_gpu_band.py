"""The pair test of packed documents in the Hopper kernels, where their tokens stand in order: by two bounds a row.

The general test of a tile reads positions and segment ids of all its tokens, those of its columns anew for every tile:
16 to 32 loads a thread, which cost the forward pass of 16 documents 13 %. Where documents stand one behind the other,
what a token of them may attend to under a window or a causal mask is a run of neighbours. Its two ends are looked up
once for each row, and a column is its own number. Whether tokens are in order is known when the program runs; a kernel
has both tests, and each row of the batch takes the one that is right for it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.blockwise.pallas_mosaic_gpu_tiles import COLUMN, ROW, columns, indices, rows
from pallas_kernels.blockwise.pallas_mosaic_gpu_walk import row_of_batch
from pallas_kernels.dispatch import current_platform
from pallas_kernels.mask import And, Causal, Mask, SameDocument, Window
from pallas_kernels.tokens import Tokens
from pallas_kernels.wgmma import ROWS

_LAST_ID = jnp.iinfo(jnp.int32).max


class Band(NamedTuple):
    """Of the tokens that are a kernel's rows, queries or keys, the tokens of the other side that they are allowed with.

    Attributes:
      first, last: The ends of the run of neighbours, counted over the sequence, int32 `[B or 1, length]`; of what is
        padding none, first > last.
      in_order: Whether they say what the mask does: 1 or 0, int32 `[B or 1]`.
    """

    first: Any
    last: Any
    in_order: Any


def make_band(mask: Mask, tokens: Tokens, q_len: int, kv_len: int, *, of_queries: bool, padding: int) -> Band | None:
    """The band of queries or of keys, `padding` tokens longer; None where the mask is no band within documents, or
    queries and keys are not the same tokens whatever these are.

    Cost: O(T log T), and nothing of it depends on q, k and v: layers that have their tokens in common share it.
    """
    if q_len != kv_len or tokens.q_segment_ids is None or tokens.kv_segment_ids is None or not _is_band(mask):
        return None
    ids, positions = _ids(tokens.q_segment_ids), tokens.queries(q_len).positions
    in_order = (ids[:, 1:] > ids[:, :-1]) | (ids[:, 1:] == _LAST_ID)
    in_order |= (ids[:, 1:] == ids[:, :-1]) & (positions[:, 1:] == positions[:, :-1] + 1)
    in_order = jnp.all(in_order, axis=1)
    for x, y in ((tokens.q_segment_ids, tokens.kv_segment_ids), (positions, tokens.keys(kv_len).positions)):
        if x is not y:
            in_order &= jnp.all(x == y, axis=1)
    first, end = (jax.vmap(_search(side))(ids, ids).astype(jnp.int32) for side in ("left", "right"))
    left, right = mask.span if of_queries else mask.span[::-1]
    token = jnp.arange(q_len, dtype=jnp.int32)
    if left is not None:
        first = jnp.maximum(first, token - left)
    last = end - 1 if right is None else jnp.minimum(end - 1, token + right)
    first, last = jnp.where(ids == _LAST_ID, 1, first), jnp.where(ids == _LAST_ID, 0, last)
    first, last = (jnp.pad(x, ((0, 0), (0, padding)), constant_values=fill) for x, fill in ((first, 1), (last, 0)))
    return Band(first, last, in_order.astype(jnp.int32))


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


def _is_band(mask: Mask) -> bool:
    """Whether it is documents, and nothing but distances beside them."""

    def parts(mask: Mask) -> list[Mask]:
        return [*parts(mask.left), *parts(mask.right)] if isinstance(mask, And) else [mask]

    return mask.uses_segments and all(isinstance(part, (Causal, Window, SameDocument)) for part in parts(mask))


def _ids(segment_ids: jax.Array) -> jax.Array:
    """With padding's behind all others: that is where it stands, if anywhere."""
    return jnp.where(segment_ids < 0, _LAST_ID, segment_ids)


def _search(side: str) -> Callable:
    # An iteration of a loop costs a GPU more than what a step of the search does.
    method = "scan_unrolled" if current_platform() == "gpu" else "scan"
    return functools.partial(jnp.searchsorted, side=side, method=method)
