"""What the Hopper kernels do with a tile in registers: vectors along its rows and columns."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.blockwise.pallas_mosaic_gpu_walk import row_of_batch
from pallas_kernels.wgmma_store import store_rows

MATRIX, ROW, COLUMN = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


class PairTest(NamedTuple):
    """Whether pairs of a tile may attend.

    Attributes:
      allowed: Of a query head, and of positions and segment ids (q, kv, q, kv) as tiles; None for those not read.
      reads: The numbers of those that are. The compiler would search minutes for a layout of vectors nobody reads.
    """

    allowed: Callable[..., jax.Array]
    reads: frozenset[int]


class Words(NamedTuple):
    """Dropout's words of tokens, uint32, in whole blocks of the schedule.

    Attributes:
      first, second: Of each query and head, `[B or 1, N, T]`.
      keys: `[B or 1, S]`.
    """

    first: Any
    second: Any
    keys: Any


def rows(x, shape: tuple[int, ...]) -> jax.Array | None:
    """`[rows]` as `[rows, columns]`; None of None."""
    return None if x is None else lax.broadcast_in_dim(x, shape, [0])


def columns(x, shape: tuple[int, ...]) -> jax.Array | None:
    """`[columns]` as `[rows, columns]`; None of None."""
    return None if x is None else lax.broadcast_in_dim(x, shape, [1])


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


def indices(start, length: int, layout) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, (length,), 0, layout=layout) + start


def zeros(start, length: int, layout) -> jax.Array:
    del start
    return plgpu.layout_cast(jnp.zeros((length,), jnp.int32), layout)


def dropped(p, dp, rate: float) -> tuple[jax.Array, jax.Array]:
    """Probabilities, of which those that dropout drops came with a minus, and the gradients of what is left of them."""
    return jnp.abs(p), jnp.where(p > 0, dp * (1 / (1 - rate)), 0.0)


def store_tile(ref, value, *, interpret: bool) -> None:
    """ref[...] = value of a matmul's rows, in device memory and its dtype."""
    value = value.astype(ref.dtype)
    if interpret:
        ref[...] = value
    elif ref.dtype.itemsize == 2:
        store_rows(ref, value)
    else:
        store_parts_of_sectors(ref, value)


def store_parts_of_sectors(ref, value) -> None:
    """ref[...] = value, in device memory, where a warp's rows are shorter than the 32 bytes that memory moves."""
    if hasattr(plgpu, "store"):  # JAX 0.12 wants to be told, JAX 0.11 has no way to
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value
