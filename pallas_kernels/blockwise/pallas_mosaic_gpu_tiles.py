"""What the Hopper kernels do with a tile in registers: vectors along its rows and columns."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import store_registers
from pallas_kernels.wgmma_store import store_rows

MATRIX, ROW, COLUMN = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


def rows(x, shape: tuple[int, ...]) -> jax.Array | None:
    """`[rows]` as `[rows, columns]`; None of None."""
    return None if x is None else lax.broadcast_in_dim(x, shape, [0])


def columns(x, shape: tuple[int, ...]) -> jax.Array | None:
    """`[columns]` as `[rows, columns]`; None of None."""
    return None if x is None else lax.broadcast_in_dim(x, shape, [1])


def indices(start, length: int, layout) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, (length,), 0, layout=layout) + start


def store_tile(ref, value, *, interpret: bool) -> None:
    """ref[...] = value of a matmul's rows, in device memory and its dtype."""
    value = value.astype(ref.dtype)
    if interpret:
        ref[...] = value
    elif ref.dtype.itemsize == 2:
        store_rows(ref, value)
    else:
        store_registers(ref, value)
